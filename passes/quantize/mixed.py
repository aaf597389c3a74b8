"""Mixed precision: rank the sites by their damage, then find by bisection how many must stay in higher precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Feeds, Graph, Node
from graphopt.ir.qdq.regions import end_of
from graphopt.pipeline.calibration import Remembered
from graphopt.pipeline.context import Context
from graphopt.pipeline.damage import Reference, units
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.spelling import value_text
from graphopt.report.records import Damage, PassRecord, Report


@dataclass(frozen=True)
class Goal:
    """What a changed model must reach on the calibration batches; what is None is not asked for."""

    sqnr: float | None = None
    """Least SQNR of the worst output, in dB, of the energies summed over all batches."""
    cosine: float | None = None
    """Least cosine of the worst output, the mean over the batches."""
    max_drop: float | None = None
    """Most that the user's `evaluate` may fall below that of the unchanged model."""

    @property
    def asked(self) -> bool:
        return self != Goal()

    def met(self, damage: Damage, baseline: float | None) -> bool:
        """Whether damage is within the goal; NaN never is."""
        metric = math.inf if damage.metric is None or baseline is None else damage.metric - baseline
        asked = (self.sqnr, damage.sqnr), (self.cosine, damage.cosine)
        drop = self.max_drop is None or metric >= -self.max_drop
        return drop and all(least is None or found >= least for least, found in asked)

    def figures(self, damage: Damage) -> str:
        """The figures of a damage that the goal asks for, as text."""
        parts = [
            f"SQNR {damage.sqnr:.1f} dB" if self.sqnr is not None else "",
            f"cosine {damage.cosine:.5f}" if self.cosine is not None else "",
            f"metric {damage.metric:.5g}" if self.max_drop is not None else "",
        ]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        asked = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return " ".join(f"{name}={value_text(value)}" for name, value in asked.items())


@dataclass(frozen=True)
class Unit:
    """Sites that stay in higher precision together, as they share a weight."""

    nodes: tuple[Node, ...]
    label: str
    sqnr: float = math.inf
    """Of the worst output where these sites alone are changed, in dB."""


def sites_to_keep(graph: Graph, setting: Pass, goal: Goal, context: Context) -> dict[Node, Decline]:
    """The sites that stay as they are so that `setting`, a pass with `targets` and `ignore`, meets the goal, and why.

    Sites are ranked by `rank`, and the fewest of the worst that meet the goal are found by bisection. For n sites that
    takes, on the calibration batches, one evaluation of the unchanged model, two for the ranking where they hold n
    samples or more, and 1 + log2(n). What was tried is noted in the report of the pass; the graph does not change.
    Raises UsageError without calibration, for `max_drop` without `evaluate`, and what the pass raises.
    """
    if context.calibration is None:
        raise UsageError(f"{setting.name}: {goal} is measured on batches: pass calibration=<batches of inputs>")
    if goal.max_drop is not None and context.evaluate is None:
        raise UsageError(
            f"{setting.name}: {goal} needs a measure of quality: pass evaluate=<function of the model, more is better>"
        )
    context = remember(context)
    evaluate = None if goal.max_drop is None else context.evaluate
    reference = Reference(graph, list(context.batches()), evaluate)
    ranked = rank(graph, setting, context, reference.batches)
    tried: dict[int, Damage] = {}

    def meets(kept: int) -> bool:
        nodes = [node for unit in ranked[:kept] for node in unit.nodes]
        trial = graph.clone()
        _run(_without(setting, nodes), trial, context)
        trial.sweep()
        tried[kept] = reference.damage(trial, f"{setting.name} with {kept} sites kept")
        return goal.met(tried[kept], reference.baseline)

    fewest = 0
    if ranked and not meets(0):
        low, fewest = 0, len(ranked)  # with none changed, every goal is met
        while fewest - low > 1:
            middle = (low + fewest) // 2
            low, fewest = (low, middle) if meets(middle) else (middle, fewest)
    _note_trials(context, goal, ranked, fewest, tried, reference)
    return {
        node: Decline("kept_for_goal", goal=str(goal), sqnr=unit.sqnr)
        for unit in ranked[:fewest] for node in unit.nodes
    }  # fmt: skip


def remember(context: Context) -> Context:
    """The same, with the statistics of calibration kept for the trials of `sites_to_keep` and the pass after them."""
    if context.calibration is None or isinstance(context.calibration, Remembered):
        return context
    return dataclasses.replace(context, calibration=Remembered(context.calibration))


def _note_trials(
    context: Context, goal: Goal, ranked: Sequence[Unit], fewest: int, tried: Mapping[int, Damage], reference: Reference
) -> None:
    steps = [f"{kept}: {goal.figures(damage)}" for kept, damage in sorted(tried.items())]
    baseline = "" if reference.baseline is None else f" (metric of the unchanged model {reference.baseline:.5g})"
    all_ = ", which is all" if fewest == len(ranked) else ""
    context.note(
        f"{goal}: {fewest} of {len(ranked)} sites stay in higher precision{all_}, on {len(reference.batches)} batches"
        f"{baseline}; with so many of the worst kept: {'; '.join(steps)}"
    )


# --- the ranking ---------------------------------------------------------------------------------------------------


def rank(graph: Graph, setting: Pass, context: Context, batches: Sequence[Feeds]) -> list[Unit]:
    """The sites that `setting` changes, those first whose change alone harms the outputs most.

    Each site is changed alone, and measured on its own share of the samples of all batches: in all, every sample runs
    once through the unchanged graph and once through a changed one. Where axis 0 of the inputs is fixed, or differs
    between inputs, the shares are whole batches. With fewer samples than sites, several sites measure the same one.
    """
    probe = graph.clone()
    groups = [(label, nodes) for label, nodes, _, _ in units(graph, [setting], None, context)]
    twins, shown = _with_twins(probe, [node for _, nodes in groups for node in nodes])
    declined = _run(_for_twins(setting, twins), probe, context) if twins else set()
    changed = [(label, tuple(node for node in nodes if twins[node] not in declined)) for label, nodes in groups]
    changed = [(label, nodes) for label, nodes in changed if nodes]
    found = []
    for (label, nodes), share in zip(changed, _shares(graph, batches, len(changed)), strict=True):
        alone = probe.clone()
        by_name = {node.name: node for node in alone.nodes}
        for node in nodes:
            end, both = (by_name[name] for name in shown[node])
            form = both.operands[1]
            assert form is not None
            alone.replace(end, form)
        alone.sweep()
        found.append(Unit(nodes, label, Reference(graph, share).damage(alone).sqnr))
    return sorted(found, key=lambda unit: -math.inf if math.isnan(unit.sqnr) else unit.sqnr)


def _with_twins(graph: Graph, sites: Sequence[Node]) -> tuple[dict[Node, Node], dict[Node, tuple[str, str]]]:
    """Add a twin of each site to a clone of its graph: a node that computes the same from the same operands.

    Returns the twin by site, and by site two names: of the node that `end_of` gives for the site (it, or the relu that
    follows), and of a `sub` of that node's result and the same result computed from the twin.
    """
    by_name = {node.name: node for node in graph.nodes}
    twins, shown = dict[Node, Node](), dict[Node, tuple[str, str]]()
    for node in sites:
        site = by_name[node.name]
        end = end_of(site)
        form = graph.emit(site, *site.operands, at=site)
        both = graph.emit("sub", end.result, form if end == site else graph.emit(end, form, at=end))
        assert form.producer is not None and both.producer is not None
        twins[node], shown[node] = form.producer, (end.name, both.producer.name)
    return twins, shown


def _shares(graph: Graph, batches: Sequence[Feeds], count: int) -> Iterator[list[Feeds]]:
    """The samples of all batches, given to `count` shares in turn. No share is empty: a sample may be in several."""
    divisible = all(value.shape and isinstance(value.shape[0], str) for value in graph.inputs)
    divisible = divisible and all(len({len(feed) for feed in feeds.values()}) == 1 for feeds in batches)
    sizes = [len(next(iter(feeds.values()))) if divisible else 1 for feeds in batches]
    total = sum(sizes)
    for number in range(count):
        places = range(number % total, total, count)
        share, first = list[Feeds](), 0
        for feeds, size in zip(batches, sizes, strict=True):
            rows = [place - first for place in range(first, first + size) if place in places]
            if rows:
                share.append({name: feed[rows] for name, feed in feeds.items()} if divisible else feeds)
            first += size
        yield share


# --- the pass on a part of the sites -------------------------------------------------------------------------------


def _run(setting: Pass, graph: Graph, context: Context) -> set[Node]:
    """Run a pass without a record in the report; the sites that it declined."""
    alone = dataclasses.replace(
        context, report=Report(), record=PassRecord(setting.name, ""), instruments=(), labels={}, current=setting
    )
    setting.run(graph, alone)
    return {node for node, label in alone.labels.items() if label in alone.record.declined}


def _without(setting: Any, nodes: Sequence[Node]) -> Pass:
    """The pass, with these nodes ignored too."""
    changed: Pass = dataclasses.replace(setting, ignore=Selector(setting.ignore.terms, Selector.of(*nodes).terms))
    return changed


def _for_twins(setting: Any, twins: Mapping[Node, Node]) -> Pass:
    """The pass on the twins alone, with the values that its options by site give the nodes."""
    changes: dict[str, Any] = {"targets": Selector.of(*twins.values()), "ignore": Selector()}
    for option in dataclasses.fields(setting):
        value = getattr(setting, option.name)
        if isinstance(value, PerSite):
            terms = {twin: value.term_of(node) for node, twin in twins.items()}
            changes[option.name] = PerSite(
                {str(Selector.of(twin).terms[0]): value[term] for twin, term in terms.items() if term is not None}
            )
    changed: Pass = dataclasses.replace(setting, **changes)
    return changed
