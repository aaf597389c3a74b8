"""Who wins a race, and what becomes of those that are lost on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    transient: bool = False

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        self.blocks -= 1
        if self.blocks < 0:
            raise Lost("its process died of signal 9", transient=self.transient)
        return self.takes * calls


def raced(leaders: Sequence[str] | None = None, **calls: Call) -> Figures:
    ticks = itertools.count(0, 0.001)
    return timed(
        {name: [call] for name, call in calls.items()}, ["base"], leaders=leaders, clock=lambda: next(ticks),
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


@pytest.mark.parametrize(("leaders", "rounds"), [(None, 3), (["base", "fast"], 3), (["base"], 6)])
def test_one_far_behind_a_leader_is_no_longer_timed(leaders: list[str] | None, rounds: int) -> None:
    """What may be ruled out for its numbers makes no other leave; one that left makes no race unsteady."""
    found = raced(leaders, base=Call(0.04), behind=Call(0.03), fast=Call(0.01))
    assert {name: one.overall.rounds for name, one in found.speeds.items()} == {"base": 6, "behind": rounds, "fast": 6}
    left = replace(found.speeds["behind"].overall, steady=False)
    speeds = found.speeds | {"behind": replace(found.speeds["behind"], overall=left)}
    assert replace(found, speeds=speeds).steady is (rounds < 6)


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


@given(rows, st.floats(0, 20), st.data())
def test_nobody_who_may_win_is_faster_than_the_winner(
    entrants: list[Entrant], within: float, data: st.DataObject
) -> None:
    """And the best quantized one may always win, so that the accuracy check never empties a race."""
    asked = [place for place, one in enumerate(entrants) if one.model == "as asked" and not one.why_out]
    planned = {place: data.draw(st.just(math.inf) | st.floats(-20, 120)) for place in asked}
    others = [place for place, one in enumerate(entrants) if one.model != "as asked"]
    rounding = {*asked, *(data.draw(st.sets(st.sampled_from(others))) if others else ())}
    ruled, least = judged(entrants, planned, rounding, within)
    order = fastest(ruled)
    speeds = [one.speed[0] for one in map(ruled.__getitem__, order) if one.speed is not None and not one.why_out]
    assert len(speeds) == len(order) and speeds == sorted(speeds, reverse=True)
    for place in order:
        sqnr = entrants[place].sqnr
        if place in rounding:  # each of them is held to a bar
            assert least is not None and sqnr is not None and sqnr >= least
        assert least is None or sqnr is None or sqnr >= least
    exact = [place for place, one in enumerate(entrants) if one.sqnr == math.inf and one.speed and not one.why_out]
    assert {place for place in exact if place not in rounding or least is not None} <= set(order)
    known = [place for place in planned if entrants[place].sqnr is not None]
    if known:
        best = max(known, key=lambda place: min(entrants[place].sqnr or 0.0, planned[place]))
        assert not ruled[best].why_out


def test_an_engine_that_computes_in_floats_sets_no_higher_bar() -> None:
    """It left out what was asked for: the others are as close as the passes let them be."""
    int8, floats = (Entrant("engine", "as asked", "float32", sqnr) for sqnr in (41.0, 69.0))
    ruled, least = judged([int8, floats], {0: 41.5, 1: 41.2}, {0, 1}, 3.0)
    assert least == pytest.approx(38.2) and not any(one.why_out for one in ruled)
    assert judged([int8, floats], {0: 41.5, 1: 69.0}, {0, 1}, 3.0)[0][0].why_out.startswith("28.0 dB below the best")


def test_what_was_reverted_sets_the_bar_that_was_asked_for() -> None:
    """A result without its integers is exact: the others are held to what the passes would have left."""
    rows = [Entrant("one", "as asked", "float32", math.inf), Entrant("other", "as asked", "float32", 40.0),
            Entrant("other", "uncompressed", "bfloat16", 30.0), Entrant("other", "uncompressed", "float32", 120.0),
           ]  # fmt: skip
    ruled, least = judged(rows, {0: 41.0, 1: 40.5}, {1, 2}, 3.0)
    assert least == pytest.approx(38.0)
    assert [bool(one.why_out) for one in ruled] == [False, False, True, False]


def test_what_rounds_is_out_where_no_bar_is_known() -> None:
    rows = [Entrant("one", "uncompressed", "float32", 120.0), Entrant("one", "uncompressed", "bfloat16", 40.0)]
    ruled, least = judged(rows, {}, {1}, 3.0)
    assert least is None and not ruled[0].why_out and "nothing to compare with" in ruled[1].why_out
    lost = Entrant("one", "as asked", "float32", None, why_out="its process died")
    assert judged([lost, *rows], {0: 42.0}, {0, 2}, 3.0)[1] == pytest.approx(39.0)  # what it was to leave is known


def test_those_that_may_run_another_time_are_told_apart() -> None:
    found = raced(base=Call(0.04), dying=Call(0.01, blocks=4), hanging=Call(0.01, blocks=5, transient=True))
    assert set(found.lost) == {"dying", "hanging"} and found.transient == ("hanging",)
