"""The race itself: candidates that time themselves, in one interleaved run, and which of them is taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from graphopt.measure import timing
from graphopt.measure.timing import Ratio, Ratios, TimesItself
from graphopt.racing.contestant import Lost
from graphopt.report.records import Entrant

CAN_NOT_WIN = 0.5
"""A candidate whose speed over the baseline's stays below this in its first rounds is no longer timed."""

FAR_BEHIND = 0.67
"""Nor is one whose speed is below this share of a leader's: most often it is the model as it is."""

NARROW = 1.1
"""Upper over lower end of the 95% interval at which fewer rounds are enough."""


@dataclass(frozen=True)
class Figures:
    """What a race has measured, by the label of each candidate."""

    baseline: str
    """What the speeds are over."""
    speeds: dict[str, Ratios]
    """Over the baseline."""
    lost: dict[str, str] = field(default_factory=dict)
    """How those failed that did not come to the end."""
    sqnrs: dict[str, float] = field(default_factory=dict)
    """Of the outputs to the original's, in dB."""
    transient: tuple[str, ...] = ()
    """Of those that are lost, the ones that may run another time (`Lost.transient`)."""

    @property
    def steady(self) -> bool:
        """Whether the machine's speed was, by all that were not dropped after a few rounds."""
        overall = [one.overall for one in self.speeds.values()]
        return all(one.steady for one in overall if one.rounds + one.dropped >= timing.MIN_PAIRS)

    def milliseconds(self, label: str) -> tuple[float, ...]:
        """p50 of one call at each shape."""
        return tuple(1000 * shape.seconds[label][0] for shape in self.speeds[label].shapes)

    def kept(self) -> dict[str, Any]:
        """Plain data for the timing cache, with the entries that `graphopt cache` shows of any choice."""
        overall = {label: ratios.overall for label, ratios in self.speeds.items()}
        ordered = sorted(overall, key=lambda label: label != self.baseline)
        return {
            "form": max(overall, key=lambda label: overall[label].median),
            "ratios": {label: [overall[label].median, overall[label].low, overall[label].high] for label in ordered},
            "dropped": self.lost,
            "race": asdict(self),
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Figures:
        """What `kept` gave."""
        facts = kept["race"]
        speeds = {
            label: Ratios(_ratio(one["overall"]), tuple(map(_ratio, one["shapes"])))
            for label, one in facts["speeds"].items()
        }
        return cls(facts["baseline"], speeds, facts["lost"], facts["sqnrs"])


def _ratio(facts: Mapping[str, Any]) -> Ratio:
    seconds = {label: (p50, p90) for label, (p50, p90) in facts["seconds"].items()}
    return Ratio(**{**facts, "seconds": seconds})


def timed(
    candidates: Mapping[str, Sequence[TimesItself]],
    baselines: Sequence[str],
    *,
    leaders: Container[str] | None = None,
    clock: timing.Clock = time.perf_counter,
    probe: Callable[[], object] | None = None,
    on_round: Callable[[str], object] | None = None,
) -> Figures:
    """Time all candidates in one interleaved run (`timing.paired_calls`), each with one call for each shape.

    The process of a candidate pauses by itself (`child`).
    baselines: labels, of which the first that runs is what the others are compared with; the first candidate where
    none does. leaders: those that make others leave that are far behind them. One that is lost on the way is left out,
    and the others start again. Raises Lost where none is left.
    """
    lost: dict[str, Lost] = {}
    while remaining := {label: calls for label, calls in candidates.items() if label not in lost}:
        baseline = next(label for label in (*baselines, *remaining) if label in remaining)
        named = {label: [_Named(call, label) for call in calls] for label, calls in remaining.items()}
        try:
            found = timing.paired_calls(
                named, baseline=baseline, give_up_below=CAN_NOT_WIN, give_up_behind=FAR_BEHIND, leaders=leaders,
                until=_is_narrow, clock=clock, pause=0.0, probe=probe, on_round=on_round,
            )  # fmt: skip
        except _Out as out:
            lost[out.label] = out.lost
            continue
        transient = tuple(label for label, how in lost.items() if how.transient)
        return Figures(baseline, found, {label: str(how) for label, how in lost.items()}, transient=transient)
    raise Lost("; ".join(f"{label} {how}" for label, how in lost.items()))


def _is_narrow(ratios: Ratios) -> bool:
    return ratios.overall.steady and 0 < ratios.overall.high <= NARROW * ratios.overall.low


class _Out(Exception):
    def __init__(self, label: str, lost: Lost) -> None:
        self.label, self.lost = label, lost


@dataclass
class _Named:
    """A call whose failure says whose it is."""

    call: TimesItself
    label: str

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        try:
            return self.call.seconds(calls)
        except Lost as lost:
            raise _Out(self.label, lost) from lost


def judged(
    entrants: Sequence[Entrant], planned: Mapping[int, float], rounding_places: Container[int], within: float
) -> tuple[list[Entrant], float | None]:
    """The entrants, those too far from the original ruled out, and the least SQNR (dB) that the others reach.

    planned: for each place (index in `entrants`) that a lossy pipeline made, the SQNR (dB) that its passes leave before
    any site is reverted; infinity where that is not known. An engine that computes some of these sites in floats, or
    reverts them, is closer to the original than was asked for: it sets no higher bar than `planned`. The least SQNR is
    `within` dB below the best bar; None where `planned` gives no bar.
    rounding_places: the places of entrants that round what the model does not. Without a bar, these are ruled out:
    nothing says how much they may lose.
    """
    found = [(entrants[place].sqnr, most) for place, most in planned.items()]
    known = [min(sqnr, most) for sqnr, most in found if sqnr is not None and not math.isnan(sqnr)]
    best = max(known or [most for _, most in found if most < math.inf], default=None)

    def ruled(place: int, one: Entrant) -> Entrant:
        if one.why_out:
            return one
        if place in rounding_places and (best is None or one.sqnr is None):
            return replace(one, why_out="it rounds, and nothing to compare with says how much may be lost")
        if best is None or one.sqnr is None or one.sqnr >= best - within:
            return one
        return replace(one, why_out=f"{best - one.sqnr:.1f} dB below the best, and within={within:g}")

    return [ruled(place, one) for place, one in enumerate(entrants)], None if best is None else best - within


def fastest(entrants: Sequence[Entrant]) -> list[int]:
    """The places of those that may win, the fastest first."""
    timed = [place for place, one in enumerate(entrants) if one.speed is not None and not one.why_out]
    return sorted(timed, key=lambda place: -(entrants[place].speed or (0.0,))[0])
