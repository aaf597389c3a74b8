"""Weight-only quantization on onnxruntime: linears by MatMulNBits, embeddings by GatherBlockQuantized.

Both read packed integers in blocks along the last axis. A scale of each row, or of all, is repeated for each block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.dialects.onnx import export as onnx_export
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.qdq.regions import STORED as STORED_OPS
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule
from graphopt.numerics.quantize import BLOCKS, pack

LARGEST_BLOCK = 128
"""Rows with one scale are cut into blocks of this: larger ones are no faster, and activations are rounded by block."""

ACCURACY_LEVEL = 4
"""Activations are rounded to int8 by block; without it, the kernel for 8 bits dequantizes the weight at each run."""

FLOAT_LEVEL = 1
"""Activations stay in float32."""


@dataclass(frozen=True)
class Blocks:
    """A matrix of integers (rows, columns) in the kernels' form."""

    packed: Tensor
    """uint8 (rows, blocks, bytes of one block), the last block filled up with zeros."""
    scale: Tensor
    """float32 (rows, blocks)."""
    zero_point: Tensor | None
    """uint8 (rows, bytes), packed like the integers; None: 2**(bits-1) in each block."""
    bits: int
    block: int


def why_not(site: Node) -> Decline | None:
    """Why a linear or embedding has no kernel that reads its weight in integers; None where it has one."""
    producer = site.required("weight" if site.kind == "linear" else "table").producer
    if producer is None or not is_stored(producer):
        return Decline("weight_not_in_integers")
    integers, scale = producer.required("x"), producer.required("scale")
    axis, block = producer.attributes["axis"], producer.attributes["block"]
    if integers.rank != 2 or integers.dtype not in (torch.int8, torch.uint8):
        return Decline("weight_unsupported", rank=integers.rank, dtype=str(integers.dtype))
    if block and (axis != 1 or block not in BLOCKS):
        return Decline("blocks_unsupported", block=block, axis=axis)
    if not block and axis == 1 and scale.rank == 1:
        return Decline("scale_per_input")
    if site.kind == "linear":
        return _why_not_activations(site.input)
    ids = site.required("ids").dtype
    return None if ids in (torch.int32, torch.int64) else Decline("ids_unsupported", dtype=str(ids))


def _why_not_activations(x: Value) -> Decline | None:
    if x.producer is not None and x.producer.kind == "dequantize":
        return Decline("activations_in_integers")  # the kernel would quantize them a second time
    return None if x.dtype is torch.float32 else Decline("activations_not_float32", dtype=str(x.dtype))


def is_stored(node: Node) -> bool:
    """Whether a node is the dequantize of constants."""
    return node.kind == "dequantize" and all(value is None or value.is_constant for value in node.operands)


def _blocks(graph: Graph, node: Node, least_bits: int, block: int | None = None) -> Blocks:
    """The matrix of a stored dequantize in the kernels' form, in `least_bits` or more.

    block: columns of a block, where the weight has none of its own.
    """
    integers, scale, zero_point = (None if v is None else graph.constant(v) for v in (*node.operands, None)[:3])
    assert integers is not None and scale is not None  # as stored
    own = node.attributes["block"]
    if zero_point is None and integers.dtype is torch.uint8:
        zero_point = torch.zeros_like(scale, dtype=torch.uint8)
    bits = next(size for size in (2, 4, 8) if size >= max(node.attributes["bits"], least_bits))
    return in_blocks(integers, scale, zero_point, bits=bits, block=own, most=block or LARGEST_BLOCK)


def in_blocks(
    integers: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int = 8, block: int | None = None,
    most: int = LARGEST_BLOCK,
) -> Blocks:
    """A matrix of integers (rows, columns) in the kernels' form.

    scale, zero_point: (rows, blocks) of `block` columns each; without `block`, (rows,) or () for all, repeated for
    blocks of `most` columns, or of all of them where there are fewer.
    """  # fmt: skip
    if not block:
        block = next((size for size in BLOCKS if size >= integers.shape[1]), most)
        block = min(block, most)
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


def _matmul_nbits(level: int, bits: int = 2, block: int | None = None) -> Callable[[Builder, Match], Value]:
    """Weights stay packed in memory, and are unpacked in registers, where they are multiplied.

    bits: the fewest that an integer takes in memory. block: columns with a scale, of a weight with one for each row.
    """

    def emit(op: Builder, m: Match) -> Value:
        _require_kernel(m.root)
        given = m.weight.attributes
        if bits > 2 and given["bits"] >= bits:
            raise Declined("stored_in_as_many_bits", bits=bits)
        if block is not None and given["block"]:
            raise Declined("stored_in_blocks", block=given["block"])
        out, into = (int(size) for size in m.weight.result.shape)
        packed = _blocks(op.graph, m.weight, least_bits=bits, block=block)
        return emit_matmul_nbits(op, m.x, packed, (out, into), m.bias, level=level)

    return emit


def emit_matmul_nbits(
    op: Builder, x: Value, weight: Blocks, shape: tuple[int, int], bias: Value | None, *, level: int = ACCURACY_LEVEL
) -> Value:
    """MatMulNBits of a float input and a packed weight. shape: of the weight, (out, in)."""
    sizes = {"N": shape[0], "K": shape[1], "bits": weight.bits, "block_size": weight.block}
    operands = _constants(op, weight)
    return op("com.microsoft.MatMulNBits", x, *operands, None, bias, **sizes, accuracy_level=level)


def _gather_integers(op: Builder, m: Match) -> Value:
    """Only the rows that are asked for are dequantized; a Gather of a dequantized table needs all of them."""
    _require_kernel(m.root)
    found = _blocks(op.graph, m.table, least_bits=4)
    rows, width = (int(size) for size in m.table.result.shape)
    flat = found.packed.reshape(rows, -1)[:, : -(-width * found.bits // 8)]
    packed, scale, zero_point = _constants(op, found, flat.contiguous())
    where: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": found.block, "bits": found.bits}
    return op("com.microsoft.GatherBlockQuantized", packed, m.ids, scale, zero_point, **where)


def _gather_rows(op: Builder, m: Match) -> Value:
    """Gather, and standard operators that dequantize its rows."""
    _require_kernel(m.root)
    rows = onnx_export.gathered(op.graph, m.root)
    if rows is None:
        raise Declined("rows_not_gathered")
    return rows


def _require_kernel(site: Node) -> None:
    if (decline := why_not(site)) is not None:
        raise Declined(decline)


def _constants(op: Builder, found: Blocks, packed: Tensor | None = None) -> list[Value | None]:
    tensors = (found.packed if packed is None else packed, found.scale, found.zero_point)
    return [None if tensor is None else op.constant(tensor) for tensor in tensors]


def _scaled(op: Builder, m: Match) -> Value:
    return _scaled_weight(op, m.root)


def _scaled_weight(op: Builder, stored: Node) -> Value:
    """Cast and scaled by operators that the engine folds when it loads the file: there the weights are integers, and
    each run multiplies floats. A DequantizeLinear would run each time: a bidirectional LSTM of 64 units takes 476 us
    with it, 140 with these and 128 in floats."""
    zero_point = stored.operand("zero_point")
    floats = op.cast(stored.input, dtype=torch.float32)
    if zero_point is not None:
        floats = op.sub(floats, op.constant(_along(stored, zero_point)))
    return op.mul(floats, op.constant(_along(stored, stored.required("scale"))))


def _read_by(node: Node, *kinds: str) -> bool:
    return not node.result.is_output and all(user.kind in kinds for user in node.result.users)


def _linear_of_scaled(op: Builder, m: Match) -> Value:
    return op.linear(m.x, _scaled_weight(op, m.weight), m.bias)


def _is_rounded_by_engine(m: Match) -> bool:
    """Whether the engine would round activations in floats: beside a weight of 8 bits, and not in blocks."""
    integers = m.weight.input.dtype
    is_plain = is_stored(m.weight) and integers in (torch.int8, torch.uint8) and not m.weight.attributes["block"]
    return is_plain and m.weight.attributes["bits"] == 8 and _why_not_activations(m.x) is None


def _along(node: Node, parameter: Value) -> Tensor:
    """A scale or zero point of a stored dequantize, in a shape that is broadcast to its integers."""
    tensor, axis = node.graph.constant(parameter), node.attributes["axis"]
    assert tensor is not None  # as stored
    rank = 0 if axis is None else node.input.rank or 0
    return tensor.float().reshape([-1 if place == axis else 1 for place in range(rank)])


def _fold(op: Builder, m: Match) -> Value:
    """The engine would dequantize a stored weight at each run: it does not fold a DequantizeLinear."""
    tensors = [None if value is None else op.graph.constant(value) for value in m.root.operands]
    return op.constant(OPS["dequantize"].reference(*tensors, **m.root.attributes))


EMBEDDING = Choice(
    "embedding-of-integers",
    _table,
    {"GatherBlockQuantized": _gather_integers, "Gather": _gather_rows},
    check=lambda m: is_stored(m.table),
    shared=True,
)
LINEAR = Choice(
    "matmul-nbits",
    _linear,
    {
        "MatMulNBits": _matmul_nbits(ACCURACY_LEVEL),
        "MatMulNBits in blocks of 32": _matmul_nbits(ACCURACY_LEVEL, block=32),
        "MatMulNBits in 8 bits": _matmul_nbits(ACCURACY_LEVEL, bits=8),
        "MatMulNBits in float32": _matmul_nbits(FLOAT_LEVEL),
    },
    check=lambda m: is_stored(m.weight),
    shared=True,
    lossy=frozenset({"MatMulNBits", "MatMulNBits in blocks of 32", "MatMulNBits in 8 bits"}),
)
STORED = (
    Rule("stored-integers", _stored, _scaled, check=lambda m: is_stored(m.root) and _read_by(m.root, *STORED_OPS)),
)
"""Weights of ops that no kernel computes from integers."""
SCALED = Rule("scaled-weights", _linear, _linear_of_scaled, check=_is_rounded_by_engine, shared=True)
"""Weights of a file of standard operators; in one for onnxruntime alone MatMulNBits reads them."""
FOLDED = (Rule("float-weights", _stored, _fold, check=lambda m: is_stored(m.root)),)
"""Applied after all rules that read integers: weights for which none of them has a kernel."""
