"""linear, conv and add on integers, with their scales: what targets that read no quantize and dequantize run."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import locked
from graphopt.ir.ops.convolution import conv
from graphopt.ir.ops.declaration import op
from graphopt.ir.ops.linear import weight_flops
from graphopt.ir.ops.quantization import dequantize, quantize


@op(flops=weight_flops, axes=locked)
def linear_int8(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """linear of uint8 x and int8 weight (out, in) with a scale per row; float32 out.

    scale: of x, a scalar, or (..., 1), one for each of its rows; zero_point: a scalar.
    """
    y = F.linear(x.float() - zero_point.float(), weight.float()) * (scale * weight_scale)
    return y if bias is None else y + bias


@op(flops=weight_flops, axes=locked)
def conv_int8(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> Tensor:
    """conv of uint8 x and int8 weight, a scale per output channel, quantized to uint8 by y_scale and y_zero_point."""
    y = conv(
        dequantize(x, scale, zero_point), dequantize(weight, weight_scale, axis=0), bias,
        stride=stride, padding=padding, dilation=dilation, groups=groups,
    )  # fmt: skip
    return quantize(y, y_scale, y_zero_point)


@op(flops=0, axes=locked)
def add_int8(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor,
    y_scale: Tensor, y_zero_point: Tensor,
) -> Tensor:  # fmt: skip
    """add of two uint8 values, quantized to uint8 by y_scale and y_zero_point."""
    return quantize(dequantize(a, a_scale, a_zero_point) + dequantize(b, b_scale, b_zero_point), y_scale, y_zero_point)
