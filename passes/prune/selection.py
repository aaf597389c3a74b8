"""Which groups of axes a pass may cut: selectors, kinds and locks, and what the report says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphopt.analysis.branches import Branch
from graphopt.analysis.groups import Group, groups
from graphopt.errors import UsageError, nearest
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.ir.ops import OPS
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.weights import already_quantized
from graphopt.report.declines import Reason


def open_groups(
    graph: Graph,
    context: Context,
    kinds: Sequence[str],
    targets: Selector,
    ignore: Selector,
    *,
    named: bool = False,
    required: bool = True,
) -> list[Group]:
    """The groups of these kinds that are selected and that nothing locks, in the order of the graph.

    Those that are selected are counted as eligible, by name, and those that are locked are declined. A term that is the
    name of a group, and no op, selects that group only; any other selects those with such a producer or consumer.
    named: whether the user wrote `targets`. required: False where it is no error that the graph has none, or none that
    can shrink.
    Producers come first: a module selects by what it consumes only where it produces no group.
    Raises UsageError where the graph has no group of these kinds, where a term that the user wrote selects none, or
    none but locked ones, and where nothing that is selected can shrink. A site that is named and has none is declined
    before.
    """
    name = context.record.name
    everything = groups(graph)
    found = [group for group in everything if group.kind in kinds]
    counts = Counter(group.kind for group in everything)
    if not found:
        if not required:
            return []
        there = ", ".join(f"{count} of {kind}" for kind, count in counts.items()) or "none"
        raise UsageError(
            f"{name}: the model has no group of {' or '.join(kinds)}; its groups: {there}"
            + locks([group for group in everything if group.locked]) + already_quantized(graph)
        )  # fmt: skip
    names = {group.name for group in everything} - OPS.keys()

    def hits(term: str) -> list[Group]:
        if term in names:
            return [group for group in found if group.name == term]
        nodes = Selector(term)
        produced = [group for group in found if any(node in nodes for node in group.producers)]
        if produced and term not in OPS:
            return produced
        return [group for group in found if group in produced or any(node in nodes for node in group.consumers)]

    for term in (*(targets.terms if named else ()), *ignore.terms):
        if not hits(term):
            for node in graph.nodes if term in targets.terms else ():
                if node in Selector(term):
                    context.decline(node, Decline("no_group", kinds=" or ".join(kinds)))
            near = nearest(term, [group.name for group in found])
            raise UsageError(f"{name}: {term!r} selects no group of {' or '.join(kinds)}{near}")
    for term in targets.terms if named else ():
        first = hits(term)[0]
        if first.locked and all(group.locked for group in hits(term)):
            context.record.decline(first.name, first.locked)
            raise UsageError(f"{name}: {first.name} ({first.kind}) cannot shrink: {Reason.of(first.locked)}")
    ignored = {group for term in ignore.terms for group in hits(term)}
    wanted = {group for term in targets.terms for group in hits(term)} - ignored
    chosen = [group for group in found if group in wanted]
    context.consider([group.name for group in chosen])
    for group in everything:
        context.considered.update(group.producers, group.consumers)
    for group in chosen:
        if group.locked:
            context.record.decline(group.name, group.locked)
    left = [group for group in chosen if not (group.locked or context.reverts(group.name))]
    if required and not left:
        why = locks(chosen) if chosen else "; targets and ignore leave none of them"
        all_ = "graphopt inspect MODEL --groups lists them"
        raise UsageError(f"{name}: no group of {' or '.join(kinds)} can shrink{why} ({all_})")
    return left


def locks(locked: Sequence[Group | Branch]) -> str:
    """The first locks, after a semicolon; nothing where there are none."""
    told = [f"{group.name} ({group.kind}): {Reason.of(group.locked)}" for group in locked[:3] if group.locked]
    more = f" and {len(locked) - 3} more" if len(locked) > 3 else ""
    return f"; locked: {', '.join(told)}{more}" if told else ""
