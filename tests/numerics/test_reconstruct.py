"""Second-order rounding against round-to-nearest, and against the textbook: one weight at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.numerics.moments import Covariance, Mean
from graphopt.numerics.quantize import fit
from graphopt.numerics.reconstruct import bias_shift, fitted, output_error, reconstruct, refine

Array = np.ndarray[Any, Any]
GRIDS: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 8, "axis": None},
    {"bits": 3, "symmetric": False},
    {"bits": 4, "block": 16},
    {"bits": 2, "block": 16, "symmetric": False, "search": True},
]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, features: int) -> Tensor:
    """Correlated inputs of different sizes, not centred."""
    mixed = seeded(rows, features, seed=1) @ seeded(features, features, seed=2) + seeded(features, seed=3)
    return mixed * torch.linspace(0.2, 2, features)


def covariance(x: Tensor, groups: int = 1) -> Tensor:
    rows = x.double().reshape(len(x), groups, -1).transpose(0, 1)
    return rows.transpose(1, 2) @ rows / len(x)


def one_by_one(weight: Array, covariance: Array, scale: Array, zero: Array, low: int, high: int) -> Array:
    """Optimal brain quantization in a fixed order, each inverse computed anew: integers of weight (out, in).

    After a weight is rounded, those left move by what minimizes the squared error given it: H_FF⁻¹ H_Fj e.
    """
    left = [int(j) for j in np.argsort(-np.diag(covariance), kind="stable")]
    h = covariance + 0.01 * np.diag(covariance).mean() * np.eye(len(covariance))
    w, integers = weight.astype(np.float64), np.zeros(weight.shape)
    while left:
        j = left.pop(0)
        integers[:, j] = np.clip(np.rint(w[:, j] / scale[:, j]) + zero[:, j], low, high)
        error = w[:, j] - (integers[:, j] - zero[:, j]) * scale[:, j]
        if left:
            w[:, left] += np.outer(error, np.linalg.solve(h[np.ix_(left, left)], h[left, j]))
    return integers


@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("features", [32, 160])
def test_equals_one_weight_at_a_time(options: dict[str, Any], features: int) -> None:
    weight, second = seeded(5, features), covariance(inputs(400, features))
    grid = fit(weight, **options)
    scale, zero = (part.double().numpy() for part in grid.expanded(weight))
    expected = one_by_one(weight.numpy(), second[0].numpy(), scale, zero, grid.low, grid.high)
    found = reconstruct(weight, second, grid)
    assert found.dtype == grid.round(weight).dtype
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_outputs_are_nearer_than_by_rounding(options: dict[str, Any]) -> None:
    weight, x = seeded(24, 64), inputs(500, 64)
    second, grid = covariance(x), fit(weight, **options)
    nearest, found = (grid.values(q) for q in (grid.round(weight), reconstruct(weight, second, grid)))
    by_rounding, by_gptq = (
        ((weight - v).double() @ x.double().T).square().sum().item() for v in (nearest, found)
    )
    assert by_gptq < 0.7 * by_rounding
    assert output_error(weight - found, second) * len(x) == pytest.approx(by_gptq, rel=1e-6)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_a_diagonal_covariance_rounds_to_nearest(options: dict[str, Any]) -> None:
    weight, grid = seeded(6, 32), fit(seeded(6, 32), **options)
    second = torch.diag(torch.linspace(0, 3, 32).double()).unsqueeze(0)  # the first input is dead
    assert torch.equal(reconstruct(weight, second, grid), grid.round(weight))
    assert torch.equal(reconstruct(weight, torch.zeros_like(second), grid), grid.round(weight))


def test_groups_of_a_convolution_are_rounded_apart() -> None:
    weight, x = seeded(6, 2, 3, 3), seeded(2, 4, 8, 8, seed=4).cumsum(2).cumsum(3) / 8
    moments = Covariance(18, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2))
    moments.update(x)
    second, grid = moments.matrix(), fit(weight, bits=4)
    found = reconstruct(weight, second, grid)
    for group in range(2):
        part = slice(3 * group, 3 * group + 3)
        alone = reconstruct(weight[part], second[group : group + 1], fit(weight[part], bits=4))
        assert torch.equal(found[part], alone)
    errors = []
    for integers in (grid.round(weight), found):
        wrong = torch.nn.functional.conv2d(x, weight - grid.values(integers), padding=1, groups=2)
        errors.append(float(wrong.double().square().sum()))
    assert errors[1] < 0.5 * errors[0]
    assert output_error(weight - grid.values(found), second) * moments.count == pytest.approx(errors[1], rel=1e-5)


def test_outputs_are_rounded_apart_in_any_number() -> None:
    """More weights than are held in float64 at once."""
    weight, second = seeded(9000, 128), covariance(inputs(300, 128))
    grid = fit(weight, bits=4)
    found = reconstruct(weight, second, grid)
    part = slice(8190, 8200)  # across the seam
    assert torch.equal(found[part], reconstruct(weight[part], second, fit(weight[part], bits=4)))


def test_inputs_that_depend_on_each_other_are_damped() -> None:
    x = inputs(10, 32)  # rank 10
    weight = seeded(4, 32)
    grid = fit(weight, bits=4)
    for damping in (0.0, 0.01):
        found = grid.values(reconstruct(weight, covariance(x), grid, damping=damping))
        error, nearest = (output_error(weight - v, covariance(x)) for v in (found, grid.values(grid.round(weight))))
        assert error < nearest


def test_layout_does_not_change_a_bit() -> None:
    weight, second = seeded(7, 32), covariance(inputs(100, 32))
    strided = weight.T.contiguous().T
    assert torch.equal(reconstruct(weight, second, fit(weight)), reconstruct(strided, second, fit(strided)))


def test_the_bias_takes_up_what_outputs_shift_by() -> None:
    """E[W x] = E[W' x] + shift, for a grouped convolution over what it really reads, padding included."""
    weight, x = seeded(6, 2, 3, 3), seeded(3, 4, 7, 7, seed=5) + 2
    mean = Mean(18, ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2))
    mean.update(x)
    grid = fit(weight, bits=3)
    rounded = grid.values(grid.round(weight))
    exact, wrong = (
        torch.nn.functional.conv2d(x, w, stride=2, padding=1, groups=2).double().mean((0, 2, 3))
        for w in (weight, rounded)
    )
    shift = bias_shift(weight - rounded, mean.mean())
    assert shift.dtype == torch.float32 and shift.shape == (6,)
    torch.testing.assert_close(wrong + shift, exact, rtol=1e-5, atol=1e-5)
    assert float((wrong - exact).abs().max()) > 0.1


def test_what_does_not_fit_is_refused() -> None:
    weight, grid = torch.ones(6, 8), fit(torch.ones(6, 8))
    for shape in ((1, 7, 7), (4, 8, 8), (1, 8, 7)):
        with pytest.raises(ValueError, match=r"does not fit the weight \[6, 8\]"):
            reconstruct(weight, torch.ones(shape).double(), grid)
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -1"):
        reconstruct(weight, torch.eye(8).double().unsqueeze(0), grid, damping=-1)
    with pytest.raises(ValueError, match="covariance has 64 of 64 values NaN"):
        reconstruct(weight, torch.full((1, 8, 8), torch.nan).double(), grid)


def test_zeros_stay_zero() -> None:
    generator = torch.Generator().manual_seed(11)
    mixed = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 16, generator=generator, dtype=torch.float64) @ mixed
    weight = torch.randn(8, 16, generator=generator)
    weight[torch.rand(8, 16, generator=generator) < 0.5] = 0
    grid = fit(weight, bits=4, block=16, symmetric=False)
    integers = reconstruct(weight, (x.T @ x / 200)[None], grid)
    assert bool((grid.values(integers)[weight == 0] == 0).all())


def squares(weight: Tensor, values: Tensor, second: Tensor) -> Tensor:
    """The squared error of each output under a damped covariance of one group."""
    damped = second[0] + 0.01 * second[0].diagonal().mean() * torch.eye(len(second[0]))
    wrong = (weight - values).double()
    return ((wrong @ damped) * wrong).sum(1)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_refining_leaves_no_single_step_that_is_better(options: dict[str, Any]) -> None:
    weight, second = seeded(5, 160), covariance(inputs(400, 160))
    weight[:, 7] = 0
    grid = fit(weight, **options)
    first = reconstruct(weight, second, grid)
    refined, integers = refine(weight, second, grid, first, rounds=40)
    assert integers.dtype == first.dtype and refined.scale.dtype == grid.scale.dtype
    before, after = squares(weight, grid.values(first), second), squares(weight, refined.values(integers), second)
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < 0.995 * float(before.sum())
    assert torch.equal(refined.values(integers)[:, 7], torch.zeros(5))
    for column in set(range(160)) - {7}:
        for step in (-1, 1):
            moved = integers.int()
            moved[:, column] += step
            other = squares(weight, refined.values(moved), second)
            allowed = (moved[:, column] >= grid.low) & (moved[:, column] <= grid.high)
            assert bool((other >= after * (1 - 1e-6))[allowed].all())


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "block": 16}], ids=str)
def test_refined_scales_are_those_of_least_squares(options: dict[str, Any]) -> None:
    weight, second = seeded(5, 32), covariance(inputs(400, 32))
    grid = fit(weight, **options)
    refined, integers = refine(weight, second, grid, reconstruct(weight, second, grid), rounds=40)
    root = np.linalg.cholesky((second[0] + 0.01 * second[0].diagonal().mean() * torch.eye(32)).numpy()).T
    for row in range(5):
        parts = np.stack(np.split(np.eye(32) * integers[row].double().numpy(), max(grid.scale.numel() // 5, 1), 1))
        wanted = np.linalg.lstsq((root @ parts).sum(2).T, root @ weight[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(refined.scale[row].numpy().reshape(-1), wanted, rtol=1e-5)


def test_refining_outputs_of_groups_and_in_parts_is_the_same() -> None:
    weight = seeded(9000, 128)
    second = torch.cat([covariance(inputs(300, 128)), covariance(inputs(300, 128).flip(1))])
    grid = fit(weight, bits=4, block=32)
    both, integers = refine(weight, second, grid, reconstruct(weight, second, grid), rounds=1)
    for group in range(2):
        part = slice(4500 * group, 4500 * group + 4500)
        alone = fit(weight[part], bits=4, block=32)
        first = reconstruct(weight[part], second[group : group + 1], alone)
        refined, found = refine(weight[part], second[group : group + 1], alone, first, rounds=1)
        assert float((found != integers[part]).double().mean()) < 1e-4  # products of other shapes are rounded otherwise
        torch.testing.assert_close(refined.scale, both.scale[part], rtol=1e-5, atol=0)


def test_refining_needs_damping() -> None:
    weight, second = seeded(4, 32), covariance(inputs(100, 32))
    grid = fit(weight, bits=4)
    with pytest.raises(ValueError, match="damping must be above 0"):
        refine(weight, second, grid, grid.round(weight), damping=0.0)


def test_the_fitted_weight_is_that_of_ridge_regression() -> None:
    """Rows for the ridge stand below the inputs: numpy's least squares then solves the same."""
    weight, x = seeded(6, 5), inputs(200, 5).double()
    met = torch.round(x)
    second, cross = covariance(met), (x.T @ met / len(x)).unsqueeze(0)
    ridge = torch.diag((0.01 * second[0].diagonal() * len(x)).sqrt())
    wanted = torch.cat([x @ weight.double().T, ridge @ weight.double().T])
    expected = np.linalg.lstsq(torch.cat([met, ridge]).numpy(), wanted.numpy(), rcond=None)[0].T
    found = fitted(weight, second, cross)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fitted(weight, second, second), weight, rtol=1e-6, atol=0)
    weight[:, 2] = 0
    assert torch.equal(fitted(weight, second, cross)[:, 2], torch.zeros(6))
