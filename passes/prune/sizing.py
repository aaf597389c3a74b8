"""How many units of each group stay, by a share for each kind or one budget for all, with notes for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphopt.analysis.groups import Group
from graphopt.errors import UsageError
from graphopt.ir.cost import sizes
from graphopt.ir.graph import Graph
from graphopt.passes.prune import budget
from graphopt.passes.prune.budget import Candidate, Sizes
from graphopt.passes.prune.costs import CostModel, latency_left
from graphopt.pipeline.context import Context


def by_shares(context: Context, candidates: Sequence[Candidate], shares: Mapping[str, float], together: bool) -> Sizes:
    """Sizes that leave out a share of the units of each kind; a note says so where the shares cannot be met."""
    found: dict[Candidate, int] = {}
    for kind, share in shares.items():
        of_kind = [one for one in candidates if one.group.kind == kind]
        chosen = budget.by_share(of_kind, share, together)
        found |= chosen
        total = sum(one.group.size for one in of_kind)
        gone = (total - sum(chosen.values())) / total if total else share
        if abs(gone - share) > budget.TOLERANCE * share:
            context.note(f"{gone:.3f} of the {kind} go, of {share:g} asked: {_why_coarse(of_kind)}")
    return found


def note_sizes(context: Context, left: Mapping[Group, int]) -> None:
    """Say for each kind how many units of its groups stay."""
    for kind in dict.fromkeys(group.kind for group in left):
        of_kind = (f"{group.name} {group.size} -> {size}" for group, size in left.items() if group.kind == kind)
        context.note(f"{kind}: {', '.join(of_kind)}")


def _why_coarse(candidates: Sequence[Candidate]) -> str:
    multiples = sorted({one.multiple for one in candidates} - {1})
    if multiples:
        return f"sizes are multiples of {' and '.join(map(str, multiples))} (round_to=1 takes any)"
    return "units go whole, and one of each group stays at least"


def within_budget(
    graph: Graph, context: Context, candidates: Sequence[Candidate], of: str, share: float, together: bool
) -> Sizes:
    """Sizes that leave this share of the model's flops, params or latency.

    Raises UsageError where these cannot be counted or measured, and where even the smallest sizes leave more.
    """
    name = context.record.name
    if of != "params" and not context.feeds:
        raise UsageError(f"{name}: {of}={share:g} needs the sizes of the inputs: pass example_inputs=<a batch>")
    model = CostModel(graph, candidates, sizes(graph, context.feeds[0]) if context.feeds else {})
    if of == "flops" and model.uncounted:
        node = model.uncounted[0]
        raise UsageError(
            f"{name}: flops={share:g} cannot be counted, as the sizes at {node.label} ({node.kind}) are not known; use "
            "params="
        )
    unit_cost = model.unit_cost("flops" if model.flops and of != "params" else "params")
    try:
        if of == "latency":
            if not context.target.runs:
                raise UsageError(f"{name}: latency is measured, and {context.target.name} does not run here")
            cost = latency_left(graph, context.target, context.feeds, context.threads)
            path = budget.ranked(candidates, unit_cost) if together else budget.evenly(candidates)
            chosen = budget.bracket(path, cost, share, budget.MEASURING)[1]
        else:
            cost = model.share_left(of)
            chosen = budget.fit(candidates, cost, share, unit_cost, together)
    except budget.Unreachable as error:
        raise UsageError(
            f"{name}: {of}={share:g} cannot be reached: with every group that may be cut at its smallest, "
            f"{error.least:.3f} stay; allow more (kinds=..., round_to=1), or see which groups are locked "
            "(graphopt inspect MODEL --groups)"
        ) from None
    left = cost(chosen)
    missed = ""
    if of != "latency" and abs(left - share) > budget.TOLERANCE * share:
        single = [replace(one, round_to=1) for one in candidates]
        path = budget.ranked(single, unit_cost) if together else budget.evenly(single)
        above, below = budget.bracket(path, cost, share)
        missed = f": the next sizes leave {cost(below if left > share else above):.3f}"
    context.note(f"{left:.3f} of the {of} stay, of {share:g} that the budget leaves{missed}")
    return chosen
