"""Int8 ops on onnxruntime: uint8 x int8 kernels, and islands of operators that stay in integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from graphopt.backends.onnxruntime import (
    conv as onnxruntime_conv,
)
from graphopt.backends.onnxruntime import (
    conv_shallow as onnxruntime_conv_shallow,
)
from graphopt.backends.onnxruntime import (
    linear_int8 as onnxruntime_linear_int8,
)
from graphopt.backends.onnxruntime.linear import Rows
from graphopt.dialects.onnx import export as onnx_export
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.qdq.regions import is_global
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule

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

At 8x12x128x128 on a core with VNNI, QLinearMatMul took 0.5 to 0.8 of MatMul's time, with int8 on its right (as long
with uint8), but QLinearSoftmax nine times Softmax's: a softmax stays float unless it is asked for by name.
"""

_HALF = 128
_MOVES = ("reshape", "transpose", "squeeze", "unsqueeze")
"""Ops that the engine itself moves behind a quantize."""


def _add_pattern(op: Recorder, a: str, a_scale: str, a_zero_point: str, b: str, b_scale: str, b_zero_point: str,
                 y_scale: str, y_zero_point: str) -> Pattern:  # fmt: skip
    return op.add_int8(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)


def _qlinear_add(op: Builder, m: Match) -> Value:
    """The contrib kernel adds without leaving int8."""
    return op("com.microsoft.QLinearAdd", m.a, m.a_scale, m.a_zero_point, m.b, m.b_scale, m.b_zero_point,
              m.y_scale, m.y_zero_point)  # fmt: skip


def _quantized(op: Recorder, x: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(x, scale, zero_point)


def island(quantize: Node) -> Node | None:
    """The op of QLINEAR whose result a quantize alone reads, in the form that its operator computes."""
    op = quantize.input.producer
    if op is None or op.kind not in QLINEAR or op.result.only_user is None:
        return None
    if op.kind == "mean" and not is_global(op):
        return None
    return op if reads_u8(op) and _is_u8(quantize) else None


def promised(graph: Graph) -> Mapping[str, Sequence[Node]]:
    """The sites that are to have a kernel for integers, by op; matmuls with a float result share that of linears."""
    found: dict[str, list[Node]] = defaultdict(list)
    closed = [op for op in map(island, graph.sites("quantize")) if op is not None]
    for site in [*graph.sites("linear_int8", "conv_int8", "add_int8"), *closed]:
        found[site.kind].append(site)
    found["linear_int8"] += [one for one in graph.sites("matmul") if reads_u8(one) and one not in closed]
    return found


def reads_u8(op: Node) -> bool:
    """Whether all operands of an op are dequantized from uint8, by stored scales for all."""
    makers = [value.producer for value in op.operands if value is not None]
    return all(one is not None and one.kind == "dequantize" and _is_u8(one) and one.input.dtype is torch.uint8
               for one in makers)  # fmt: skip


def _is_u8(node: Node) -> bool:
    """Whether the scale of a quantize or dequantize is stored and for all, and so its zero point, in uint8."""
    scale, zero_point = node.required("scale"), node.operand("zero_point")
    stored = scale.is_constant and zero_point is not None and zero_point.is_constant
    return stored and scale.rank == 0 and zero_point is not None and zero_point.dtype is torch.uint8


def _qlinear(op: Builder, m: Match, signed: bool) -> Value:
    """One operator computes without leaving integers."""
    site = island(m.root)
    assert site is not None  # checked
    sides = _sides(site)
    result: tuple[Value, ...] = (m.scale, m.zero_point)
    domain = "com.microsoft"
    given = site.attributes
    attributes: dict[str, Any] = {}
    match site.kind:
        case "matmul":
            sides, domain = [*sides[:3], *(_signed(op, *sides[3:]) if signed else sides[3:])], "onnx"
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
    """Steps, scale and zero point of each operand; all are dequantized."""
    makers = [value.producer for value in op.operands if value is not None]
    return [one.required(name) for one in makers if one is not None for name in OPS["dequantize"].operands]


def _signed(op: Builder, steps: Value, scale: Value, zero_point: Value) -> tuple[Value, Value, Value]:
    """What a quantize makes, 128 lower in int8: uint8 x int8 multiplies twice as fast as uint8 x uint8.

    What moves it comes behind, floats included: the engine would quantize to uint8 before, and to int8 once more after.
    The result of another kernel stays uint8, as that has no faster way to int8.
    """
    maker, moves, node = None, [], steps.producer
    while node is not None and (node.kind in _MOVES or (maker is None and node.kind == "quantize" and _is_u8(node))):
        if node.kind == "quantize":
            maker = node
        else:
            moves.append(node)
        source, node = node.input, node.input.producer
    if maker is None:
        return steps, scale, zero_point
    made, read = (_lower(op, value) for value in (maker.required("zero_point"), zero_point))
    lower = op.quantize(source, maker.required("scale"), made)
    for move in reversed(moves):
        lower = op.graph.emit(move, lower, *move.operands[1:], at=op.at)
    return lower, scale, read


def _lower(op: Builder, zero_point: Value) -> Value:
    stored = op.graph.constant(zero_point)
    assert stored is not None  # as checked
    return op.constant((stored.to(torch.int16) - _HALF).to(torch.int8))


def _matmul_pattern(op: Recorder, a: str, b: str) -> Pattern:
    return op.matmul(a, b)


def _product_to_float(op: Builder, m: Match, signed: bool) -> Value:
    """Two activations, and a result that is read in float."""
    a, a_scale, a_zero_point, *right = _sides(m.root)
    b, b_scale, b_zero_point = _signed(op, *right) if signed else right
    return op("com.microsoft.MatMulIntegerToFloat", a, b, a_scale, b_scale, a_zero_point, b_zero_point)


def stages(signed: bool = True) -> Sequence[Sequence[Rule | Choice]]:
    """For one graph. signed: the right side of a product of activations in int8, where that is faster and fits."""
    to_integers = (onnxruntime_linear_int8.to_integers(Rows()),)
    to_float = onnxruntime_linear_int8.DYNAMIC, onnxruntime_linear_int8.STATIC
    convs = (onnxruntime_conv.PADDING,), (onnxruntime_conv_shallow.SHALLOW,), (onnxruntime_conv.SMALL,)
    islands = (
        onnxruntime_conv.PLAIN,
        onnxruntime_linear_int8.TO_FLOAT,
        Rule("qlinear-add", _add_pattern, _qlinear_add),
        Rule("qlinear", _quantized, partial(_qlinear, signed=signed), check=lambda m: island(m.root) is not None),
        onnx_export.DYNAMIC_QUANTIZE,
    )
    product = partial(_product_to_float, signed=signed)
    # Behind the islands: what is left has a result in float.
    products = (Rule("product-to-float", _matmul_pattern, product, check=lambda m: reads_u8(m.root)),)
    return to_integers, to_float, *convs, islands, products
