"""The ranks of many pairs at once: the best under one budget, or the largest that the target runs faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Shape
from graphopt.numerics.allocate import spend
from graphopt.numerics.split import Split
from graphopt.passes.low_rank.pairs import Candidate
from graphopt.pipeline.context import Context

if TYPE_CHECKING:
    from graphopt.measure.timing import Ratio

Choice = int | Decline
"""The rank of a pair, or why its sites stay whole."""


def within_budget(found: Sequence[Candidate], graph: Graph, context: Context, kind: str, share: float) -> list[Choice]:
    """Ranks with the least squared error, relative to each output and summed, that keep `share` of the model's cost.

    kind: params or flops. Raises UsageError where sizes are not known, and where even the smallest ranks cost more.
    """
    cost = context.cost(graph)
    model = cost.parameters if kind == "params" else cost.flops
    wholes = [math.prod(one.split.shape) if kind == "params" else one.flops for one in found]
    if model is None or None in wholes:
        raise UsageError("low-rank: flops need the sizes of all axes; pass example_inputs, or use params=")
    amounts = [whole or 0 for whole in wholes]
    shares = [one.split.numbers() / math.prod(one.split.shape) if kind == "params" else one.work for one in found]
    ranks = [one.ranks() for one in found]
    costs = [
        amount * torch.tensor([*(rank * each for rank in several), 1], dtype=torch.float64)
        for amount, each, several in zip(amounts, shares, ranks, strict=True)
    ]
    losses = [
        len(one.weight.sites) * torch.cat([one.spectrum.errors()[several], torch.zeros(1, dtype=torch.float64)])
        for one, several in zip(found, ranks, strict=True)
    ]
    rest = model - sum(amounts)
    least = rest + sum(float(options.min()) for options in costs)
    if least > share * model:
        raise UsageError(
            f"low-rank: {kind}={share} cannot be reached: the smallest pairs leave {least / model:.3f} of the model's "
            f"{kind}, {rest / model:.3f} being in what cannot be split; give more, or prune besides"
        )
    chosen = spend(losses, costs, share * model - rest)
    spent = rest + sum(float(options[one]) for options, one in zip(costs, chosen, strict=True))
    why = "" if spent >= 0.98 * share * model else ": the next step of any rank costs more than is left"
    context.note(f"{spent / model:.4f} of the model's {kind} stay, of {share} allowed{why}")
    return [
        several[option] if option < len(several) else _why_whole(one, kind)
        for one, several, option in zip(found, ranks, chosen, strict=True)
    ]


def _why_whole(candidate: Candidate, kind: str) -> Decline:
    if not candidate.most:
        return candidate.why_no_gain(1)
    rank = candidate.ranks()[-1]
    error = float(candidate.spectrum.errors()[rank].sqrt())
    return Decline("worth_its_cost", budget=kind, rank=rank, shape=list(candidate.split.shape), error=error)


def break_even(found: Sequence[Candidate], graph: Graph, context: Context) -> list[Choice]:
    """The largest ranks that the target runs faster than the original at every example shape, by a confidence bound.

    Weights that split alike and read inputs of one shape are split together, and the whole model is lowered and timed
    against the original, by bisection over the ranks. Raises UsageError without a target or examples.
    """
    if not (context.target.runs and context.feeds):
        raise UsageError("low-rank: rank=break-even is measured; give a target and example_inputs")
    alike: dict[tuple[Split, tuple[Shape | None, ...]], list[Candidate]] = {}
    for one in found:
        alike.setdefault(_form(one), []).append(one)
    choices = {form: _fastest(several, graph, context) for form, several in alike.items()}
    return [choices[_form(one)] for one in found]


def _form(one: Candidate) -> tuple[Split, tuple[Shape | None, ...]]:
    return one.split, tuple(site.input.shape for site in one.weight.sites)


def _fastest(several: Sequence[Candidate], graph: Graph, context: Context) -> Choice:
    """The largest rank at which the model is faster with all of these split; a Decline where there is none."""
    ranks, measured = several[0].ranks(), dict[int, float]()
    if not ranks:
        return several[0].why_no_gain(1)
    faster, slower = -1, len(ranks)
    while slower - faster > 1:
        middle = (faster + slower) // 2
        ratios = _timed(several, ranks[middle], graph, context)
        measured[ranks[middle]] = min(ratio.median for ratio in ratios)
        faster, slower = (middle, slower) if min(ratio.low for ratio in ratios) > 1 else (faster, middle)
    speedups = ", ".join(f"{speedup:.3f} at rank {rank}" for rank, speedup in sorted(measured.items()))
    shape, count = list(several[0].split.shape), len(several)
    context.note(f"times as fast as the original with {shape} (x{count}) split: {speedups}")
    return ranks[faster] if faster >= 0 else Decline("no_rank_faster", shape=shape, count=count, speedups=speedups)


def _timed(several: Sequence[Candidate], rank: int, graph: Graph, context: Context) -> list[Ratio]:
    trial = graph.clone()
    named = {node.name: node for node in trial.nodes}
    for one in several:
        one.apply(trial, [named[site.name] for site in one.weight.sites], rank)
    trial.sweep()
    return context.target.ratios(trial, graph, context.feeds, threads=context.threads)
