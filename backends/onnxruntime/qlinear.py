"""QLinear operators on onnxruntime: ops of quantized regions, computed without leaving integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.qdq.regions import is_global
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule

QLINEAR = {
    "matmul": "QLinearMatMul",
    "mul": "QLinearMul",
    "concat": "QLinearConcat",
    "average_pool": "QLinearAveragePool",
    "mean": "QLinearGlobalAveragePool",
    "sigmoid": "QLinearSigmoid",
    "leaky_relu": "QLinearLeakyRelu",
    "softmax": "QLinearSoftmax",
}
"""Ops that have one operator for dequantize, the op, and quantize.

At 8x12x128x128 on a core with VNNI, QLinearMatMul took 0.5 to 0.8 of MatMul's time with int8 on its right side (all of
MatMul's time with uint8), but QLinearSoftmax took nine times Softmax's: a softmax stays float unless the user asks for
it by name.
"""

_OFFSET = 128
_MOVES = ("reshape", "transpose", "squeeze", "unsqueeze")
"""Ops that the engine itself moves after a quantize: they compute nothing."""


def _add_pattern(op: Recorder, a: str, a_scale: str, a_zero_point: str, b: str, b_scale: str, b_zero_point: str,
                 y_scale: str, y_zero_point: str) -> Pattern:  # fmt: skip
    return op.add_int8(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)


def _qlinear_add(op: Builder, m: Match) -> Value:
    """The contrib kernel adds integers, with a scale for each side and for the result."""
    return op("com.microsoft.QLinearAdd", m.a, m.a_scale, m.a_zero_point, m.b, m.b_scale, m.b_zero_point,
              m.y_scale, m.y_zero_point)  # fmt: skip


def _quantized(op: Recorder, x: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(x, scale, zero_point)


def qlinear_op(quantize: Node) -> Node | None:
    """The op of QLINEAR whose result only a quantize reads, in the form that its operator computes."""
    op = quantize.input.producer
    if op is None or op.kind not in QLINEAR or op.result.only_user is None:
        return None
    if op.kind == "mean" and not is_global(op):
        return None
    return op if reads_uint8(op) and _is_uint8(quantize) else None


def reads_uint8(op: Node) -> bool:
    """Whether all operands of an op are dequantized from uint8, with stored scales, per tensor."""
    producers = [value.producer for value in op.operands if value is not None]
    return all(node is not None and node.kind == "dequantize" and _is_uint8(node) and node.input.dtype is torch.uint8
               for node in producers)  # fmt: skip


def _is_uint8(node: Node) -> bool:
    """Whether a quantize or dequantize has a stored scale per tensor, a stored zero point in uint8, and all 8 bits."""
    scale, zero_point = node.required("scale"), node.operand("zero_point")
    stored = scale.is_constant and zero_point is not None and zero_point.is_constant
    whole = stored and scale.rank == 0 and node.attributes["bits"] == 8
    return whole and zero_point is not None and zero_point.dtype is torch.uint8


def _qlinear(op: Builder, m: Match, signed: bool) -> Value:
    """One operator in the place of dequantize, the op, and quantize."""
    site = qlinear_op(m.root)
    assert site is not None  # checked
    sides = _sides(site)
    result: tuple[Value, ...] = (m.scale, m.zero_point)
    domain = "com.microsoft"
    given = site.attributes
    attributes: dict[str, Any] = {}
    match site.kind:
        case "matmul":
            sides, domain = [*sides[:3], *(_as_int8(op, *sides[3:]) if signed else sides[3:])], "onnx"
        case "softmax":
            attributes = {"axis": given["axis"], "opset": 13}  # since when it is along one axis
        case "concat":
            sides, result, attributes = [*result, *sides], (), {"axis": given["axis"]}
        case "average_pool":
            attributes = {
                "kernel_shape": given["kernel"], "strides": given["stride"] or (1,) * len(given["kernel"]),
                "pads": given["padding"] or (0, 0) * len(given["kernel"]), "ceil_mode": int(given["ceil"]),
                "count_include_pad": int(given["include_pad"]),
            }  # fmt: skip
        case "leaky_relu":
            attributes = {"alpha": float(given["slope"])}
    return op(f"{domain}.{QLINEAR[site.kind]}", *sides, *result, **attributes)


def _sides(op: Node) -> list[Value]:
    """Integers, scale and zero point of each operand; all are dequantized."""
    producers = [value.producer for value in op.operands if value is not None]
    return [node.required(name) for node in producers if node is not None for name in OPS["dequantize"].operands]


def _as_int8(op: Builder, integers: Value, scale: Value, zero_point: Value) -> tuple[Value, Value, Value]:
    """The uint8 result of a quantize as int8, 128 lower: uint8 x int8 multiplies twice as fast as uint8 x uint8.

    Ops that move its elements, before or after the quantize, are emitted after it: else the engine would quantize to
    uint8 before them, and to int8 once more after them. The result of another kernel stays uint8, as nothing faster
    turns it into int8.
    """
    quantize, moves, node = None, [], integers.producer
    while node is not None and (
        node.kind in _MOVES or (quantize is None and node.kind == "quantize" and _is_uint8(node))
    ):
        if node.kind == "quantize":
            quantize = node
        else:
            moves.append(node)
        source, node = node.input, node.input.producer
    if quantize is None:
        return integers, scale, zero_point
    own, read = (_zero_point_as_int8(op, value) for value in (quantize.required("zero_point"), zero_point))
    lower = op.quantize(source, quantize.required("scale"), own)
    for move in reversed(moves):
        lower = op.graph.emit(move, lower, *move.operands[1:], at=op.at)
    return lower, scale, read


def _zero_point_as_int8(op: Builder, zero_point: Value) -> Value:
    stored = op.graph.constant(zero_point)
    assert stored is not None  # as checked
    return op.constant((stored.to(torch.int16) - _OFFSET).to(torch.int8))


def _matmul_pattern(op: Recorder, a: str, b: str) -> Pattern:
    return op.matmul(a, b)


def _product_to_float(op: Builder, m: Match, signed: bool) -> Value:
    """A product of two activations whose result is read in float."""
    a, a_scale, a_zero_point, *right = _sides(m.root)
    b, b_scale, b_zero_point = _as_int8(op, *right) if signed else right
    return op("com.microsoft.MatMulIntegerToFloat", a, b, a_scale, b_scale, a_zero_point, b_zero_point)


def in_integers(signed: bool) -> Sequence[Rule]:
    """Ops whose result is quantized, and adds.

    signed: the right side of a product of activations in int8, where that is faster and does not saturate.
    """
    qlinear = partial(_qlinear, signed=signed)
    return (
        Rule("qlinear-add", _add_pattern, _qlinear_add),
        Rule("qlinear", _quantized, qlinear, check=lambda m: qlinear_op(m.root) is not None),
    )


def in_floats(signed: bool) -> Rule:
    """Products of two activations whose result is read in float; applied after `in_integers`, which has the others."""
    return Rule("product-to-float", _matmul_pattern, partial(_product_to_float, signed=signed),
                check=lambda m: reads_uint8(m.root))  # fmt: skip
