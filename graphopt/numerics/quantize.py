"""Floats to integers: the grids that weights are rounded to, and the parameters of activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite

BLOCKS = (16, 32, 64, 128, 256)
"""Weights along the input axis that may share a scale: those that kernels for blocks take."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below this a scale is subnormal: it has few bits left, and engines flush it to zero."""

_LEAST_SHARE = 0.3
"""Of the full range, in a search: 2 bits want about 0.4, 4 bits 0.7, 8 bits 1."""

_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Those that a search begins with, besides 1."""

_FINER = (0.05, 0.025)
"""How far to either side of the best it then looks."""

_CHUNK = 2**19
"""Weights that are searched at once: few enough to stay in the cache through all shares."""


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take: (integer - zero point) * scale, for integers from low to high.

    Slices share a scale: those of an axis, or blocks of the last axis of a matrix, or all. Source: ONNX
    DequantizeLinear (with axis, and with block_size).
    """

    scale: Tensor
    """Float32, never 0, in units of weight per step: (), (weight.shape[axis],) or, for blocks, (out, in / block)."""
    zero_point: Tensor | None
    """Uint8, the shape of scale, within low to high; None: integers are int8, and 0 stands for 0."""
    low: int
    high: int
    axis: int | None
    """The axis with one scale per slice, the last one for blocks; None: one scale per tensor."""

    def round(self, weight: Tensor) -> Tensor:
        """The nearest integers (halves to even, then cut to low..high): int8 or uint8, contiguous.

        weight: float, the shape that the grid was fitted to; read in float32, and finite.
        """
        weight = weight.detach().to(torch.float32).contiguous()
        steps = self._sliced(weight) / self._along(self.scale, weight)
        steps.round_()
        if self.zero_point is not None:
            steps += self._along(self.zero_point, weight)
        steps.clamp_(self.low, self.high)
        return steps.to(torch.int8 if self.zero_point is None else torch.uint8).reshape(weight.shape)

    def values(self, integers: Tensor) -> Tensor:
        """The weight that integers stand for: float32, same shape."""
        steps = self._sliced(integers.to(torch.float32))
        if self.zero_point is not None:
            steps = steps - self._along(self.zero_point, integers)
        return (steps * self._along(self.scale, integers)).reshape(integers.shape)

    def expanded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (0 where there is none) of each weight: float32, the shape of weight."""
        zero_point = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.float()
        sliced = self._sliced(weight)
        scales, zeros = (self._along(one, weight).expand_as(sliced) for one in (self.scale, zero_point))
        return scales.reshape(weight.shape), zeros.reshape(weight.shape)

    def _sliced(self, weight: Tensor) -> Tensor:
        return weight.reshape(*self.scale.shape, -1) if self.scale.dim() == 2 else weight

    def _along(self, parameter: Tensor, weight: Tensor) -> Tensor:
        """Scale or zero point, shaped to broadcast over the sliced weight."""
        return parameter.unsqueeze(2) if parameter.dim() == 2 else _along(parameter, self.axis, weight.dim())


def fit(
    weight: Tensor,
    *,
    bits: int = 8,
    axis: int | None = 0,
    block: int | None = None,
    symmetric: bool = True,
    search: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """The grid that covers a weight, slice by slice.

    weight: float, any shape; bits: 2 to 8; axis: the axis with one scale per slice, None: one scale per tensor.
    block: for a matrix (out, in), one scale per `block` weights along `in`; one of `BLOCKS`, which divides `in`.
    symmetric: zero is the integer 0. Per axis and per tensor integers are within ±(2**(bits-1) - 1) and scales > 0; in
    blocks all of -2**(bits-1) .. 2**(bits-1) - 1 is used: the weight of largest magnitude is at the lower end, and the
    scale has the opposite sign of it. Otherwise integers are 0 to 2**bits - 1, over the range from the smallest to the
    largest weight, widened to hold 0: 0 is exact in every grid.
    search: take a share of that range, down to 0.3, with little squared error in each slice; what lies outside is cut
    off. Twelve scales make integers, each scale is then fitted to these by least squares, and the best stays: together,
    slices miss about what they do by the best of 36 scales as they are, or less.
    importance: float, at least 0, broadcast over weight: what a squared error counts in that search, such as the mean
    square of the input that the weight multiplies. Without search the error per weight is at most |scale| / 2, or
    |scale| for those that are nearly as large as a block's largest, with the other sign.
    A slice of zeros, or one whose scale would be subnormal in float32, gets scale 1 and so integers that mean 0.
    With 7 bits an unsigned 8-bit input times two weights stays within 16 bits (2 * 255 * 63 = 32130), so that x86
    without VNNI doesn't saturate. The result depends on values only, never on memory layout.
    Raises ValueError on bits or block out of range, and on NaN or infinity (in float32), naming the first index.
    Sources: Jacob et al. 2018, section 2.1; blocks: Frantar et al. 2023, section 5; search: Banner et al. 2019, and by
    importance, the diagonal of the layer's Hessian: Choi et al. 2017 (Towards the limit of network quantization).
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
    weight = weight.detach().to(torch.float32).contiguous()
    require_finite(weight, "weight")
    if block is not None:
        _require_divides(block, weight)
        axis, shape = -1, torch.Size([weight.shape[0], weight.shape[1] // block])
        slices = weight.reshape(-1, block)
    elif axis is None:
        slices, shape = weight.reshape(1, -1), torch.Size([])
    else:
        slices, shape = weight.movedim(axis, 0).reshape(weight.shape[axis], -1), torch.Size([weight.shape[axis]])
    half = 2 ** (bits - 1)
    low, high = (0, 2 * half - 1) if not symmetric else (-half if block else 1 - half, half - 1)
    below, above = slices.amin(1), slices.amax(1)
    if not symmetric:
        scale = (above.clamp(min=0) - below.clamp(max=0)) / high
    elif block is None:
        scale = torch.maximum(above, -below) / high
    else:
        scale = torch.where(above > -below, above, below) / low
    scale = _normal(scale)
    zero_point = torch.zeros_like(scale) if symmetric else torch.round(-below.clamp(max=0) / scale).clamp(0, high)
    if search:
        counts = None if importance is None else importance.to(torch.float32).expand_as(weight)
        if counts is not None:
            counts = (counts if axis is None or block else counts.movedim(axis, 0)).reshape(slices.shape)
        scale = _normal(_searched(slices, counts, scale, None if symmetric else zero_point, low, high))
    return Grid(scale.reshape(shape), None if symmetric else zero_point.to(torch.uint8).reshape(shape), low, high, axis)


def activation_parameters(low: Tensor | float, high: Tensor | float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point that map the range [low, high] onto the unsigned integers 0..2**bits - 1, asymmetric.

    low, high: numbers or tensors of one element. The range is first widened to hold 0, so that 0 is exact.
    Returns the scale (a float32 value, > 0, in units of activation per step) and the zero point (one of the integers).
    A range that is only 0, or so narrow that its scale would be subnormal in float32, gets scale 1 and zero point 0.
    Error per element within the range is at most scale / 2, but for the rounding of float32.
    Raises ValueError when low > high, or when an end or the width is not finite in float32.
    Source: Jacob et al. 2018, section 3; the arithmetic, in float32, is that of ONNX DynamicQuantizeLinear.
    """
    bottom, top = _widened(low, high)
    most = 2**bits - 1
    scale = (top - bottom) / most
    if float(scale) < _SMALLEST_SCALE:
        return 1.0, 0
    return float(scale), int(torch.round(-bottom / scale).clamp(0, most))


def largest(dtype: torch.dtype) -> float:
    """The magnitude that a range about zero is mapped onto: 127 of int8, the largest number of a float of 8 bits."""
    return torch.finfo(dtype).max if dtype.is_floating_point else 127.0


def float8_weight(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A weight in floats of 8 bits, with one scale for each output.

    weight: float (out, ...), finite. Returns the nearest numbers (halves to even, same shape) and scales (float32
    (out,), > 0) at which the largest of each output is the largest of the type; 1 for an output of zeros. Error per
    element is at most 2**-4 of it (e4m3: 3 bits of fraction), or scale * 2**-10 where that is more.
    Raises ValueError on NaN or infinity, naming the first index. Source: Micikevicius et al. 2022, section 3.
    """
    weight = weight.detach().to(torch.float32).contiguous()
    require_finite(weight, "weight")
    scale = _normal(weight.flatten(1).abs().amax(1) / largest(dtype))
    most = largest(dtype)
    return (weight / _along(scale, 0, weight.dim())).clamp(-most, most).to(dtype), scale


def symmetric_scale(low: Tensor | float, high: Tensor | float, largest: float = 127.0) -> float:
    """The scale that maps the range [low, high] onto the integers -127..127, with 0 for 0.

    low, high: numbers or tensors of one element; the end of larger magnitude is at -127 or 127. Returns a float32
    value, > 0, in units of activation per step; 1 where the range is only 0, or the scale would be subnormal. Error per
    element within the range is at most scale / 2. largest: where that end is, in place of 127.
    Raises ValueError as `activation_parameters` does.
    Source: Jacob et al. 2018, section 3, with zero point 0.
    """
    bottom, top = _widened(low, high)
    return float(_normal(torch.maximum(top, -bottom) / largest))


def _widened(low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """A range in float32 that holds 0. Raises ValueError when low > high, or when it is not finite."""
    ends = torch.tensor([float(low), float(high)], dtype=torch.float32)
    if float(low) > float(high):
        raise ValueError(f"the range [{float(low)}, {float(high)}] has low above high")
    bottom, top = ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)
    if not bool(torch.isfinite(top - bottom)):
        raise ValueError(f"the range [{float(low)}, {float(high)}] is not finite in float32")
    return bottom, top


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers as unsigned numbers of `bits` bits, the first of each byte in its low bits, the last byte filled with 0.

    integers: int8 or uint8, (..., n); signed ones get 2**(bits-1) added first. bits: 2, 4 or 8. Returns uint8,
    (..., ceil(n * bits / 8)). A matrix of blocks (out, in / block, block) is then the B of MatMulNBits, and zero points
    (out, in / block) its zero_points. Raises ValueError on other bits.
    Source: ONNX Runtime, contrib operator MatMulNBits, whose zero point is 2**(bits-1) where none is given.
    """
    _require_packable(bits)
    each = 8 // bits
    unsigned = integers.view(torch.uint8) + 2 ** (bits - 1) if integers.dtype == torch.int8 else integers
    filled = torch.nn.functional.pad(unsigned, (0, -integers.shape[-1] % each))
    parts = filled.reshape(*filled.shape[:-1], -1, each).unbind(-1)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` unsigned numbers of each row that `pack` made: uint8, (..., count)."""
    _require_packable(bits)
    parts = torch.bitwise_right_shift(packed.unsqueeze(-1), torch.arange(0, 8, bits, dtype=torch.uint8))
    return torch.bitwise_and(parts, 2**bits - 1).flatten(-2)[..., :count]


def _normal(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _SMALLEST_SCALE, 1.0, scale)


def _searched(
    slices: Tensor, counts: Tensor | None, scale: Tensor, zero_point: Tensor | None, low: int, high: int
) -> Tensor:
    """Of each of slices (n, weights), a scale (n,) with little squared error.

    counts: float32, the shape of slices, what each error counts, or None for 1.
    """
    rows = max(1, _CHUNK // slices.shape[1])
    parts = [slice(start, start + rows) for start in range(0, max(1, len(slices)), rows)]
    return torch.cat([
        _best(slices[part], None if counts is None else counts[part], scale[part],
              None if zero_point is None else zero_point[part], low, high)
        for part in parts
    ])  # fmt: skip


def _best(
    slices: Tensor, counts: Tensor | None, scale: Tensor, zero_point: Tensor | None, low: int, high: int
) -> Tensor:
    roots = None if counts is None else counts.sqrt()
    slices = slices / scale.unsqueeze(1)  # squares of these neither overflow nor vanish
    total, steps, integers = _squares(slices, roots), torch.empty_like(slices), torch.empty_like(slices)

    def fitted(share: Tensor) -> tuple[Tensor, Tensor]:
        """The share with the least squared error for the integers that a share makes, and that error.

        In steps, for integers q of v: |v - (1 + m) q|² = |v - q|² - 2m q(v - q) + m² qq, and q(v - q) is
        (vv - qq - |v - q|²) / 2, as sums of squares are three times as fast as those of products.
        """
        torch.mul(slices, share.reciprocal().unsqueeze(1), out=steps)
        torch.round(steps, out=integers)
        if zero_point is None:  # scalar bounds are six times as fast as those of each slice
            integers.clamp_(low, high)
        else:
            integers.add_(zero_point.unsqueeze(1)).clamp_(low, high).sub_(zero_point.unsqueeze(1))
        held, missed = _squares(integers, roots), _squares(steps.sub_(integers), roots)
        twice = total / share.square() - held - missed
        more = torch.where(held > 0, twice / (2 * held), 0.0)
        best = ((1 + more) * share).clamp_(_LEAST_SHARE, 1)
        more = best / share - 1
        return best, share.square() * (missed - more * (twice - more * held))

    best = fitted(torch.ones_like(scale))
    for share in _SHARES:
        best = _better(best, fitted(torch.full_like(scale, share)))
    for distance in _FINER:
        around, _ = best
        for shares in (around - distance, around + distance):
            best = _better(best, fitted(shares.clamp_(_LEAST_SHARE, 1)))
    return scale * best[0]


def _squares(values: Tensor, roots: Tensor | None) -> Tensor:
    """The sum of squares of each row, each counted as its root squared."""
    length: Tensor = torch.linalg.vector_norm(values if roots is None else values * roots, dim=1)
    return length.square_()


def _better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two shares with their errors, slice by slice that with the smaller one, the first of equals."""
    takes = other[1] < one[1]
    return torch.where(takes, other[0], one[0]), torch.where(takes, other[1], one[1])


def _require_divides(block: int, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"blocks need a matrix, got shape {list(weight.shape)}")
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block}")
    if weight.shape[1] % block:
        raise ValueError(f"block {block} does not divide {weight.shape[1]} inputs (weight {list(weight.shape)})")


def _require_packable(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8 to be packed, got {bits}")


def _along(scale: Tensor, axis: int | None, dims: int) -> Tensor:
    """The scale, shaped to broadcast along `axis` of a tensor with `dims` axes."""
    if axis is None:
        return scale
    shape = [1] * dims
    shape[axis] = -1
    return scale.reshape(shape)
