"""Weights that alone are integers, on onnxruntime: linears by MatMulNBits, tables by GatherBlockQuantized.

Both read packed integers in blocks along the last axis. A scale for each row, or for all, becomes that of each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.dialects.onnx import export as onnx_export
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule
from graphopt.numerics.quantize import BLOCKS, pack

LONGEST = 128
"""The block that rows with one scale are cut into: larger ones are no faster, and activations are rounded by block."""

ACCURACY_LEVEL = 4
"""Activations are rounded to int8 by block; without it, the kernel for 8 bits makes B float at each run."""


@dataclass(frozen=True)
class Blocks:
    """A matrix of integers (rows, columns) in the kernels' form."""

    packed: Tensor
    """uint8 (rows, blocks, bytes of one block), the last block filled up."""
    scale: Tensor
    """float32 (rows, blocks)."""
    zero_point: Tensor | None
    """uint8 (rows, bytes), packed like the integers; None: 2**(bits-1) in each block."""
    bits: int
    block: int


KERNELS = {"linear": "MatMulNBits", "embedding": "GatherBlockQuantized"}
"""By op, the kernel that reads its weight in integers."""


def promised(graph: Graph, op: str) -> list[Node]:
    """The sites of an op whose weight, or table, its kernel reads in integers."""
    return [site for site in graph.sites(op) if _why_not(site) is None]


def _why_not(site: Node) -> str | None:
    """Why a linear or embedding has no kernel that reads its weight in integers."""
    maker = site.required("weight" if site.kind == "linear" else "table").producer
    if maker is None or not _is_stored(maker):
        return "weight is not stored in integers"
    integers, scale = maker.required("x"), maker.required("scale")
    axis, block = maker.attributes["axis"], maker.attributes["block"]
    if integers.rank != 2 or integers.dtype not in (torch.int8, torch.uint8):
        return "weight is no matrix of int8 or uint8"
    if block and (axis != 1 or block not in BLOCKS):
        return f"blocks of {block} along axis {axis} have no kernel"
    if not block and axis == 1 and scale.rank == 1:
        return "a scale for each input has no kernel"
    if site.kind == "linear":
        if site.input.producer is not None and site.input.producer.kind == "dequantize":
            return "activations are integers too"  # which the kernel would round once more
        return None if site.input.dtype is torch.float32 else f"activations are {site.input.dtype}, not float32"
    ids = site.required("ids").dtype
    return None if ids in (torch.int32, torch.int64) else f"ids are {ids}, not int32 or int64"


def _is_stored(node: Node) -> bool:
    """Whether a node is the dequantize of constants."""
    return node.kind == "dequantize" and all(value is None or value.is_constant for value in node.operands)


def _blocks(graph: Graph, node: Node, narrowest: int) -> Blocks:
    """What a dequantize of a stored matrix means to the kernels, in `narrowest` bits or more."""
    integers, scale, zero_point = (None if v is None else graph.constant(v) for v in (*node.operands, None)[:3])
    assert integers is not None and scale is not None  # as promised
    block = node.attributes["block"]
    if zero_point is None and integers.dtype is torch.uint8:
        zero_point = torch.zeros_like(scale, dtype=torch.uint8)
    bits = next(size for size in (2, 4, 8) if size >= max(node.attributes["bits"], narrowest))
    return in_blocks(integers, scale, zero_point, bits=bits, block=block)


def in_blocks(
    integers: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int = 8, block: int | None = None
) -> Blocks:
    """A matrix of integers (rows, columns) in the kernels' form; without `block`, scales are of rows, or of all."""
    if not block:
        block = next((size for size in BLOCKS if size >= integers.shape[1]), LONGEST)
        block = min(block, LONGEST)
        count = -(-integers.shape[1] // block)
        scale = scale.reshape(-1, 1).expand(integers.shape[0], count)
        zero_point = None if zero_point is None else zero_point.reshape(-1, 1).expand(integers.shape[0], count)
    filled = torch.nn.functional.pad(integers, (0, -integers.shape[1] % block))
    packed = pack(filled.reshape(integers.shape[0], -1, block), bits)
    return Blocks(packed, scale.contiguous(), None if zero_point is None else pack(zero_point, bits), bits, block)


def _linear(
    op: Recorder, x: str, q: str, scale: str, zero_point: str | None = None, bias: str | None = None
) -> Pattern:
    return op.linear(x, op.dequantize(q, scale, zero_point, bind="weight"), bias)


def _table(op: Recorder, ids: str, q: str, scale: str, zero_point: str | None = None) -> Pattern:
    return op.embedding(op.dequantize(q, scale, zero_point, bind="table"), ids)


def _stored(op: Recorder, q: str, scale: str, zero_point: str | None = None) -> Pattern:
    return op.dequantize(q, scale, zero_point)


def _matmul_nbits(op: Builder, m: Match) -> Value:
    """Weights stay packed in memory; each is unpacked in the registers that multiply it."""
    _require_kernel(m.root)
    out, into = (int(size) for size in m.weight.result.shape)
    return emit_matmul(op, m.x, _blocks(op.graph, m.weight, narrowest=2), (out, into), m.bias)


def emit_matmul(op: Builder, x: Value, weight: Blocks, shape: tuple[int, int], bias: Value | None) -> Value:
    """MatMulNBits of float rows and a packed weight, whose shape is (out, in)."""
    sizes = {"N": shape[0], "K": shape[1], "bits": weight.bits, "block_size": weight.block}
    operands = _constants(op, weight)
    return op("com.microsoft.MatMulNBits", x, *operands, None, bias, **sizes, accuracy_level=ACCURACY_LEVEL)


def _gather_integers(op: Builder, m: Match) -> Value:
    """Only the rows that are asked for are dequantized: a Gather of a dequantized table makes all of it float."""
    _require_kernel(m.root)
    found = _blocks(op.graph, m.table, narrowest=4)
    rows, width = (int(size) for size in m.table.result.shape)
    flat = found.packed.reshape(rows, -1)[:, : -(-width * found.bits // 8)]
    packed, scale, zero_point = _constants(op, found, flat.contiguous())
    where: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": found.block, "bits": found.bits}
    return op("com.microsoft.GatherBlockQuantized", packed, m.ids, scale, zero_point, **where)


def _gather_rows(op: Builder, m: Match) -> Value:
    """Gather, and what makes its rows float: several operators of the standard."""
    _require_kernel(m.root)
    rows = onnx_export.gathered(op.graph, m.root)
    if rows is None:
        raise Declined("ONNX gathers no rows of less than a byte, nor of such scales")
    return rows


def tables(model: ir.Model) -> int:
    """How many Gathers of a model read rows of stored integers."""
    small = (ir.DataType.INT8, ir.DataType.UINT8)
    gathers = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    return sum(one is not None and one.const_value is not None and one.const_value.dtype in small for one in gathers)


def _require_kernel(site: Node) -> None:
    if (reason := _why_not(site)) is not None:
        raise Declined(reason)


def _constants(op: Builder, found: Blocks, packed: Tensor | None = None) -> list[Value | None]:
    tensors = (found.packed if packed is None else packed, found.scale, found.zero_point)
    return [None if tensor is None else op.constant(tensor) for tensor in tensors]


def _fold(op: Builder, m: Match) -> Value:
    """The engine would make a stored weight float at each run: it does not fold a DequantizeLinear."""
    tensors = [None if value is None else op.graph.constant(value) for value in m.root.operands]
    return op.constant(OPS["dequantize"].reference(*tensors, **m.root.attributes))


# --- weights with zero points, and activations in integers ---------------------------------------------------------


def _shifted_linear(
    op: Recorder, x: str, scale: str, zero_point: str, w: str, w_scale: str, w_zero_point: str, bias: str | None = None
) -> Pattern:
    read = op.dequantize(x, scale, zero_point, bind="input")
    return op.linear(read, op.dequantize(w, w_scale, w_zero_point, bind="weight"), bias)


def _shifted_conv(
    op: Recorder, x: str, scale: str, zero_point: str, w: str, w_scale: str, w_zero_point: str, y_scale: str,
    y_zero_point: str, bias: str | None = None,
) -> Pattern:  # fmt: skip
    read = op.dequantize(x, scale, zero_point, bind="input")
    conv = op.conv(read, op.dequantize(w, w_scale, w_zero_point, bind="weight"), bias, bind="conv")
    return op.quantize(conv, y_scale, y_zero_point)


def _is_shifted(m: Match) -> bool:
    """Whether a stored weight has zero points for all or for each output, and activations are uint8 with one scale."""
    one_scale = m.scale.rank == 0 and m.x.dtype is torch.uint8 and not m.x.is_constant
    attributes = m.weight.attributes
    whole = attributes["axis"] in (None, 0) and not attributes["block"] and attributes["bits"] == 8
    return one_scale and whole and _is_stored(m.weight) and m.w.dtype in (torch.int8, torch.uint8)


def _integer_to_float(op: Builder, m: Match) -> Value:
    """The kernel takes a zero point for each column too."""
    weight = op.graph.constant(m.w)
    assert weight is not None
    sides = m.x, op.constant(weight.t().contiguous()), m.scale, m.w_scale, m.zero_point, m.w_zero_point
    return op("com.microsoft.MatMulIntegerToFloat", *sides, m.bias)


def _qlinear_conv(op: Builder, m: Match) -> Value:
    """Zero points of weights are one number in all kernels."""
    graph = op.graph
    zero_points, scale, weight_scale = (graph.constant(one) for one in (m.w_zero_point, m.scale, m.w_scale))
    bias = graph.constant(m.bias) if m.bias is not None else None
    if zero_points is None or scale is None or weight_scale is None or (m.bias is not None and bias is None):
        raise Declined("its scales or its bias are not constant")
    if m.y_zero_point.dtype is not torch.uint8 or m.y_scale.rank != 0:
        raise Declined("its result is not quantized to uint8 with one scale")
    if bool((zero_points != zero_points.flatten()[0]).any()):
        raise Declined("its weights have several zero points")
    site = m.conv.attributes
    return op(
        "onnx.QLinearConv", m.x, m.scale, m.zero_point, m.w, m.w_scale, m.w_zero_point, m.y_scale, m.y_zero_point,
        None if bias is None else op.constant(bias_steps(bias, scale, weight_scale)),
        strides=site["stride"], pads=site["padding"], dilations=site["dilation"], group=site["groups"],
    )  # fmt: skip


def bias_steps(bias: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias in int32 steps of scale · weight_scale (ONNX QLinearConv)."""
    limits = torch.iinfo(torch.int32)
    rounded = (bias.double() / (scale.double() * weight_scale.double())).round()
    return rounded.clamp(limits.min, limits.max).to(torch.int32)


EMBEDDING = Choice(
    "embedding-of-integers",
    _table,
    {"GatherBlockQuantized": _gather_integers, "Gather": _gather_rows},
    check=lambda m: _is_stored(m.table),
    shared=True,
)
RULES = (
    Rule("matmul-integer-with-zero-points", _shifted_linear, _integer_to_float, shared=True, check=_is_shifted),
    Rule("qlinear-conv-with-zero-points", _shifted_conv, _qlinear_conv, shared=True, check=_is_shifted),
    Rule("matmul-nbits", _linear, _matmul_nbits, shared=True, check=lambda m: _is_stored(m.weight)),
    EMBEDDING,
)
FOLDED = (Rule("float-weights", _stored, _fold, check=lambda m: _is_stored(m.root)),)
"""Last: what no rule before has found a kernel for."""
