"""Whole residual branches go: one after the other, the one without which the model's outputs move least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from graphopt.analysis.branches import Branch, branches
from graphopt.errors import UsageError, nearest
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Feeds, Graph
from graphopt.passes.prune.budget import TOLERANCE
from graphopt.passes.prune.costs import ROUNDS
from graphopt.passes.prune.selection import locks
from graphopt.pipeline.context import Context
from graphopt.pipeline.reference import Reference
from graphopt.pipeline.remaining import nodes_with_weights
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.weights import already_quantized
from graphopt.report.figures import decibels

BATCHES = 8
"""Calibration batches on which outputs are compared."""


@dataclass(frozen=True)
class Choice:
    """Which branches a pass may remove."""

    targets: Selector
    ignore: Selector
    named: bool = False
    """Whether the user wrote `targets`."""
    required: bool = True
    """Whether it is an error where none may go."""


@dataclass
class _Plan:
    """Which branches go, and what was measured."""

    gone: dict[str, float] = field(default_factory=dict)
    """By the name of the sum, in order: the SQNR in dB of the outputs from then on."""
    others: dict[str, float] = field(default_factory=dict)
    """Of those that stay: the SQNR without them, in place of the last that goes."""
    locked: dict[str, Decline] = field(default_factory=dict)
    """Of those that stay, why they can go no more once the others are gone."""


def remove_share(graph: Graph, context: Context, share: float, choice: Choice) -> bool:
    """Remove this share of the branches that may go, to the nearest number; one stays at least.

    Returns whether any may go. Raises UsageError where a term of the user's selects no branch, none can go and they are
    required, or there is no data to measure on.
    """
    chosen = _open(graph, context, choice)
    if not chosen:
        return False
    count = len(chosen)
    stay = min(range(count, 0, -1), key=lambda size: abs(size - count * (1 - share)))
    plan = _planned(graph, context, chosen, lambda trial, gone: gone == count - stay)
    _apply(graph, context, chosen, plan)
    gone = len(plan.gone) / count
    if abs(gone - share) > TOLERANCE * share:
        context.note(f"{gone:.3f} of the layers go, of {share:g} asked: branches go whole, and one stays at least")
    return True


def remove_within(graph: Graph, context: Context, of: str, share: float, choice: Choice) -> bool:
    """Remove branches until no more than this share of the model's flops, params or latency stays.

    Returns whether any may go. Raises UsageError as `remove_share`, and where the cost is not known or all but one of
    the branches leave more.
    """
    chosen = _open(graph, context, choice)
    left = _share_left(graph, context, of, share)
    shares = {0: 1.0}

    def reached(trial: Graph, gone: int) -> bool:
        if gone not in shares:
            shares[gone] = left(trial)
        return shares[gone] <= share

    plan = _planned(graph, context, chosen, reached)
    least = shares[max(shares)]
    if least > share:
        raise UsageError(
            f"{context.record.name}: {of}={share:g} cannot be reached: without all residual branches that may go (one "
            f"stays at least), {least:.3f} stay; cut neurons or channels too, in a prune of their own"
        )
    _apply(graph, context, chosen, plan)
    context.note(f"{least:.3f} of the {of} stay, of {share:g} that the budget leaves")
    return bool(chosen)


def _open(graph: Graph, context: Context, choice: Choice) -> list[Branch]:
    """The branches that are selected, and that nothing locks; the report says which."""
    name, found = context.record.name, branches(graph)
    if not found and choice.required:
        raise UsageError(
            f"{name}: the model has no residual branch: no sum x + f(x) with a layer that has weights in f"
            + already_quantized(graph)
        )
    for term in (*(choice.targets.terms if choice.named else ()), *choice.ignore.terms) if found else ():
        if not any(_selected(branch, Selector(term)) for branch in found):
            near = nearest(term, [branch.name for branch in found])
            raise UsageError(f"{name}: {term!r} selects no residual branch{near}")
    chosen = [one for one in found if _selected(one, choice.targets) and not _selected(one, choice.ignore)]
    context.consider([branch.name for branch in chosen])
    context.considered.update(site for branch in found for site in branch.sites)
    for branch in chosen:
        if branch.locked:
            context.record.decline(branch.name, branch.locked)
    if choice.required:  # else units are cut, of these nodes too
        _decline_outside(graph, context, choice)
    left = [branch for branch in chosen if not (branch.locked or context.reverts(branch.name))]
    if not left and choice.required:
        why = locks(chosen) if chosen else "; targets and ignore leave none of them"
        raise UsageError(f"{name}: no residual branch can go{why} (graphopt inspect MODEL --groups lists them)")
    if not left:
        context.note("layers: no residual branch that may go")
    return left


def _decline_outside(graph: Graph, context: Context, choice: Choice) -> None:
    """Decline the selected ops with weights that are in no branch."""
    for node in nodes_with_weights(graph):
        chosen = node in choice.targets and node not in choice.ignore
        if chosen and node.op is not None and node not in context.considered:
            context.consider([node])
            context.decline(node, Decline("in_no_branch"))


def _selected(branch: Branch, terms: Selector) -> bool:
    return any(site in terms for site in branch.sites)


def _planned(graph: Graph, context: Context, chosen: list[Branch], enough: Callable[[Graph, int], bool]) -> _Plan:
    """Which branches go, on clones: measured again after each.

    enough: from the graph without those gone so far, and their number.
    """
    trial, plan = graph.clone(), _Plan()
    left = [branch.sum.name for branch in chosen]
    reference: Reference | None = None
    while not enough(trial, len(plan.gone)) and len(plan.gone) < len(chosen) - 1:
        locks_now = {branch.sum.name: branch.locked for branch in branches(trial)}
        plan.locked |= {name: lock for name in left if (lock := locks_now[name]) is not None}
        left = [name for name in left if name not in plan.locked]
        if not left:
            break
        reference = reference or Reference(graph, _batches(context))
        damages = {name: reference.damage(_without(trial, name)).sqnr for name in left}
        plan.others = {name: -math.inf if math.isnan(sqnr) else sqnr for name, sqnr in damages.items()}
        best = max(left, key=plan.others.__getitem__)
        plan.gone[best] = plan.others.pop(best)
        left.remove(best)
        trial = _without(trial, best)
    return plan


def _batches(context: Context) -> list[Feeds]:
    feeds: list[Feeds] = list(islice(context.batches(), BATCHES) if context.calibration is not None else context.feeds)
    if not feeds:
        raise UsageError(
            f"{context.record.name}: layers go by what the outputs lose without them, and there is no batch to "
            "measure it on: pass calibration=<batches of inputs>, or example_inputs=<a batch>"
        )
    return feeds


def _without(graph: Graph, name: str) -> Graph:
    """A clone without one branch."""
    small = graph.clone()
    next(branch for branch in branches(small) if branch.sum.name == name).remove(small)
    return small


def _apply(graph: Graph, context: Context, chosen: list[Branch], plan: _Plan) -> None:
    """Remove the branches of a plan, and report them."""
    names = {branch.sum.name: branch.name for branch in chosen}
    for branch in chosen:
        if branch.sum.name in plan.locked:
            context.record.decline(branch.name, plan.locked[branch.sum.name])
        elif branch.sum.name in plan.others:
            last, sqnr = names[list(plan.gone)[-1]], plan.others[branch.sum.name]
            context.record.decline(branch.name, Decline("branch_matters_more", site=last, sqnr=sqnr))
        elif branch.sum.name not in plan.gone:
            context.record.decline(branch.name, Decline("no_branch_goes", count=len(chosen)))
    for name in plan.gone:
        next(branch for branch in branches(graph) if branch.sum.name == name).remove(graph)
    if plan.gone:
        told = ", ".join(f"{names[name]} ({decibels(sqnr)})" for name, sqnr in plan.gone.items())
        left = len(chosen) - len(plan.gone)
        context.note(f"layers: {len(chosen)} -> {left}; gone, with what the outputs keep: {told}")


def _share_left(graph: Graph, context: Context, of: str, share: float) -> Callable[[Graph], float]:
    """From a smaller graph to the share of the cost of `graph` that it has."""
    name = context.record.name
    if of != "params" and not context.feeds:
        raise UsageError(f"{name}: {of}={share:g} needs the sizes of the inputs: pass example_inputs=<a batch>")
    if of == "latency":
        if not context.target.runs:
            raise UsageError(f"{name}: latency is measured, and {context.target.name} does not run here")

        def measured(small: Graph) -> float:
            ratios = context.target.ratios(small, graph, context.feeds, threads=context.threads, rounds=ROUNDS)
            return math.exp(-math.fsum(math.log(ratio.median) for ratio in ratios) / len(ratios))

        return measured
    whole = context.cost(graph)
    if of == "params":
        return lambda small: context.cost(small).parameters / whole.parameters
    if not whole.flops:
        raise UsageError(f"{name}: flops={share:g} cannot be counted, as not all sizes are known; use params=")
    flops = whole.flops
    return lambda small: (context.cost(small).flops or 0) / flops
