"""Which groups of axes a pass may cut: selectors, kinds and locks, and the account of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphopt.axes import Group, groups
from graphopt.graph import Graph
from graphopt.pipeline import Context, Selector, UsageError, nearest
from graphopt.words import WORDS


def open_groups(
    graph: Graph,
    context: Context,
    kinds: Sequence[str],
    targets: Selector,
    ignore: Selector,
    *,
    required: Sequence[str] = (),
    named: bool = False,
) -> list[Group]:
    """The groups of these kinds that are selected and that nothing locks, in the order of the graph.

    Those that are selected are counted as eligible, by name, and those that are locked are declined. A term that is the
    name of a group, and no word, selects that group only; any other selects those with such a producer or consumer.
    required: kinds of which there must be a group; named: whether the user wrote `targets`.
    Raises UsageError where the graph has no group of a required kind, or of any, and where a term that the user wrote
    selects none, or none but locked ones.
    """
    everything = groups(graph)
    found = [group for group in everything if group.kind in kinds]
    counts = Counter(group.kind for group in everything)
    missing = [kind for kind in required if not counts[kind]]
    if missing or not found:
        there = ", ".join(f"{count} of {kind}" for kind, count in counts.items()) or "none"
        raise UsageError(
            f"{context.record.name}: the model has no group of {' or '.join(missing or kinds)}; its groups: {there}"
        )
    names = {group.name for group in everything} - WORDS.keys()

    def hits(term: str) -> list[Group]:
        if term in names:
            return [group for group in found if group.name == term]
        nodes = Selector(term)
        return [group for group in found if any(node in nodes for node in (*group.producers, *group.consumers))]

    for term in (*(targets.terms if named else ()), *ignore.terms):
        if not hits(term):
            near = nearest(term, [group.name for group in found])
            raise UsageError(f"{context.record.name}: {term!r} selects no group of {' or '.join(kinds)}{near}")
    for term in targets.terms if named else ():
        if all(group.locked for group in hits(term)):
            group = hits(term)[0]
            raise UsageError(f"{context.record.name}: {group.name} ({group.kind}) cannot shrink: it {group.locked}")
    ignored = {group for term in ignore.terms for group in hits(term)}
    wanted = {group for term in targets.terms for group in hits(term)} - ignored
    chosen = [group for group in found if group in wanted]
    context.record.eligible.extend(group.name for group in chosen)
    context.record.declined.update((group.name, f"it {group.locked}") for group in chosen if group.locked)
    return [group for group in chosen if not group.locked]
