"""Ranges over batches, against the range of everything at once."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.numerics.observe import MinMax

Array = np.ndarray[Any, Any]
BATCHES = st.lists(arrays(np.float32, (2, 3, 4), elements=st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=4)


@given(BATCHES, st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_range_is_that_of_all_real_positions(batches: list[Array], axes: int, random: Random) -> None:
    observer, kept = MinMax(), []
    for batch in batches:
        mask = np.array([random.random() < 0.5 for _ in range(24)]).reshape(2, 3, 4)[(...,) + (0,) * (3 - axes)]
        kept.append(batch[mask].ravel())
        batch = np.where(mask.reshape(mask.shape + (1,) * (3 - axes)), batch, np.float32("nan"))
        observer.update(torch.from_numpy(batch), torch.from_numpy(mask.copy()))
    seen = np.concatenate(kept)
    assert observer.count == seen.size
    if seen.size:
        assert observer.range() == (seen.min(), seen.max())


def test_without_a_mask_everything_counts() -> None:
    observer = MinMax()
    observer.update(torch.tensor([[1.0, 5.0]]))
    observer.update(torch.tensor([[2, -3]]))
    assert observer.range() == (-3.0, 5.0) and observer.count == 4


def test_no_range_of_nothing() -> None:
    observer = MinMax()
    observer.update(torch.zeros(0, 4))
    observer.update(torch.ones(2, 4), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no element was observed"):
        observer.range()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite_and_stays_as_it_was(bad: float) -> None:
    observer = MinMax()
    observer.update(torch.tensor([1.0, 2.0]))
    x = torch.zeros(2, 3)
    x[0, 0] = x[1, 1] = x[1, 2] = bad
    with pytest.raises(ValueError, match=r"x has 2 of 6 values NaN or infinite, the first at \(1, 1\)"):
        observer.update(x, torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"x has 3 of 6 values NaN or infinite, the first at \(0, 0\)"):
        observer.update(x)
    assert observer.range() == (1.0, 2.0) and observer.count == 2


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 4, 1), (1, 3), ()])
def test_refuses_a_mask_that_is_no_prefix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"does not fit the leading axes of \[2, 3, 4\]"):
        MinMax().update(torch.zeros(2, 3, 4), torch.ones(shape, dtype=torch.bool))


def test_refuses_a_mask_that_is_not_bool() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool, got torch.int64"):
        MinMax().update(torch.zeros(2, 3), torch.ones(2, dtype=torch.int64))
