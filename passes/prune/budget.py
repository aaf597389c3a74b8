"""How many units of each group stay: a share of each, or as many as one budget over all of them allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from graphopt.analysis.groups import Group, groups
from graphopt.analysis.shrink import shrink
from graphopt.ir.cost import flops
from graphopt.ir.graph import Graph, Shape, Value
from torch import Tensor

FEWEST_STEPS = 4
"""Multiples that a group must hold to be cut by them: 64 channels by 16, but 32 by 8."""

CLOSE = 0.005
"""Share of the budget by which a count may miss it without a further step."""

TOLERANCE = 0.02
"""Share of the budget by which a count may miss it without finer sizes."""

COUNTING = 2.0**-20
MEASURING = 2.0**-6
"""Share of a path to which a budget is bracketed, where costs are counted and where they are measured."""

ROUNDS = 9
"""Paired rounds of one measurement: a bisection makes about seven, and the last of them are close to each other."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may shrink, how much each of its units matters, and the multiple that sizes are rounded to."""

    group: Group
    scores: Tensor
    """(size,) float64, at least 0; only their shares of the sum matter."""
    round_to: int = 1

    @cached_property
    def multiple(self) -> int:
        """`round_to`, halved until the group holds four of it: a small group can be cut too."""
        multiple = self.round_to
        while multiple > 1 and self.group.size < FEWEST_STEPS * multiple:
            multiple //= 2
        return multiple

    @cached_property
    def sizes(self) -> list[int]:
        """How many units may stay, most first: all, or a multiple, of which one at least."""
        most = (self.group.size - 1) // self.multiple * self.multiple
        return [self.group.size, *range(most, 0, -self.multiple)]

    @cached_property
    def order(self) -> Tensor:
        """The units, least important first, the earlier of equals first."""
        return self.scores.argsort(stable=True)

    @cached_property
    def shares(self) -> list[float]:
        """For each of `sizes` the share of the group's importance that is lost."""
        total = float(self.scores.sum())
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), self.scores[self.order].cumsum(0)])
        return [float(lost[self.group.size - size]) / total if total > 0 else 0.0 for size in self.sizes]

    def units(self, size: int) -> Tensor:
        """The `size` units that stay: the most important, sorted."""
        return self.order[self.group.size - size :].sort().values

    def nearest(self, amount: float) -> int:
        """The size nearest to what is left without the share `amount`; the larger of two that are as near."""
        left = self.group.size * (1 - amount)
        return min(self.sizes, key=lambda size: (abs(size - left), -size))


Sizes = Mapping[Candidate, int]
"""How many units of each stay."""

Path = Callable[[float], dict[Candidate, int]]
"""From all units (0) to as few as may be (1), less and less."""


def evenly(candidates: Sequence[Candidate]) -> Path:
    """The same share of each goes."""
    return lambda amount: {one: one.nearest(amount) for one in candidates}


def ranked(candidates: Sequence[Candidate], price: Callable[[Candidate], float]) -> Path:
    """What matters least for its price goes first, whichever group it is of.

    Importance is the share of the group's sum, so that groups of other scales compare; price is that of one unit.
    """
    steps = sorted(_steps(candidates, price), key=lambda step: step[0])  # stable, so in order within a group

    def path(amount: float) -> dict[Candidate, int]:
        sizes = {one: one.group.size for one in candidates}
        sizes.update((one, size) for _, one, size in steps[: round(amount * len(steps))])
        return sizes

    return path


def _steps(
    candidates: Sequence[Candidate], price: Callable[[Candidate], float]
) -> Iterator[tuple[float, Candidate, int]]:
    """Every step to the next size: importance lost for its price (not less than before), whose step, and the size."""
    for one in candidates:
        loss = 0.0
        for index in range(1, len(one.sizes)):
            loss = max(loss, _loss(one, index, price(one)))
            yield loss, one, one.sizes[index]


def _loss(one: Candidate, index: int, price: float) -> float:
    """The importance that the step to sizes[index] loses, for what it saves."""
    saved = price * (one.sizes[index - 1] - one.sizes[index])
    return (one.shares[index] - one.shares[index - 1]) / saved if saved > 0 else float("inf")


def by_share(candidates: Sequence[Candidate], share: float, together: bool) -> dict[Candidate, int]:
    """Sizes without this share of the units: of each group, or of all of them, ranked together."""
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
    """No size that a budget may choose is small enough; `least` is the share that stays with the smallest."""

    def __init__(self, least: float) -> None:
        super().__init__(f"at least {least:.3f} stay")
        self.least = least


def bracket(
    path: Path, cost: Callable[[Sizes], float], budget: float, precision: float = COUNTING
) -> tuple[dict[Candidate, int], dict[Candidate, int]]:
    """The sizes on a path just above the budget and just within it, by bisection.

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
    price: Callable[[Candidate], float],
    together: bool,
) -> dict[Candidate, int]:
    """Sizes whose cost is within TOLERANCE of the budget, rounded as the candidates are; where that is too coarse, to
    half of it and so on, down to single units.

    cost: of sizes, as a share of the whole; price: what a unit saves; together: ranked over all groups, and not the
    same share of each. Raises Unreachable where the smallest sizes are above the budget.
    """
    finer = [replace(one, round_to=one.multiple // 2) if one.multiple > 1 else one for one in candidates]
    finest = all(one.multiple == 1 for one in candidates)
    try:
        found = _nearest(candidates, cost, budget, price, together)
    except Unreachable:
        if finest:
            raise
        return fit(finer, cost, budget, price, together)
    if finest or abs(cost(found) - budget) <= TOLERANCE * budget:
        return found
    better = fit(finer, cost, budget, price, together)
    return min((found, better), key=lambda sizes: abs(cost(sizes) - budget))


def _nearest(
    candidates: Sequence[Candidate],
    cost: Callable[[Sizes], float],
    budget: float,
    price: Callable[[Candidate], float],
    together: bool,
) -> dict[Candidate, int]:
    """The sizes on the path just above the budget, and then a step more of single groups where that loses least for its
    price: a path may move several groups at once, and so pass a budget by."""
    path = ranked(candidates, price) if together else evenly(candidates)
    sizes, within = bracket(path, cost, budget)
    found = cost(sizes)
    steps = [(one, one.sizes.index(sizes[one]) + 1) for one in candidates if sizes[one] > one.sizes[-1]]
    for one, index in sorted(steps, key=lambda step: _loss(step[0], step[1], price(step[0]))):
        if found <= budget * (1 + CLOSE):
            break
        trial = {**sizes, one: one.sizes[index]}
        less = cost(trial)
        if abs(less - budget) <= abs(found - budget):
            sizes, found = trial, less
    return min((sizes, within), key=lambda one: abs(cost(one) - budget))


class CostModel:
    """What a graph costs with some units cut, counted without cutting it."""

    def __init__(self, graph: Graph, candidates: Sequence[Candidate], axes: Mapping[str, int]) -> None:
        """axes: numbers for named axes. `flops` is None where that does not make all sizes known, at `uncounted`."""
        self.axes = axes
        values = {axis.value for one in candidates for axis in one.group.axes}
        self._constants = [value for value in values if value.is_constant]
        self._touched = [node for node in graph.nodes if not values.isdisjoint((*node.operands, *node.results))]
        counted = [flops(node, axes) for node in graph.nodes]
        self.uncounted = [node for node, count in zip(graph.nodes, counted, strict=True) if count is None]
        self.flops = None if self.uncounted else sum(n for n in counted if n is not None)
        self.parameters = sum(tensor.numel() for _, tensor in graph.constants())

    def price(self, of: str) -> Callable[[Candidate], float]:
        """What a unit of a group saves of the FLOPs ("flops") or parameters ("params"), with all others there."""
        saved = self._saved(of)
        known: dict[Candidate, float] = {}

        def price(one: Candidate) -> float:
            if one not in known:
                fewer = one.sizes[1]
                known[one] = saved({one: fewer}) / (one.group.size - fewer)
            return known[one]

        return price

    def share(self, of: str) -> Callable[[Sizes], float]:
        """From sizes to the share of the FLOPs or parameters that is left. Raises ValueError where it is not known."""
        whole = self.flops if of == "flops" else self.parameters
        if not whole:
            raise ValueError(f"the {of} of the model are not known")
        saved = self._saved(of)
        return lambda sizes: 1 - saved(sizes) / whole

    def _saved(self, of: str) -> Callable[[Sizes], int]:
        return self.flops_saved if of == "flops" else self.parameters_saved

    def flops_saved(self, sizes: Sizes) -> int:
        """FLOPs that go with the units that do."""
        shapes = self._shapes(sizes)
        nodes = [node for node in self._touched if not shapes.keys().isdisjoint((*node.operands, *node.results))]
        return sum((flops(node, self.axes) or 0) - (flops(node, self.axes, shapes) or 0) for node in nodes)

    def parameters_saved(self, sizes: Sizes) -> int:
        """Stored numbers that go."""
        shapes = self._shapes(sizes)
        return sum(_numel(value.shape) - _numel(shapes.get(value, value.shape)) for value in self._constants)

    def _shapes(self, sizes: Sizes) -> dict[Value, Shape]:
        """The shape of each value that is cut."""
        shapes: dict[Value, list[int | str]] = {}
        for one, size in sizes.items():
            if size < one.group.size:
                gone = torch.ones(one.group.size + 1, dtype=torch.bool)
                gone[one.units(size)] = gone[-1] = False
                for axis in one.group.axes:
                    shape = shapes.setdefault(axis.value, list(axis.value.shape or ()))
                    before = shape[axis.axis]
                    assert isinstance(before, int)  # an axis that has units has a size
                    shape[axis.axis] = before - int(gone[axis.units].sum())
        return {value: tuple(shape) for value, shape in shapes.items()}


def _numel(shape: Shape | None) -> int:
    return torch.Size([size for size in shape or () if isinstance(size, int)]).numel()


def measured(graph: Graph, target: Any, feeds: Sequence[Mapping[str, Tensor]], threads: int | None) -> Callable[
    [Sizes], float
]:
    """How long a graph takes on a target with such sizes, as a share of its time as it is.

    The geometric mean over feeds. Each measurement cuts a clone, lowers and compiles it, and is remembered.
    """
    known: dict[tuple[tuple[str, int], ...], float] = {}
    names = [group.name for group in groups(graph)]

    def cost(sizes: Sizes) -> float:
        key = tuple((one.group.name, size) for one, size in sizes.items())
        if key not in known:
            small = graph.clone()
            cut(small, sizes, names)
            ratios = target.ratios(small, graph, feeds, threads=threads, rounds=ROUNDS)
            known[key] = math.exp(-math.fsum(math.log(ratio.median) for ratio in ratios) / len(ratios))
        return known[key]

    return cost


def cut(graph: Graph, sizes: Sizes, names: Sequence[str]) -> None:
    """Shrink the groups that these were, in a graph of the same structure: a clone, or one with other weights.

    names: of all groups, in order, in the graph that sizes were chosen for; a node that was emitted again and has no
    module path may be called otherwise by now. Raises ValueError where the graph has another number of groups.
    """
    there = groups(graph)
    if len(there) != len(names):
        raise ValueError(f"sizes were chosen for {len(names)} groups, and the graph now has {len(there)}")
    units = {one.group.name: one.units(size) for one, size in sizes.items() if size < one.group.size}
    shrink(graph, {group: units[name] for name, group in zip(names, there, strict=True) if name in units})
