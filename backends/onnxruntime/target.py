"""ONNX Runtime on CPU: uint8 x int8 kernels, attention whole, and forms that its own fusions do not undo."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import ClassVar

import onnx
import onnxruntime as ort
from torch import Tensor

from graphopt.backends.onnx_target import OnnxTarget
from graphopt.backends.onnxruntime import (
    conv as onnxruntime_conv,
)
from graphopt.backends.onnxruntime import (
    floats as onnxruntime_float,
)
from graphopt.backends.onnxruntime import (
    int8 as onnxruntime_int8,
)
from graphopt.backends.onnxruntime import (
    unsigned as onnxruntime_unsigned,
)
from graphopt.backends.onnxruntime import (
    weights as onnxruntime_weights,
)
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError, first_line
from graphopt.ir.graph import Graph, Node
from graphopt.ir.rewrite import Choice, Rule
from graphopt.lowering.backend import Runner
from graphopt.lowering.choices import TimedChooser

INT8_KERNELS = {
    "linear_int8": ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "MatMulNBits", "QAttention"),
    "conv_int8": ("QLinearConv",),
    "add_int8": ("QLinearAdd",),
    **{op: (kernel,) for op, kernel in onnxruntime_int8.QLINEAR.items()},
}
"""The kernels that count as int8, by op."""

PROFILED = 7
"""Runs that a profile takes the median of, after one to warm up."""

_KERNEL = "_kernel_time"
"""What the profiler puts behind the name of a node."""


class OnnxRuntime(OnnxTarget):
    """Microsoft's engine, on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX Runtime on CPU; exports a standard .onnx file"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "linear": ("static", "dynamic", "weight-only"),
        "conv": ("static",),
        "add": ("static",),
        "embedding": ("weight-only",),
        **dict.fromkeys(onnxruntime_int8.QLINEAR, ("static",)),
    }
    floats: ClassVar[tuple[str, ...]] = ("float16",)
    """Stored so, and computed in float32 between casts: files are smaller, not faster."""
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {"linear": (8, 4, 2), "embedding": (8, 4)}
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}
    """A register of AVX-512 floats: blocked convolutions pad channels to it, and GEMM tiles are multiples of it."""
    zeros: str = (
        "sparse initializers are made dense at load, and no CPU kernel skips zeros: a file is smaller once compressed, "
        "no more"
    )

    def pipeline(self) -> str:
        return "fold-int8"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        saturating = self.saturates()
        integers = onnxruntime_int8.stages(signed=not saturating)
        weights = onnxruntime_weights.RULES, onnxruntime_weights.FOLDED
        return *onnxruntime_float.stages(), *integers, *weights, onnxruntime_unsigned.RULES if saturating else ()

    def engine(self) -> str:
        return f"onnxruntime {ort.__version__}"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> TimedChooser:
        return TimedChooser(self.engine(), feeds, partial(self.compile, threads=threads), threads)

    def compile(self, graph: Graph, threads: int | None = None) -> OrtRunner:
        assert isinstance(graph, OnnxGraph)
        return OrtRunner(graph, threads)

    def check(self, folded: Graph, runner: Runner) -> None:
        built = Counter(runner.kernels())
        built["QAttention"] *= 3  # it holds the products of query, key and value
        if isinstance(runner, OrtRunner):
            merged = runner.parts() - sum(len(site.results) - 1 for site in folded.sites("onnx.Split"))
            built["MatMulIntegerToFloat"] += merged
            of_pixels = onnxruntime_conv.products(runner.model)
            built["QGemm"], built["QLinearConv"] = built["QGemm"] - of_pixels, built["QLinearConv"] + of_pixels
            built["GatherBlockQuantized"] += onnxruntime_weights.tables(runner.model)
        promised = onnxruntime_int8.promised(folded)
        for op, kernels in INT8_KERNELS.items():
            kinds = " and ".join(dict.fromkeys(site.kind for site in promised[op]))
            _require_kernels(built, kinds, kernels, promised[op])
        for op, kernel in onnxruntime_weights.KERNELS.items():
            _require_kernels(built, f"weight-only {op}", (kernel,), onnxruntime_weights.promised(folded, op))


def _require_kernels(built: Mapping[str, int], what: str, kernels: Sequence[str], promised: Sequence[Node]) -> None:
    """Raise LoweringError where fewer kernels were built than sites were promised one."""
    found = sum(built.get(kernel, 0) for kernel in kernels)
    if found < len(promised):
        raise LoweringError(
            f"{len(promised)} {what} were promised and onnxruntime built {found} int8 kernels "
            f"({', '.join(kernels)}) among {', '.join(site.label for site in promised)}"
        )


class OrtRunner(Runner):
    """A session at the default options, of the file as it would be exported."""

    def __init__(self, graph: OnnxGraph, threads: int | None) -> None:
        self.model, self.threads = onnx_export.deployable(graph), threads
        self.names = [value.name for value in graph.outputs]
        try:
            self.session = onnx_run.session(self.model, level="all", threads=threads)
        except Exception as error:  # the engine's own exceptions have no base of theirs
            raise LoweringError(f"onnxruntime cannot load the model: {first_line(error)}") from error

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return onnx_run.run(self.session, feeds)

    def kernels(self) -> dict[str, int]:
        """From the model that the session optimized, dumped at the level below hardware layouts."""
        return dict(self._kernels)

    def parts(self) -> int:
        """How many results of the model's Split nodes there are beyond one of each: those that were one node's once."""
        return sum(len(node.outputs) - 1 for node in self.model.graph if node.op_type == "Split")

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        """By the engine's own profiler, the median of PROFILED runs."""
        options = ort.SessionOptions()
        seconds: dict[str, list[float]] = defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            session = onnx_run.session(self.model, level="all", threads=self.threads, options=options)
            for _ in range(PROFILED + 1):
                onnx_run.run(session, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                seconds[event["name"].removesuffix(_KERNEL)].append(event["dur"] / 1e6)
        return {name: median(several[1:]) for name, several in seconds.items()}

    @cached_property
    def _kernels(self) -> Counter[str]:
        options = ort.SessionOptions()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            # The dump holds every weight: externally, so that no model is too large for it.
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
            onnx_run.session(self.model, level="extended", options=options)
            nodes = onnx.load(path, load_external_data=False).graph.node
        return Counter(sorted(node.op_type for node in nodes))
