"""Smoothing against its formula, and its estimate against what quantizing really does."""

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.numerics.quantize import activation_parameters
from graphopt.numerics.smooth import ALPHAS, expected_error, outlier_factors, smooth, smooth_factors
from tests.models import quantize_weight


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int = 3000) -> Tensor:
    """32 channels that go together, of which one is 40 times as large."""
    x = seeded(rows, 32, seed=1) + seeded(rows, 1, seed=2)
    x[:, 5] *= 40
    return x


def quantized(x: Tensor, weight: Tensor, factors: Tensor) -> float:
    """The mean squared error of outputs, summed over them, with 8 bits for x / f (per tensor) and W f (per output)."""
    divided = (x / factors).numpy()
    scale, zero = activation_parameters(float(divided.min()), float(divided.max()))
    steps = (np.clip(np.rint(divided / scale) + zero, 0, 255) - zero) * scale
    integers, scales = quantize_weight(weight * factors)
    rounded = integers.double().numpy() * scales.double().numpy()[:, None]
    wrong = steps @ rounded.T - x.double().numpy() @ weight.double().numpy().T
    return float(np.square(wrong).sum(1).mean())


def ranges(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance, low and high of channels."""
    return x.double().T @ x.double() / len(x), x.amin(0), x.amax(0)


def test_factors_are_those_of_the_paper() -> None:
    x, w = torch.tensor([16.0, 4.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    np.testing.assert_allclose(smooth_factors(x, w, 0.5), [4, 1, 1, 1])
    np.testing.assert_allclose(smooth_factors(x, w, 1.0), [16, 4, 1, 1])
    np.testing.assert_allclose(smooth_factors(x, w, 0.0), [1, 0.25, 1, 1])
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            smooth_factors(x, w, alpha)


def test_half_makes_activations_and_weights_equally_large() -> None:
    x, w = seeded(8, seed=3).abs(), seeded(8, seed=4).abs()
    factors = smooth_factors(x, w, 0.5)
    torch.testing.assert_close(x / factors, w * factors)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8])
def test_the_estimate_is_what_quantizing_does(alpha: float) -> None:
    x, weight = activations(), seeded(16, 32)
    second, low, high = ranges(x)
    factors = smooth_factors(x.abs().amax(0), weight.abs().amax(0), alpha)
    estimate = expected_error([weight], second, low, high, factors)
    assert estimate == pytest.approx(quantized(x, weight, factors), rel=0.1)


def test_errors_of_weights_that_share_an_input_add_up() -> None:
    second, low, high = ranges(activations())
    weights, ones = [seeded(16, 32), seeded(4, 32, seed=9)], torch.ones(32)
    apart = [expected_error([weight], second, low, high, ones, bits=5) for weight in weights]
    assert expected_error(weights, second, low, high, ones, bits=5) == pytest.approx(sum(apart))


def test_an_outlier_is_smoothed_with_the_best_alpha() -> None:
    x, weight = activations(), seeded(16, 32)
    second, low, high = ranges(x)
    found = smooth([weight], second, low, high)
    assert found.alpha in ALPHAS
    tried = {a: quantized(x, weight, smooth_factors(x.abs().amax(0), weight.abs().amax(0), a)) for a in ALPHAS}
    real = quantized(x, weight, found.factors)
    assert real <= 1.1 * min(tried.values()) and real < 0.1 * quantized(x, weight, torch.ones(32))
    assert found.error == pytest.approx(real, rel=0.1)
    assert found.before == pytest.approx(quantized(x, weight, torch.ones(32)), rel=0.1)


def test_even_channels_are_left_alone_or_gain() -> None:
    x = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 0, 1
    weight = torch.where(torch.arange(32).reshape(4, 8) % 2 == 0, 1.0, -1.0)
    found = smooth([weight], *ranges(x))
    assert found.alpha is None and bool((found.factors == 1).all()) and found.error == found.before


def test_what_does_not_fit_is_refused() -> None:
    second, low, high = ranges(activations(50))
    with pytest.raises(ValueError, match=r"\[16, 31\]\], of which some don't fit"):
        smooth([seeded(16, 32), seeded(16, 31)], second, low, high)
    with pytest.raises(ValueError, match="channel 3 has low above high"):
        smooth([seeded(16, 32)], second, low.index_fill(0, torch.tensor(3), torch.inf), high)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_outliers_come_down_to_the_next_channel(count: int) -> None:
    sizes = torch.tensor([3.0, 1.0, 40.0, 2.0, 5.0, 0.0, 0.5, 9.0])
    factors = outlier_factors(sizes, count)
    least = sizes.sort(descending=True).values[count]
    assert bool((factors >= 1).all()) and int((factors > 1).sum()) == count
    if least > 0:
        assert torch.equal((sizes / factors).sort(descending=True).values[: count + 1], least.expand(count + 1))
