"""Int8 linears on onnxruntime: activations quantized in one kernel or two, and results in floats or in integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.backends.onnxruntime import weights as onnxruntime_weights
from graphopt.backends.onnxruntime.linear import Rows, linear_int8, stored_tensor
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.qdq.numbers import saturates
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule, scalar


def _stored_kn(op: Builder, weight: Value) -> Value:
    """The engine's kernels read weights as (in, out); the constant is laid out so once, here."""
    tensor = op.graph.constant(weight)
    if tensor is None:
        raise Declined("the int8 weight is not constant")
    return op.constant(tensor.t().contiguous())


# --- results in floats ---------------------------------------------------------------------------------------------


def _is_dynamic(m: Match) -> bool:
    quantize, ranges = m.x.producer, m.scale.producer
    kinds = [None if node is None else node.kind for node in (quantize, ranges)]
    return kinds == ["quantize", "choose_qparams"]


def _is_static(m: Match) -> bool:
    quantize = m.x.producer
    return quantize is not None and quantize.kind == "quantize" and m.scale.is_constant


def _on_one_input(m: Match) -> list[Node]:
    """A dynamic linear with all that read the same integers, and what makes those."""
    return [m.scale.producer, m.x.producer, *m.x.users]


def _dynamic_matmul(op: Builder, m: Match) -> Value:
    """One kernel quantizes and multiplies, where nobody else needs the quantized value."""
    if len(m.scale.users) != 2 or len(m.zero_point.users) != 2:  # quantize and this linear
        raise Declined("several linears share the quantized input")
    x = m.x.producer.input
    return op("com.microsoft.DynamicQuantizeMatMul", x, _stored_kn(op, m.weight), m.weight_scale, None, m.bias)


def _integer_to_float(op: Builder, m: Match) -> Value:
    """One quantized input serves several of these."""
    weight = _stored_kn(op, m.weight)
    return op("com.microsoft.MatMulIntegerToFloat", m.x, weight, m.scale, m.weight_scale, m.zero_point, None, m.bias)


def _shared_integers(op: Builder, m: Match) -> Value:
    """One quantized input serves several linears; of one alone the engine would make a DynamicQuantizeMatMul again."""
    if len(m.x.users) == 1:
        raise Declined("it is alone on its input")
    return _integer_to_float(op, m)


def _matmul_nbits(op: Builder, m: Match) -> Value:
    """The kernel rounds its float rows itself, by block: for one row at a time, as a decoder multiplies them."""
    weight, scale = op.graph.constant(m.weight), op.graph.constant(m.weight_scale)
    if weight is None or scale is None:
        raise Declined("the int8 weight is not constant")
    blocks, (out, into) = onnxruntime_weights.in_blocks(weight, scale), weight.shape
    return onnxruntime_weights.emit_matmul(op, m.x.producer.input, blocks, (out, into), m.bias)


# --- results in integers -------------------------------------------------------------------------------------------


def _quantized(op: Recorder, y: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(y, scale, zero_point)


def _made_by(quantize: Node) -> tuple[Node, ...]:
    """The linear whose result a quantize alone reads, with all but its rows stored, and a relu or clip behind it.

    Empty where there is none, where saturation does not do the work of what is between, or where another op reads the
    integers: a product of two activations wants those on its right 128 lower. In topological order.
    """
    scale, zero_point = (scalar(quantize.graph, quantize.operand(name)) for name in ("scale", "zero_point"))
    node, between = quantize.input.producer, list[Node]()
    if node is not None and node.kind in ("relu", "clip"):
        between, node = [node], node.input.producer
    if node is None or node.kind != "linear_int8" or scale is None or zero_point is None:
        return ()
    x, *parameters = node.operands
    stored = all(value.is_constant for value in parameters if value is not None)
    alone = all(one.result.only_user is not None for one in (node, *between))
    rows = x is not None and (x.rank or 0) > 1 and quantize.result.dtype is torch.uint8
    read = all(user.kind in ("linear_int8", "conv_int8", "add_int8") for user in quantize.result.users)
    fits = stored and alone and rows and read and all(saturates(one, scale, zero_point) for one in between)
    return (node, *between) if fits else ()


_ROOM = 2**30
"""Steps that a bias may have where the sums of products, in int32, begin at it."""


def quantized_gemm(
    op: Builder, x: Sequence[Value | None], weight: Tensor, scales: Tensor, bias: Tensor | None, y: Sequence[Value]
) -> Value:
    """A product whose result is rounded inside.

    x: (rows, in) of uint8, its scale and zero point; y: those of the result. weight: (out, in) of int8, with a scale
    for each output; bias: of as many, in int32 steps.
    """
    stored = weight.t().contiguous(), scales, torch.zeros_like(scales, dtype=torch.int8)  # as many, or it is refused
    steps = None if bias is None else op.constant(bias)
    return op("com.microsoft.QGemm", *x, *map(op.constant, stored), steps, *y)


def to_integers(rows: Rows) -> Choice:
    """A linear in front of a quantize: its result in floats, or rounded inside the product.

    Nothing is written in floats then, but of the engine's products this one is the slowest: with a relu between, 1.09
    times as fast at 128x64x128 on a core with AVX2, and 0.95 times at 1024x384x1536.
    """

    def gemm(op: Builder, m: Match) -> Value:
        linear = _made_by(m.root)[0]
        x, (scale, zero_point) = linear.input, linear.operands[1:3]
        weight, scales = (stored_tensor(linear, linear.required(name)) for name in ("weight", "weight_scale"))
        bias, step = linear.bias, stored_tensor(linear, scale)
        steps = None if bias is None else onnxruntime_weights.bias_steps(stored_tensor(linear, bias), step, scales)
        if steps is not None and steps.long().abs().max() > _ROOM:
            raise Declined("its bias, in steps of its products, leaves them no room in 32 bits")
        out, into = weight.shape
        flat, result = (rows.flat(op, x, into), scale, zero_point), (m.scale, m.zero_point)
        return rows.back(op, quantized_gemm(op, flat, weight, scales, steps, result), x, out)

    return Choice(
        "linear-to-integers",
        _quantized,
        {"MatMulIntegerToFloat": None, "QGemm": gemm},
        check=lambda m: bool(_made_by(m.root)),
        around=lambda m: (*_made_by(m.root), m.root),
    )


DYNAMIC = Choice(
    "dynamic-linear",
    linear_int8,
    {
        "DynamicQuantizeMatMul": _dynamic_matmul,
        "MatMulIntegerToFloat": _shared_integers,
        "MatMulNBits": _matmul_nbits,
    },
    check=_is_dynamic,
    around=_on_one_input,
)
STATIC = Choice(
    "static-linear",
    linear_int8,
    {"MatMulIntegerToFloat": _integer_to_float, "MatMulNBits": _matmul_nbits},
    check=_is_static,
    around=lambda m: [m.x.producer, *m.x.users],
)
TO_FLOAT = Rule("matmul-integer-to-float", linear_int8, _integer_to_float)
