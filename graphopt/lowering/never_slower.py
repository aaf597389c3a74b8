"""What comes out is never slower than what went in: both are timed at the end, and what loses is found.

The result loses at an example shape where the lower 95% bound of its time over the input's is above 1, in 15
interleaved rounds, of which 6 have to count, and again in a second run (`timing.slower_than`). The pipeline then runs
again without the sites that lose most there, up to RERUNS times, and after that without any pass that loses accuracy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graphopt.lowering.backend import Runner
from graphopt.report.records import PassRecord

if TYPE_CHECKING:
    from graphopt.measure.cache import Timings
    from graphopt.measure.timing import Clock, Contender, Ratio

RERUNS = 6
"""Most runs of the pipeline without sites that lost."""

SHARE = 0.5
"""Of the time lost, what the sites that are reverted at once make up: a profile tells small losses from noise badly."""

CLEARLY = 1.25
"""How much faster a result is that few rounds of an unsteady machine are enough for: what had 1.09 in 6 was at 0.88."""

Feeds = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """The speed of a result over the input's."""

    ratios: tuple[Ratio, ...]
    """One for each example shape."""
    slower: tuple[int, ...] = ()
    """The example shapes, by index, at which it loses."""


@dataclass(frozen=True)
class Trial:
    """Results against one input here. What was timed before, of the same two graphs, is not timed again."""

    baseline: Runner
    named: Callable[[], Runner]
    """The captured model, whose nodes have the names of sites; built where sites that lose are looked for."""
    feeds: Sequence[Feeds]
    setting: Mapping[str, Any]
    """What timings depend on besides the result: the engine, the machine, threads, the input."""
    timings: Timings
    clock: Clock = time.perf_counter

    def verdict(self, result: Runner, digest: str) -> Verdict:
        """Whether a result loses. digest: of its graph. Kept; for UNSURE seconds where the machine was unsteady."""
        from graphopt.measure.cache import UNSURE
        from graphopt.measure.timing import Ratio

        key = self._key("verdict", digest)
        kept = self.timings.get(key)
        if kept is not None:
            return Verdict(tuple(Ratio(**one) for one in kept["ratios"]), tuple(kept["slower"]))
        found = judge(result, self.baseline, self.feeds, self.clock)
        self.timings.put(key, asdict(found), math.inf if all(one.steady for one in found.ratios) else UNSURE)
        return found

    def losers(
        self, result: Runner, digest: str, shapes: Sequence[int], records: Sequence[PassRecord]
    ) -> dict[str, tuple[float, float]]:
        """The sites that lose most at some of the example shapes: as `losers`."""
        key = self._key("losers", digest) | {"at": list(shapes), "passes": [record.text for record in records]}
        kept = self.timings.get(key)
        if kept is None:
            kept = {"lost": losers(result, self.named(), [self.feeds[index] for index in shapes], records)}
            self.timings.put(key, kept)
        return {label: (before, after) for label, (before, after) in kept["lost"].items()}

    def _key(self, what: str, digest: str) -> dict[str, Any]:
        shapes = [[list(tensor.shape) for tensor in one.values()] for one in self.feeds]
        return {**self.setting, "choice": f"never slower: {what}", "result": digest, "shapes": shapes}


def judge(
    result: Runner, baseline: Runner, feeds: Sequence[Feeds], clock: Clock = time.perf_counter
) -> Verdict:
    """Time a result against the input, interleaved; where it seems to lose, a second run has to say so too.

    Where it is faster for certain at every shape, on an unsteady machine CLEARLY so, 6 rounds tell that, and are all.
    """
    from graphopt.measure import timing

    calls = {"input": [partial(baseline, one) for one in feeds], "optimized": [partial(result, one) for one in feeds]}
    ratios = timing.contest(calls, baseline="input", until=_faster, clock=clock)["optimized"].shapes
    suspects = [index for index, ratio in enumerate(ratios) if timing.slower_than(ratio)]
    if suspects:
        ratios = timing.contest(calls, baseline="input", clock=clock)["optimized"].shapes
    return Verdict(ratios, tuple(index for index in suspects if timing.slower_than(ratios[index])))


def _faster(result: Contender) -> bool:
    return all(one.low > (1 if one.steady else CLEARLY) for one in result.shapes)


def losers(
    result: Runner, baseline: Runner, feeds: Sequence[Feeds], records: Iterable[PassRecord]
) -> dict[str, tuple[float, float]]:
    """The sites, by label, that passes changed and that lose most: seconds before and after, summed over the feeds.

    From the engine's own profile, over the nodes under each site's module path, which both runners must name theirs by.
    Those are given that make up SHARE of all that is lost.
    """
    changed = {label for record in records for label in record.eligible if label not in record.declined}
    before, after = ({path: 0.0 for path in changed} for _ in range(2))
    for runner, sums in ((baseline, before), (result, after)):
        for one in feeds:
            for name, seconds in runner.profile(one).items():
                if (path := _site_of(name, changed)) is not None:
                    sums[path] += seconds
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
    """The site whose module path a node's name begins with: engines add to names, and fuse nodes under the first's."""
    while name:
        if name in labels:
            return name
        name = name.rpartition("/")[0]
    return None
