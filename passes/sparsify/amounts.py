"""The amount of each weight where only the total is given: more where the model's outputs suffer less."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from graphopt.ir.graph import Graph
from graphopt.numerics.allocate import spend
from graphopt.numerics.power import power_between
from graphopt.passes.sparsify.criteria import Request
from graphopt.pipeline.context import Context
from graphopt.pipeline.damage import scan
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.selectors import Selector
from graphopt.report.records import Damage

_STEPS = 60
"""Amounts that a weight may be given, evenly spaced from none to the largest that was tried."""


def by_sensitivity(evenly: Pass, graph: Graph, context: Context, request: Request) -> Request:
    """The request with the amounts that hurt the outputs least, for the same number of zeros in all.

    evenly: the pass with allocate=evenly. It is tried on each weight alone with three amounts: half of the total, the
    total, and halfway from there to 1. Between these the output noise is interpolated as a power of the amount, and the
    noises of several weights are taken to add up; `numerics.allocate` then spends the budget.
    """
    total = max(request.shares.values())
    amounts = [total / 2, total, (1 + total) / 2]
    options: list[dict[str, Any]] = [{"amount": amount} for amount in amounts]
    tries = [dataclasses.replace(evenly, **option) for option in options]
    sites = Selector.of(*(site for weight in request.weights for site in weight.sites))
    found = scan(graph, tries, context, sites=sites)
    choices = torch.linspace(0, amounts[-1], _STEPS + 1, dtype=torch.float64)
    noises, kept = [], []
    for weight in request.weights:
        damages = found.of(weight.sites[0])
        noises.append(power_between(amounts, [_noise(damages.get(str(one))) for one in tries], choices))
        kept.append((1 - choices) * weight.tensor.numel())
    elements = sum(weight.tensor.numel() for weight in request.weights)
    chosen = spend(noises, kept, (1 - total) * elements * (1 + 1e-9))
    shares = {weight.value: float(choices[one]) for weight, one in zip(request.weights, chosen, strict=True)}
    low, high = (pick(request.weights, key=lambda one: shares[one.value]) for pick in (min, max))
    context.note(
        f"amounts by sensitivity, {total:g} in all: from {shares[low.value]:.2f} ({low.sites[0].label}) to "
        f"{shares[high.value]:.2f} ({high.sites[0].label})"
    )
    return dataclasses.replace(request, shares=shares)


def _noise(damage: Damage | None) -> float:
    """Energy of the outputs' error, as a share of theirs; 0 where the pass had nothing to change."""
    return 0.0 if damage is None else 10 ** (-max(damage.rank, -300.0) / 10)
