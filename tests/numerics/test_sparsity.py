"""Masks, against a stable sort in numpy, and exact counts; patterns, by counting."""

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from graphopt.numerics import sparsity as prune
from graphopt.numerics.sparsity import Pattern

Array = np.ndarray[Any, Any]
FEW_VALUES = st.sampled_from([0.0, -0.0, 1e-42, 0.5, -0.5, 1.0, -1.0, 3e38])
ELEMENTS = st.one_of(FEW_VALUES, st.floats(-1e6, 1e6, width=32))
WEIGHTS = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=8), elements=ELEMENTS)
AMOUNTS = st.floats(0, 1, exclude_max=True)


def mask_of(weight: Tensor, amount: float) -> Tensor:
    """What stays of one tensor, anywhere in it."""
    return Pattern().masks([weight], amount)[0]


def expected_keep(magnitudes: Array, count: int) -> Array:
    """All True but `count` smallest, the earlier of equals first: a stable sort."""
    keep = np.ones(len(magnitudes), bool)
    keep[np.argsort(magnitudes, kind="stable")[:count]] = False
    return keep


@given(WEIGHTS, AMOUNTS)
@settings(max_examples=150, deadline=None)
def test_mask_equals_a_stable_sort(weight: Array, amount: float) -> None:
    mask = mask_of(torch.from_numpy(weight), amount)
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
    masks = Pattern().masks(iter(tensors), amount)
    assert [m.shape for m in masks] == [t.shape for t in tensors]
    magnitudes = np.concatenate([np.zeros(0), *(np.abs(w).ravel() for w in weights)])
    count = round(amount * len(magnitudes))
    flat = np.concatenate([np.zeros(0, bool), *(m.numpy().ravel() for m in masks)])
    assert np.array_equal(flat, expected_keep(magnitudes, count))


def test_float64_is_told_apart_below_float32() -> None:
    weight = torch.tensor([1.0 + 1e-15, 1.0, 1.0 + 2e-15], dtype=torch.float64)
    assert mask_of(weight, 0.34).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(mask_of(weight, 0.4), mask_of(weight.float(), 0.4))


def test_ties_go_in_row_major_order_whatever_the_layout() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0], [1.0, 5.0, 1.0]])
    expected = [[False, False, False], [True, True, True]]
    assert mask_of(weight, 0.5).tolist() == expected
    assert mask_of(weight.T.contiguous().T, 0.5).tolist() == expected


def test_ties_go_in_the_order_of_the_weights() -> None:
    masks = Pattern().masks([torch.ones(2), torch.zeros(1), torch.ones(2)], 0.8)
    assert [m.tolist() for m in masks] == [[False, False], [False], [False, True]]


def test_larger_than_one_histogram_bin() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    mask = mask_of(weight, 0.9)
    assert int((~mask).sum()) == 54000
    assert weight[~mask].abs().max() <= weight[mask].abs().min()


@pytest.mark.parametrize("amount", [-0.1, 1.0, float("nan")])
def test_amount_out_of_range(amount: float) -> None:
    with pytest.raises(ValueError, match=r"amount must be in \[0, 1\)"):
        mask_of(torch.ones(2), amount)


def test_names_the_weight_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"weight 1 has 1 of 3 values NaN or infinite, the first at \(2,\): nan"):
        Pattern().masks([torch.ones(2), torch.tensor([0.0, 1.0, float("nan")])], 0.5)


def test_all_may_go_by_count() -> None:
    assert not prune.without_lowest([torch.ones(3)], 3)[0].any()
    assert prune.without_lowest([torch.ones(3)], 0)[0].all()


# --- matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (6, 4, 3, 2), (2, 3, 2, 2, 2)])
def test_the_matrix_of_a_weight_and_back(shape: tuple[int, ...]) -> None:
    weight = torch.arange(float(np.prod(shape))).reshape(shape)
    matrix = prune.as_matrix(weight)
    assert matrix.shape == (shape[0], np.prod(shape[1:]))
    assert torch.equal(prune.as_weight(matrix, shape), weight)
    assert torch.equal(weight.flatten(1)[:, prune.columns(shape)], matrix)
    # Neighbours are input channels at one position of the kernel.
    first = weight[0].reshape(shape[1], -1)[:, 0]
    assert torch.equal(matrix[0, : shape[1]], first)


# --- patterns ------------------------------------------------------------------------------------------------------


@st.composite
def matrices(draw: st.DrawFn, rows: int = 1, columns: int = 1) -> Array:
    shape = draw(st.integers(1, 4)) * rows, draw(st.integers(1, 4)) * columns
    return draw(arrays(np.float32, shape, elements=ELEMENTS))


@given(st.data(), st.integers(1, 7), st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_n_of_m_neighbours_stay_and_they_are_the_largest(data: st.DataObject, n: int, m: int) -> None:
    keep = min(n, m - 1)
    weight = data.draw(matrices(columns=m))
    mask = Pattern.parse(f"{keep}:{m}").masks([torch.from_numpy(weight)], 0)[0].numpy()
    groups, kept = np.abs(weight).reshape(-1, m), mask.reshape(-1, m)
    assert (kept.sum(1) == keep).all()
    for group, kept_of_it in zip(groups, kept, strict=True):
        assert np.array_equal(kept_of_it, expected_keep(group, m - keep))


@given(st.data(), st.integers(1, 4), st.integers(1, 4), AMOUNTS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_blocks_stay_or_go_whole(data: st.DataObject, rows: int, columns: int, amount: float, by_row: bool) -> None:
    weight = data.draw(matrices(rows, columns))
    pattern, tensor = Pattern.parse(f"{rows}x{columns}"), torch.from_numpy(weight)
    mask = (pattern.masks_by_row(tensor, amount) if by_row else pattern.masks([tensor], amount)[0]).numpy()
    blocks = weight.shape[0] // rows, rows, weight.shape[1] // columns, columns
    sums = np.abs(weight.astype(np.float64)).reshape(blocks).sum((1, 3))
    kept = mask.reshape(blocks)
    assert (kept == kept[:, :1, :, :1]).all()
    kept = kept[:, 0, :, 0]
    if by_row:
        assert ((~kept).sum(1) == round(amount * sums.shape[1])).all()
        pairs = list(zip(sums, kept, strict=True))
    else:
        assert (~kept).sum() == round(amount * sums.size)
        pairs = [(sums.ravel(), kept.ravel())]
    for scores, stay in pairs:
        assert not stay.any() or stay.all() or scores[~stay].max() <= scores[stay].min() * (1 + 1e-12)


@given(st.data(), AMOUNTS)
@settings(max_examples=50, deadline=None)
def test_by_row_equals_a_stable_sort_of_each(data: st.DataObject, amount: float) -> None:
    weight = data.draw(matrices())
    mask = Pattern().masks_by_row(torch.from_numpy(weight), amount).numpy()
    count = round(amount * weight.shape[1])
    assert np.array_equal(mask, np.stack([expected_keep(row, count) for row in np.abs(weight)]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2/4", "pattern is '2/4'; give unstructured, N:M (2:4) or a block of outputs x inputs (4x1)"),
        ("4:2", "pattern is 4:2; of every M weights N stay, with 1 <= N < M"),
        ("4:4", "pattern is 4:4; of every M weights N stay"),
        ("0:4", "pattern is 0:4; of every M weights N stay"),
        ("0x4", "pattern is 0x4; a block holds at least 1x1 weights"),
    ],
)
def test_patterns_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Pattern.parse(text)
    assert message in str(caught.value)


def test_patterns_say_how_much_goes_and_what_they_divide() -> None:
    assert Pattern.parse("1:4").amount == 0.75 and Pattern.parse("4x1").amount is None
    assert Pattern.parse("2:4").undivided_axis((6, 8, 3, 3)) is None
    assert Pattern.parse("2:4").undivided_axis((8, 6)) == ("input", 6, 4)
    assert Pattern.parse("4x1").undivided_axis((6, 8)) == ("output", 6, 4)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4x1"])
def test_scores_that_are_not_finite(text: str) -> None:
    scores, pattern = torch.ones(4, 4), Pattern.parse(text)
    scores[1, 2] = float("inf")
    with pytest.raises(ValueError, match="values NaN or infinite"):
        pattern.masks([scores], 0.5)
    with pytest.raises(ValueError, match="values NaN or infinite"):
        pattern.masks_by_row(scores, 0.5)


def test_amounts_out_of_range_by_row_and_by_threshold() -> None:
    with pytest.raises(ValueError, match=r"amount must be in \[0, 1\), got 1.0"):
        Pattern().masks_by_row(torch.ones(2, 2), 1.0)
    with pytest.raises(ValueError, match=r"amount must be in \[0, 1\), got -0.1"):
        prune.threshold_mask(torch.ones(2), -0.1)


# --- the rest ------------------------------------------------------------------------------------------------------


def test_threshold_is_a_share_of_the_largest() -> None:
    weight = torch.tensor([[0.0, -8.0, 2.0], [1.99, -2.0, 4.0]])
    assert prune.threshold_mask(weight, 0.25).tolist() == [[False, True, True], [False, True, True]]
    assert prune.threshold_mask(weight, 0.0).all() and prune.threshold_mask(torch.zeros(2), 0.5).all()
    assert prune.threshold_mask(torch.zeros(0), 0.5).shape == (0,)


def test_compressed_share() -> None:
    dense = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    half = torch.where(Pattern().masks([dense], 0.5)[0], dense, 0)
    assert 0.85 < prune.compressed_share(dense) <= 1.0
    exact = len(zlib.compress(half.numpy().tobytes(), 6)) / half.nbytes
    assert prune.compressed_share(half) == pytest.approx(exact, rel=0.02) and exact < 0.6
    assert prune.compressed_share(torch.zeros(3, 5, dtype=torch.bfloat16)) < 1
    assert prune.compressed_share(dense[:0]) == 1
    # Neither half of a tensor speaks for the whole of it.
    assert prune.compressed_share(torch.cat([dense, torch.zeros(2**18)])) == pytest.approx(
        prune.compressed_share(dense) / 2, abs=0.06
    )
