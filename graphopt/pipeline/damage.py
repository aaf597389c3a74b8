"""What the change of each site alone does to the outputs: one scan for budgets, mixed precision and the table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Node, Value, digest, raw_bytes
from graphopt.measure.machine import version
from graphopt.numerics import metrics
from graphopt.pipeline.calibration import MEMORY
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.report.records import Damage, PassRecord, Report, Row, Sensitivity, plain

if TYPE_CHECKING:

    pass

STEPS = 8
"""Batches on which outputs are compared, where nothing else is asked for."""

BUDGETS = ("flops", "params", "latency")
"""Options that are for a whole model, and mean nothing at one site."""

Feeds = Mapping[str, Tensor]
Evaluate = Callable[[Graph], float]
"""A graph -> how good it is; more is better."""


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
    """Run each setting on a clone with its `targets` narrowed to one site, and measure what that does to the outputs.

    The result is also kept in the account of the pass that runs (`context.record`). context: its calibration gives the
    batches; the passes see all of them, the outputs are compared on the first `steps`. sites: selected in place of the
    settings' own targets. cache: a file of JSON lines, one a row, that a later call reads instead of measuring again;
    rows count for the same graph, batches, target and version of graphopt. What it can't know of, `evaluate`, the loss
    and labels, is up to the caller: delete the file when they change.

    Raises UsageError without settings, sites or batches, for a pass without targets, and where `evaluate` gives no
    number; PassError where a pass fails.
    """
    if steps < 1:
        raise UsageError(f"sensitivity: steps is {steps}; give at least 1")
    several = list(units(graph, settings, sites, context))
    if not several:
        raise UsageError(f"sensitivity: {', '.join(map(str, settings))} selects no site of the model")
    batches = list(islice(context.batches(), steps))
    reference = Reference(graph, batches, evaluate)
    known = None if cache is None else _Cache(cache, _key(graph, batches, context, evaluate))
    found = Sensitivity(list(dict.fromkeys(map(str, settings))), batches=len(batches), baseline=reference.baseline)
    with ExitStack() as stack:
        watched = [stack.enter_context(one.watch("sensitivity", len(several))) for one in context.instruments]
        for label, nodes, setting, narrowed in several:
            row = Row(label, tuple(node.name for node in nodes), str(setting))
            if known is not None and (row.setting, row.nodes) in known.rows:
                row = dataclasses.replace(known.rows[row.setting, row.nodes], site=label)
            else:
                row = _measured(row, graph, narrowed, reference, context)
                if known is not None:
                    known.add(row)
            found.rows.append(row)
            for advance in watched:
                advance(f"{row.setting} at {row.site}")
    context.record.sensitivity = found
    return found


class Reference:
    """The outputs of a graph on a few batches, which the same graph after a change is compared with."""

    def __init__(self, graph: Graph, batches: Sequence[Feeds], evaluate: Evaluate | None = None) -> None:
        """Outputs of at most MEMORY bytes are kept; those of further batches are computed again when needed.

        Raises UsageError where `evaluate` gives no number for `graph`.
        """
        self.graph, self.batches, self._evaluate = graph, batches, evaluate
        self._masks = mask_inputs(graph.inputs)
        floats = [index for index, value in enumerate(graph.outputs) if value.dtype and value.dtype.is_floating_point]
        self._compared = floats or list(range(len(graph.outputs)))
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self.baseline = None if evaluate is None else self._metric(graph, "the unchanged model")

    def damage(self, changed: Graph, what: str = "the changed model") -> Damage:
        """How far the outputs of a changed graph are; `what` names it in errors.

        Raises UsageError where `evaluate` gives no number for it.
        """
        count = len(self._compared)
        signal, noise, cosines = [0.0] * count, [0.0] * count, [list[float]() for _ in range(count)]
        for number, feeds in enumerate(self.batches):
            pairs = zip(self._expected(number), self._outputs(changed, feeds), strict=True)
            for index, (expected, found) in enumerate(pairs):
                energies = metrics.energies(expected, found)
                signal[index] += energies[0]
                noise[index] += energies[1]
                cosines[index].append(metrics.cosine(expected, found))
        return Damage(
            sqnr=_least(map(metrics.decibels, signal, noise)),
            cosine=_least(sum(several) / len(several) for several in cosines),
            worst_cosine=_least(figure for several in cosines for figure in several),
            metric=None if self._evaluate is None else self._metric(changed, what),
        )

    def _expected(self, number: int) -> list[Tensor]:
        if number in self._kept:
            return self._kept[number]
        outputs = self._outputs(self.graph, self.batches[number])
        size = sum(output.nbytes for output in outputs)
        if self._bytes + size <= MEMORY:
            self._kept[number] = outputs
            self._bytes += size
        return outputs

    def _outputs(self, graph: Graph, feeds: Feeds) -> list[Tensor]:
        """The compared outputs at real positions."""
        found = []
        for index, tensor in zip(self._compared, graph.evaluate(feeds, self._fetched(graph)), strict=True):
            real = real_positions(self.graph.outputs[index].shape, tensor, self._masks, feeds)
            found.append(tensor if real is None else tensor[real])
        return found

    def _fetched(self, graph: Graph) -> list[Value]:
        return [graph.outputs[index] for index in self._compared]

    def _metric(self, graph: Graph, what: str) -> float:
        assert self._evaluate is not None
        figure: Any = self._evaluate(graph)
        if isinstance(figure, Tensor) and figure.numel() == 1:
            figure = figure.item()
        if isinstance(figure, bool) or not isinstance(figure, numbers.Real) or math.isnan(figure):
            raise UsageError(f"evaluate gives {figure!r} for {what}; it must return one number, larger where better")
        return float(figure)


def _least(figures: Iterable[float]) -> float:
    """The smallest, where NaN is smaller than any number."""
    return min(figures, key=lambda figure: -math.inf if math.isnan(figure) else figure)


# --- what to measure -----------------------------------------------------------------------------------------------


def units(
    graph: Graph, settings: Sequence[Pass], sites: Selector | None, context: Context
) -> Iterator[tuple[str, list[Node], Pass, Pass]]:
    """(label, nodes, setting, the setting for these nodes only), in the order of the graph, then of the settings."""
    if not settings:
        raise UsageError("sensitivity needs at least one setting, such as sparsify{amount=0.5}")
    selected: dict[Pass, set[Node]] = {}
    for setting in settings:
        if not isinstance(getattr(setting, "targets", None), Selector):
            raise UsageError(f"sensitivity: {setting} has no targets, and so cannot run on one site alone")
        if budgets := [name for name in BUDGETS if getattr(setting, name, None) is not None]:
            raise UsageError(
                f"sensitivity: {budgets[0]} of {setting} is a budget for the whole model, and sites run alone; give "
                "what each site loses: prune{neurons=0.5}, low-rank{energy=0.9} or low-rank{rank=0.25}"
            )
        wanted: Any = setting if sites is None else _with(setting, targets=sites)
        asker = Context(current=wanted, target=context.target)
        selected[setting] = set(asker.sites(graph, wanted.targets, getattr(wanted, "ignore", Selector())))
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
    """What nodes that change together have in common: a stored weight, or the node itself."""
    operands = () if node.op is None else node.op.operands
    stored = next((node.operand(name) for name in ("weight", "table") if name in operands), None)
    return stored if stored is not None and stored.is_constant else node


def _labels(groups: Sequence[Sequence[Node]]) -> list[str]:
    """A label for each group, with a node's name where several groups share it."""
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
    """The row with the damage, or with the reason of the pass to decline."""
    alone = dataclasses.replace(context, report=Report(), record=PassRecord("", ""), instruments=(), labels={})
    clone = graph.clone()
    try:
        run_pass(setting, clone, alone)
    except UsageError:
        if not alone.record.declined:  # a pass may refuse to run where every site declines
            raise
    if not alone.record.changes:
        reasons = dict.fromkeys(alone.record.declined.values())
        return dataclasses.replace(row, declined="; ".join(reasons) or "nothing to change")
    return dataclasses.replace(row, damage=reference.damage(clone, f"{row.setting} at {row.site}"))


# --- what was measured before --------------------------------------------------------------------------------------


def _key(graph: Graph, batches: Sequence[Feeds], context: Context, evaluate: Evaluate | None) -> str:
    """What a cached row must agree in."""
    compared = _batches_digest(batches)
    calibration = context.batches()
    seen = compared if calibration.once else _batches_digest(calibration)
    target = context.target.name
    facts = [version("graphopt"), digest(graph), compared, seen, target, evaluate is not None]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _batches_digest(batches: Iterable[Feeds]) -> str:
    found = hashlib.sha256()
    for feeds in batches:
        for name, tensor in sorted(feeds.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(raw_bytes(tensor))
    return found.hexdigest()


class _Cache:
    """Rows in a file, one JSON object a line, each written when it is measured: an interrupted scan goes on there."""

    def __init__(self, path: Path, key: str) -> None:
        """Reads the rows of `key`. Raises UsageError where the file cannot be one."""
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{path} cannot be a cache: " + ("it is a folder" if path.is_dir() else "no such folder"))
        self.path, self.key = path, key
        self.rows: dict[tuple[str, tuple[str, ...]], Row] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        damaged = 0
        for line in lines:
            try:
                found, row = _read(line)
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            if found == key:
                self.rows[row.setting, row.nodes] = row
        if damaged:
            text = f"{path}: {damaged} of {len(lines)} rows cannot be read; they are measured again"
            warnings.warn(text, stacklevel=4)
        if lines and not path.read_bytes().endswith(b"\n"):  # the last writer was cut off
            self._append("\n")

    def add(self, row: Row) -> None:
        self.rows[row.setting, row.nodes] = row
        self._append(json.dumps({"key": self.key, **plain(row)}) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def _read(line: str) -> tuple[str, Row]:
    """The key and the row of a line. Raises ValueError, TypeError or KeyError where it is something else."""
    facts = json.loads(line)
    damage = facts["damage"]
    figures = None if damage is None else {name: None if one is None else float(one) for name, one in damage.items()}
    row = Row(
        site=str(facts["site"]),
        nodes=tuple(map(str, facts["nodes"])),
        setting=str(facts["setting"]),
        damage=None if figures is None else Damage(**figures),  # type: ignore[arg-type]  # a bad one fails below
        declined=str(facts["declined"]),
    )
    if row.damage is not None and None in (row.damage.sqnr, row.damage.cosine, row.damage.worst_cosine):
        raise ValueError("a figure is missing")
    return str(facts["key"]), row
