"""Checks that a result is not slower than its input, and finds the sites that are slower where it is.

The result is slower at an example shape where the 95% interval of its speed over the input's is below 1
(`timing.slower_than`), in 15 interleaved rounds and again in a second run. The pipeline then runs again without the
sites that lose most time there, up to RERUNS times, and after that without any pass that loses accuracy
(`graphopt.run`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from graphopt.ir.graph import Feeds
from graphopt.lowering.backend import Runner
from graphopt.measure import timing
from graphopt.measure.cache import UNSURE, Timings
from graphopt.measure.timing import Clock, Ratio, Ratios
from graphopt.report.records import PassRecord

RERUNS = 6
"""Most times that the pipeline runs again without some sites."""

SHARE = 0.5
"""Of all lost time, the part of the sites that are reverted at once: a profile cannot tell small losses from noise."""

CLEARLY_FASTER = 1.25
"""Speed over the input's at which 6 rounds on an unsteady machine are enough; measured: a result at 1.09 after 6
unsteady rounds was really at 0.88."""


@dataclass(frozen=True)
class SpeedResult:
    """The speed of a result over the input's."""

    ratios: tuple[Ratio, ...]
    """One for each example shape."""
    slower: tuple[int, ...] = ()
    """The example shapes, by index, at which it is slower."""


@dataclass(frozen=True)
class SpeedCheck:
    """Times results against one input on this machine, and caches the figures by the digests of both graphs."""

    baseline: Runner
    captured: Callable[[], Runner]
    """Builds the captured model, whose nodes are named like sites; called only where slow sites are looked for."""
    feeds: Sequence[Feeds]
    setting: Mapping[str, Any]
    """All that timings depend on but the result: the engine, the machine, threads, the input."""
    timings: Timings
    clock: Clock = time.perf_counter

    def time(self, result: Runner, digest: str, on_round: Callable[[str], object] | None = None) -> SpeedResult:
        """The speed of a result. digest: of its graph. on_round: called after each round. Cached; where the machine was
        unsteady, for UNSURE seconds."""
        key = self._key("verdict", digest)
        kept = self.timings.get(key)
        if kept is not None:
            return SpeedResult(tuple(Ratio(**ratio) for ratio in kept["ratios"]), tuple(kept["slower"]))
        found = compare_speed(result, self.baseline, self.feeds, self.clock, on_round)
        self.timings.put(key, asdict(found), math.inf if all(ratio.steady for ratio in found.ratios) else UNSURE)
        return found

    def slowest_sites(
        self, result: Runner, digest: str, shapes: Sequence[int], records: Sequence[PassRecord]
    ) -> dict[str, tuple[float, float]]:
        """As the function `slowest_sites`, at some of the example shapes, given by index. Cached."""
        key = self._key("losers", digest) | {"at": list(shapes), "passes": [record.text for record in records]}
        kept = self.timings.get(key)
        if kept is None:
            kept = {"lost": slowest_sites(result, self.captured(), [self.feeds[index] for index in shapes], records)}
            self.timings.put(key, kept)
        return {label: (before, after) for label, (before, after) in kept["lost"].items()}

    def _key(self, what: str, digest: str) -> dict[str, Any]:
        shapes = [[list(tensor.shape) for tensor in feeds.values()] for feeds in self.feeds]
        return {**self.setting, "choice": f"never slower: {what}", "result": digest, "shapes": shapes}


def compare_speed(
    result: Runner,
    baseline: Runner,
    feeds: Sequence[Feeds],
    clock: Clock = time.perf_counter,
    on_round: Callable[[str], object] | None = None,
) -> SpeedResult:
    """Time a result against the input, interleaved; where it seems slower, a second run has to say so too.

    Timing ends after 6 rounds where the result is faster for certain at every shape; on an unsteady machine, by
    CLEARLY_FASTER.
    """
    calls = {"input": [partial(baseline, one) for one in feeds], "optimized": [partial(result, one) for one in feeds]}
    compare = partial(timing.paired_calls, calls, baseline="input", clock=clock, on_round=on_round)
    ratios = compare(until=_faster)["optimized"].shapes
    suspects = [index for index, ratio in enumerate(ratios) if timing.slower_than(ratio)]
    if suspects:
        ratios = compare()["optimized"].shapes
    return SpeedResult(ratios, tuple(index for index in suspects if timing.slower_than(ratios[index])))


def _faster(ratios: Ratios) -> bool:
    return all(ratio.low > (1 if ratio.steady else CLEARLY_FASTER) for ratio in ratios.shapes)


def slowest_sites(
    result: Runner, baseline: Runner, feeds: Sequence[Feeds], records: Iterable[PassRecord]
) -> dict[str, tuple[float, float]]:
    """Of the sites that passes changed, those that became slower by most: by label, seconds before and after.

    Seconds are from the engine's own profile, summed over the feeds and over the nodes whose names begin with the
    site's label; both runners have to name their nodes so. Sites are given until they make up SHARE of all lost time.
    """
    changed = {label for record in records for label in record.eligible if label not in record.declined}
    before, after = ({label: 0.0 for label in changed} for _ in range(2))
    for runner, sums in ((baseline, before), (result, after)):
        for batch in feeds:
            for name, seconds in runner.profile(batch).items():
                if (label := _site_of(name, changed)) is not None:
                    sums[label] += seconds
    lost = {label: after[label] - before[label] for label in changed if 0 < before[label] < after[label]}
    found: dict[str, tuple[float, float]] = {}
    missing = SHARE * sum(lost.values())
    for label in sorted(lost, key=lambda label: (-lost[label], label)):
        if missing <= 0:
            break
        found[label] = before[label], after[label]
        missing -= lost[label]
    return found


def _site_of(name: str, labels: set[str]) -> str | None:
    """The site that a node's name begins with: engines append to names, and name a fused node after its first part."""
    while name:
        if name in labels:
            return name
        name = name.rpartition("/")[0]
    return None
