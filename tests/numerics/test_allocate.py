"""Budgets, against every combination where they can all be tried."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.numerics.allocate import spend

ITEM = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5)


def vectors(items: list[list[tuple[int, int]]]) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and costs of items that are lists of (loss, cost)."""
    return tuple([torch.tensor([pair[side] for pair in item]).double() for item in items] for side in (0, 1))  # type: ignore[return-value]


@given(st.lists(ITEM, min_size=1, max_size=4), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_never_above_the_budget_and_best_for_what_it_spends(items: list[list[tuple[int, int]]], extra: int) -> None:
    least = sum(min(cost for _, cost in item) for item in items)
    chosen = spend(*vectors(items), least + extra)
    spent = sum(item[one][1] for item, one in zip(items, chosen, strict=True))
    lost = sum(item[one][0] for item, one in zip(items, chosen, strict=True))
    assert spent <= least + extra
    combinations = list(itertools.product(*items))
    cheapest = min(sum(loss for loss, _ in one) for one in combinations if sum(cost for _, cost in one) <= least)
    assert lost <= cheapest
    # no single change that still fits is an improvement
    for item, one in zip(items, chosen, strict=True):
        assert not any(loss < item[one][0] and cost <= item[one][1] + least + extra - spent for loss, cost in item)


def test_convex_items_get_the_optimum_of_a_multiplier() -> None:
    """Where every step costs the same and gains fall, the steepest steps are the best of all combinations."""
    losses = [torch.tensor(loss) for loss in ([9.0, 4, 1, 0], [8.0, 6, 5, 4.5], [3.0, 1, 0, 0])]
    costs = [torch.arange(4).double()] * 3
    for budget in range(10):
        best = min(
            sum(float(loss[one]) for loss, one in zip(losses, options, strict=True))
            for options in itertools.product(range(4), repeat=3)
            if sum(options) <= budget
        )
        chosen = spend(losses, costs, budget)
        assert sum(float(loss[one]) for loss, one in zip(losses, chosen, strict=True)) == best


def test_what_is_left_goes_to_options_beside_the_hull() -> None:
    losses, costs = [torch.tensor([10.0, 9.0, 0.0])], [torch.tensor([0.0, 5.0, 10.0]).double()]
    assert spend(losses, costs, 9) == [1] and spend(losses, costs, 10) == [2]


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="the cheapest options cost 3, above the budget of 2"):
        spend([torch.zeros(2)], [torch.tensor([3.0, 4.0])], 2)
    with pytest.raises(ValueError, match="every item needs at least one option"):
        spend([torch.zeros(0)], [torch.zeros(0)], 2)
