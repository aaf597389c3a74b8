"""TensorRT: explicit Q/DQ in int8, as its builder wants them in a strongly typed network.

Nothing here runs TensorRT: a file is checked by its rules, and its numbers are those of ONNX Runtime without
optimizations. Source: TensorRT's documentation, "Explicit Quantization" and its advice on where Q/DQ go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from torch import Tensor

from graphopt.backends.onnx_target import QdqTarget
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph
from graphopt.ir.qdq.regions import reads_integers
from graphopt.lowering.backend import Runner
from graphopt.pipeline.target import Placement

OPSET = 20
"""TensorRT 10 reads it: Gelu and LayerNormalization are whole, attention is products and a softmax, which it fuses."""

WEIGHTED = {"linear": ("MatMul", "Gemm"), "matmul": ("MatMul",), "conv": ("Conv",)}
"""The operators that compute an op."""

_OUTPUTS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
"""The axis of outputs in a stored weight: the only one that may have several scales."""

_FUSED = ("Relu", "Clip", "LeakyRelu", "BatchNormalization")
"""What TensorRT computes together with a weighted operator before it."""

_INTEGER_OPS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul")


class TensorRt(QdqTarget):
    """NVIDIA's engine, on its GPUs."""

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "TensorRT; writes an .onnx file with int8 Q/DQ by its rules, which is not run here"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("linear", "conv", "matmul", "add"), ("static",))
    placement: ClassVar[Placement | None] = Placement(signed=True, fuses_sum=True)
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 32, "channels": 32, "width": 32, "rank": 32}
    """Its int8 kernels read channels in vectors of 32."""
    runs: bool = False
    zeros: str = (
        "TensorRT skips zeros in 2:4 where its builder is told to look for them (kSPARSE_WEIGHTS); others make a file "
        "smaller once compressed, no more"
    )

    def notes(self) -> list[str]:
        return ["rules checked, never run by TensorRT: outputs are those of onnxruntime on the CPU"]

    def product_bits(self) -> int:
        """8: its sums have 32 bits."""
        return 8

    def compile(self, graph: Graph, threads: int | None = None) -> TensorRtRunner:
        assert isinstance(graph, OnnxGraph)
        return TensorRtRunner(graph, threads)

    def check(self, folded: Graph, runner: Runner) -> None:
        assert isinstance(runner, TensorRtRunner)
        promised = [site for site in folded.sites(*WEIGHTED) if reads_integers(site)]
        found = [node for node in runner.emitted.nodes if node.op in _OUTPUTS and _reads_integers(node)]
        if len(found) < len(promised):
            raise LoweringError(
                f"{len(promised)} int8 ops were promised, and the file for tensorrt holds {len(found)} among "
                f"{', '.join(site.label for site in promised)}"
            )

    def deployable(self, graph: OnnxGraph, opset: int | None = None) -> ir.Model:
        return _model(emit(graph, opset))

    def graphsurgeon(self, graph: Graph) -> gs.Graph:
        assert isinstance(graph, OnnxGraph)
        return emit(graph)


class TensorRtRunner(Runner):
    """The emitted file in ONNX Runtime without optimizations: Q/DQ around floats, in the order of the file."""

    def __init__(self, graph: OnnxGraph, threads: int | None) -> None:
        self.emitted = emit(graph)
        self._session = onnx_run.session(_model(self.emitted), level="disable", threads=threads)

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return onnx_run.run(self._session, feeds)

    def kernels(self) -> dict[str, int]:
        """The operators of the file, those that read integers as `Conv int8`: TensorRT has built nothing of it."""
        kinds = [f"{node.op} int8" if _reads_integers(node) else node.op for node in self.emitted.nodes]
        return dict(Counter(sorted(kinds)))


def _model(emitted: gs.Graph) -> ir.Model:
    model: ir.Model = ir.from_proto(gs.export_onnx(emitted))
    return model


# --- emission ------------------------------------------------------------------------------------------------------


def emit(graph: OnnxGraph, opset: int | None = None) -> gs.Graph:
    """The graph as TensorRT reads it. Raises LoweringError naming the first node that breaks one of its rules."""
    surgical = onnx_export.graphsurgeon(onnx_export.deployable(graph, opset or min(OPSET, graph.opset)))
    for node in surgical.nodes:
        if node.op in ("Conv", "ConvTranspose", "Gemm", "Add"):
            node.inputs = [_float_bias(value) for value in node.inputs]
    surgical.cleanup().toposort()
    for fault in faults(surgical):
        raise LoweringError(f"TensorRT would not run the file as intended: {fault}")
    return surgical


def _float_bias(value: gs.Tensor) -> gs.Tensor:
    """The floats of a stored bias that a DequantizeLinear reads: TensorRT has no Q/DQ in int32."""
    maker = _maker(value, "DequantizeLinear")
    if maker is None or not isinstance(maker.inputs[0], gs.Constant) or maker.inputs[0].values.dtype != np.int32:
        return value
    steps, scale, *zero_point = (one.values for one in maker.inputs)
    return gs.Constant(f"{value.name}.float", ((steps - sum(zero_point)) * scale.astype(np.float32)).astype(np.float32))


# --- rules ---------------------------------------------------------------------------------------------------------


def faults(graph: gs.Graph) -> Iterator[str]:
    """What breaks TensorRT's rules for explicit quantization: a sentence each, with the node and what to do."""
    for node in [*graph.nodes, *(node for inner in graph.subgraphs(recursive=True) for node in inner.nodes)]:
        for fault in _faults(node):
            yield f"{node.name} ({node.op}) {fault}"


def _faults(node: gs.Node) -> Iterator[str]:
    if node.domain not in (None, "", "ai.onnx") or node.op in _INTEGER_OPS:
        yield "is no operator of its explicit quantization; quantize the float model with target=tensorrt"
    elif node.op in ("QuantizeLinear", "DequantizeLinear"):
        yield from _parameter_faults(node)
    elif node.op in _OUTPUTS:
        yield from _weighted_faults(node)
    elif node.op in _FUSED and (conv := _behind_pair(node.inputs[0])) is not None:
        yield f"is fused with {conv.name}, but Q/DQ stand between them; take them out"
    elif node.op == "Add":
        yield from _add_faults(node)


def _parameter_faults(node: gs.Node) -> Iterator[str]:
    """Scales are stored and above 0, zero points 0 in int8, activations have one scale per tensor."""
    x, *parameters = node.inputs
    if not all(isinstance(one, gs.Constant) for one in parameters):
        yield "has parameters that are computed at run time; quantize with scheme=static"
        return
    scale, zero_point = parameters[0].values, parameters[1].values if len(parameters) > 1 else None
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"has a scale of {float(scale.min()):g}; scales are above 0"
    if zero_point is None and node.op == "QuantizeLinear":
        yield "makes uint8, as it has no zero point; give it one of int8"
    elif zero_point is not None and (zero_point.dtype != np.int8 or zero_point.any()):
        yield f"has a zero point of {int(zero_point.flat[0])} in {zero_point.dtype}; it is 0 in int8"
    if isinstance(x, gs.Constant):
        if x.values.dtype != np.int8:
            yield f"reads weights in {x.values.dtype}; they are int8"
    elif scale.size != 1:
        yield f"has {scale.size} scales for an activation; it has one"
    if node.attrs.get("block_size"):
        yield "has scales for blocks; int8 has them for outputs or the whole tensor"


def _weighted_faults(node: gs.Node) -> Iterator[str]:
    """Both factors are quantized or none, a weight along its outputs alone, and the bias is float."""
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        if _maker(value, "DequantizeLinear") is None and _maker(other, "DequantizeLinear") is not None:
            yield f"multiplies integers with {value.name}, which is float; quantize both or none"
    maker = _maker(node.inputs[1], "DequantizeLinear")
    if maker is not None and maker.inputs[1].values.size > 1:
        rank = len(maker.inputs[0].shape)
        axis, outputs = maker.attrs.get("axis", 1) % rank, _OUTPUTS[node.op]
        if node.op == "MatMul":
            outputs = rank - 1
        elif node.op == "Gemm" and node.attrs.get("transB"):
            outputs = 0
        if axis != outputs:
            yield f"has a weight with scales along axis {axis}; they are along its outputs, axis {outputs}"
    if len(node.inputs) > 2 and _maker(node.inputs[2], "DequantizeLinear") is not None:
        yield "has a bias in integers; it is float"


def _add_faults(node: gs.Node) -> Iterator[str]:
    """An add is fused with one conv that it reads as it is, and then reads its other side in int8."""
    if any(isinstance(value, gs.Constant) for value in node.inputs):
        return
    own = [value for value in node.inputs if _is_int8_conv(value)]
    between = [conv for conv in map(_behind_pair, node.inputs) if conv is not None]
    if between and not own:
        yield f"is fused with {between[-1].name}, but Q/DQ stand between them; take them out"
    for value in node.inputs:
        if own and value is not own[-1] and _maker(value, "DequantizeLinear") is None:
            conv = own[-1].inputs[0].name
            yield f"is fused with {conv}, and its other side {value.name} is float; take it out of ignore"


def _reads_integers(node: gs.Node) -> bool:
    return node.op in _OUTPUTS and all(_maker(value, "DequantizeLinear") is not None for value in node.inputs[:2])


def _is_int8_conv(value: gs.Tensor) -> bool:
    conv = _maker(value, "Conv")
    return conv is not None and len(value.outputs) == 1 and _reads_integers(conv)


def _behind_pair(value: gs.Tensor) -> gs.Node | None:
    """The int8 conv whose result comes here through Q/DQ, and nowhere else."""
    dequantize = _maker(value, "DequantizeLinear")
    quantize = None if dequantize is None else _maker(dequantize.inputs[0], "QuantizeLinear")
    if quantize is None or len(value.outputs) != 1 or not _is_int8_conv(quantize.inputs[0]):
        return None
    return quantize.inputs[0].inputs[0]


def _maker(value: gs.Tensor, op: str) -> gs.Node | None:
    """The node of this operator that makes a tensor."""
    return next((node for node in value.inputs if node.op == op), None)
