"""Which weights go to zero: the smallest magnitudes, an exact number of them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite

_DIGIT = 16
"""Bits of a magnitude that one pass of the selection settles."""


def magnitude_mask(weight: Tensor, amount: float) -> Tensor:
    """Keep all but the share `amount` of smallest magnitude.

    weight: float, any shape; amount: in [0, 1). Returns bool, same shape, True = keep, with exactly
    round(amount * numel) False (halves to even); of equal magnitudes the earlier, in row-major order, goes first.
    Raises ValueError on amount out of range, and on NaN or infinity, naming the first index.
    Source: Han et al. 2015, section 3.
    """
    return magnitude_masks_global([weight], amount)[0]


def magnitude_masks_global(weights: Iterable[Tensor], amount: float) -> list[Tensor]:
    """Keep all but the share `amount` of smallest magnitude, over all `weights` together.

    weights: float, any shapes; amount: in [0, 1). Returns one bool mask for each, same shape, True = keep, with exactly
    round(amount * total) False over all (halves to even); of equal magnitudes the earlier goes first, by the order of
    `weights`, then row-major. Beyond the masks, memory is a few copies of the largest weight.
    Raises ValueError on amount out of range, and on NaN or infinity, naming the weight and the first index.
    Source: Han et al. 2015; global ranking as in Blalock et al. 2020, section 2.3.
    """
    weights = list(weights)
    cut, ties = _select(weights, amount)
    masks = []
    for weight in weights:
        bits = _magnitude_bits(weight, cut.dtype)
        keep = bits > cut
        equal = torch.nonzero(bits == cut).flatten()
        keep[equal[ties:]] = True
        ties -= min(ties, len(equal))
        masks.append(keep.reshape(weight.shape))
    return masks


def sparsity(weight: Tensor) -> float:
    """The share of elements of `weight` (any shape and dtype) that are exactly zero, in [0, 1]; 0 when it is empty."""
    if weight.numel() == 0:
        return 0.0
    return 1.0 - int(torch.count_nonzero(weight)) / weight.numel()


def _select(weights: Sequence[Tensor], amount: float) -> tuple[Tensor, int]:
    """The round(amount * total)-th smallest magnitude, as bits, and how many of the elements equal to it go.

    Magnitudes of IEEE floats order as their bits do, so a radix selection finds it exactly with one histogram a digit,
    and no sort. Bits -1, below every magnitude, when nothing goes.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"amount must be in [0, 1), got {amount}")
    for number, weight in enumerate(weights):
        require_finite(weight, f"weight {number}")
    width = 64 if any(weight.dtype == torch.float64 for weight in weights) else 32
    integers = torch.int64 if width == 64 else torch.int32
    left = round(amount * sum(weight.numel() for weight in weights))
    if left == 0:
        return torch.tensor(-1, dtype=integers), 0

    prefix = 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for weight in weights:
            bits = _magnitude_bits(weight, integers)
            if shift < width - _DIGIT:
                bits = bits[bits >> (shift + _DIGIT) == prefix]
            counts += torch.bincount((bits >> shift) & (2**_DIGIT - 1), minlength=2**_DIGIT).cpu()
        up_to = torch.cumsum(counts, 0)
        digit = int(torch.searchsorted(up_to, left))
        left -= int(up_to[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
    return torch.tensor(prefix, dtype=integers), left


def _magnitude_bits(weight: Tensor, integers: torch.dtype) -> Tensor:
    """|weight| as the integers of its float32 or float64 bits, flat and in row-major order."""
    floats = torch.float64 if integers == torch.int64 else torch.float32
    return weight.detach().to(floats).abs().reshape(-1).contiguous().view(integers)
