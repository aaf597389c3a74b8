"""x, W  ->  x / f, W f: outlier channels of activations move into the weights, where a scale per output has room."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.numerics.quantize import fit
from graphopt.numerics.reconstruct import output_error

ALPHAS = tuple(step / 10 for step in range(1, 11))
"""The alphas that the search tries: how much of the range moves into the weights."""


@dataclass(frozen=True)
class Smoothing:
    """The factors with the least expected error, and what they bring."""

    factors: Tensor
    """Float32 (in,), > 0: activations are divided by them, the weights' input channels multiplied; all 1 if best."""
    alpha: float | None
    """The alpha of these factors; None where no smoothing was best."""
    error: float
    """`expected_error` with these factors."""
    before: float
    """`expected_error` without any."""


def smooth_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """max|x_j|**alpha / max|W_j|**(1 - alpha), for each input channel j: float32 (in,), > 0.

    activations, weights: (in,), the largest magnitude of each channel, over batches and over the outputs of all weights
    that read x; alpha: in [0, 1], how much of the range moves into the weights. A channel that is zero in either
    gets 1. Raises ValueError when alpha is out of range. Source: Xiao et al. 2023, equation 4.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    x, w = activations.double(), weights.double()
    factors = torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), 1.0)
    return factors.clamp(2.0**-60, 2.0**60).float()


def outlier_factors(activations: Tensor, count: int) -> Tensor:
    """Factors that bring the `count` largest channels down to the next one, and leave the others: float32 (in,), >= 1.

    activations: (in,), the largest magnitude of each channel; count: less than in.
    """
    next_one = activations.double().topk(count + 1).values[-1]
    return (activations.double() / next_one).clamp(1, 2.0**60).nan_to_num(1.0).float()


def expected_error(
    weights: Sequence[Tensor], covariance: Tensor, low: Tensor, high: Tensor, factors: Tensor, *, bits: int = 8
) -> float:
    """The expected squared error of the outputs, summed over them, when x / f and W f are quantized.

    weights: float (out, in) each, all reading x; covariance: float64 (in, in), the mean of x xᵀ; low, high: (in,), the
    range of each channel of x; factors: (in,); bits: of the weights, symmetric, one scale per output; x gets 8 bits,
    one scale, over the range of all channels. With D the exact change of a weight by rounding, and s the scale of x, it
    is E‖D x‖² + ‖W'‖² s²/12: errors of x taken as uniform, and independent of each other and of x, so that
    channels that stay within half a step, or saturate, are not told apart from others.
    Source: the noise model of Widrow & Kollár 2008.
    """
    bottom, top = (low / factors).min().clamp(max=0), (high / factors).max().clamp(min=0)
    variance = (float(top - bottom) / 255) ** 2 / 12
    error = 0.0
    for weight in weights:
        scaled = weight.detach().float() * factors
        grid = fit(scaled, bits=bits)
        rounded = grid.values(grid.round(scaled))
        error += output_error((rounded - scaled) / factors, covariance.unsqueeze(0))
        error += variance * float(rounded.double().square().sum())
    return error


def smooth(weights: Sequence[Tensor], covariance: Tensor, low: Tensor, high: Tensor, *, bits: int = 8) -> Smoothing:
    """Factors for x and the weights that read it, with the alpha of `ALPHAS`, or none, of least `expected_error`.

    Arguments as there. Raises ValueError when shapes don't fit, or where a channel's range was never seen.
    Source: Xiao et al. 2023; alpha per site by output error as in AWQ's grid search (Lin et al. 2024, section 3.2).
    """
    width = covariance.shape[0]
    shapes = [list(one.shape) for one in (covariance, low, high, *weights)]
    if shapes[:3] != [[width, width], [width], [width]] or any(shape[1:] != [width] for shape in shapes[3:]):
        raise ValueError(f"covariance, low, high and weights have the shapes {shapes}, of which some don't fit")
    if not bool((low <= high).all()):
        raise ValueError(f"channel {int((low > high).nonzero()[0])} has low above high: was nothing observed?")
    activations = torch.maximum(low.abs(), high.abs())
    largest = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    ones = torch.ones(width)
    before = expected_error(weights, covariance, low, high, ones, bits=bits)
    best = Smoothing(ones, None, before, before)
    for alpha in ALPHAS:
        factors = smooth_factors(activations, largest, alpha)
        error = expected_error(weights, covariance, low, high, factors, bits=bits)
        if error < best.error:
            best = Smoothing(factors, alpha, error, before)
    return best
