"""Ranges over batches, against the range of everything at once."""

from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.numerics.observe import (
    OBSERVERS,
    ChannelMinMax,
    Entropy,
    Histogram,
    MinMax,
    Mse,
    Observer,
    Percentile,
    oddity,
)

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


class Small(Histogram):
    """Few bins, so that they widen often."""

    bins = 16


FLOATS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(count: int, seed: int = 0) -> torch.Tensor:
    """Mostly of size 1, a few of size 30."""
    x = normal(count, seed=seed)
    x[:: count // 20] *= 30
    return x


def filled(observer: Observer, *batches: torch.Tensor) -> Observer:
    for batch in batches:
        observer.update(batch)
    return observer


@given(st.lists(FLOATS, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_histogram_counts_what_numpy_counts_in_any_order_and_cut(batches: list[Array], random: Random) -> None:
    one, whole = Small(), np.concatenate(batches)
    for batch in batches:
        one.update(torch.from_numpy(batch))
    edges, counts = one.counts()
    assert int(counts.sum()) == one.count == whole.size
    assert len(edges) <= Small.bins and np.log2(one.width) % 1 == 0
    ends = np.append(edges.numpy(), edges[-1] + one.width)
    expected = [((whole >= low) & (whole < high)).sum() for low, high in pairwise(ends)]
    assert counts.tolist() == expected and counts[0] > 0 and counts[-1] > 0

    other = Small()
    mixed = [float(v) for v in whole]
    random.shuffle(mixed)
    cut = random.randrange(len(mixed) + 1)
    for part in (mixed[:cut], mixed[cut:]):
        other.update(torch.tensor(part, dtype=torch.float32))
    assert all(map(torch.equal, one.counts(), other.counts())) and one.width == other.width


@pytest.mark.parametrize("spread", [1e-8, 1.0, 1e5])
def test_histogram_uses_at_least_half_of_its_bins(spread: float) -> None:
    histogram = Histogram()
    histogram.update(torch.zeros(3))
    histogram.update(normal(1000) * spread)
    assert Histogram.bins / 2 <= len(histogram.counts()[0]) <= Histogram.bins


@pytest.mark.parametrize("name", OBSERVERS)
def test_range_does_not_depend_on_order_and_cut(name: str) -> None:
    x = heavy(6000)
    one = filled(OBSERVERS[name](), x)
    other = filled(OBSERVERS[name](), x[5000:], x[:10], x[10:5000])
    assert one.range() == other.range() and one.count == other.count


@pytest.mark.parametrize("name", OBSERVERS)
def test_memory_is_flat(name: str) -> None:
    observer = OBSERVERS[name]()
    stated, sizes = observer.nbytes, []
    for number in range(20):
        observer.update(normal(500, seed=number) * number)
        sizes.append(sum(value.nbytes for value in vars(observer).values() if isinstance(value, torch.Tensor)))
    assert max(sizes) == sizes[1] <= stated == observer.nbytes


@pytest.mark.parametrize("name", OBSERVERS)
def test_padding_is_left_out_by_all(name: str) -> None:
    x, mask = heavy(4000).reshape(4, 10, 100), torch.arange(40).reshape(4, 10) % 3 > 0
    real, padded = filled(OBSERVERS[name](), x[mask]), OBSERVERS[name]()
    padded.update(torch.where(mask.unsqueeze(2), x, torch.nan), mask)
    assert padded.range() == real.range() and padded.count == real.count
    with pytest.raises(ValueError, match="no element was observed"):
        OBSERVERS[name]().range()


@given(FLOATS, st.sampled_from([0.0, 1e-5, 0.01, 0.1, 0.3]))
@settings(max_examples=150, deadline=None)
def test_percentile_is_that_of_numpy_within_a_bin(x: Array, tail: float) -> None:
    observer = Percentile(tail)
    observer.update(torch.from_numpy(x))
    low, high = observer.range()
    x = x.astype(np.float64)
    assert abs(low - np.quantile(x, tail, method="inverted_cdf")) <= observer.width
    assert abs(high + np.quantile(-x, tail, method="inverted_cdf")) <= observer.width
    assert x.min() <= low and high <= x.max()


def test_percentile_leaves_out_a_hundred_thousandth() -> None:
    x = normal(400_000)
    x[0], x[1] = 1000, -1000
    low, high = filled(Percentile(), x).range()
    assert -6 < low < -4 and 4 < high < 6
    with pytest.raises(ValueError, match=r"tail must be in \[0, 0.5\), got 0.5"):
        Percentile(0.5)


def squared_error(x: Array, low: float, high: float) -> float:
    """What ONNX QuantizeLinear and DequantizeLinear make of x, by their text."""
    scale = (high - low) / 255
    zero_point = np.rint(-low / scale)
    steps = np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point
    return float(np.mean((steps * scale - x) ** 2))


@pytest.mark.parametrize(
    "x",
    [normal(20_000), heavy(20_000), heavy(20_000).relu(), -heavy(20_000).abs(), normal(2000).exp(), normal(40) + 9],
    ids=["normal", "heavy", "relu", "negative", "skewed", "few"],
)
def test_mse_is_as_good_as_any_range(x: torch.Tensor) -> None:
    found = squared_error(x.double().numpy(), *filled(Mse(), x).range())
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = np.linspace(0.01, 1, 80)
    every = [squared_error(x.numpy(), least * a, most * b) for a in shares[:: 1 if least else 80]
             for b in shares[:: 1 if most else 80]]  # fmt: skip
    assert found <= min(every) * 1.03 and found <= squared_error(x.numpy(), least, most) * 1.001


def test_mse_of_zeros_and_of_a_constant() -> None:
    assert filled(Mse(), torch.zeros(5)).range() == (0, 0)
    low, high = filled(Mse(), torch.full((5,), 3.0)).range()
    assert low == 0 and squared_error(np.full(5, 3.0), low, high) < 1e-4


def kullback_leibler(histogram: Array, first: int, last: int) -> float:
    """Migacz 2017, slide 38, for the bins from first to last."""
    p = histogram[first : last + 1].astype(float)
    p[0] += histogram[:first].sum()
    p[-1] += histogram[last + 1 :].sum()
    bins = histogram[first : last + 1]
    q = np.zeros(len(bins))
    for group in range(256):
        members = slice(-(-group * len(bins) // 256), -(-(group + 1) * len(bins) // 256))
        positive = bins[members] > 0
        q[members][positive] = bins[members].sum() / max(positive.sum(), 1)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a))


@pytest.mark.parametrize("skew", [False, True])
def test_entropy_has_the_least_divergence_of_its_candidates(skew: bool) -> None:
    observer, x = Entropy(), normal(30_000) ** 3
    observer.update(torch.where(x < 0, x / 3, x) if skew else x)
    edges, counts = (part.numpy() for part in observer.counts())
    zero = int(np.flatnonzero(edges == 0)[0])
    counts[zero] = min(counts[zero], max(counts[zero - 1], counts[zero + 1]))
    size = np.maximum(np.abs(edges), np.abs(edges + observer.width))
    found: dict[tuple[float, float], float] = {}
    for cut in np.linspace(size.max(), np.sort(size)[255], 128):
        inside = np.nonzero((counts > 0) & (size <= cut))[0]
        ends = float(edges[inside[0]]), float(edges[inside[-1]]) + observer.width
        found.setdefault(ends, kullback_leibler(counts, inside[0], inside[-1]))
    best = min(found, key=lambda ends: found[ends])
    low, high = observer.extremes
    assert observer.range() == (max(best[0], low), min(best[1], high))
    assert len(found) > 10 and observer.range() != observer.extremes


@pytest.mark.parametrize("zeros", [100_000, 1_000_000])
def test_entropy_is_not_drawn_to_the_zeros_of_a_relu(zeros: int) -> None:
    half = 6 * normal(100_000).abs()
    alone, with_zeros = (filled(Entropy(), half, torch.zeros(count)).range() for count in (1000, zeros))
    assert with_zeros == alone and 3 * 6 < with_zeros[1] < float(half.max())


@pytest.mark.parametrize("values", [[2.0], [0.0], [-1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
def test_entropy_of_a_few_values_cuts_nothing(values: list[float]) -> None:
    low, high = filled(Entropy(), torch.tensor(values).repeat(10)).range()
    assert (low, high) == (min(values), max(values))


@pytest.mark.parametrize("axis", [1, -1])
def test_channels_keep_their_ends(axis: int) -> None:
    x = normal(3, 4, 5)
    observer = ChannelMinMax(x.shape[axis], axis)
    observer.update(x[:1])
    observer.update(x[1:])
    others = tuple(a for a in range(3) if a != axis % 3)
    np.testing.assert_array_equal(observer.low, x.numpy().min(others))
    np.testing.assert_array_equal(observer.high, x.numpy().max(others))
    np.testing.assert_array_equal(observer.magnitudes(), np.abs(x.numpy()).max(others))
    assert observer.range() == (float(x.min()), float(x.max())) and observer.count == 60


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_leave_padding_out(axis: int) -> None:
    x, mask = normal(3, 4, 5), torch.tensor([True, False, True])
    observer = ChannelMinMax(x.shape[axis], axis)
    observer.update(x.index_fill(0, torch.tensor([1]), torch.nan), mask)
    assert torch.equal(observer.high, x[mask].amax(3 - axis).amax(0)) and observer.count == 40


def test_channels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="x has 5 channels on axis 2, not 4"):
        ChannelMinMax(4).update(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"\[3, 4\] reaches over the channels, axis 1 of x"):
        ChannelMinMax(4, 1).update(torch.zeros(3, 4, 5), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no element was observed"):
        ChannelMinMax(4).magnitudes()


def test_outliers_stand_out_from_the_median() -> None:
    x = torch.ones(2, 7) * torch.tensor([1.0, 1.0, -25.0, 0.0, 1.2, 19.0, 0.8])
    observer = ChannelMinMax(7)
    observer.update(x)
    assert observer.outliers() == [2] and observer.outliers(18) == [2, 5] and observer.outliers(30) == []
    observer = ChannelMinMax(5)
    observer.update(torch.zeros(3, 5))
    assert observer.outliers() == []
    observer.update(torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]))  # channels that are all zero say nothing of the others
    assert observer.outliers() == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], "never exercised"), ([0.0, 0.0], "all zero"), ([2.5], "constant (2.5)"), ([1.0, 2.0], None)],
)
def test_oddities(values: list[float], expected: str | None) -> None:
    for name in OBSERVERS:
        assert oddity(filled(OBSERVERS[name](), torch.tensor(values))) == expected
    channels = ChannelMinMax(1)
    channels.update(torch.tensor(values).reshape(-1, 1))
    assert oddity(channels) == expected
