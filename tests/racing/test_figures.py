"""Who wins a race, and what becomes of those that are lost on the way."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.racing.contestant import Lost
from graphopt.racing.figures import Figures, fastest, judged, timed
from graphopt.report.records import Entrant


@dataclass
class Call:
    """Takes so many seconds, and is lost after some blocks."""

    takes: float
    blocks: int = 1000

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        self.blocks -= 1
        if self.blocks < 0:
            raise Lost("its process died of signal 9")
        return self.takes * calls


def raced(**calls: Call) -> Figures:
    ticks = itertools.count(0, 0.001)
    return timed(
        {name: [call] for name, call in calls.items()}, ["base"], clock=lambda: next(ticks), sleep=lambda seconds: None,
        probe=lambda: None,
    )  # fmt: skip


def test_speeds_are_over_the_first_baseline_that_runs() -> None:
    found = raced(base=Call(0.04), fast=Call(0.01), slow=Call(0.1))
    assert found.baseline == "base"
    assert {name: one.overall.median for name, one in found.speeds.items()} == pytest.approx(
        {"base": 1.0, "fast": 4.0, "slow": 0.4}
    )
    assert found.milliseconds("fast") == pytest.approx([10.0])
    assert raced(base=Call(0.04, blocks=3), fast=Call(0.01)).baseline == "fast"


def test_one_that_is_lost_leaves_the_others_racing() -> None:
    found = raced(base=Call(0.04), dying=Call(0.01, blocks=4), fast=Call(0.02))
    assert found.lost == {"dying": "its process died of signal 9"}
    assert found.speeds["fast"].overall.median == pytest.approx(2.0)
    with pytest.raises(Lost, match="base its process died"):
        raced(base=Call(0.04, blocks=0))


def test_figures_survive_the_cache() -> None:
    found = raced(base=Call(0.04), fast=Call(0.01), dying=Call(0.01, blocks=4))
    assert Figures.of(found.kept()) == found
    assert found.kept()["form"] == "fast"


sqnrs = st.one_of(st.none(), st.just(math.inf), st.floats(-20, 120))
rows = st.lists(
    st.builds(
        Entrant, st.just("engine"), st.sampled_from(["as asked", "uncompressed"]), st.just("float32"), sqnrs,
        st.just(()), st.one_of(st.none(), st.floats(0.1, 10).map(lambda speed: (speed, speed, speed))),
        st.sampled_from(["", "", "", "lost"]),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(rows, st.floats(0, 20))
def test_nobody_who_may_win_is_faster_than_the_winner(entrants: list[Entrant], within: float) -> None:
    """And the best quantized one may always win, so that the accuracy check never empties a race."""
    rounded = [place for place, one in enumerate(entrants) if one.model == "as asked" and not one.why_out]
    ruled, least = judged(entrants, dict.fromkeys(rounded, math.inf), within)
    order = fastest(ruled)
    speeds = [one.speed[0] for one in map(ruled.__getitem__, order) if one.speed is not None and not one.why_out]
    assert len(speeds) == len(order) and speeds == sorted(speeds, reverse=True)
    found = [one.sqnr for one in map(ruled.__getitem__, order) if one.sqnr is not None]
    assert least is None or all(one >= least for one in found)
    exact = [place for place, one in enumerate(entrants) if one.sqnr == math.inf and one.speed and not one.why_out]
    assert set(exact) <= set(order)
    known = [place for place in rounded if entrants[place].sqnr is not None]
    if known:
        best = max(known, key=lambda place: entrants[place].sqnr or -math.inf)
        assert not ruled[best].why_out


def test_an_engine_that_computes_in_floats_sets_no_higher_bar() -> None:
    """It left out what was asked for: the others are as close as the passes let them be."""
    int8, floats = (Entrant("engine", "as asked", "float32", sqnr) for sqnr in (41.0, 69.0))
    ruled, least = judged([int8, floats], {0: 41.5, 1: 41.2}, 3.0)
    assert least == pytest.approx(38.2) and not any(one.why_out for one in ruled)
    assert judged([int8, floats], {0: 41.5, 1: 69.0}, 3.0)[0][0].why_out.startswith("28.0 dB below the best")
