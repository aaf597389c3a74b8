"""ONNX Runtime on NVIDIA GPUs: 16 bits with regions of float32, fused attention and norms, packed weights.

Its CUDA provider has no int8 products: it computes Q/DQ models in float, and runs the Q/DQ besides. Where the provider
is missing, files are checked by rules, and run by CPU kernels, which compute the same operators in float32 and round
results to 16 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from graphopt.backends.onnx_target import OnnxTarget
from graphopt.backends.onnxruntime.attention import ATTENTION_3D, attention, multi_head
from graphopt.backends.onnxruntime.guards import guarded
from graphopt.backends.onnxruntime.linear import linear
from graphopt.backends.onnxruntime.weight_only import FOLDED, Blocks, in_blocks, is_stored
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError, UsageError, first_line
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule
from graphopt.lowering.backend import Runner
from graphopt.lowering.timed_forms import TimedChooser
from graphopt.numerics.quantize import BLOCKS

CUDA = "CUDAExecutionProvider"

FLOATS_16 = (torch.float16, torch.bfloat16)


class OnnxRuntimeCuda(OnnxTarget):
    """Microsoft's engine, on NVIDIA's GPUs."""

    name: ClassVar[str] = "onnxruntime-cuda"
    summary: ClassVar[str] = "ONNX Runtime on NVIDIA GPUs; exports an .onnx file in 16 bits, with weights of 8 or 4"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear": ("weight-only",)}
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {"linear": (8, 4)}
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 32, "channels": 32, "width": 32, "rank": 32}

    def __init__(self, cpu: str | None = None, providers: Sequence[str] | None = None) -> None:
        """providers: those of this build of onnxruntime, where not its own. Raises UsageError where cpu is given."""
        if cpu is not None:
            raise UsageError(f"target {self.name} runs on a GPU: leave out cpu={cpu}")
        super().__init__()
        self.runs = CUDA in (ort.get_available_providers() if providers is None else providers)

    def notes(self) -> list[str]:
        if self.runs:
            return ["captured and checked on the CPU, run by onnxruntime's CUDA provider"]
        return [f"rules checked, never run on a GPU: this onnxruntime has no {CUDA} (onnxruntime-gpu has), and outputs "
                "are those of its CPU kernels, in float32 between roundings to 16 bits"]  # fmt: skip

    def product_bits(self) -> int:
        return 8

    def pipeline(self) -> str:
        return ""

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        return (PACKED,), (NORM_16,), (SKIP_NORM, *ATTENTION_3D), (ATTENTION,), FOLDED

    def engine(self) -> str:
        return f"onnxruntime {ort.__version__}, CUDA"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> TimedChooser | None:
        if not self.runs:
            return None
        return TimedChooser(self.engine(), feeds, partial(self.compile, threads=threads), threads)

    def compile(self, graph: Graph, threads: int | None = None) -> OrtCudaRunner:
        assert isinstance(graph, OnnxGraph)
        return OrtCudaRunner(graph, threads, (CUDA, onnx_run.CPU) if self.runs else (onnx_run.CPU,))

    def check(self, folded: Graph, runner: Runner) -> None:
        assert isinstance(runner, OrtCudaRunner)
        packed = [site for site in folded.sites("linear") if _reads_packed_weight(site)]
        if (built := runner.kernels().get("MatMulNBits", 0)) < len(packed):
            raise LoweringError(f"{len(packed)} weight-only linear were promised and the file has {built} MatMulNBits "
                                f"among {', '.join(site.label for site in packed)}")  # fmt: skip
        for fault in faults(runner.model):
            raise LoweringError(f"onnxruntime's CUDA provider would run the file slowly, or not at all: {fault}")


class OrtCudaRunner(Runner):
    """A session of the file as it would be exported."""

    def __init__(self, graph: OnnxGraph, threads: int | None, providers: Sequence[str]) -> None:
        self.model = onnx_export.deployable(guarded(graph))
        try:
            self._session = onnx_run.session(self.model, level="all", threads=threads, providers=providers)
        except Exception as error:  # the engine's own exceptions have no base of theirs
            raise LoweringError(f"onnxruntime cannot load the model: {first_line(error)}") from error
        if CUDA in providers and CUDA not in self._session.get_providers():
            raise LoweringError("onnxruntime's CUDA provider did not start: its log says which library it misses")

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return onnx_run.run(self._session, {name: tensor.cpu() for name, tensor in feeds.items()})

    def kernels(self) -> dict[str, int]:
        """The operators of the file."""
        return dict(Counter(sorted(node.op_type for node in self.model.graph)))


def faults(model: ir.Model) -> list[str]:
    """What the CUDA provider runs slowly, or not at all: a sentence each, with the name of the node."""
    found = []
    for node in model.graph.all_nodes():
        types = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
        floats = types & {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        stored = all(one is None or one.const_value is not None for one in node.inputs)
        if node.op_type == "DequantizeLinear" and stored:
            found.append(f"{node.name} dequantizes a stored weight at each run")
        if node.domain == "com.microsoft" and len(floats) > 1:
            found.append(f"{node.name} ({node.op_type}) reads {', '.join(sorted(one.name for one in floats))} at once")
        if node.op_type == "MatMulNBits" and node.attributes["block_size"].as_int() not in BLOCKS:
            found.append(f"{node.name} has blocks of {node.attributes['block_size'].as_int()}")
        if node.op_type in ("QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"):
            found.append(f"{node.name} ({node.op_type}) has no kernel there")
    return found


# --- weights -------------------------------------------------------------------------------------------------------


def _packed_weight(site: Node) -> Node | None:
    """The dequantize that makes a weight, also through the cast of a site in 16 bits."""
    maker = site.required("weight").producer
    if maker is not None and maker.kind == "cast":
        maker = maker.input.producer
    return maker if maker is not None and maker.kind == "dequantize" else None


def _reads_packed_weight(site: Node) -> bool:
    """Whether a linear has a weight that MatMulNBits reads in integers."""
    maker = _packed_weight(site)
    if maker is None or not is_stored(maker) or maker.required("x").rank != 2:
        return False
    bits, block, axis = (maker.attributes[name] for name in ("bits", "block", "axis"))
    if block:
        return bits in (4, 8) and axis == 1 and block in BLOCKS
    return bits in (4, 8) and not (axis == 1 and maker.required("scale").rank == 1)


def _matmul_nbits(op: Builder, m: Match) -> Value:
    """Integers are unpacked where they are multiplied: decoding reads 2 to 4 times fewer bytes.

    The kernel takes no bias on GPUs.
    """
    maker = _packed_weight(m.root)
    assert maker is not None
    integers, scale, zero_point = (None if v is None else op.graph.constant(v) for v in (*maker.operands, None)[:3])
    assert integers is not None and scale is not None
    if zero_point is None and integers.dtype is torch.uint8:
        zero_point = torch.zeros_like(scale, dtype=torch.uint8)
    attributes = maker.attributes
    found: Blocks = in_blocks(integers, scale, zero_point, bits=attributes["bits"], block=attributes["block"])
    zeros = None if found.zero_point is None else op.constant(found.zero_point)
    sizes: dict[str, Any] = {"N": integers.shape[0], "K": integers.shape[1], "bits": found.bits}
    y = op("com.microsoft.MatMulNBits", m.x, op.constant(found.packed), op.constant(found.scale.to(m.x.dtype)), zeros,
           **sizes, block_size=found.block)  # fmt: skip
    return y if m.bias is None else op.add(y, m.bias)


# --- norms ---------------------------------------------------------------------------------------------------------


def _norm_between_casts(op: Recorder, x: str, weight: str, bias: str | None = None) -> Pattern:
    return op.cast(op.layer_norm(op.cast(x, bind="widened"), weight, bias, bind="norm"))


def _is_norm_in_float32(m: Match) -> bool:
    """Whether a norm in float32 stands between values of 16 bits: its kernel computes in float32 anyway."""
    stored = all(value is None or value.is_constant for value in (m.weight, m.bias))
    in_16_bits = m.x.dtype in FLOATS_16 and m.root.result.dtype == m.x.dtype
    return stored and in_16_bits and m.norm.result.dtype is torch.float32


def _norm_in_16_bits(op: Builder, m: Match) -> Value:
    """The kernel reads and writes 16 bits, and sums in float32 (stash_type 1): no pass over memory for the casts."""
    weight, bias = (None if value is None else op.graph.constant(value) for value in (m.weight, m.bias))
    assert weight is not None
    parts = op.constant(weight.to(m.x.dtype)), None if bias is None else op.constant(bias.to(m.x.dtype))
    return op.layer_norm(m.x, *parts, eps=m.norm.attributes["eps"])


def _skip_norm_pattern(op: Recorder, x: str, residual: str, weight: str, bias: str | None = None) -> Pattern:
    return op.layer_norm(op.add(x, residual), weight, bias)


def _skip_norm(op: Builder, m: Match) -> Value:
    """One kernel adds and normalizes; a sum that others read too does not match."""
    same = m.x.shape is not None and "?" not in m.x.shape and m.x.shape == m.residual.shape
    if not same or m.x.rank not in (2, 3) or m.weight.rank != 1:
        raise Declined("residual_norm_unsupported", x=m.x.shape, residual=m.residual.shape)
    operands = m.x, m.residual, m.weight, m.bias
    return op("com.microsoft.SkipLayerNormalization", *operands, epsilon=m.root.attributes["eps"])


# --- attention -----------------------------------------------------------------------------------------------------


def _group_query_attention(op: Builder, m: Match) -> Value:
    """With fewer heads of keys than of queries. The kernel masks later positions, and is told each length less 1."""
    given = m.root.attributes
    if not given["heads"] or given["kv_heads"] in (0, given["heads"]):
        raise Declined("key_heads_not_shared")
    if not given["causal"] or m.mask is not None:
        raise Declined("attention_not_causal")
    if m.query.shape is None or m.key.shape is None or m.query.shape[1] != m.key.shape[1] or "?" in m.key.shape[1:2]:
        raise Declined("lengths_differ")
    one = op.constant(torch.tensor([1]))
    length = op("onnx.Shape", m.key, start=1, end=2)
    last = op("onnx.Expand", op.sub(length, one), op("onnx.Shape", m.key, start=0, end=1))
    total = op.cast(op.squeeze(length, axes=(0,)), dtype=torch.int32)
    attributes = {"num_heads": given["heads"], "kv_num_heads": given["kv_heads"]}
    if given["scale"] is not None:
        attributes["scale"] = float(given["scale"])
    operands = m.query, m.key, m.value, None, None, op.cast(last, dtype=torch.int32), total
    return op("com.microsoft.GroupQueryAttention", *operands, **attributes)


ATTENTION = Choice(
    "attention",
    attention,
    {"GroupQueryAttention": _group_query_attention, "MultiHeadAttention": multi_head, "Attention": None},
)
"""MultiHeadAttention before Attention: its flash kernels take 16 bits with and without a mask."""
NORM_16 = Rule("norm-in-16-bits", _norm_between_casts, _norm_in_16_bits, check=_is_norm_in_float32)
SKIP_NORM = Choice(
    "residual-norm", _skip_norm_pattern, {"SkipLayerNormalization": _skip_norm, "LayerNormalization": None}
)
PACKED = Rule("matmul-nbits", linear, _matmul_nbits, check=lambda m: _reads_packed_weight(m.root))
