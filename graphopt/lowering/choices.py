"""Where a pattern has several legal forms: the one that runs fastest here, or the first where nothing is measured.

The smallest graph around a pattern is cut out, and its forms take turns on the engine, on what flows there at the
example inputs (`timing.contest`). Alike patterns are measured once, and what was measured is kept on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphError, first_line
from graphopt.ir.cost import numbers_of, sizes
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Choice, Match, rewrite
from graphopt.lowering.backend import SAFE, Runner, max_abs
from graphopt.measure import machine, timing
from graphopt.measure.cache import UNSURE, Timings, opened
from graphopt.numerics.metrics import sqnr
from graphopt.report.declines import Reason

ROUNDS = 6
"""Interleaved rounds of a contest that have to count: the fewest that give a 95% interval."""

BLOCK = 0.01
"""Seconds, at least, of one form's turn at one shape."""

HOPELESS = 0.8
"""A form that is never this fast in its first rounds, over the first form, gives up."""

ALIKE = 25.0
"""SQNR (dB) that the forms of one pattern must share at least: less is an engine's fault, not rounding."""


@dataclass(frozen=True)
class Excerpt:
    """One pattern of a graph, with all that its forms depend on."""

    match: Match
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @classmethod
    def of(cls, match: Match, nodes: Sequence[Node]) -> Excerpt:
        inside = set(nodes)
        made = {result for node in nodes for result in node.results}
        read = dict.fromkeys(value for node in nodes for value in node.operands if value is not None)
        inputs = tuple(value for value in read if value not in made and not value.is_constant)
        outputs = tuple(value for node in nodes for value in node.results
                        if value.is_output or any(user not in inside for user in value.users))  # fmt: skip
        return cls(match, tuple(nodes), inputs, outputs)

    def signature(self) -> str:
        """What its time depends on, values and named axes by number: the same for all patterns that are alike."""
        numbers: dict[Value, int] = {}
        axes: dict[str, str] = {}

        def text(value: Value | None) -> str:
            if value is None:
                return "-"
            number = self._wide(value) if value.is_constant else f"%{numbers.setdefault(value, len(numbers))}"
            if value.shape is None:
                return f"{number}?:{value.dtype}"
            sizes = [axes.setdefault(one, f"n{len(axes)}") if isinstance(one, str) else one for one in value.shape]
            return f"{number}{sizes}:{value.dtype}"

        lines = [
            f"{node.kind}({', '.join(map(text, node.operands))}) {sorted(node.attributes.items())} -> "
            f"{', '.join(map(text, node.results))}"
            for node in self.nodes
        ]
        return "\n".join([*lines, f"return {', '.join(map(text, self.outputs))}"])

    def _wide(self, constant: Value) -> str:
        """A mark on int8 weights that may saturate: on some CPUs other kernels multiply them."""
        tensor = self.match.root.graph.constant(constant) if constant.dtype is torch.int8 and constant.rank else None
        return "wide" if tensor is not None and max_abs(tensor) > SAFE else ""


@dataclass
class Measured:
    """What was measured for one kind of pattern, and which form that made."""

    form: str
    ratios: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By form, its speed over the first one's: median, and the 95% interval; geometric mean over the example inputs."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Forms that the engine refuses, or that compute something else, and how."""
    steady: bool = True
    """Whether the machine was: else figures are kept for UNSURE seconds."""
    sure: bool = True
    """Whether that tells: the machine was steady, or all the same a form won, or all others lost or gave up."""


@dataclass
class Measuring:
    """Takes the form of each pattern by time. Stateful: one for the lowering of one graph."""

    engine: str
    """Name and version of what runs, for the cache."""
    feeds: Sequence[Mapping[str, Tensor]]
    compile: Callable[[Graph], Runner]
    threads: int | None = None
    clock: timing.Clock = time.perf_counter
    place: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """Feeds where the engine reads them."""
    timings: Timings = field(default_factory=opened)
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By choice, one entry for each kind of site: the label of one, how many there are, and what was measured."""
    notes: list[str] = field(default_factory=list)

    def decide(self, graph: Graph, choice: Choice, finish: Callable[[Graph], object]) -> Callable[[Match], str]:
        """The form of each match of a choice. finish: what else turns an excerpt into the engine's operations."""
        kinds: dict[str, Excerpt] = {}
        of: dict[Node, str] = {}
        for match in choice.matches(graph):
            excerpt = Excerpt.of(match, choice.around(match))
            of[match.root] = excerpt.signature()
            kinds.setdefault(of[match.root], excerpt)
        taken = self._measure(graph, choice, kinds, finish) if kinds else {}
        self.found[choice.name] = [
            {"site": kinds[one].match.root.label, "sites": list(of.values()).count(one), **vars(measured)}
            for one, measured in taken.items()
        ]
        unsure = [kinds[one].match.root.label for one, measured in taken.items() if not measured.sure]
        if unsure:
            self.notes.append(f"{choice.name}: the machine is too unsteady to measure {', '.join(unsure)}; "
                              f"the static order stands")  # fmt: skip
        first = next(iter(choice.forms))
        return lambda match: taken[of[match.root]].form if of.get(match.root) in taken else first

    def _measure(
        self, graph: Graph, choice: Choice, kinds: Mapping[str, Excerpt], finish: Callable[[Graph], object]
    ) -> dict[str, Measured]:
        taken: dict[str, Measured] = {}
        flows: list[dict[Value, Tensor]] = []
        shapes = _shapes(graph, [value for one in kinds.values() for value in one.inputs], self.feeds)
        if shapes is None:
            flows = self._flows(graph, kinds.values())
            shapes = [{value: list(tensor.shape) for value, tensor in flow.items()} for flow in flows]
        for signature, excerpt in kinds.items():
            at = [[one[value] for value in excerpt.inputs] for one in shapes]
            key = {"graphopt": machine.version("graphopt"), "engine": self.engine, "machine": machine.machine(),
                   "threads": self.threads, "choice": choice.name, "forms": list(choice.forms), "pattern": signature,
                   "shapes": at}  # fmt: skip
            kept = self.timings.get(key)
            if kept is None:
                flows = flows or self._flows(graph, kinds.values())
                inputs = [self.place({value.name: flow[value] for value in excerpt.inputs}) for flow in flows]
                measured = self._contest(graph, choice, excerpt, inputs, finish)
                self.timings.put(key, vars(measured), math.inf if measured.steady else UNSURE)
            else:
                measured = Measured(**kept | {"ratios": {form: tuple(one) for form, one in kept["ratios"].items()}})
            taken[signature] = measured
        return taken

    def _flows(self, graph: Graph, excerpts: Iterable[Excerpt]) -> list[dict[Value, Tensor]]:
        """What flows into some excerpts at each of the example inputs."""
        values = list(dict.fromkeys(value for one in excerpts for value in one.inputs))
        return [dict(zip(values, graph.evaluate(feeds, values), strict=True)) for feeds in self.feeds]

    def _contest(
        self,
        graph: Graph,
        choice: Choice,
        excerpt: Excerpt,
        inputs: Sequence[Mapping[str, Tensor]],
        finish: Callable[[Graph], object],
    ) -> Measured:
        runners: dict[str, Runner] = {}
        expected: list[list[Tensor]] = []
        dropped: dict[str, str] = {}
        for form in choice.forms:
            try:
                made = graph.extract(excerpt.inputs, excerpt.outputs)
                if choice.forms[form] is not None:
                    (log,) = rewrite(made, [choice.only(form)]).values()
                    if log.declined:
                        raise GraphError(Reason.of(next(iter(log.declined.values()))))
                    made.sweep()
                finish(made)
                runner = self.compile(made)
                results = [[result.cpu() for result in runner(one)] for one in inputs]
                if expected:
                    _hold(results, expected)
                else:
                    expected = results
                runners[form] = runner
            except Exception as error:  # the engine's own have no base of theirs
                dropped[form] = first_line(error)
        if len(runners) < 2:
            return Measured(next(iter(runners), next(iter(choice.forms))), dropped=dropped)
        first = next(iter(runners))
        found = timing.contest(
            {form: [partial(runner, one) for one in inputs] for form, runner in runners.items()},
            baseline=first, rounds=ROUNDS, min_block_seconds=BLOCK, hopeless=HOPELESS, clock=self.clock,
            until=lambda one: one.overall.certain,
        )  # fmt: skip
        ratios = {form: (one.overall.median, one.overall.low, one.overall.high) for form, one in found.items()}
        winners = [form for form, (_, low, _) in ratios.items() if low > 1]
        others = [one.overall for form, one in found.items() if form != first and one.overall.rounds >= timing.FEWEST]
        steady = all(one.steady for one in others)
        sure = bool(winners) or all(one.steady or one.certain for one in others)
        return Measured(max(winners, key=lambda form: ratios[form][0], default=first), ratios, dropped, steady, sure)


def _shapes(
    graph: Graph, values: Iterable[Value], feeds: Sequence[Mapping[str, Tensor]]
) -> list[dict[Value, list[int]]] | None:
    """The shapes of values at each of the example inputs; None where they do not follow from those of the inputs."""
    axes = [sizes(graph, one) for one in feeds]
    found = [{value: numbers_of(value.shape, one) for value in values} for one in axes]
    known = [{value: shape for value, shape in one.items() if shape is not None} for one in found]
    return known if known == found else None


def _hold(results: Iterable[Sequence[Tensor]], expected: Iterable[Sequence[Tensor]]) -> None:
    """Raise GraphError where a form computes something else than the first one."""
    for several, others in zip(results, expected, strict=True):
        for result, other in zip(several, others, strict=True):
            if result.shape != other.shape:
                raise GraphError(f"its result has the shape {list(result.shape)}, not {list(other.shape)}")
            if result.is_floating_point() and not (found := sqnr(other, result)) >= ALIKE:
                raise GraphError(f"its result is {found:.1f} dB from the first form's")
            if not result.is_floating_point() and (other.int() - result.int()).abs().max() > 1:
                raise GraphError("its integers are more than one step from the first form's")
