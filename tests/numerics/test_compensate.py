"""compensate: the least squares solution, found by numpy from the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.numerics.compensate import refit
from graphopt.numerics.moments import Covariance


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count: int = 200, features: int = 8) -> Tensor:
    """Correlated inputs that are not centred."""
    return drawn(count, features) @ drawn(features, features, seed=1) + drawn(features, seed=2)


KEEP = torch.tensor([True, False, True, True, False, True, True, False])


def moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@pytest.mark.parametrize("biased", [False, True])
def test_undamped_is_the_least_squares_of_numpy(biased: bool) -> None:
    x, weight = rows(), drawn(5, 8, seed=3)
    found = refit(weight, moments(x), KEEP, mean=x.mean(0) if biased else None, damping=0.0)
    new, shift = found.weight, found.shift
    inputs = x[:, KEEP].numpy()
    if biased:
        inputs = np.column_stack([inputs, np.ones(len(x))])
    solved = np.linalg.lstsq(inputs, (x @ weight.T).numpy(), rcond=None)[0].T
    assert np.allclose(new[:, KEEP], solved[:, : int(KEEP.sum())], rtol=1e-8, atol=1e-10)
    assert np.allclose(shift, solved[:, -1] if biased else 0.0, rtol=1e-8, atol=1e-10)
    assert torch.equal(new[:, ~KEEP], torch.zeros(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damped_is_a_ridge_around_the_old_weights(damping: float) -> None:
    """As rows that are added to the least squares: each input that stays, alone, with the weight it had."""
    x, weight = rows(), drawn(5, 8, seed=3)
    new = refit(weight, moments(x), KEEP, damping=damping).weight
    extra = torch.diag((damping * x.square().sum(0)).sqrt()[KEEP])
    inputs = torch.cat([x[:, KEEP], extra])
    outputs = torch.cat([x @ weight.T, extra @ weight[:, KEEP].T])
    solved = np.linalg.lstsq(inputs.numpy(), outputs.numpy(), rcond=None)[0].T
    assert np.allclose(new[:, KEEP], solved, rtol=1e-8, atol=1e-10)


def test_an_input_that_is_a_sum_of_others_costs_nothing() -> None:
    x, weight = rows(), drawn(5, 8, seed=3)
    x[:, 1] = x[:, 0] - 2 * x[:, 2] + 3
    keep = torch.arange(8) != 1
    found = refit(weight, moments(x), keep, mean=x.mean(0), damping=0.0)
    assert torch.allclose(x @ found.weight.T + found.shift, x @ weight.T, atol=1e-9) and not found.singular


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_survives_dead_inputs_and_fewer_rows_than_inputs(damping: float) -> None:
    x, weight = rows(count=20), drawn(5, 8, seed=3)
    x[:, 0] = 0.0
    new = refit(weight, moments(x), KEEP, damping=damping).weight
    assert torch.equal(new[:, 0], weight[:, 0]) and bool(new.isfinite().all())
    few = rows(count=3)
    found = refit(weight, moments(few), KEEP, mean=few.mean(0))
    assert found.singular and bool(found.weight.isfinite().all()) and bool(found.shift.isfinite().all())


@pytest.mark.parametrize("spread", [0.0, 6e-3, 3e-2])
def test_survives_the_rounding_of_observed_moments(spread: float) -> None:
    """Inputs whose variance is lost in float32 sums, or nearly: they go by their mean, which the bias takes up."""
    x = 10 + spread * drawn(300, 32).float()
    x[:, 16:] = drawn(300, 16, seed=1).float()
    seen, weight = Covariance(32), drawn(5, 32, seed=3).float()
    seen.update(x)
    affine, keep = seen.affine()[0], torch.arange(32) % 2 == 0
    for damping in (0.0, 0.1):
        found = refit(weight, affine[:-1, :-1], keep, mean=affine[-1, :-1], damping=damping)
        change = (x @ (found.weight - weight).T + found.shift).double()
        without = (x - x.mean(0))[:, ~keep] @ weight[:, ~keep].T
        assert float(change.square().mean()) < 1.1 * float(without.square().mean())
        assert found.damping >= damping


def test_keeping_everything_changes_nothing() -> None:
    x, weight = rows(), drawn(5, 8, seed=3).float()
    found = refit(weight, moments(x), torch.ones(8, dtype=torch.bool), mean=x.mean(0))
    assert torch.equal(found.weight, weight) and found.weight.dtype == torch.float32
    assert torch.equal(found.shift, torch.zeros(5)) and not found.singular


def test_layouts_give_the_same_bits() -> None:
    x, weight = rows(), drawn(5, 8, seed=3).float()
    found = [refit(one, moments(x), KEEP).weight for one in (weight, weight.T.contiguous().T)]
    assert torch.equal(*found)


def test_refuses_to_lose_everything() -> None:
    with pytest.raises(ValueError, match="none of 8 inputs stays"):
        refit(drawn(5, 8), moments(rows()), torch.zeros(8, dtype=torch.bool))
