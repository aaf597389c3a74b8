"""Int8 linears on onnxruntime: activations quantized in one kernel or two, and results in floats or in integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.backends.onnxruntime.linear import stored_tensor
from graphopt.backends.onnxruntime.rows import from_rows, to_rows
from graphopt.backends.onnxruntime.weight_only import emit_matmul_nbits, in_blocks
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.qdq.numbers import fits_integers, saturates
from graphopt.ir.qdq.regions import has_row_scale
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule, scalar
from graphopt.lowering import row_scales
from graphopt.lowering.row_scales import linear_int8


def _transposed(op: Builder, weight: Value) -> Value:
    """The weight as (in, out), which the engine's kernels read: transposed here, not at each run."""
    tensor = op.graph.constant(weight)
    if tensor is None:
        raise Declined("int8_weight_computed")
    return op.constant(tensor.t().contiguous())


# --- results in floats ---------------------------------------------------------------------------------------------


def _is_scaled_by(m: Match, op: str) -> bool:
    """Whether the activation is quantized right in front, with a scale that an op finds at each run."""
    kinds = [None if node is None else node.kind for node in (m.x.producer, m.scale.producer)]
    return kinds == ["quantize", op]


def _is_static(m: Match) -> bool:
    quantize = m.x.producer
    return quantize is not None and quantize.kind == "quantize" and m.scale.is_constant


def _on_one_input(m: Match) -> list[Node]:
    """A dynamic linear, all others that read the same integers, and the nodes that make those."""
    return [m.scale.producer, m.x.producer, *m.x.users]


def _dynamic_matmul(op: Builder, m: Match) -> Value:
    """One kernel quantizes and multiplies, where no other node needs the quantized value."""
    if len(m.scale.users) != 2 or len(m.zero_point.users) != 2:  # quantize and this linear
        raise Declined("quantized_input_shared")
    x = m.x.producer.input
    return op("com.microsoft.DynamicQuantizeMatMul", x, _transposed(op, m.weight), m.weight_scale, None, m.bias)


def _integer_to_float(op: Builder, m: Match) -> Value:
    """Several of these may share one quantized input."""
    weight = _transposed(op, m.weight)
    return op("com.microsoft.MatMulIntegerToFloat", m.x, weight, m.scale, m.weight_scale, m.zero_point, None, m.bias)


def _shared_integers(op: Builder, m: Match) -> Value:
    """For several linears on one quantized input; of one alone the engine would make a DynamicQuantizeMatMul again."""
    if len(m.x.users) == 1:
        raise Declined("quantized_input_not_shared")
    return _integer_to_float(op, m)


def _rows_to_float(op: Builder, m: Match) -> Value:
    """The kernel takes one scale for all rows: it gets 1, and a Mul behind it those of the rows."""
    operands = m.x, _transposed(op, m.weight), row_scales.one(op), m.weight_scale, m.zero_point
    product = op("com.microsoft.MatMulIntegerToFloat", *operands)
    return row_scales.rescaled(op, product, m.scale, m.bias)


def _matmul_nbits(op: Builder, m: Match) -> Value:
    """The kernel quantizes its float input itself, by block: fast for one row at a time, as a decoder multiplies."""
    weight, scale = op.graph.constant(m.weight), op.graph.constant(m.weight_scale)
    if weight is None or scale is None:
        raise Declined("int8_weight_computed")
    blocks, (out, into) = in_blocks(weight, scale), weight.shape
    return emit_matmul_nbits(op, _within_range(op, m), blocks, (out, into), m.bias)


def _within_range(op: Builder, m: Match) -> Value:
    """The floats that are quantized, without what a stored scale cuts off: they are not read in integers here."""
    x: Value = m.x.producer.input
    scale, zero_point = (scalar(op.graph, value) for value in (m.scale, m.zero_point))
    if scale is None or zero_point is None or m.x.dtype is None:
        return x
    limits = torch.iinfo(m.x.dtype)
    return op.clip(x, low=(limits.min - zero_point) * scale, high=(limits.max - zero_point) * scale)


# --- results in integers -------------------------------------------------------------------------------------------


def _quantized(op: Recorder, y: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(y, scale, zero_point, bits=8)


def _linear_before(quantize: Node) -> tuple[Node, ...]:
    """The linear whose result only a quantize reads, with stored parameters, and a relu or clip between the two.

    In topological order. Empty where there is none, where the quantize's saturation does not do what the relu or clip
    does, or where an op reads the integers that wants another form of them: a product of two activations wants its
    right side in int8, 128 lower.
    """
    scale, zero_point = (scalar(quantize.graph, quantize.operand(name)) for name in ("scale", "zero_point"))
    linear, clips = quantize.input.producer, list[Node]()
    if linear is not None and linear.kind in ("relu", "clip"):
        clips, linear = [linear], linear.input.producer
    if linear is None or linear.kind != "linear_int8" or scale is None or zero_point is None:
        return ()
    x, *parameters = linear.operands
    fits = (
        all(value.is_constant for value in parameters if value is not None)
        and all(node.result.only_user is not None for node in (linear, *clips))
        and all(saturates(clip, scale, zero_point) for clip in clips)
        and x is not None and (x.rank or 0) > 1
        and quantize.result.dtype is torch.uint8
        and all(user.kind in ("linear_int8", "conv_int8", "add_int8") for user in quantize.result.users)
    )  # fmt: skip
    return (linear, *clips) if fits else ()


def bias_steps(bias: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias in steps of its products, scale * weight_scale (ONNX QLinearConv): int32, of the shape of `bias`.

    Raises Declined where int32 has no room for it.
    """
    if not fits_integers(bias, scale, weight_scale):
        raise Declined("bias_too_large")
    return (bias.double() / (scale.double() * weight_scale.double())).round().to(torch.int32)


def quantized_gemm(
    op: Builder, x: Sequence[Value | None], weight: Tensor, scales: Tensor, bias: Tensor | None, y: Sequence[Value]
) -> Value:
    """QGemm with a uint8 result, (rows, out).

    x: uint8 (rows, in), its scale and zero point. weight: int8 (out, in); scales: float32 (out,); bias: int32 (out,),
    in steps of scale * weight scale. y: scale and zero point of the result.
    """
    zeros = torch.zeros_like(scales, dtype=torch.int8)  # the kernel refuses one zero point for many scales
    stored = weight.t().contiguous(), scales, zeros
    steps = None if bias is None else op.constant(bias)
    return op("com.microsoft.QGemm", *x, *map(op.constant, stored), steps, *y)


def _gemm(op: Builder, m: Match) -> Value:
    """Nothing is written in floats, but of the engine's products this one is the slowest.

    With a relu between, 1.09 times as fast at 128x64x128 on a core with AVX2, and 0.95 times at 1024x384x1536.
    """
    linear = _linear_before(m.root)[0]
    x, (scale, zero_point) = linear.input, linear.operands[1:3]
    weight, scales = (stored_tensor(linear, linear.required(name)) for name in ("weight", "weight_scale"))
    bias, step = linear.bias, stored_tensor(linear, scale)
    steps = None if bias is None else bias_steps(stored_tensor(linear, bias), step, scales)
    out, into = weight.shape
    rows, result = (to_rows(op, x, into), scale, zero_point), (m.scale, m.zero_point)
    return from_rows(op, quantized_gemm(op, rows, weight, scales, steps, result), x, out)


TO_INTEGERS = Choice(
    "linear-to-integers",
    _quantized,
    {"MatMulIntegerToFloat": None, "QGemm": _gemm},
    check=lambda m: bool(_linear_before(m.root)),
    around=lambda m: (*_linear_before(m.root), m.root),
)
"""A linear in front of a quantize: its result in floats, or rounded inside the product."""
DYNAMIC = Choice(
    "dynamic-linear",
    linear_int8,
    {
        "DynamicQuantizeMatMul": _dynamic_matmul,
        "MatMulIntegerToFloat": _shared_integers,
        "MatMulNBits": _matmul_nbits,
    },
    check=lambda m: _is_scaled_by(m, "choose_qparams"),
    around=_on_one_input,
    lossy=frozenset({"MatMulNBits"}),
)
STATIC = Choice(
    "static-linear",
    linear_int8,
    {"MatMulIntegerToFloat": _integer_to_float, "MatMulNBits": _matmul_nbits},
    check=_is_static,
    around=lambda m: [m.x.producer, *m.x.users],
    lossy=frozenset({"MatMulNBits"}),
)
def _opset(op: Builder) -> int:
    assert isinstance(op.graph, OnnxGraph)
    return op.graph.opset


def _in_blocks(op: Builder, m: Match) -> Value:
    """QuantizeLinear with one block a row: 0.6 to 0.9 of the time of a Div in front of one with the scale 1."""
    width, opset = (m.x.shape or (None,))[-1], _opset(op)
    if opset < 21 or not isinstance(width, int):
        raise Declined("rows_not_in_blocks", opset=opset)
    zero_points = op("onnx.Expand", m.zero_point, op("onnx.Shape", m.scale))
    return op("onnx.QuantizeLinear", m.x, m.scale, zero_points, axis=-1, block_size=width)


def _row_scale(op: Recorder, x: str) -> Pattern:
    return op.row_scale(x)


def _reduced(op: Builder, kind: str, x: Value) -> Value:
    if _opset(op) < 18:
        return op(kind, x, axes=(-1,), keepdims=1)
    return op(kind, x, op.constant(torch.tensor([-1])), keepdims=1)


def _step(op: Builder, m: Match, magnitude: Value) -> Value:
    """The scale at a row's largest magnitude: for a row of zeros a tiny one, not 1, at which the integers are the
    same."""
    least = op.constant(torch.tensor(torch.finfo(torch.float32).tiny))
    return op("onnx.Max", op.div(magnitude, op.constant(torch.tensor(m.root.attributes["largest"]))), least)


def _of_both_ends(op: Builder, m: Match) -> Value:
    """0.6 to 0.9 of the time of the maximum of Abs, which is written in between, at 8x128x1536 and 8x128x384."""
    high, low = (_reduced(op, f"onnx.{kind}", m.x) for kind in ("ReduceMax", "ReduceMin"))
    return _step(op, m, op("onnx.Max", high, op("onnx.Neg", low)))


def _of_magnitudes(op: Builder, m: Match) -> Value:
    """Fewer operators, for short inputs."""
    return _step(op, m, _reduced(op, "onnx.ReduceMax", op("onnx.Abs", m.x)))


ROW_SCALE = Choice("row-scale", _row_scale, {"ReduceMax, ReduceMin": _of_both_ends, "Abs": _of_magnitudes})
QUANTIZE_ROWS = Choice(
    "quantize-rows",
    row_scales.quantize,
    {"blocks": _in_blocks, "Div": row_scales.divided},
    check=lambda m: has_row_scale(m.root),
)
ROWS = Choice(
    "linear-of-rows",
    linear_int8,
    {"MatMulIntegerToFloat": _rows_to_float, "MatMulNBits": _matmul_nbits},
    check=lambda m: _is_scaled_by(m, "row_scale"),
    around=_on_one_input,
    lossy=frozenset({"MatMulNBits"}),
)
"""Activations with a scale for each row."""
TO_FLOAT = Rule("matmul-integer-to-float", linear_int8, _integer_to_float)
