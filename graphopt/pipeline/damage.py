"""What the change of each site alone does to the outputs: for budgets, mixed precision and the sensitivity table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError, require_positive_integer
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments.phases import watched
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.reference import Evaluate, Reference
from graphopt.pipeline.row_cache import RowCache, cache_key
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.report.declines import Reason
from graphopt.report.records import PassRecord, Report, Row, Sensitivity

__all__ = ["STEPS", "Reference", "scan", "units"]

STEPS = 8
"""Batches on which outputs are compared by default."""


def scan(
    graph: Graph,
    settings: Sequence[Pass],
    context: Context,
    *,
    sites: Selector | None = None,
    steps: int = STEPS,
    evaluate: Evaluate | None = None,
    cache: Path | None = None,
) -> Sensitivity:
    """Run each setting at one site after the other, on clones, and measure how far the outputs move each time.

    The result is also stored in the record of the pass that runs (`context.record`).
    context: its calibration gives the batches; the passes see all of them, outputs are compared on the first `steps`.
    sites: selected in place of the settings' own targets. cache: a file of JSON lines, one for each row, from which a
    later call takes rows of the same graph, batches, target and version of graphopt. It does not know `evaluate`, the
    loss and labels: delete the file when they change.

    Raises UsageError without settings, sites or batches, for a pass without targets, and where `evaluate` gives no
    number; PassError where a pass fails.
    """
    require_positive_integer("steps", steps)
    trials = list(units(graph, settings, sites, context))
    if not trials:
        raise UsageError(f"sensitivity: {', '.join(map(str, settings))} selects no site of the model")
    batches = list(islice(context.batches(), steps))
    reference = Reference(graph, batches, evaluate)
    known = None if cache is None else RowCache(cache, cache_key(graph, batches, context, evaluate))
    found = Sensitivity(list(dict.fromkeys(map(str, settings))), batches=len(batches), baseline=reference.baseline)
    with watched(context.instruments, "sensitivity", len(trials)) as advance:
        for label, nodes, setting, narrowed in trials:
            row = Row(label, tuple(node.name for node in nodes), str(setting))
            if known is not None and (row.setting, row.nodes) in known.rows:
                row = dataclasses.replace(known.rows[row.setting, row.nodes], site=label)
            else:
                row = _measured(row, graph, narrowed, reference, context)
                if known is not None:
                    known.add(row)
            found.rows.append(row)
            advance(f"{row.setting} at {row.site}")
    context.record.sensitivity = found
    return found


# --- what to measure -----------------------------------------------------------------------------------------------


def units(
    graph: Graph, settings: Sequence[Pass], sites: Selector | None, context: Context
) -> Iterator[tuple[str, list[Node], Pass, Pass]]:
    """What changes together, with each setting: (label, nodes, setting, the setting for these nodes only).

    Nodes that share a stored weight are one unit. In the order of the graph, then of the settings. Raises UsageError
    without settings, and for one without targets or with a budget for the whole model.
    """
    if not settings:
        raise UsageError("sensitivity needs at least one setting, such as sparsify{amount=0.5}")
    selected: dict[Pass, set[Node]] = {}
    for setting in settings:
        if not isinstance(getattr(setting, "targets", None), Selector):
            raise UsageError(f"sensitivity: {setting} has no targets, and so cannot run on one site alone")
        if budgets := [option for option in setting.given() if option in setting.whole_model_options]:
            raise UsageError(
                f"sensitivity: {budgets[0]} of {setting} is a budget for the whole model, and sites run alone; give "
                f"what each site loses, such as {setting.whole_model_options[budgets[0]]}"
            )
        if setting.marks:
            raise UsageError(
                f"sensitivity: {setting} leaves it to a training what goes, and sites run alone; use another criterion"
            )
        wanted: Any = setting if sites is None else _with(setting, targets=sites)
        alone = Context(current=wanted, target=context.target)
        selected[setting] = set(alone.sites(graph, wanted.targets, getattr(wanted, "ignore", Selector())))
    groups: dict[Value | Node, list[Node]] = {}
    for node in graph.nodes:
        if any(node in nodes for nodes in selected.values()):
            groups.setdefault(_shared(node), []).append(node)
    labels = _labels(list(groups.values()))
    for label, nodes in zip(labels, groups.values(), strict=True):
        for setting in selected:
            mine = [node for node in nodes if node in selected[setting]]
            narrowed = _narrowed(setting, mine)
            if narrowed is not None:
                yield label, mine, setting, narrowed


def _shared(node: Node) -> Value | Node:
    """What a unit shares: the stored weight of its nodes, or the only node itself."""
    operands = () if node.op is None else node.op.operands
    stored = next((node.operand(name) for name in ("weight", "table") if name in operands), None)
    return stored if stored is not None and stored.is_constant else node


def _labels(groups: Sequence[Sequence[Node]]) -> list[str]:
    """A label for each unit, with a node's name where several units share it."""
    labels = [" + ".join(dict.fromkeys(node.label for node in nodes)) for nodes in groups]
    often = Counter(labels)
    return [
        label if often[label] == 1 else f"{label} ({nodes[0].name})"
        for label, nodes in zip(labels, groups, strict=True)
    ]


def _narrowed(setting: Pass, nodes: Sequence[Node]) -> Pass | None:
    """The setting for these nodes only, with what it says by site; None where it says nothing of them."""
    if not nodes:
        return None
    changes: dict[str, Any] = {"targets": Selector.of(*nodes)}
    for option in dataclasses.fields(setting):
        value = getattr(setting, option.name)
        if isinstance(value, PerSite):
            term = value.term_of(nodes[0])
            if term is None:
                return None
            changes[option.name] = value[term]
    return _with(setting.alone(), **changes)


def _with(setting: Pass, **options: Any) -> Pass:
    return dataclasses.replace(setting, **options)


def _measured(row: Row, graph: Graph, setting: Pass, reference: Reference, context: Context) -> Row:
    """The row with the damage that the setting does, or with why the pass declined."""
    alone = dataclasses.replace(
        context, report=Report(), record=PassRecord("", ""), instruments=(), labels={}, sparse={}
    )
    clone = graph.clone()
    try:
        run_pass(setting, clone, alone)
    except UsageError:
        if not alone.record.declined:  # a pass may refuse to run where every site declines
            raise
    if not alone.record.changes:
        reasons = tuple(dict.fromkeys(alone.record.declined.values()))
        return dataclasses.replace(row, declined=reasons or (Reason.of(Decline("nothing_to_change")),))
    return dataclasses.replace(row, damage=reference.damage(clone, f"{row.setting} at {row.site}"))
