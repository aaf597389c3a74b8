"""How far a candidate tensor is from its reference. All sums are in float64."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

QUANTIZED_RTOL = 2 / 255
"""Relative tolerance of two forms of a quantized graph: one step of an 8-bit range, at most 2 max|a| wide.

A float that differs in its last bit may be rounded to the next integer, which moves an output by about one step.
"""

QUANTIZED_SQNR = 30.0
"""SQNR (dB) that is enough where activations are quantized already, as such steps accumulate over layers: what the
output is without that noise is unknown.

Less is enough where the network itself amplifies rounding (a value that rounds differently changes roundings in later
layers). Measured: a quantized transformer of 6 layers has 27 dB against the same model after the engine's optimizer; an
untrained MobileNetV2 has 20 dB against itself with inputs perturbed by 8 eps.
"""


def sqnr(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantization noise: 10 log10(sum(reference**2) / sum((reference - candidate)**2)), in dB.

    Both: same shape, any real dtype. inf when they are equal, -inf when only the reference is all zero, nan with NaN.
    Raises ValueError when the shapes differ.
    """
    return decibels(*energies(reference, candidate))


def energies(reference: Tensor, candidate: Tensor) -> tuple[float, float]:
    """sum(reference**2) and sum((reference - candidate)**2), which add up over batches.

    Both: same shape, any real dtype. Raises ValueError when the shapes differ.
    """
    a, b = _in_double(reference, candidate)
    return float(a.square().sum()), float((a - b).square().sum())


def decibels(signal: float, noise: float) -> float:
    """`sqnr` of these two energies, in dB."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def worst(figures: Iterable[float]) -> float:
    """The smallest figure, where more is better; NaN is worse than any number, and inf where there is no figure."""
    return min(figures, key=lambda figure: -math.inf if math.isnan(figure) else figure, default=math.inf)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors taken as flat vectors, in [-1, 1].

    Both: same shape, any real dtype. Two zero vectors give 1, one zero vector gives 0.
    Raises ValueError when the shapes differ.
    """
    a, b = _in_double(a, b)
    return float(_cosines(a.reshape(1, -1), b.reshape(1, -1)))


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """`cosine` of each pair of rows along the last axis, averaged over the rows, in [-1, 1].

    Both: same shape (..., n), any real dtype. Raises ValueError when the shapes differ, or when there is no row.
    """
    a, b = _in_rows(a, b)
    return float(_cosines(a, b).mean())


def max_error(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|, in the units of a; 0 when they are empty, nan with NaN.

    Both: same shape, any real dtype. Raises ValueError when the shapes differ.
    """
    a, b = _in_double(a, b)
    return float((a - b).abs().amax()) if a.numel() else 0.0


def top1_agreement(a: Tensor, b: Tensor) -> float:
    """The share of rows along the last axis whose largest element (first of equals) is at the same index, in [0, 1].

    Both: same shape (..., classes), any real dtype. Raises ValueError when the shapes differ, or when there is no row.
    """
    a, b = _in_rows(a, b)
    return float((a.argmax(-1) == b.argmax(-1)).double().mean())


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) that a lossless rewrite is held to.

    (1e-4, 1e-6) for float32 and float64, (1e-2, 1e-6) for narrower floats, (0, 0) for integers and bool.
    """
    if not dtype.is_floating_point:
        return 0.0, 0.0
    return (1e-2 if torch.finfo(dtype).bits < 32 else 1e-4), 1e-6


def within_tolerance(
    reference: Tensor, candidate: Tensor, *, rtol: float | None = None, atol: float | None = None
) -> bool:
    """Whether |reference - candidate| <= rtol * max|reference| + atol at every element.

    Both: any shape and real dtype; shapes that differ are False. rtol, atol: by default those of `tolerance`, the wider
    of the two dtypes. The maximum is over the finite elements of the reference: one bound for the whole tensor.
    NaN agrees with NaN at the same place, an infinity with the same infinity. Where either side is integer or bool,
    values must be equal, whatever rtol and atol.
    """
    if reference.shape != candidate.shape:
        return False
    if not (reference.is_floating_point() and candidate.is_floating_point()):
        return bool((reference == candidate).all())
    wider = max(tolerance(reference.dtype), tolerance(candidate.dtype))
    rtol = wider[0] if rtol is None else rtol
    atol = wider[1] if atol is None else atol
    a, b = reference.detach().double(), candidate.detach().double()
    finite = torch.isfinite(a)
    largest = float(torch.where(finite, a.abs(), 0.0).amax()) if a.numel() else 0.0
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    close = finite & torch.isfinite(b) & ((a - b).abs() <= rtol * largest + atol)
    return bool((same | close).all())


def within_one_step(reference: Tensor, candidate: Tensor) -> bool:
    """Whether two tensors of 8-bit integers of one shape are nowhere further apart than 1, as where a float that
    differs in its last bit was rounded to the next integer; False for other dtypes."""
    eight = (torch.int8, torch.uint8)
    if reference.dtype not in eight or candidate.dtype != reference.dtype or reference.shape != candidate.shape:
        return False
    return bool(((reference.int() - candidate.int()).abs() <= 1).all())


def _in_double(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    return a.detach().double(), b.detach().double()


def _in_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() == 0 or a.numel() == 0:
        raise ValueError(f"there is no row to compare in shape {list(a.shape)}")
    a, b = _in_double(a, b)
    return a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per row, of two float64 (rows, n)."""
    norms = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
    zeros = (norms[0] == 0).double() + (norms[1] == 0).double()
    product = ((a / norms[0][:, None]) * (b / norms[1][:, None])).sum(-1).clamp(-1.0, 1.0)
    return torch.where(zeros == 0, product, torch.where(zeros == 2, 1.0, 0.0).double())
