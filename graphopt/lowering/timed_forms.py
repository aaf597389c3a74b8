"""Picks the form of each pattern that has several, by timing the forms here.

The nodes of a match are cut out as a small graph. Each form of it is lowered, compiled and run on the tensors that flow
there at the example inputs, and the forms are timed against each other (`timing.paired_calls`). Matches with equal
operators, shapes and dtypes are measured once, and the figures are kept on disk (`measure.cache`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import first_line
from graphopt.ir.cost import numbers_of, sizes
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Choice, Match, rewrite
from graphopt.lowering.backend import Runner
from graphopt.lowering.saturation import SAFE, max_abs
from graphopt.measure import machine, timing
from graphopt.measure.cache import UNSURE, Timings, opened
from graphopt.numerics.metrics import sqnr
from graphopt.report.declines import Reason
from graphopt.report.records import plain

FORMAT = 2
"""Of a Measurement in the timing cache; those of another format are not read."""

ROUNDS = timing.MIN_PAIRS
"""Interleaved rounds of a comparison of forms: the fewest that give a 95% interval."""

MIN_BLOCK_SECONDS = 0.01
"""Of one form's turn at one shape."""

GIVE_UP_BELOW = 0.8
"""A form whose speed over the first form's stays below this in its first rounds is no longer timed."""

MIN_SQNR = 25.0
"""Least SQNR (dB) of a form's result to the first form's: below, an engine computes it wrongly; rounding gives more."""


@dataclass(frozen=True)
class Subgraph:
    """One match of a choice, the nodes that are measured with it, and what flows in and out."""

    match: Match
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @classmethod
    def of(cls, match: Match, nodes: Sequence[Node]) -> Subgraph:
        inside = set(nodes)
        results = {result for node in nodes for result in node.results}
        read = dict.fromkeys(value for node in nodes for value in node.operands if value is not None)
        inputs = tuple(value for value in read if value not in results and not value.is_constant)
        outputs = tuple(value for node in nodes for value in node.results
                        if value.is_output or any(user not in inside for user in value.users))  # fmt: skip
        return cls(match, tuple(nodes), inputs, outputs)

    def signature(self) -> str:
        """What its time depends on, as text: equal where only the names of values and of dynamic axes differ."""
        numbers: dict[Value, int] = {}
        axes: dict[str, str] = {}

        def text(value: Value | None) -> str:
            if value is None:
                return "-"
            if value.is_constant:
                number = self._saturation_mark(value)
            else:
                number = f"%{numbers.setdefault(value, len(numbers))}"
            if value.shape is None:
                return f"{number}?:{value.dtype}"
            sizes = [axes.setdefault(size, f"n{len(axes)}") if isinstance(size, str) else size for size in value.shape]
            return f"{number}{sizes}:{value.dtype}"

        lines = [
            f"{node.kind}({', '.join(map(text, node.operands))}) {sorted(node.attributes.items())} -> "
            f"{', '.join(map(text, node.results))}"
            for node in self.nodes
        ]
        return "\n".join([*lines, f"return {', '.join(map(text, self.outputs))}"])

    def _saturation_mark(self, constant: Value) -> str:
        """A mark on int8 weights whose products may saturate: on some CPUs other kernels multiply them."""
        tensor = self.match.root.graph.constant(constant) if constant.dtype is torch.int8 and constant.rank else None
        return "wide" if tensor is not None and max_abs(tensor) > SAFE else ""


@dataclass
class Measurement:
    """What was measured for matches of one signature, and the form that was picked."""

    form: str
    """The name of the form that is taken."""
    ratios: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By form, its speed over the first form's: median and 95% interval, geometric means over the example inputs."""
    dropped: dict[str, Reason] = field(default_factory=dict)
    """By form, why it is left out: it is not legal here, the engine refuses it, or it computes something else."""
    steady: bool = True
    """Whether the machine's speed was steady; else the figures expire after UNSURE seconds."""
    sure: bool = True
    """Whether the figures decide: the machine was steady, or one form wins or all others lose for certain anyway."""


@dataclass
class TimedChooser:
    """Picks the form of each match by time (a `Chooser`). Stateful: one for each lowering of a graph."""

    engine: str
    """Name and version of the engine, a part of the cache's key."""
    feeds: Sequence[Mapping[str, Tensor]]
    compile: Callable[[Graph], Runner]
    threads: int | None = None
    clock: timing.Clock = time.perf_counter
    pause: float = timing.PAUSE
    """Most seconds between two forms, for which the engine's threads spin after their work."""
    place: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """Moves feeds to the engine's device."""
    timings: Timings = field(default_factory=opened)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By choice, for each signature: the label of one site, how many sites there are, and its Measurement."""
    _unsure: dict[str, int] = field(default_factory=dict)
    """By choice, at how many kinds of sites the machine was too unsteady to decide."""
    _on_site: Callable[[str], object] | None = None

    def watch(self, on_site: Callable[[str], object]) -> None:
        """See `Chooser.watch`."""
        self._on_site = on_site

    @property
    def notes(self) -> list[str]:
        """One line where the machine was too unsteady, whatever the number of choices."""
        if not self._unsure:
            return []
        sites = ", ".join(f"{name} ({count})" for name, count in self._unsure.items())
        return [f"measuring failed: the machine is busy; the static order stands for {sites}"]

    def decide(self, graph: Graph, choice: Choice, finish: Callable[[Graph], object]) -> Callable[[Match], str]:
        """From a match of a choice to the name of its form, once all its matches are measured.

        finish: lowers the rest of a small graph in which one form was applied, so that it can be compiled.
        """
        subgraphs: dict[str, Subgraph] = {}
        signatures: dict[Node, str] = {}
        for match in choice.matches(graph):
            subgraph = Subgraph.of(match, choice.around(match))
            signatures[match.root] = subgraph.signature()
            subgraphs.setdefault(signatures[match.root], subgraph)
        found = self._measure(graph, choice, subgraphs, finish) if subgraphs else {}
        counts = Counter(signatures.values())
        self.measured[choice.name] = [
            {"site": subgraphs[signature].match.root.label, "sites": counts[signature], **vars(measurement)}
            for signature, measurement in found.items()
        ]
        if unsure := sum(not one.sure for one in found.values()):
            self._unsure[choice.name] = unsure
        first = next(iter(choice.forms))
        return lambda match: found[signatures[match.root]].form if match.root in signatures else first

    def _measure(
        self, graph: Graph, choice: Choice, subgraphs: Mapping[str, Subgraph], finish: Callable[[Graph], object]
    ) -> dict[str, Measurement]:
        """The measurement of each signature, from the cache where it is there."""
        found: dict[str, Measurement] = {}
        flows: list[dict[Value, Tensor]] = []
        shapes = _shapes(graph, [value for subgraph in subgraphs.values() for value in subgraph.inputs], self.feeds)
        if shapes is None:
            flows = self._flows(graph, subgraphs.values())
            shapes = [{value: list(tensor.shape) for value, tensor in flow.items()} for flow in flows]
        for signature, subgraph in subgraphs.items():
            key = {"format": FORMAT, "graphopt": machine.version("graphopt"), "engine": self.engine,
                   "machine": machine.machine(), "threads": self.threads, "choice": choice.name,
                   "forms": list(choice.forms), "pattern": signature,
                   "shapes": [[of[value] for value in subgraph.inputs] for of in shapes]}  # fmt: skip
            kept = self.timings.get(key)
            if kept is None:
                if self._on_site is not None:
                    self._on_site(f"{choice.name} at {subgraph.match.root.label}")
                flows = flows or self._flows(graph, subgraphs.values())
                inputs = [self.place({value.name: flow[value] for value in subgraph.inputs}) for flow in flows]
                measurement = self._compare_forms(graph, choice, subgraph, inputs, finish)
                kept = vars(measurement) | {"dropped": plain(measurement.dropped)}
                self.timings.put(key, kept, math.inf if measurement.steady else UNSURE)
            else:
                ratios = {form: tuple(numbers) for form, numbers in kept["ratios"].items()}
                dropped = {form: Reason.from_dict(reason) for form, reason in kept["dropped"].items()}
                measurement = Measurement(**kept | {"ratios": ratios, "dropped": dropped})
            found[signature] = measurement
        return found

    def _flows(self, graph: Graph, subgraphs: Iterable[Subgraph]) -> list[dict[Value, Tensor]]:
        """The inputs of subgraphs at each of the example inputs."""
        values = list(dict.fromkeys(value for subgraph in subgraphs for value in subgraph.inputs))
        flows = [dict(zip(values, graph.evaluate(feeds, values), strict=True)) for feeds in self.feeds]
        graph.release()
        return flows

    def _compare_forms(
        self,
        graph: Graph,
        choice: Choice,
        subgraph: Subgraph,
        inputs: Sequence[Mapping[str, Tensor]],
        finish: Callable[[Graph], object],
    ) -> Measurement:
        """Compile every form, hold its results to those of the first that runs, and time them against that one."""
        runners: dict[str, Runner] = {}
        expected: list[list[Tensor]] = []
        dropped: dict[str, Reason] = {}
        for form in choice.forms:
            try:
                runner = self.compile(_with_form(graph, choice, form, subgraph, finish))
                results = [[result.cpu() for result in runner(feeds)] for feeds in inputs]
                if expected:
                    _require_alike(results, expected)
                else:
                    expected = results
                runners[form] = runner
            except Declined as declined:
                dropped[form] = Reason.of(declined.decline)
            except Exception as error:  # the engines' own errors have no common base
                dropped[form] = Reason.of(Decline("engine_refuses", error=first_line(error)))
        if len(runners) < 2:
            return Measurement(next(iter(runners), next(iter(choice.forms))), dropped=dropped)
        first = next(iter(runners))
        found = timing.paired_calls(
            {form: [partial(runner, feeds) for feeds in inputs] for form, runner in runners.items()},
            baseline=first, rounds=ROUNDS, min_block_seconds=MIN_BLOCK_SECONDS, give_up_below=GIVE_UP_BELOW,
            clock=self.clock, pause=self.pause, until=lambda ratios: ratios.overall.certain,
        )  # fmt: skip
        overall = {form: ratios.overall for form, ratios in found.items()}
        winners = [form for form, ratio in overall.items() if ratio.low > 1]
        # One that was given up has too few pairs to be steady or certain, and lost all the same.
        others = [ratio for form, ratio in overall.items() if form != first and ratio.rounds >= timing.MIN_PAIRS]
        return Measurement(
            max(winners, key=lambda form: overall[form].median, default=first),
            {form: (ratio.median, ratio.low, ratio.high) for form, ratio in overall.items()},
            dropped,
            steady=all(ratio.steady for ratio in others),
            sure=bool(winners) or all(ratio.steady or ratio.certain for ratio in others),
        )


def _with_form(
    graph: Graph, choice: Choice, form: str, subgraph: Subgraph, finish: Callable[[Graph], object]
) -> Graph:
    """A subgraph as a lowered graph of its own, with one form. Raises Declined where the form does."""
    lowered = graph.extract(subgraph.inputs, subgraph.outputs)
    if choice.forms[form] is not None:
        (log,) = rewrite(lowered, [choice.only(form)]).values()
        if log.declined:
            raise Declined(next(iter(log.declined.values())))
        lowered.sweep()
    finish(lowered)
    return lowered


def _shapes(
    graph: Graph, values: Iterable[Value], feeds: Sequence[Mapping[str, Tensor]]
) -> list[dict[Value, list[int]]] | None:
    """The shapes of values at each of the example inputs; None where they do not follow from the inputs' shapes."""
    found = []
    for axes in [sizes(graph, one) for one in feeds]:
        shapes = {value: numbers_of(value.shape, axes) for value in values}
        known = {value: shape for value, shape in shapes.items() if shape is not None}
        if len(known) < len(shapes):
            return None
        found.append(known)
    return found


def _require_alike(results: Iterable[Sequence[Tensor]], expected: Iterable[Sequence[Tensor]]) -> None:
    """Raise Declined where a form computes something else than the first: below MIN_SQNR, or integers by over 1."""
    for several, others in zip(results, expected, strict=True):
        for result, other in zip(several, others, strict=True):
            if result.shape != other.shape:
                raise Declined("form_shape_differs", shape=list(result.shape), expected=list(other.shape))
            if result.is_floating_point() and not (found := sqnr(other, result)) >= MIN_SQNR:
                raise Declined("form_differs", sqnr=found)
            if not result.is_floating_point() and ((other.int() - result.int()).abs() > 1).any():
                raise Declined("form_integers_differ")
