"""Second order: which weights a layer's output misses least, and what the others do to make up for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite
from graphopt.numerics.sparsity import Pattern, require_amount, without_lowest

_BLOCK = 128
"""Columns that choose their zeros together, and after which the columns to their right are updated."""

_ROUNDING = 1e-6
"""A pivot below this share of its diagonal is rounding: the products were summed in float32."""


@dataclass(frozen=True)
class Solved:
    """A sparse weight, and what its covariance was like."""

    weight: Tensor
    """Float64, the shape of the given one."""
    mask: Tensor
    """Bool, True = kept."""
    dead: int
    """Inputs that were always zero, over all groups."""
    singular: bool
    """Whether some input is a combination of others, to float32's precision: only the damping tells them apart."""
    damping: float
    """What was added to the diagonal, as a share of its mean: the given one, or more where that was too little."""


def sparse_gpt(weight: Tensor, covariance: Tensor, *, pattern: Pattern, amount: float, damping: float) -> Solved:
    """Zeros where the layer's squared output error grows least, the weights that stay updated to make up for them.

    weight: float (groups, out, in); covariance: float64 (groups, in, in), the mean of x xᵀ (its scale is of no
    consequence); pattern: unstructured or N:M along `in`; amount: share of zeros in [0, 1), exact over the whole
    weight, read where the pattern does not say it; damping: at least 0, share of the mean of the diagonal that is
    added to it. Columns go from left to right: of the inverse covariance of what is still free, U with H⁻¹ = Uᵀ U
    holds every one that is needed; a weight is scored w² / U_jj², its error w / U_jj is spread over the columns to
    the right. Zeros are chosen in blocks of 128 columns (of M, for N:M) from the weights as updated so far.
    Raises ValueError where the pattern is of blocks, on an amount out of range, and on NaN or infinity.
    Source: Frantar & Alistarh 2023, algorithm 1; the step for one weight is OBS (Hassibi & Stork 1993).
    """
    if pattern.rows > 1 or (pattern.columns > 1 and not pattern.keep):
        raise ValueError("GPTQ pruning knows single weights and N:M, no blocks")
    require_amount(amount)
    require_finite(weight, "weight")
    require_finite(covariance, "covariance")
    upper, damping = inverse_factor(covariance, damping)
    w = weight.detach().double().clone()
    groups, out, width = w.shape
    mask = torch.ones(w.shape, dtype=torch.bool)
    block = max(_BLOCK // pattern.columns, 1) * pattern.columns
    for start in range(0, width, block):
        end = min(start + block, width)
        part, factor = w[:, :, start:end], upper[:, start:end, start:end]
        diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(1)
        errors = torch.zeros_like(part)
        if not pattern.keep:
            # Rounding what goes up to here, not what goes of each block, makes the total exact.
            count = round(amount * groups * out * end) - round(amount * groups * out * start)
            mask[:, :, start:end] = without_lowest([(part / diagonal).square()], count)[0]
        for j in range(end - start):
            if pattern.keep and j % pattern.columns == 0:
                ahead = slice(j, j + pattern.columns)
                score = (part[:, :, ahead] / diagonal[:, :, ahead]).square()
                mask[:, :, start + j : start + j + pattern.columns] = pattern.masks([score], 0)[0]
            goes = ~mask[:, :, start + j]
            error = torch.where(goes, part[:, :, j], 0) / diagonal[:, :, j]
            part[:, :, j:] -= error.unsqueeze(2) * factor[:, j, j:].unsqueeze(1)
            part[:, :, j][goes] = 0
            errors[:, :, j] = error
        w[:, :, end:] -= errors @ upper[:, start:end, end:]
    dead, singular = _examined(covariance)
    return Solved(w, mask, dead, singular, damping)


def inverse_factor(covariance: Tensor, damping: float) -> tuple[Tensor, float]:
    """U, upper triangular, with (covariance + damping · mean(diagonal) · 1)⁻¹ = Uᵀ U, in each group, and the damping.

    Where that is not positive definite, the damping is raised tenfold until it is.
    """
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(covariance, damping))
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any() and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping = max(10 * damping, _ROUNDING)


def damped(covariance: Tensor, damping: float) -> Tensor:
    """covariance + damping · mean(diagonal) · 1, in each group."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    mean = torch.where(mean > 0, mean, 1)  # nothing came in: all inputs count alike
    return covariance + torch.diag_embed((damping * mean).unsqueeze(1).expand_as(diagonal))


def _examined(covariance: Tensor) -> tuple[int, bool]:
    """How many inputs are always zero, and whether another is a combination of those before it."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    lower, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(dead.to(covariance.dtype)))
    pivots = lower.diagonal(dim1=1, dim2=2).square()
    return int(dead.sum()), bool(failed.any() or (pivots < _ROUNDING * diagonal)[~dead].any())
