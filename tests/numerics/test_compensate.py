"""compensate: the least squares solution, found by numpy from the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.numerics.compensate import refit
from graphopt.numerics.moments import Drift


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


@pytest.mark.parametrize("biased", [False, True])
def test_comes_near_to_what_the_layer_gave_before_others_changed(biased: bool) -> None:
    """Undamped, it is numpy's least squares of the old outputs on the inputs that stay, as they are now."""
    x, weight = rows(), drawn(5, 8, seed=3)
    before = x + 0.3 * x.roll(1, 1) + drawn(200, 8, seed=4) + drawn(8, seed=5)
    away = before - x
    drift = torch.cat([away.T @ x / len(x), away.mean(0)[:, None]], 1)
    found = refit(weight, moments(x), KEEP, mean=x.mean(0) if biased else None, drift=drift, damping=0.0)
    read = x[:, KEEP].numpy()
    if biased:
        read = np.column_stack([read, np.ones(len(x))])
    solved = np.linalg.lstsq(read, (before @ weight.T).numpy(), rcond=None)[0].T
    assert np.allclose(found.weight[:, KEEP], solved[:, : int(KEEP.sum())], rtol=1e-8, atol=1e-10)
    assert np.allclose(found.shift, solved[:, -1] if biased else 0.0, rtol=1e-8, atol=1e-10)


def test_drift_is_summed_over_batches_without_padding() -> None:
    now, before = drawn(2, 6, 4).float(), drawn(2, 6, 4, seed=1).float()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    seen = Drift(4)
    for one in range(2):
        seen.compare(now[one : one + 1], before[one : one + 1], mask[one : one + 1])
    x, away = now[mask].double().numpy(), (before - now)[mask].double().numpy()
    assert np.allclose(seen.drift()[0, :, :-1], away.T @ x / 10, rtol=1e-5, atol=1e-6)
    assert np.allclose(seen.drift()[0, :, -1], away.mean(0), rtol=1e-5, atol=1e-6)
    assert np.allclose(seen.affine()[0], np.column_stack([x, np.ones(10)]).T @ np.column_stack([x, np.ones(10)]) / 10,
                       rtol=1e-5, atol=1e-6)  # fmt: skip
