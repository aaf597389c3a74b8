"""One choice for each of many, the best that a common budget buys."""

from collections.abc import Sequence

import torch
from torch import Tensor


def spend(losses: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> list[int]:
    """One option of each item, with the least total loss that was found at a total cost of at most `budget`.

    losses, costs: for each item, float vectors over its options, in any order. First along the lower convex hull of
    each item, steepest steps first: as a Lagrange multiplier would choose (Everett 1963; Shoham & Gersho 1988), so
    that no other choice of that total cost has a smaller total loss. What is left of the budget then goes, option by
    option, to the largest gain for its cost that still fits. Raises ValueError where the cheapest options together
    cost more, saying how much, and on an item without options.
    """
    if any(len(loss) == 0 or loss.shape != cost.shape for loss, cost in zip(losses, costs, strict=True)):
        raise ValueError("every item needs at least one option, and as many losses as costs")
    chosen = [_cheapest(loss, cost) for loss, cost in zip(losses, costs, strict=True)]
    left = budget - sum(float(cost[one]) for cost, one in zip(costs, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the cheapest options cost {budget - left:g}, above the budget of {budget:g}")
    steps: list[tuple[float, int, int, int]] = [
        (gain, item, position, option)
        for item, (loss, cost) in enumerate(zip(losses, costs, strict=True))
        for position, (gain, option) in enumerate(_hull(loss, cost, chosen[item]))
    ]
    stuck: set[int] = set()
    for _, item, _, option in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        price = float(costs[item][option] - costs[item][chosen[item]])
        if item in stuck or price > left:
            stuck.add(item)
            continue
        chosen[item], left = option, left - price
    while (better := _best_that_fits(losses, costs, chosen, left)) is not None:
        item, option = better
        left -= float(costs[item][option] - costs[item][chosen[item]])
        chosen[item] = option
    return chosen


def _cheapest(loss: Tensor, cost: Tensor) -> int:
    """The option of least cost, and among equals of least loss."""
    least = (cost == cost.min()).nonzero().flatten()
    return int(least[loss[least].argmin()])


def _hull(loss: Tensor, cost: Tensor, start: int) -> list[tuple[float, int]]:
    """The lower convex hull from `start`: (loss removed for each unit of cost, option), the slopes falling."""
    steps: list[tuple[float, int]] = []
    at = start
    while True:
        slopes = _slopes(loss, cost, at)
        best = int(slopes.argmax())
        if not slopes[best] > 0:
            return steps
        # of several on one line, the farthest: the others come in when the budget ends between
        best = int(torch.where(slopes == slopes[best], cost, -torch.inf).argmax())
        steps.append((float(slopes[best]), best))
        at = best


def _slopes(loss: Tensor, cost: Tensor, at: int) -> Tensor:
    """For each option, loss removed for each unit of cost against option `at`; 0 where it is no dearer or no better."""
    gain, price = loss[at] - loss, cost - cost[at]
    return torch.where((gain > 0) & (price > 0), gain / price.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _best_that_fits(
    losses: Sequence[Tensor], costs: Sequence[Tensor], chosen: Sequence[int], left: float
) -> tuple[int, int] | None:
    found, most = None, 0.0
    for item, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        at = chosen[item]
        slopes = torch.where(cost - cost[at] <= left, _slopes(loss, cost, at), 0.0)
        best = int(slopes.argmax())
        if slopes[best] > most:
            found, most = (item, best), float(slopes[best])
    return found
