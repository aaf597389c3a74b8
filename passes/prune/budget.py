"""How many units of each group stay: a share of each, or as many as one budget over all groups allows.

A path is a family of sizes from all units to the fewest; a budget is met by bisection along a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from graphopt.analysis.groups import Group

FEWEST_STEPS = 4
"""Multiples that a group must hold to be rounded to them: 64 channels to 16, but 32 to 8."""

CLOSE = 0.005
"""Relative error of a counted budget at which no single group is cut further."""

TOLERANCE = 0.02
"""Relative error of a counted budget above which sizes are rounded more finely."""

COUNTING = 2.0**-20
MEASURING = 2.0**-6
"""Length, of a path from 0 to 1, to which a budget is bracketed: where costs are counted, and where measured."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may shrink, with the importance of each unit and the multiple that sizes are rounded to."""

    group: Group
    scores: Tensor
    """The importance of each unit: float64 (size,), at least 0, in any scale."""
    round_to: int = 1

    @cached_property
    def multiple(self) -> int:
        """`round_to`, halved until the group holds four multiples, so that small groups can be cut too."""
        multiple = self.round_to
        while multiple > 1 and self.group.size < FEWEST_STEPS * multiple:
            multiple //= 2
        return multiple

    @cached_property
    def sizes(self) -> list[int]:
        """How many units may stay, in falling order: all, then every multiple down to one."""
        most = (self.group.size - 1) // self.multiple * self.multiple
        return [self.group.size, *range(most, 0, -self.multiple)]

    @cached_property
    def order(self) -> Tensor:
        """The units in rising order of importance, of equals the earlier first."""
        return self.scores.argsort(stable=True)

    @cached_property
    def shares(self) -> list[float]:
        """For each of `sizes`, the share of the group's importance that is lost."""
        total = float(self.scores.sum())
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), self.scores[self.order].cumsum(0)])
        return [float(lost[self.group.size - size]) / total if total > 0 else 0.0 for size in self.sizes]

    def units(self, size: int) -> Tensor:
        """The `size` units that stay: the most important, sorted."""
        return self.order[self.group.size - size :].sort().values

    def nearest(self, amount: float) -> int:
        """The size nearest to a share 1 - amount of the units; of two that are as near, the larger."""
        left = self.group.size * (1 - amount)
        return min(self.sizes, key=lambda size: (abs(size - left), -size))


Sizes = Mapping[Candidate, int]
"""How many units of each stay."""

Path = Callable[[float], dict[Candidate, int]]
"""Sizes by a number from 0 (all units stay) to 1 (the fewest), never rising."""


def evenly(candidates: Sequence[Candidate]) -> Path:
    """Removes the same share of each group."""
    return lambda amount: {one: one.nearest(amount) for one in candidates}


def ranked(candidates: Sequence[Candidate], unit_cost: Callable[[Candidate], float]) -> Path:
    """Removes first the units of least importance for what they cost, over all groups.

    Importance is taken relative to the sum of the group, so that groups of different scales compare.
    unit_cost: of one unit of a group.
    """
    steps = sorted(_steps(candidates, unit_cost), key=lambda step: step[0])  # stable, so in order within a group

    def path(amount: float) -> dict[Candidate, int]:
        sizes = {one: one.group.size for one in candidates}
        sizes.update((one, size) for _, one, size in steps[: round(amount * len(steps))])
        return sizes

    return path


def _steps(
    candidates: Sequence[Candidate], unit_cost: Callable[[Candidate], float]
) -> Iterator[tuple[float, Candidate, int]]:
    """Every step to the next size: the importance lost for what is saved (never falling within a group), the
    candidate, and the size."""
    for one in candidates:
        loss = 0.0
        for index in range(1, len(one.sizes)):
            loss = max(loss, _loss(one, index, unit_cost(one)))
            yield loss, one, one.sizes[index]


def _loss(one: Candidate, index: int, unit_cost: float) -> float:
    """The importance that the step to sizes[index] loses, divided by the cost that it saves."""
    saved = unit_cost * (one.sizes[index - 1] - one.sizes[index])
    return (one.shares[index] - one.shares[index - 1]) / saved if saved > 0 else float("inf")


def by_share(candidates: Sequence[Candidate], share: float, together: bool) -> dict[Candidate, int]:
    """Sizes that leave out this share of the units: of each group, or of all groups ranked together."""
    total = sum(one.group.size for one in candidates)
    if not together or share == 0 or not candidates:
        return evenly(candidates)(share)

    def left(sizes: Sizes) -> float:
        return sum(sizes.values()) / total

    path = ranked(candidates, lambda one: 1.0)
    if left(path(1.0)) > 1 - share:
        return path(1.0)
    return min(bracket(path, left, 1 - share), key=lambda sizes: abs(left(sizes) - (1 - share)))


class Unreachable(Exception):
    """A budget is below `least`, the share of the cost that the smallest sizes leave."""

    def __init__(self, least: float) -> None:
        super().__init__(f"at least {least:.3f} stay")
        self.least = least


def bracket(
    path: Path, cost: Callable[[Sizes], float], budget: float, precision: float = COUNTING
) -> tuple[dict[Candidate, int], dict[Candidate, int]]:
    """The sizes on a path just above the budget, and those just within it, by bisection.

    cost: of sizes, as a share of the whole. Raises Unreachable where the end of the path is above the budget.
    """
    low, high = 0.0, 1.0
    least = cost(path(high))
    if least > budget:
        raise Unreachable(least)
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(path(middle)) <= budget else (middle, high)
    return path(low), path(high)


def fit(
    candidates: Sequence[Candidate],
    cost: Callable[[Sizes], float],
    budget: float,
    unit_cost: Callable[[Candidate], float],
    together: bool,
) -> dict[Candidate, int]:
    """Sizes whose cost is within TOLERANCE of the budget.

    They are multiples as the candidates say; where those are too coarse, of half of that and so on, down to 1.
    cost: of sizes, as a share of the whole. unit_cost: of one unit of a group. together: units are ranked over all
    groups; otherwise each group loses the same share. Raises Unreachable where the smallest sizes are above the budget.
    """
    finer = [replace(one, round_to=one.multiple // 2) if one.multiple > 1 else one for one in candidates]
    finest = all(one.multiple == 1 for one in candidates)
    try:
        found = _nearest(candidates, cost, budget, unit_cost, together)
    except Unreachable:
        if finest:
            raise
        return fit(finer, cost, budget, unit_cost, together)
    if finest or abs(cost(found) - budget) <= TOLERANCE * budget:
        return found
    better = fit(finer, cost, budget, unit_cost, together)
    return min((found, better), key=lambda sizes: abs(cost(sizes) - budget))


def _nearest(
    candidates: Sequence[Candidate],
    cost: Callable[[Sizes], float],
    budget: float,
    unit_cost: Callable[[Candidate], float],
    together: bool,
) -> dict[Candidate, int]:
    """The sizes nearest to the budget: those on the path just within it, or those just above it with further steps of
    single groups, as one step of a path may move many groups at once."""
    path = ranked(candidates, unit_cost) if together else evenly(candidates)
    sizes, within = bracket(path, cost, budget)
    found = cost(sizes)
    steps = [(one, one.sizes.index(sizes[one]) + 1) for one in candidates if sizes[one] > one.sizes[-1]]
    for one, index in sorted(steps, key=lambda step: _loss(step[0], step[1], unit_cost(step[0]))):
        if found <= budget * (1 + CLOSE):
            break
        trial = {**sizes, one: one.sizes[index]}
        less = cost(trial)
        if abs(less - budget) <= abs(found - budget):
            sizes, found = trial, less
    return min((sizes, within), key=lambda one: abs(cost(one) - budget))
