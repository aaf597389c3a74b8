"""Distances of two tensors, against numpy and scipy, and the tolerance at its very edge."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cosine as scipy_cosine
from torch import Tensor

from graphopt.numerics import metrics

Array = np.ndarray[Any, Any]
PAIRS = arrays(np.float64, (2, 3, 5), elements=st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-6))
NAN, INF = math.nan, math.inf


def both(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(a), torch.as_tensor(b)


@given(PAIRS)
@settings(max_examples=100, deadline=None)
def test_equal_to_numpy_and_scipy(pair: Array) -> None:
    a, b = pair
    ta, tb = both(a, b)
    assert metrics.max_error(ta, tb) == np.abs(a - b).max()
    assert metrics.top1_agreement(ta, tb) == pytest.approx(np.mean(a.argmax(-1) == b.argmax(-1)), abs=1e-15)
    signal, noise = (a**2).sum(), ((a - b) ** 2).sum()
    if signal and noise:
        assert metrics.sqnr(ta, tb) == pytest.approx(10 * np.log10(signal / noise), rel=1e-12, abs=1e-9)
    if a.any() and b.any():
        assert metrics.cosine(ta, tb) == pytest.approx(1 - scipy_cosine(a.ravel(), b.ravel()), abs=1e-12)
    if a.any(-1).all() and b.any(-1).all():
        rows = np.mean([1 - scipy_cosine(x, y) for x, y in zip(a, b, strict=True)])
        assert metrics.mean_cosine(ta, tb) == pytest.approx(rows, abs=1e-12)


def test_sqnr_at_its_ends() -> None:
    one, zero = both([1.0, 2.0], [0.0, 0.0])
    assert metrics.sqnr(one, one) == INF and metrics.sqnr(zero, zero) == INF
    assert metrics.sqnr(zero, one) == -INF
    assert metrics.sqnr(one, zero) == 0
    assert metrics.sqnr(one, one * 1.1) == pytest.approx(20, abs=1e-5)
    assert math.isnan(metrics.sqnr(one, torch.tensor([NAN, 2.0])))


def test_cosine_with_zero_vectors() -> None:
    one, zero = both([[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert metrics.cosine(zero, zero) == 1 and metrics.cosine(one, zero) == 0
    assert metrics.mean_cosine(one, zero) == 0.5
    assert metrics.mean_cosine(one, -one) == pytest.approx(0, abs=1e-14)
    assert metrics.cosine(one, 3 * one) == pytest.approx(1, abs=1e-14)


def test_top1_counts_rows_and_takes_the_first_of_equals() -> None:
    a = torch.tensor([[1, 1, 0], [0, 2, 1], [5, 4, 3], [0, 0, 1]])
    b = torch.tensor([[2, 0, 0], [0, 1, 2], [7, 0, 0], [0, 0, 9]])
    assert metrics.top1_agreement(a, b) == 0.75


def test_empty_and_nan() -> None:
    empty = torch.zeros(0, 3)
    assert metrics.max_error(empty, empty) == 0 and metrics.sqnr(empty, empty) == INF
    assert math.isnan(metrics.max_error(torch.tensor([NAN, 1.0]), torch.ones(2)))
    for measure in (metrics.mean_cosine, metrics.top1_agreement):
        with pytest.raises(ValueError, match=r"no row to compare in shape \[0, 3\]"):
            measure(empty, empty)


@pytest.mark.parametrize(
    "measure", [metrics.sqnr, metrics.cosine, metrics.mean_cosine, metrics.max_error, metrics.top1_agreement]
)
def test_shapes_must_agree(measure: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(ValueError, match=r"shapes differ: \[2, 3\] and \[3\]"):
        measure(torch.ones(2, 3), torch.ones(3))


def test_default_tolerances() -> None:
    assert metrics.tolerance(torch.float32) == metrics.tolerance(torch.float64) == (1e-4, 1e-6)
    assert metrics.tolerance(torch.float16) == metrics.tolerance(torch.bfloat16) == (1e-2, 1e-6)
    assert metrics.tolerance(torch.int64) == metrics.tolerance(torch.bool) == (0.0, 0.0)


def test_tolerance_scales_with_the_largest_of_the_reference() -> None:
    a = torch.tensor([0.0, -10.0], dtype=torch.float64)
    bound = 1e-4 * 10 + 1e-6
    for sign in (1, -1):
        assert metrics.within_tolerance(a, a + torch.tensor([sign * bound * 0.999, 0]))
        assert not metrics.within_tolerance(a, a + torch.tensor([sign * bound * 1.001, 0]))
    assert not metrics.within_tolerance(torch.zeros(2), torch.full((2,), 1.1e-6))
    assert metrics.within_tolerance(torch.zeros(2), torch.full((2,), 0.9e-6))
    assert not metrics.within_tolerance(a, a + 1e-5, rtol=0)
    assert metrics.within_tolerance(a, a + 1e-5, rtol=0, atol=2e-5)


def test_the_wider_dtype_sets_the_tolerance() -> None:
    a = torch.tensor([1.0, 100.0])
    off = torch.tensor([1.5, 100.0])
    assert not metrics.within_tolerance(a, off)
    assert metrics.within_tolerance(a, off.half()) and metrics.within_tolerance(a.bfloat16(), off)
    assert not metrics.within_tolerance(a.half(), off.half() + 1)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([NAN, 1.0], [NAN, 1.0], True),
        ([NAN, 1.0], [1.0, NAN], False),
        ([NAN, 1.0], [0.0, 1.0], False),
        ([0.0, 1.0], [NAN, 1.0], False),
        ([INF, -INF, 1.0], [INF, -INF, 1.0], True),
        ([INF, 1.0], [-INF, 1.0], False),
        ([INF, 1.0], [3e38, 1.0], False),
        ([1.0, 1.0], [INF, 1.0], False),
        ([INF, 1.0], [INF, 1.1], False),
        ([INF, NAN], [INF, NAN], True),
    ],
)
def test_nan_and_infinity(reference: list[float], candidate: list[float], expected: bool) -> None:
    assert metrics.within_tolerance(*both(reference, candidate)) is expected


def test_integers_bools_and_shapes() -> None:
    assert metrics.within_tolerance(*both([1, 2], [1, 2]))
    assert not metrics.within_tolerance(*both([1, 20000000], [1, 20000001]), rtol=1.0, atol=5.0)
    assert metrics.within_tolerance(torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32))
    assert not metrics.within_tolerance(*both([True, False], [True, True]))
    assert not metrics.within_tolerance(torch.zeros(2), torch.zeros(2, 1))
    assert metrics.within_tolerance(torch.zeros(0, 2), torch.zeros(0, 2))


def test_one_step_is_of_integers_of_8_bits_alone() -> None:
    a, b = torch.tensor([0, 254], dtype=torch.uint8), torch.tensor([1, 255], dtype=torch.uint8)
    assert metrics.within_one_step(a, b) and metrics.within_one_step(a - 0, a)
    assert not metrics.within_one_step(a, torch.tensor([0, 0], dtype=torch.uint8))
    assert not metrics.within_one_step(a.to(torch.int64), b.to(torch.int64))
    assert not metrics.within_one_step(a, b[:1])
