"""Masks, against a stable sort in numpy, and exact counts."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from graphopt.numerics import prune

Array = np.ndarray[Any, Any]
FEW_VALUES = st.sampled_from([0.0, -0.0, 1e-42, 0.5, -0.5, 1.0, -1.0, 3e38])
ELEMENTS = st.one_of(FEW_VALUES, st.floats(-1e6, 1e6, width=32))
WEIGHTS = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=8), elements=ELEMENTS)
AMOUNTS = st.floats(0, 1, exclude_max=True)


def expected_keep(magnitudes: Array, count: int) -> Array:
    """All True but `count` smallest, the earlier of equals first: a stable sort."""
    keep = np.ones(len(magnitudes), bool)
    keep[np.argsort(magnitudes, kind="stable")[:count]] = False
    return keep


@given(WEIGHTS, AMOUNTS)
@settings(max_examples=150, deadline=None)
def test_mask_equals_a_stable_sort(weight: Array, amount: float) -> None:
    mask = prune.magnitude_mask(torch.from_numpy(weight), amount)
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    count = round(amount * weight.size)
    assert int((~mask).sum()) == count
    assert np.array_equal(mask.numpy().ravel(), expected_keep(np.abs(weight).ravel(), count))


@given(st.lists(WEIGHTS, max_size=4), AMOUNTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_global_masks_equal_a_stable_sort_of_all(weights: list[Array], amount: float, double: bool) -> None:
    tensors = [torch.from_numpy(w) for w in weights]
    if double and tensors:
        tensors[0] = tensors[0].double()
    masks = prune.magnitude_masks_global(iter(tensors), amount)
    assert [m.shape for m in masks] == [t.shape for t in tensors]
    magnitudes = np.concatenate([np.zeros(0), *(np.abs(w).ravel() for w in weights)])
    count = round(amount * len(magnitudes))
    flat = np.concatenate([np.zeros(0, bool), *(m.numpy().ravel() for m in masks)])
    assert np.array_equal(flat, expected_keep(magnitudes, count))


def test_float64_is_told_apart_below_float32() -> None:
    weight = torch.tensor([1.0 + 1e-15, 1.0, 1.0 + 2e-15], dtype=torch.float64)
    assert prune.magnitude_mask(weight, 0.34).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(prune.magnitude_mask(weight, 0.4), prune.magnitude_mask(weight.float(), 0.4))


def test_ties_go_in_row_major_order_whatever_the_layout() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0], [1.0, 5.0, 1.0]])
    expected = [[False, False, False], [True, True, True]]
    assert prune.magnitude_mask(weight, 0.5).tolist() == expected
    assert prune.magnitude_mask(weight.T.contiguous().T, 0.5).tolist() == expected


def test_ties_go_in_the_order_of_the_weights() -> None:
    masks = prune.magnitude_masks_global([torch.ones(2), torch.zeros(1), torch.ones(2)], 0.8)
    assert [m.tolist() for m in masks] == [[False, False], [False], [False, True]]


def test_larger_than_one_histogram_bin() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    mask = prune.magnitude_mask(weight, 0.9)
    assert int((~mask).sum()) == 54000
    assert weight[~mask].abs().max() <= weight[mask].abs().min()


@pytest.mark.parametrize("amount", [-0.1, 1.0, float("nan")])
def test_amount_out_of_range(amount: float) -> None:
    with pytest.raises(ValueError, match=r"amount must be in \[0, 1\)"):
        prune.magnitude_mask(torch.ones(2), amount)


def test_names_the_weight_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"weight 1 has 1 of 3 values NaN or infinite, the first at \(2,\): nan"):
        prune.magnitude_masks_global([torch.ones(2), torch.tensor([0.0, 1.0, float("nan")])], 0.5)


def test_sparsity() -> None:
    assert prune.sparsity(torch.tensor([[0.0, -0.0], [1e-45, 2.0]])) == 0.5
    assert prune.sparsity(torch.zeros(3, dtype=torch.int8)) == 1.0
    assert prune.sparsity(torch.zeros(0)) == 0.0
