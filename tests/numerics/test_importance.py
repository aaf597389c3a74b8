"""importance: each score against its definition, in numpy and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.numerics import importance


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_per_unit_sums_what_belongs_to_each_unit_over_all_parts() -> None:
    first, second = drawn(4, 3), drawn(2, 3, 5, seed=1)
    units = torch.tensor([1, 0, -1, 1])
    found = importance.per_unit([(first, 0, units), (second, -2, torch.tensor([0, 2, 2]))], 3)
    a, b = first.double().numpy(), second.double().numpy()
    expected = [a[1].sum() + b[:, 0].sum(), a[0].sum() + a[3].sum(), b[:, 1:].sum()]
    assert found.dtype == torch.float64 and np.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_numpys_over_all_weights_of_a_unit(order: int) -> None:
    up, bias, down = drawn(6, 5), drawn(6, seed=1), drawn(4, 6, seed=2)
    units = torch.tensor([0, 0, 1, 1, 2, 2])
    found = importance.norms([(up, 0, units), (bias, 0, units), (down, 1, units)], 3, order=order)
    for unit in range(3):
        rows = slice(2 * unit, 2 * unit + 2)
        weights = np.concatenate([t.double().numpy().ravel() for t in (up[rows], bias[rows], down[:, rows])])
        assert np.isclose(found[unit], np.linalg.norm(weights, order), rtol=1e-12)


def test_output_energy_is_what_an_input_adds_to_the_outputs_alone() -> None:
    weight, x = drawn(4, 6), drawn(100, 6, seed=1)
    found = importance.output_energy(weight, x.double().square().mean(0))
    for j in range(6):
        alone = torch.outer(x[:, j], weight[:, j]).double()
        assert np.isclose(found[j], alone.square().sum(1).mean(), rtol=1e-6)


def test_output_energy_of_a_conv_sums_over_the_kernel() -> None:
    weight, squares = drawn(4, 3, 2, 2), drawn(12, seed=1).double().square()
    found = importance.output_energy(weight, squares)
    expected = np.einsum("ockl,ckl->c", weight.double().numpy() ** 2, squares.numpy().reshape(3, 2, 2))
    assert np.allclose(found, expected, rtol=1e-12)


def test_taylor_is_the_change_of_a_linear_loss() -> None:
    """Of a loss that is linear in the weights, the first order is all there is."""
    weight, bias, x = drawn(3, 5), drawn(3, seed=1), drawn(5, seed=2)
    coefficients = drawn(3, seed=3)

    def loss(keep: Tensor) -> Tensor:
        return coefficients @ ((weight * keep[:, None]) @ x + bias * keep)

    units = torch.arange(3)
    slopes = torch.outer(coefficients, x), coefficients
    found = importance.taylor([(weight, slopes[0], 0, units), (bias, slopes[1], 0, units)], 3)
    for unit in range(3):
        removed = loss(torch.ones(3)) - loss((units != unit).float())
        assert np.isclose(found[unit], abs(float(removed)), rtol=1e-5)


def test_layouts_give_the_same_bits() -> None:
    weight, squares = drawn(7, 5), drawn(5, seed=1).double().square()
    other = weight.T.contiguous().T
    assert torch.equal(importance.output_energy(weight, squares), importance.output_energy(other, squares))
    units = torch.arange(5)
    same = [importance.norms([(one, 1, units)], 5, order=2) for one in (weight, other)]
    assert torch.equal(*same)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"3 units for axis 0 of shape \[4, 2\]"):
        importance.per_unit([(drawn(4, 2), 0, torch.arange(3))], 3)
    with pytest.raises(ValueError, match=r"a tensor of the group has 1 of 2 values NaN"):
        importance.per_unit([(torch.tensor([1.0, float("nan")]), 0, torch.arange(2))], 2)
    with pytest.raises(ValueError, match=r"\[5\] squares for a weight of shape \[4, 6\]"):
        importance.output_energy(drawn(4, 6), drawn(5).double())
