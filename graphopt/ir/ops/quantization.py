"""Scales, and the way from floats to integers and back."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.axes import NodeAxes, Unclear, unrelated
from graphopt.ir.ops.declaration import op


@op(flops=0, axes=unrelated, results=("scale", "zero_point"))
def choose_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (float32 scalar) and zero point (uint8 scalar) that cover x at run time (ONNX
    DynamicQuantizeLinear)."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).round().clamp(0, 255).to(torch.uint8)


@op(flops=0, axes=unrelated)
def row_scale(x: Tensor, *, largest: float = 127.0) -> Tensor:
    """The scale (float32, (..., 1)) at which the largest magnitude of each row of x, at run time, is `largest`.

    A row lies along the last axis; one of zeros gets scale 1.
    """
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _axes(node: NodeAxes) -> None:
    if node.attributes.get("block"):
        raise Unclear("axis_in_blocks")
    node.broadcast(node.x, node.y)
    for parameter in node.given[1:]:
        if node.rank(parameter) == 1 and node.attributes["axis"] is not None:
            node.same(parameter, 0, node.y, node.attributes["axis"])


@op(flops=0, axes=_axes)
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int | None = None, bits: int = 8
) -> Tensor:
    """round(x / scale) + zero_point, saturated to the zero point's type (int8 without one).

    scale: one, a vector along axis, or one for each row (..., 1). bits: of int8 and uint8, how many are used: with 4,
    it saturates to -8..7, or to 0..15. A zero point of float8 is 0 and gives that type: the nearest of its numbers,
    saturated too (ONNX QuantizeLinear).
    """
    dtype = torch.int8 if zero_point is None else zero_point.dtype
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max
        return (x / _along(scale, x, axis)).clamp(-most, most).to(dtype)
    steps = (x / _along(scale, x, axis)).round()
    if zero_point is not None:
        steps = steps + _along(zero_point, x, axis)
    return steps.clamp(*integer_range(dtype, bits)).to(dtype)


def integer_range(dtype: torch.dtype, bits: int = 8) -> tuple[int, int]:
    """The least and the largest integer of a dtype; of `bits` where the dtype has 8."""
    info = torch.iinfo(dtype)
    return (info.min >> (8 - bits), info.max >> (8 - bits)) if info.bits == 8 else (info.min, info.max)


@op(flops=0, axes=_axes)
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    block: int = 0,
    bits: int = 8,
) -> Tensor:
    """(x - zero_point) · scale in float32; per slice of axis when scale is a vector, per row when it is (..., 1).

    With a block, scale and zero_point have the rank of x, and one entry for each `block` entries of x along axis.
    bits: how many bits of x (int8 or uint8) are used, so that it may be stored in as many; it changes no number.
    """
    steps = x.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, x, axis, block).float()
    return steps * _along(scale, x, axis, block)


def _along(parameter: Tensor, x: Tensor, axis: int | None, block: int = 0) -> Tensor:
    """A scale or zero point in a shape that is broadcast to x: one an entry, a slice of axis, or a block along it."""
    if axis is None or parameter.dim() == 0:
        return parameter
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])  # the last may be cut short
    return parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
