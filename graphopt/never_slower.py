"""What comes out is never slower than what went in: both are timed at the end, and what loses is found.

The result loses at an example shape where the lower 95% bound of its time over the input's is above 1, in at least 15
interleaved rounds and again in a second run (`measure.slower_than`). The pipeline then runs again without the sites
that lose most, up to RERUNS times, and after that without any pass that loses accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.backend import Runner
from graphopt.report import PassRecord

if TYPE_CHECKING:
    from graphopt.backends.measure import Contender, Ratio

RERUNS = 6
"""Most runs of the pipeline without sites that lost."""

Feeds = Mapping[str, Tensor]
Contest = Callable[..., Mapping[str, "Contender"]]


@dataclass(frozen=True)
class Verdict:
    """The speed of a result over the input's, one Ratio for each example shape, and whether it loses at one of them."""

    ratios: tuple[Ratio, ...]
    loses: bool


def judge(result: Runner, baseline: Runner, feeds: Sequence[Feeds], contest: Contest) -> Verdict:
    """Time a result against the input, interleaved; where it seems to lose, a second run has to say so too."""
    from graphopt.backends.measure import slower_than

    calls = {"input": [partial(baseline, one) for one in feeds], "optimized": [partial(result, one) for one in feeds]}
    first = contest(calls, baseline="input")["optimized"].shapes
    suspects = [index for index, ratio in enumerate(first) if slower_than(ratio)]
    if not suspects:
        return Verdict(first, False)
    second = contest(calls, baseline="input")["optimized"].shapes
    return Verdict(second, any(slower_than(second[index]) for index in suspects))


def losers(
    result: Runner, baseline: Runner, feeds: Sequence[Feeds], records: Iterable[PassRecord]
) -> dict[str, tuple[float, float]]:
    """The sites, by label, that passes changed and that now take longer: seconds before and after, over all examples.

    From the engine's own profile, summed over the nodes under each site's module path; those that lose most first.
    """
    changed = {label for record in records for label in record.eligible if label not in record.declined}
    before, after = ({path: 0.0 for path in changed} for _ in range(2))
    for runner, sums in ((baseline, before), (result, after)):
        for one in feeds:
            for name, seconds in runner.profile(one).items():
                if (path := _site_of(name, changed)) is not None:
                    sums[path] += seconds
    lost = {label: (before[label], after[label]) for label in changed if 0 < before[label] < after[label]}
    return dict(sorted(lost.items(), key=lambda one: one[1][0] - one[1][1]))


def _site_of(name: str, labels: set[str]) -> str | None:
    """The site whose module path a node's name begins with: engines add to names, and fuse nodes under the first's."""
    while name:
        if name in labels:
            return name
        name = name.rpartition("/")[0]
    return None
