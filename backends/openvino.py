"""OpenVINO on CPU: reads uint8 Q/DQ around float ops, and folds them into int8 kernels by itself."""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.backends.onnx_target import QdqTarget
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.tensors import to_numpy
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.graph import Graph
from graphopt.ir.qdq.regions import reads_integers
from graphopt.ir.rewrite import Choice, Rule
from graphopt.lowering import row_scales
from graphopt.lowering.backend import Runner
from graphopt.pipeline.target import Placement

KERNELS = {"linear": ("FullyConnected", "MatMul"), "conv": ("Convolution",), "matmul": ("MatMul",)}
"""The layers that compute an op, as OpenVINO names them."""

PROFILED = 7
"""Runs that a profile takes the median of."""

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""What INFERENCE_PRECISION_HINT calls a precision."""

ISAS = ("amx", "avx512", "avx2", "avx", "sse42")
"""As names of primitives spell them; one that has amx has avx512 too."""

OLDEST = (2026, 4)
"""The first version that is known to run what is written here."""

_DATA = ("Input", "Const", "Output")


class OpenVino(QdqTarget):
    """Intel's engine, on the CPU."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO on CPU (needs the extra openvino); exports a standard .onnx file with Q/DQ"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "linear": ("static", "weight-only", "dynamic"),
        "conv": ("static",),
        "matmul": ("static",),
        **dict.fromkeys(("add", "max_pool", "average_pool", "mean"), ("static",)),
        "embedding": ("weight-only",),
    }
    granularities: ClassVar[tuple[str, ...]] = ("row",)
    """It folds no quantize whose scale is computed: rows are divided by their scales, and have the stored scale 1."""
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {"linear": (8, 4), "embedding": (8, 4)}
    placement: ClassVar[Placement | None] = Placement()
    """Quantized regions are not closed: a quantize directly after a conv would prevent fusing the activation."""
    floats: ClassVar[tuple[str, ...]] = ("float16",)
    """Stored so, and computed in float32: files are smaller, not faster."""
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}

    other_suffixes: ClassVar[tuple[str, ...]] = (".xml",)
    """OpenVINO's own form (IR), with the weights in a .bin file beside it."""

    def accept(self, model: Any, example_inputs: Any) -> None:
        """Raises UsageError where the package is missing or too old: before the passes run, not after."""
        _package()

    def notes(self) -> list[str]:
        hint = HINTS[self.precision]
        usual = _package().Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        if usual == hint:
            return []
        return [f"run with INFERENCE_PRECISION_HINT={hint}; by default OpenVINO computes floats in {usual} on this CPU"]

    @property
    def precisions(self) -> tuple[str, ...]:
        if self.cpu is not None:
            return ("float32",)  # nothing can be measured
        known = _package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "float32", *(name for name, word in (("bfloat16", "BF16"), ("float16", "FP16")) if word in known)

    def loading(self, file: str, threads: int | None = None) -> Mapping[str, Any]:
        config: dict[str, Any] = settings(self.precision, threads)
        python = f"openvino.Core().compile_model({file!r}, 'CPU', {config!r})"
        return {"engine": self.engine(), "device": "CPU", "config": config, "python": python}

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        if path.suffix != ".xml":
            super().export(graph, path, metadata=metadata, opset=opset, external_data=external_data)
            return
        if opset is not None or external_data is not None:
            raise UsageError("an .xml file is OpenVINO's own form: opset and external_data are for .onnx")
        package = _package()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            super().export(graph, file, metadata=metadata)
            model = package.convert_model(str(file))
        for name, text in metadata.items():
            model.set_rt_info(text, ["graphopt", name])
        package.save_model(model, str(path), compress_to_fp16=False)

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        return *super().rules(graph), (row_scales.LINEAR, row_scales.QUANTIZE)

    def engine(self) -> str:
        return f"openvino {_package().__version__}"

    def compile(self, graph: Graph, threads: int | None = None) -> OpenVinoRunner:
        assert isinstance(graph, OnnxGraph)
        return OpenVinoRunner(graph, threads, self.precision)

    def check(self, folded: Graph, runner: Runner) -> None:
        assert isinstance(runner, OpenVinoRunner)
        for op, kinds in KERNELS.items():
            layers = [layer for layer in runner.layers if layer.kind in kinds]
            built = [layer for layer in layers if layer.is_int8]
            sites = [site for site in folded.sites(op) if reads_integers(site)]
            if len(built) < len(sites):
                others = ", ".join(f"{layer.name} ({layer.precision})" for layer in layers if layer not in built)
                raise LoweringError(
                    f"{len(sites)} static {op} were promised and openvino runs {len(built)} in int8; in floats it "
                    f"runs {others or 'none'}, of {', '.join(site.label for site in sites)}"
                )


def _package() -> Any:
    """The package. Raises UsageError where it is missing, or older than OLDEST."""
    try:
        import openvino
    except ImportError as error:
        raise UsageError("target openvino needs the package openvino: pip install 'graphopt[openvino]'") from error
    found = str(openvino.__version__).partition("-")[0]
    numbers = [int(number) for number in re.findall(r"\d+", found)]
    if tuple(numbers[:2]) < OLDEST:
        raise UsageError(
            f"target openvino needs openvino {'.'.join(map(str, OLDEST))} or newer, and {found} is installed: "
            "pip install -U 'graphopt[openvino]'"
        )
    return openvino


def settings(precision: str, threads: int | None) -> dict[str, Any]:
    """How a model is compiled for the CPU."""
    return {"INFERENCE_PRECISION_HINT": HINTS[precision]} | (
        {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    )


@dataclass(frozen=True)
class Layer:
    """A kernel of the compiled model."""

    kind: str
    name: str
    precision: str
    """Of its input, such as u8 and f32; of its weights where only those are integers."""
    is_int8: bool
    """Whether it multiplies integers: with integers as weights alone, it computes in floats."""
    isa: str = ""
    """The instructions that it was built for, of ISAS; empty where it does not say."""


def layers(compiled: Any) -> list[Layer]:
    """The kernels of a compiled model's execution graph, in order."""
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {name: value.astype(str) for name, value in node.get_rt_info().items()}
        kind, precision = facts["layerType"], facts["runtimePrecision"]
        if kind not in _DATA:
            name = facts["originalLayersNames"] or node.get_friendly_name()
            primitive = facts["primitiveType"]
            found.append(Layer(kind, name, precision, primitive.endswith("I8"), _isa(primitive)))
    return found


def _isa(primitive: str) -> str:
    """The instructions in the name of a primitive, such as brgemm_avx512_amx_I8."""
    return next((isa for isa in ISAS if isa in primitive), "")


class OpenVinoRunner(Runner):
    """The file as it would be exported, compiled for the CPU; floats are computed in float32, as the file says, or in
    another precision that was chosen."""

    def __init__(self, graph: OnnxGraph, threads: int | None, precision: str = "float32") -> None:
        self._graph, self._names = graph, [value.name for value in graph.inputs]
        self._options = settings(precision, threads)
        self.compiled = self._compile()

    def _compile(self, **options: Any) -> Any:
        core = _package().Core()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx_export.write(onnx_export.deployable(self._graph), path, {})
            try:
                return core.compile_model(str(path), "CPU", self._options | options)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise LoweringError(f"openvino cannot load the model: {reason}") from error

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        found = self.compiled({name: to_numpy(feeds[name]) for name in self._names})
        return [torch.from_numpy(found[port]) for port in self.compiled.outputs]

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        """By the engine's own counters, the median of PROFILED runs, after one to warm up."""
        request = self._compile(PERF_COUNT=True).create_infer_request()
        arrays = {name: to_numpy(feeds[name]) for name in self._names}
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(PROFILED + 1):
            request.infer(arrays)
            for node in request.profiling_info:
                seconds[node.node_name].append(node.real_time.total_seconds())
        return {name: median(several[1:]) for name, several in seconds.items() if any(several)}

    def kernels(self) -> dict[str, int]:
        """From the execution graph: layers, their precision and their instructions, such as `Convolution u8 amx`."""
        names = (" ".join(filter(None, (layer.kind, layer.precision, layer.isa))) for layer in self.layers)
        return dict(Counter(sorted(names)))

    @cached_property
    def layers(self) -> list[Layer]:
        """The kernels of the execution graph, in order."""
        return layers(self.compiled)
