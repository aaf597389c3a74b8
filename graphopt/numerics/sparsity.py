"""Which weights go to zero: the lowest scores, an exact number of them, where a pattern lets zeros lie.

Scores are magnitudes, or anything whose magnitude says how much a weight matters. Patterns are those of matrices
(out, in): `as_matrix` shows the weight of a convolution as one.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite

_DIGIT = 16
"""Bits of a magnitude that one pass of the selection settles."""

_SAMPLE = 2**16
"""Elements that are compressed to tell how small a tensor gets."""


# --- matrices ------------------------------------------------------------------------------------------------------


def as_matrix(weight: Tensor) -> Tensor:
    """A weight (out, in, *kernel) as a matrix (out, kernel · in): the inputs of one kernel position lie together.

    So groups of neighbours within a row run along the input channels, as the sparse kernels of NVIDIA want them: for
    each output channel and kernel position, "every four input channels" (TensorRT developer guide, Sparsity).
    """
    return weight.flatten(2).transpose(1, 2).flatten(1) if weight.dim() > 2 else weight


def as_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `as_matrix`, for a weight of `shape`; contiguous."""
    if len(shape) == 2:
        return matrix.contiguous()
    return matrix.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape).contiguous()


def columns(shape: Sequence[int]) -> Tensor:
    """For each column of `as_matrix`, which of the in · kernel features of `numerics.moments` it multiplies; int64."""
    return torch.arange(math.prod(shape[1:])).reshape(shape[1], -1).T.flatten()


# --- patterns ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie in a matrix (out, in): whole blocks of it, or all but `keep` of each block's elements."""

    rows: int = 1
    columns: int = 1
    keep: int = 0
    """Elements of each block that stay, where every block loses the others; 0 where blocks stay or go whole."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """unstructured; N:M, at most N of every M neighbours along the input stay (1 <= N < M); RxC, blocks of R
        outputs by C inputs. Raises ValueError for any other text."""
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+)([:x])(\d+)", str(text))
        if match is None:
            raise ValueError(f"pattern is {text!r}; give unstructured, N:M (2:4) or a block of outputs x inputs (4x1)")
        first, last = int(match[1]), int(match[3])
        if match[2] == "x" and min(first, last) < 1:
            raise ValueError(f"pattern is {text}; a block holds at least 1x1 weights")
        if match[2] == ":" and not 1 <= first < last:
            raise ValueError(f"pattern is {text}; of every M weights N stay, with 1 <= N < M")
        return cls(rows=first, columns=last) if match[2] == "x" else cls(columns=last, keep=first)

    @property
    def amount(self) -> float | None:
        """The share of zeros, where the pattern alone says it."""
        return 1 - self.keep / self.columns if self.keep else None

    def undivided_axis(self, shape: Sequence[int]) -> tuple[str, int, int] | None:
        """The first axis of a weight (out, in, *kernel) that blocks do not divide, as (output or input, its size, the
        size of a block along it); None where they divide both."""
        for name, size, part in (("output", shape[0], self.rows), ("input", shape[1], self.columns)):
            if size % part:
                return name, size, part
        return None

    def masks(self, scores: Iterable[Tensor], amount: float) -> list[Tensor]:
        """Keep all but the share `amount`, in [0, 1), of smallest magnitude, over all matrices (out, in) together.

        Returns bool, True = keep, with round(amount * total) False (halves to even), of equals the earlier
        (`without_lowest`); blocks go by the sum of their magnitudes (Mao et al. 2017, section 3.2), and are counted as
        the elements are otherwise. With N:M, `amount` is not read: each group keeps its N highest (Mishra et al. 2021).
        Raises ValueError on amount out of range, and on NaN or infinity, naming the weight and the first index.
        Source: Han et al. 2015, section 3; over several as in Blalock et al. 2020, section 2.3.
        """
        scores = list(scores)
        if self.keep:
            return [self._highest(score) for score in scores]
        require_amount(amount)
        sums = [self._sums(score) for score in scores]
        kept = without_lowest(sums, round(amount * sum(score.numel() for score in sums)))
        if self.rows == self.columns == 1:
            return kept
        return [mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1) for mask in kept]

    def masks_by_row(self, scores: Tensor, amount: float) -> Tensor:
        """As `masks` for one matrix, but each output (row of blocks) loses the same number, round(amount * in)."""
        if self.keep:
            return self._highest(scores)
        require_amount(amount)
        require_finite(scores, "scores")
        sums = self._sums(scores)
        kept = torch.ones_like(sums, dtype=torch.bool)
        kept.scatter_(1, sums.sort(dim=1, stable=True).indices[:, : round(amount * sums.shape[1])], False)
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def _sums(self, scores: Tensor) -> Tensor:
        """The sum of magnitudes of each block, (out / rows, in / columns); in float64 where there is a sum."""
        if self.rows == self.columns == 1:
            return scores.abs()
        out, inputs = scores.shape
        blocks = scores.double().abs().reshape(out // self.rows, self.rows, inputs // self.columns, self.columns)
        return blocks.sum((1, 3))

    def _highest(self, scores: Tensor) -> Tensor:
        require_finite(scores, "scores")
        groups = scores.abs().reshape(-1, self.columns)
        order = groups.sort(dim=1, stable=True).indices
        return torch.ones_like(groups, dtype=torch.bool).scatter_(
            1, order[:, : self.columns - self.keep], False
        ).reshape(scores.shape)  # fmt: skip


# --- masks ---------------------------------------------------------------------------------------------------------


def without_lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Keep all but the `count` elements of smallest magnitude, over all `scores` together.

    scores: float, any shapes; count: 0 to all. Returns one bool mask for each, same shape, True = keep; of equal
    magnitudes the earlier goes first, by the order of `scores`, then row-major. Beyond the masks, memory is a few
    copies of the largest. Raises ValueError on NaN or infinity, naming the weight and the first index.
    """
    cut, ties = _select(scores, count)
    found = []
    for score in scores:
        bits = _magnitude_bits(score, cut.dtype)
        keep = bits > cut
        equal = torch.nonzero(bits == cut).flatten()
        keep[equal[ties:]] = True
        ties -= min(ties, len(equal))
        found.append(keep.reshape(score.shape))
    return found


def threshold_mask(weight: Tensor, fraction: float) -> Tensor:
    """Keep what is at least `fraction`, in [0, 1), of the largest magnitude of `weight` (float, any shape); bool.

    Source: Han et al. 2015, section 3, where the threshold is a quality parameter times a scale of the layer.
    """
    require_amount(fraction)
    magnitudes = weight.detach().abs().double()
    return magnitudes >= fraction * magnitudes.max() if weight.numel() else magnitudes.bool()


def compressed_share(weight: Tensor) -> float:
    """About which share of its bytes a tensor takes once compressed (zlib, level 6), from 64 Ki elements at most.

    They are up to 16 runs of the row-major order, evenly spaced. 1.0 for an empty tensor.
    """
    flat = weight.detach().reshape(-1)
    if flat.numel() > _SAMPLE:
        run = _SAMPLE // 16
        starts = [(flat.numel() - run) * index // 15 for index in range(16)]
        flat = torch.cat([flat[start : start + run] for start in starts])
    stored = flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return len(zlib.compress(stored, 6)) / len(stored) if stored else 1.0


def require_amount(amount: float) -> None:
    """Raise ValueError unless `amount` is in [0, 1)."""
    if not 0 <= amount < 1:
        raise ValueError(f"amount must be in [0, 1), got {amount}")


def _select(scores: Sequence[Tensor], count: int) -> tuple[Tensor, int]:
    """The count-th smallest magnitude, as bits, and how many of the elements equal to it go.

    Magnitudes of IEEE floats order as their bits do, so a radix selection finds it exactly with one histogram per
    digit, and no sort. Bits -1, below every magnitude, when nothing goes.
    """
    for number, score in enumerate(scores):
        require_finite(score, f"weight {number}")
    width = 64 if any(score.dtype == torch.float64 for score in scores) else 32
    integers = torch.int64 if width == 64 else torch.int32
    left = count
    if left == 0:
        return torch.tensor(-1, dtype=integers), 0

    prefix = 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for score in scores:
            bits = _magnitude_bits(score, integers)
            if shift < width - _DIGIT:
                bits = bits[bits >> (shift + _DIGIT) == prefix]
            counts += torch.bincount((bits >> shift) & (2**_DIGIT - 1), minlength=2**_DIGIT).cpu()
        up_to = torch.cumsum(counts, 0)
        digit = int(torch.searchsorted(up_to, left))
        left -= int(up_to[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
    return torch.tensor(prefix, dtype=integers), left


def _magnitude_bits(score: Tensor, integers: torch.dtype) -> Tensor:
    """|score| as the integers of its float32 or float64 bits, flat and in row-major order."""
    floats = torch.float64 if integers == torch.int64 else torch.float32
    return score.detach().to(floats).abs().reshape(-1).contiguous().view(integers)


# --- gradual pruning -----------------------------------------------------------------------------------------------


def cubic(progress: float, *, start: float = 0.0, end: float = 1.0) -> float:
    """The share of the final amount that is removed (Zhu & Gupta 2017, equation 1): 1 - (1 - t)³, t rising from 0 at
    `start` to 1 at `end`."""
    t = min(max((progress - start) / (end - start), 0.0), 1.0)
    return 1 - (1 - t) ** 3
