"""Ranges of activations over batches, in memory that does not grow with their number."""

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, Self

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite

STEPS = 255
"""Steps of an activation of 8 bits: its integers are 0 to 255."""

OUTLIER = 20.0
"""An outlier channel has max_abs over this many times the median channel's; the other channels lose precision: fewer
than 13 of the 256 integers are left to the median channel."""


class Observer(Protocol):
    """What chooses the range of an activation from its batches."""

    count: int
    """Elements seen, those that a mask left out not among them."""

    @property
    def nbytes(self) -> int:
        """What it holds once it has seen a batch, in bytes."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch: as `MinMax.update`."""

    def merge(self, other: Self) -> None:
        """Take in what another of its kind has seen."""

    def range(self) -> tuple[float, float]:
        """The chosen low and high, in the units of x. Raises ValueError when nothing was seen."""

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value seen, whatever was chosen; (inf, -inf) before the first."""


class MinMax:
    """The smallest and the largest value seen.

    Source: Krishnamoorthi 2018, section 2.1.
    """

    count: int
    """Elements seen, those that a mask left out not among them."""

    def __init__(self, steps: int = STEPS) -> None:
        """steps: how many the range is to have, one fewer than the integers."""
        self.count, self.steps = 0, steps
        self._low = float("inf")
        self._high = float("-inf")

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return 16

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value seen, in the units of x; (inf, -inf) before the first."""
        return self._low, self._high

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        x: any real dtype and shape; mask: bool, its shape that of x's leading axes (for x (batch, seq, hidden):
        (batch,), (batch, seq) or all three), True = a real position; the others, padding, are left out, whatever they
        hold. Raises ValueError when the mask is not bool or doesn't fit, and on NaN or infinity at a real position,
        saying how many there are and the first index; what was seen before stays as it was.
        """
        seen, low, high = _real(x, mask)
        if seen.numel() == 0:
            return
        self._low = min(self._low, low)
        self._high = max(self._high, high)
        self.count += seen.numel()
        self._take(seen)

    def _take(self, seen: Tensor) -> None:
        """What a subclass keeps besides, of the real and finite elements of a batch, at least one."""

    def merge(self, other: Self) -> None:
        """Take in what another has seen, as if its batches had come here."""
        if other.count == 0:
            return
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        self.count += other.count
        self._join(other)

    def _join(self, other: Self) -> None:
        """Take in what a subclass keeps besides; the other has seen something."""

    def range(self) -> tuple[float, float]:
        """The smallest and the largest value, in the units of x. Raises ValueError when nothing was seen."""
        if self.count == 0:
            raise ValueError("no range: no element was observed")
        return self._low, self._high


class Histogram(MinMax):
    """Counts of values in bins of one width, a power of two, with edges at its multiples.

    When a value lies outside, the width doubles until all fit, and bins are merged in pairs: an edge of the wider grid
    is an edge of the finer one, so no count is lost or guessed. The width is the smallest that holds everything seen in
    at most `bins` bins (at least half of them, when the range allows it), and is no finer than 2**-20 of the largest
    magnitude. Counts therefore depend on the values alone: not on their order, nor on how they were cut into batches.
    """

    bins = 8192
    """Bins held, 8 bytes each."""

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__(steps)
        self._counts: Tensor | None = None
        self._first = 0
        self._exponent = -126

    @property
    def nbytes(self) -> int:
        """What it holds once it has seen a batch, in bytes."""
        return 16 + 8 * self.bins

    @property
    def width(self) -> float:
        """The width of a bin, in the units of x."""
        return 2.0**self._exponent

    def _take(self, seen: Tensor) -> None:
        self._widen()
        assert self._counts is not None
        for part in torch.split(seen.reshape(-1), 2**20):  # bounds what is held besides
            # in float64 no quotient underflows, so a negative number stays in a bin below zero
            indices = (part.double() * 2.0**-self._exponent).floor_().to(torch.int64).sub_(self._first)
            self._counts += torch.bincount(indices, minlength=self.bins)

    def _join(self, other: Self) -> None:
        self._widen(finest=other._exponent)
        assert self._counts is not None
        self._counts += other._moved(self._first, self._exponent)

    def _widen(self, finest: int = -126) -> None:
        """Make the bins cover the extremes, and no finer than 2**finest, moving the counts that are there."""
        magnitude = max(abs(self._low), abs(self._high))
        exponent = max(self._exponent, _exponent(magnitude) - 20, finest)
        while _bin(self._high, exponent) - _bin(self._low, exponent) >= self.bins:
            exponent += 1
        first = _bin(self._low, exponent)
        if self._counts is not None and (first, exponent) == (self._first, self._exponent):
            return
        self._counts, self._first, self._exponent = self._moved(first, exponent), first, exponent

    def _moved(self, first: int, exponent: int) -> Tensor:
        """The counts on a grid that is no finer and begins at bin `first`."""
        moved = torch.zeros(self.bins, dtype=torch.int64)
        if self._counts is not None:
            filled = torch.nonzero(self._counts).flatten()
            # shifting right rounds down, below zero too: the index on a grid twice as wide
            places = ((filled + self._first) >> min(exponent - self._exponent, 62)) - first
            moved.index_add_(0, places, self._counts[filled])
        return moved

    def counts(self) -> tuple[Tensor, Tensor]:
        """Left edges (float64, in the units of x) and counts (int64) of the bins from the first to the last that is
        filled, shape (n,). Raises ValueError when nothing was seen."""
        super().range()
        assert self._counts is not None
        last = _bin(self._high, self._exponent) - self._first
        numbers = torch.arange(self._first, self._first + last + 1, dtype=torch.float64)
        return numbers * self.width, self._counts[: last + 1]


class Percentile(Histogram):
    """The range that leaves a share of the elements out at either end.

    The low end is the smallest value with at least the share `tail` at or below it, to within a bin's width (numpy's
    quantile, method "inverted_cdf"); the high end is the same of -x. Source: McKinstry et al. 2019; Wu et al. 2020,
    section 3.
    """

    def __init__(self, tail: float = 1e-5, *, steps: int = STEPS) -> None:
        """tail: the share left out at either end, in [0, 0.5)."""
        super().__init__(steps)
        if not 0 <= tail < 0.5:
            raise ValueError(f"tail must be in [0, 0.5), got {tail}")
        self.tail = tail

    def range(self) -> tuple[float, float]:
        """As `MinMax.range`, for the ends named above."""
        edges, counts = self.counts()
        low = float(edges[0]) + self._depth(counts)
        high = float(edges[-1]) + self.width - self._depth(counts.flip(0))
        # within one bin the two ends may pass each other
        return min(max(low, self._low), self._high), max(min(high, self._high), self._low)

    def _depth(self, counts: Tensor) -> float:
        """How far into the bins the share reaches, the elements of a bin taken as evenly spread over it."""
        wanted = self.tail * self.count
        up_to = torch.cumsum(counts, 0)
        place = int(torch.searchsorted(up_to, max(wanted, 1e-9)))
        inside = wanted - float(up_to[place] - counts[place])
        return (place + inside / float(counts[place])) * self.width


class Mse(Histogram):
    """The range whose integers have the least mean squared error over all that was seen.

    Each bin counts at its middle. Either end is searched down to 1/256 of the extreme, the
    two together, to within 3% of the end. Source: Krishnamoorthi 2018; Banner et al. 2019; Nagel et al. 2021, section
    3.1.
    """

    def range(self) -> tuple[float, float]:
        """As `MinMax.range`, for the range named above; an extreme on the other side of zero counts as zero."""
        edges, counts = self.counts()
        middles = (edges + self.width / 2).clamp(self._low, self._high)[counts > 0]
        weights = counts[counts > 0].double()
        least, most = min(self._low, 0.0), max(self._high, 0.0)
        low, high, step = least, most, 2.0**0.5
        for powers in (range(17), range(-4, 5), range(-4, 5)):
            # the finer rounds look on both sides of the best, never past the extremes
            lows = sorted({max(low * step**-power, least) for power in powers})
            highs = sorted({min(high * step**-power, most) for power in powers})
            pairs = torch.tensor(list(itertools.product(lows, highs)), dtype=torch.float64)
            low, high = pairs[_squared_errors(middles, weights, pairs, self.steps).argmin()].tolist()
            step **= 0.25
        return low, high


class Entropy(Histogram):
    """The range whose integers keep most of the distribution: least Kullback-Leibler divergence.

    Candidates cut both tails at the same magnitude, each end then drawn in to the next filled bin; 128 magnitudes from
    the one that leaves a bin for each integer (256 of 8 bits) up to all. P is the histogram with what is cut off added
    to the end bins; Q spreads each of as many groups of the uncut bins evenly over those of its bins that are filled.
    The bin of 0 counts no more than the fuller one beside it: zeros are exact in every range, and the peak that a relu
    makes of them would outweigh all that is cut off. Source: Migacz 2017 (TensorRT 8-bit calibration, which has the
    positive half), the bin of 0 as in NVIDIA's pytorch-quantization; asymmetric as in ONNX Runtime's entropy
    calibration.
    """

    bins = 4096

    def range(self) -> tuple[float, float]:
        """As `MinMax.range`, for the range named above."""
        edges, counts = self.counts()
        counts = _without_peak(counts, -round(float(edges[0]) / self.width))
        filled = torch.nonzero(counts).flatten()
        magnitudes = torch.maximum(edges.abs(), (edges + self.width).abs())
        smallest = magnitudes.sort().values[min(self.steps, len(counts) - 1)]
        divergences: dict[tuple[int, int], float] = {}
        for cut in torch.linspace(float(magnitudes.max()), float(smallest), 128, dtype=torch.float64):
            kept = filled[magnitudes[filled] <= cut]
            ends = (int(kept[0]), int(kept[-1])) if len(kept) else (0, len(counts) - 1)
            if ends not in divergences:
                divergences[ends] = _divergence(counts, *ends, self.steps)
        first, last = min(divergences, key=lambda ends: divergences[ends])
        return max(float(edges[first]), self._low), min(float(edges[last]) + self.width, self._high)


class ChannelMinMax:
    """The smallest and the largest value of each channel: what smoothing equalizes, and what tells outlier channels.

    Source: Xiao et al. 2023, section 4.
    """

    def __init__(self, channels: int, axis: int = -1) -> None:
        """channels: the size of x along axis, which for a masked x is not among the mask's axes."""
        self.channels, self.axis, self.count = channels, axis, 0
        self.low = torch.full((channels,), float("inf"))
        """Float32 (channels,), the smallest value of each; inf before the first."""
        self.high = torch.full((channels,), float("-inf"))
        """Float32 (channels,), the largest value of each; -inf before the first."""

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return 8 * self.channels

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value seen, in the units of x; (inf, -inf) before the first."""
        return float(self.low.min()), float(self.high.max())

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch: as `MinMax.update`; ValueError, too, when x has another number of channels."""
        axis = self.axis % x.dim()
        if x.shape[axis] != self.channels:
            raise ValueError(f"x has {x.shape[axis]} channels on axis {axis}, not {self.channels}")
        if mask is not None and mask.dim() > axis:
            raise ValueError(f"mask of shape {list(mask.shape)} reaches over the channels, axis {axis} of x")
        seen, _, _ = _real(x, mask)
        if seen.numel() == 0:
            return
        # a mask leaves one axis in place of its own
        rows = seen.movedim(axis - (0 if mask is None else mask.dim() - 1), -1).reshape(-1, self.channels).float()
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.count += seen.numel()

    def range(self) -> tuple[float, float]:
        """The smallest and the largest value over all channels. Raises ValueError when nothing was seen."""
        if self.count == 0:
            raise ValueError("no range: no element was observed")
        return self.extremes

    def merge(self, other: Self) -> None:
        """Take in what another has seen."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.count += other.count

    def magnitudes(self) -> Tensor:
        """Float32 (channels,), the largest magnitude of each. Raises ValueError when nothing was seen."""
        self.range()
        return torch.maximum(self.low.abs(), self.high.abs())

    def outliers(self, factor: float = OUTLIER) -> list[int]:
        """The channels, in order, whose magnitude is more than `factor` times the median of those that are not all
        zero. Raises ValueError when nothing was seen."""
        sizes = self.magnitudes()
        alive = sizes[sizes > 0]
        if len(alive) == 0:
            return []
        return torch.nonzero(sizes > factor * alive.median()).flatten().tolist()


OBSERVERS: Mapping[str, Callable[..., Observer]] = MappingProxyType(
    {"minmax": MinMax, "percentile": Percentile, "mse": Mse, "entropy": Entropy}
)
"""Each way to choose a range, by the name that an option has for it; `steps` is how many the range is to have."""


def oddity(seen: Observer) -> str | None:
    """Why the range of an activation is degenerate; None where it is not.

    One of "never exercised" (no real position), "all zero" and "constant (its value)".
    """
    low, high = seen.extremes
    if seen.count == 0:
        return "never exercised"
    if low == high:
        return "all zero" if low == 0 else f"constant ({low:.6g})"
    return None


def _real(x: Tensor, mask: Tensor | None) -> tuple[Tensor, float, float]:
    """The elements at real positions (x itself without a mask, else (positions, ...)), the smallest and the largest."""
    x = x.detach()
    if mask is not None:
        _require_fits(mask, x)
    seen = x if mask is None else x[mask]
    if seen.numel() == 0:
        return seen, float("inf"), float("-inf")
    low, high = (float(end) for end in torch.aminmax(seen))
    if not (math.isfinite(low) and math.isfinite(high)):
        require_finite(x, "x", where=None if mask is None else _over(mask, x))
    return seen, low, high


def _require_fits(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() == 0 or mask.shape != x.shape[: mask.dim()]:
        raise ValueError(f"mask of shape {list(mask.shape)} does not fit the leading axes of {list(x.shape)}")


def _over(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(list(mask.shape) + [1] * (x.dim() - mask.dim())).expand_as(x)


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _exponent(magnitude: float) -> int:
    """The power of two just above a magnitude; for 0 that of the smallest normal number of float32."""
    return math.frexp(max(magnitude, torch.finfo(torch.float32).tiny))[1]


def _squared_errors(values: Tensor, weights: Tensor, ranges: Tensor, most: int) -> Tensor:
    """The squared error that the integers 0..most over each of `ranges` (float64 (r, 2), low <= 0 <= high) make of
    values (n,), each as often as its weight; float64 (r,). Integers as in `quantize.activation_parameters`."""
    errors = []
    for part in torch.split(ranges, 32):
        low, high = part[:, :1], part[:, 1:]
        scale = torch.where(high > low, (high - low) / most, 1.0)
        zero_point = torch.round(-low / scale)
        steps = torch.round(values / scale).add_(zero_point).clamp_(0, most).sub_(zero_point)
        errors.append(steps.mul_(scale).sub_(values).square_() @ weights)
    return torch.cat(errors)


def _without_peak(counts: Tensor, zero: int) -> Tensor:
    """Counts (n,) whose bin `zero`, where that is filled, holds as much as the fuller of those beside it, or one."""
    if not 0 <= zero < len(counts) or counts[zero] == 0:
        return counts
    beside = torch.cat([counts[max(zero - 1, 0) : zero], counts[zero + 1 : zero + 2], counts.new_ones(1)])
    counts = counts.clone()
    counts[zero] = torch.minimum(counts[zero], beside.max())
    return counts


def _divergence(counts: Tensor, first: int, last: int, steps: int) -> float:
    """KL(P || Q) in nats, when the bins from first to last (both filled) are kept of `counts` (n,)."""
    kept = counts[first : last + 1].double()
    p = kept.clone()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    groups = torch.arange(len(kept)) * (steps + 1) // len(kept)
    filled = (kept > 0).double()
    sums = torch.zeros(2, steps + 1, dtype=torch.float64).index_add_(1, groups, torch.stack([kept, filled]))
    q = (sums[0] / sums[1])[groups]
    p, q = (p / p.sum())[kept > 0], (q / kept.sum())[kept > 0]
    return float((p * (p / q).log()).sum())
