"""ONNX Runtime on CPU: uint8 x int8 kernels, attention whole, and forms that its own fusions do not undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import onnx_ir as ir
import onnxruntime as ort
from torch import Tensor

from graphopt.backends.onnx_target import OnnxTarget
from graphopt.backends.onnxruntime import (
    asymmetric_weights,
    attention,
    cached_attention,
    conv_int8,
    conv_int8_few_channels,
    gelu,
    linear,
    linear_int8,
    lstm,
    merged_linears,
    qlinear,
    rotary,
    saturation,
    skip_layer_norm,
    weight_only,
)
from graphopt.backends.onnxruntime.guards import guarded
from graphopt.backends.onnxruntime.kernel_counts import require_kernels
from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.kernels import without_kernel
from graphopt.dialects.onnx.opset import refused
from graphopt.ir.graph import Graph
from graphopt.ir.qdq.regions import STORED
from graphopt.ir.rewrite import Choice, Rule, RuleLog
from graphopt.lowering.backend import Chooser, Runner
from graphopt.lowering.timed_forms import TimedChooser


class OnnxRuntime(OnnxTarget):
    """Microsoft's engine, on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX Runtime on CPU; exports a standard .onnx file"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "linear": ("static", "dynamic", "weight-only"),
        "conv": ("static",),
        "add": ("static",),
        "embedding": ("weight-only",),
        "lstm": ("dynamic", "weight-only"),
        **dict.fromkeys(STORED[1:], ("weight-only",)),
        **dict.fromkeys(qlinear.QLINEAR, ("static",)),
    }
    floats: ClassVar[tuple[str, ...]] = ("float16",)
    """Stored so, and computed in float32 between casts: files are smaller, not faster."""
    granularities: ClassVar[tuple[str, ...]] = ("tensor", "row")
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "linear": (8, 4, 2), "embedding": (8, 4), **dict.fromkeys(STORED, (8,)),
    }  # fmt: skip
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}
    """Floats in a register of AVX-512: blocked convolutions pad channels to it, and GEMM tiles are multiples of it."""
    zeros: str = (
        "sparse initializers are made dense at load, and no CPU kernel skips zeros: a file is smaller once compressed, "
        "no more"
    )

    def pipeline(self) -> str:
        return "fold-int8"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        saturates = self.saturates()
        return (
            # floats
            rotary.BEFORE_SPLIT,
            (skip_layer_norm.RESIDUAL, skip_layer_norm.RMS_RESIDUAL, *attention.ATTENTION_3D),
            (cached_attention.FORMS,),
            (attention.FORMS,),
            (rotary.ANGLES_ONCE,),
            (attention.FLOAT_MASK_ONCE,),
            (merged_linears.FLOAT, merged_linears.INT8),
            (linear.BIAS, gelu.TANH),
            # int8
            (lstm.DYNAMIC,),
            (linear_int8.TO_INTEGERS,),
            (linear_int8.DYNAMIC, linear_int8.STATIC, linear_int8.ROWS),
            (linear_int8.QUANTIZE_ROWS, linear_int8.ROW_SCALE),
            (conv_int8.PADDING,),
            (conv_int8_few_channels.FEW_CHANNELS,),
            (conv_int8.SMALL,),
            (conv_int8.PLAIN, linear_int8.TO_FLOAT, *qlinear.in_integers(not saturates), onnx_export.DYNAMIC_QUANTIZE),
            (qlinear.in_floats(not saturates),),
            # stored weights
            (merged_linears.WEIGHT_ONLY,),
            (*asymmetric_weights.RULES, weight_only.LINEAR, weight_only.EMBEDDING),
            (*weight_only.STORED,),
            weight_only.FOLDED,
            saturation.RULES if saturates else (),
        )

    def loading(self, file: str, threads: int | None = None) -> Mapping[str, Any]:
        options = {} if threads is None else {"intra_op_num_threads": threads}
        made = "options = onnxruntime.SessionOptions(); "
        made += "".join(f"options.{name} = {value}; " for name, value in options.items())
        call = f"onnxruntime.InferenceSession({file!r}, options, providers=['CPUExecutionProvider'])"
        return {"engine": self.engine(), "session_options": options, "providers": ["CPUExecutionProvider"],
                "python": made + call}  # fmt: skip

    def lower(
        self, graph: Graph, chooser: Chooser | None = None, *, lossless: bool = False
    ) -> tuple[Graph, dict[str, RuleLog]]:
        lowered, logs = super().lower(graph, chooser, lossless=lossless)
        assert isinstance(lowered, OnnxGraph)
        cached_attention.fill_in_place(lowered)
        return lowered, logs

    def engine(self) -> str:
        return f"onnxruntime {ort.__version__}"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> TimedChooser:
        return TimedChooser(self.engine(), feeds, partial(self.compile, threads=threads), threads)

    def deployable(self, graph: OnnxGraph, opset: int | None = None) -> ir.Model:
        model = onnx_export.deployable(guarded(graph), opset)
        if opset is not None and (lacking := without_kernel(model)):
            raise refused(lacking[0], f"onnxruntime has no kernel for {lacking[0].op_type} of opset {opset}")
        return model

    def compile(self, graph: Graph, threads: int | None = None) -> OrtRunner:
        assert isinstance(graph, OnnxGraph)
        return OrtRunner(graph, threads)

    def check(self, folded: Graph, runner: Runner) -> None:
        require_kernels(folded, runner)
