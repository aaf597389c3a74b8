"""Integer weights with zero points on onnxruntime, where activations are integers too.

Models that came in quantized have them; graphopt's own int8 weights are symmetric.
"""

from __future__ import annotations

import torch

from graphopt.backends.onnxruntime.linear_int8 import bias_steps
from graphopt.backends.onnxruntime.weight_only import is_stored
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule


def _asymmetric_linear(
    op: Recorder, x: str, scale: str, zero_point: str, w: str, w_scale: str, w_zero_point: str, bias: str | None = None
) -> Pattern:
    read = op.dequantize(x, scale, zero_point, bits=8, bind="input")
    return op.linear(read, op.dequantize(w, w_scale, w_zero_point, bind="weight"), bias)


def _asymmetric_conv(
    op: Recorder, x: str, scale: str, zero_point: str, w: str, w_scale: str, w_zero_point: str, y_scale: str,
    y_zero_point: str, bias: str | None = None,
) -> Pattern:  # fmt: skip
    read = op.dequantize(x, scale, zero_point, bits=8, bind="input")
    conv = op.conv(read, op.dequantize(w, w_scale, w_zero_point, bind="weight"), bias, bind="conv")
    return op.quantize(conv, y_scale, y_zero_point, bits=8)


def _is_asymmetric(m: Match) -> bool:
    """Whether a stored weight has zero points for all or for each output, and activations are uint8 with one scale."""
    one_scale = m.scale.rank == 0 and m.x.dtype is torch.uint8 and not m.x.is_constant
    attributes = m.weight.attributes
    whole = attributes["axis"] in (None, 0) and not attributes["block"] and attributes["bits"] == 8
    return one_scale and whole and is_stored(m.weight) and m.w.dtype in (torch.int8, torch.uint8)


def _integer_to_float(op: Builder, m: Match) -> Value:
    """The kernel takes one zero point, or one for each output."""
    weight = op.graph.constant(m.w)
    assert weight is not None
    operands = m.x, op.constant(weight.t().contiguous()), m.scale, m.w_scale, m.zero_point, m.w_zero_point, m.bias
    return op("com.microsoft.MatMulIntegerToFloat", *operands)


def _qlinear_conv(op: Builder, m: Match) -> Value:
    """All kernels for convolutions take one zero point for the whole weight."""
    graph = op.graph
    zero_points, scale, weight_scale = (graph.constant(one) for one in (m.w_zero_point, m.scale, m.w_scale))
    bias = graph.constant(m.bias) if m.bias is not None else None
    if zero_points is None or scale is None or weight_scale is None or (m.bias is not None and bias is None):
        raise Declined("scales_or_bias_computed")
    if m.y_zero_point.dtype is not torch.uint8 or m.y_scale.rank != 0:
        raise Declined("output_not_uint8")
    if bool((zero_points != zero_points.flatten()[0]).any()):
        raise Declined("several_zero_points")
    site = m.conv.attributes
    return op(
        "onnx.QLinearConv", m.x, m.scale, m.zero_point, m.w, m.w_scale, m.w_zero_point, m.y_scale, m.y_zero_point,
        None if bias is None else op.constant(bias_steps(bias, scale, weight_scale)),
        strides=site["stride"], pads=site["padding"], dilations=site["dilation"], group=site["groups"],
    )  # fmt: skip


RULES = (
    Rule("matmul-integer-with-zero-points", _asymmetric_linear, _integer_to_float, shared=True, check=_is_asymmetric),
    Rule("qlinear-conv-with-zero-points", _asymmetric_conv, _qlinear_conv, shared=True, check=_is_asymmetric),
)
