"""Floats to integers and back: weights symmetric and signed, activations asymmetric and unsigned."""

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below this a scale is subnormal: it has few bits left, and engines flush it to zero."""


def quantize_weight(weight: Tensor, *, bits: int = 8, axis: int | None = 0) -> tuple[Tensor, Tensor]:
    """Round a weight to signed integers, symmetric about zero, with one scale per slice of `axis`.

    weight: float, any shape; bits: 2 to 8; axis: None for one scale per tensor. Returns integers (int8, same shape,
    within ±(2**(bits-1) - 1)) and scales (float32, shape (weight.shape[axis],) or (), > 0, in units of weight per
    step). A slice of zeros, or one whose scale would be subnormal in float32, gets scale 1 and integers 0.
    Error per element is at most scale / 2, but for the rounding of float32. Zero stays zero. Halves go to even.
    The result depends on values only, never on memory layout: equal weights give equal bits.
    Raises ValueError on bits out of range, and on NaN or infinity (in float32), naming the first index.
    Source: Jacob et al. 2018, section 2.1, with zero point 0.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
    weight = weight.detach().to(torch.float32).contiguous()
    require_finite(weight, "weight")
    limit = 2 ** (bits - 1) - 1
    scale = _largest_magnitude(weight, axis) / limit
    scale = torch.where(scale < _SMALLEST_SCALE, 1.0, scale)
    steps = torch.round(weight / _along(scale, axis, weight.dim()))
    return steps.clamp_(-limit, limit).to(torch.int8), scale


def dequantize_weight(q: Tensor, scale: Tensor, axis: int | None = 0) -> Tensor:
    """The weight that integers and scales stand for: q * scale.

    q: int8, any shape; scale: float32, shape (q.shape[axis],), or () with axis None. Returns float32, shape of q.
    Source: ONNX DequantizeLinear, with zero point 0.
    """
    return q.to(torch.float32) * _along(scale, axis, q.dim())


def activation_parameters(low: Tensor | float, high: Tensor | float) -> tuple[float, int]:
    """Scale and zero point that map the range [low, high] onto the unsigned integers 0..255, asymmetric.

    low, high: numbers or tensors of one element. The range is first widened to hold 0, so that 0 is exact.
    Returns the scale (a float32 value, > 0, in units of activation per step) and the zero point (0 to 255).
    A range that is only 0, or so narrow that its scale would be subnormal in float32, gets scale 1 and zero point 0.
    Error per element within the range is at most scale / 2, but for the rounding of float32.
    Raises ValueError when low > high, or when an end or the width is not finite in float32.
    Source: Jacob et al. 2018, section 3; the arithmetic, in float32, is that of ONNX DynamicQuantizeLinear.
    """
    ends = torch.tensor([float(low), float(high)], dtype=torch.float32)
    if float(low) > float(high):
        raise ValueError(f"the range [{float(low)}, {float(high)}] has low above high")
    bottom, top = ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)
    if not bool(torch.isfinite(top - bottom)):
        raise ValueError(f"the range [{float(low)}, {float(high)}] is not finite in float32")
    scale = (top - bottom) / 255.0
    if float(scale) < _SMALLEST_SCALE:
        return 1.0, 0
    return float(scale), int(torch.round(-bottom / scale).clamp(0, 255))


def dynamic_parameters(x: Tensor) -> tuple[float, int]:
    """Scale and zero point of the range that `x` itself spans: `activation_parameters` of its minimum and maximum.

    x: float, any shape, at least one element. Returns as `activation_parameters`, and a tensor of zeros gets scale 1.
    Raises ValueError on NaN or infinity, naming the first index, and on an empty tensor.
    Source: ONNX DynamicQuantizeLinear; its text leaves the scale of a tensor of zeros open.
    """
    if x.numel() == 0:
        raise ValueError(f"x has no elements: shape {list(x.shape)}")
    require_finite(x, "x")
    return activation_parameters(*torch.aminmax(x.detach()))


def quantize_activation(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Divide by the scale, round halves to even, add the zero point, saturate to 0..255.

    x: float, any shape, computed in float32; scale: > 0; zero_point: 0 to 255. Returns uint8, same shape.
    Infinity saturates; NaN has no defined result. Source: ONNX QuantizeLinear.
    """
    steps = torch.round(x.to(torch.float32) / scale)
    return steps.add_(zero_point).clamp_(0, 255).to(torch.uint8)


def dequantize_activation(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """The activation that integers stand for: (q - zero_point) * scale.

    q: uint8, any shape; scale, zero_point: as given to `quantize_activation`. Returns float32, same shape.
    Source: ONNX DequantizeLinear.
    """
    return (q.to(torch.float32) - zero_point) * scale


def _largest_magnitude(weight: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return weight.abs().amax()
    others = [d for d in range(weight.dim()) if d != axis % weight.dim()]
    return weight.abs().amax(dim=others) if others else weight.abs()


def _along(scale: Tensor, axis: int | None, dims: int) -> Tensor:
    """The scale, shaped to broadcast along `axis` of a tensor with `dims` axes."""
    if axis is None:
        return scale
    shape = [1] * dims
    shape[axis] = -1
    return scale.reshape(shape)
