"""Pipelines: the order of passes, and one pass between its instruments."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from graphopt.errors import PassError, RankError, SpellingError, UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline import remaining
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import Range, check_options
from graphopt.pipeline.passes import Pass, Stage
from graphopt.report.records import PassRecord

_ANYWHERE = frozenset({Stage.SIMPLIFY, Stage.RECOVER})
"""Stages that go anywhere before LOWER."""


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes in order; itself a pass, so it nests. Raises UsageError when the stages are out of order, and where
    nothing trains what a pass marked."""

    name: ClassVar[str] = "pipeline"
    stage: ClassVar[Stage] = Stage.SIMPLIFY

    passes: tuple[Pass, ...] = ()
    """The passes, first to last."""

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        check_order(self)
        check_marks(self)

    def leaves(self) -> Iterator[Pass]:
        """The passes inside, nested ones opened, repeats once."""
        for inner in self.passes:
            yield from leaves(inner)

    @property
    def is_trained(self) -> bool:
        """Whether a pass inside trains."""
        return any(leaf.trains for leaf in self.leaves())

    def apply(self, graph: Graph, context: Context) -> Graph:
        """Run on a clone and return it: when a pass fails, `graph` is as it was."""
        clone = graph.clone()
        self.run(clone, context)
        return clone

    def run(self, graph: Graph, context: Context) -> None:
        for inner in self.passes:
            inner.run(graph, context) if isinstance(inner, Pipeline) else run_pass(inner, graph, context)

    def __str__(self) -> str:
        return ",".join(f"({p})" if type(p) is Pipeline else str(p) for p in self.passes)


@dataclass(frozen=True, init=False)
class Repeat(Pipeline):
    """Passes in order, repeated until a round changes nothing or `times` rounds have run."""

    name: ClassVar[str] = "repeat"

    times: Annotated[int, Range(1)] = 10
    """Most rounds, at least 1."""

    def __init__(self, passes: Iterable[Pass] = (), times: int = 10) -> None:
        super().__init__(passes)
        object.__setattr__(self, "times", times)
        check_options(self.name, self)
        stages = {leaf.stage for leaf in self.leaves()}
        if times > 1 and len(stages if Stage.LOWER in stages else stages - _ANYWHERE) > 1:
            names = ", ".join(f"{leaf.name} ({leaf.stage.name})" for leaf in self.leaves())
            raise UsageError(f"repeat: the second round of {names} would go back a stage; repeat each stage by itself")

    def run(self, graph: Graph, context: Context) -> None:
        outer = context.round
        for number in range(self.times):
            before, context.round = graph.version, (number + 1, self.times)
            super().run(graph, context)
            if graph.version == before:
                break
        context.round = outer

    def __str__(self) -> str:
        return f"repeat{{times={self.times}}}({super().__str__()})"


def leaves(one: Pass) -> Iterator[Pass]:
    """A pass itself, or the passes inside a pipeline."""
    yield from one.leaves() if isinstance(one, Pipeline) else [one]


def check_order(pipeline: Pipeline) -> None:
    """Raise UsageError when a pass stands after one of a later stage, saying the right order."""
    leaves = list(pipeline.leaves())
    latest: Pass | None = None
    for leaf in leaves:
        if latest is not None and (
            latest.stage is Stage.LOWER if leaf.stage in _ANYWHERE else leaf.stage < latest.stage
        ):
            ordered = _in_order(leaves)
            raise UsageError(
                f"{leaf.name} ({leaf.stage.name}) cannot stand after {latest.name} ({latest.stage.name}); "
                f"the right order is {','.join(p.name for p in ordered)}"
            )
        if leaf.stage not in _ANYWHERE:
            latest = leaf


def check_marks(pipeline: Pipeline) -> None:
    """Raise UsageError where a pass only marks what is to go, and no training is behind it, within the same brackets
    and before the weights become others."""
    marking: Pass | None = None
    for leaf in pipeline.leaves():
        if marking is not None and not leaf.trains and leaf.stage > Stage.PRUNE:
            raise UsageError(
                f"{marking} marks what the training behind it learns to remove, and {leaf.name} comes first: put "
                f"distill or finetune between them"
            )
        if leaf.trains or leaf.marks:
            marking = None if leaf.trains else leaf
    if marking is not None:
        raise UsageError(
            f"{marking} marks what the training behind it learns to remove, and there is none: put distill or finetune "
            "behind it, or use another criterion"
        )


def _in_order(passes: Sequence[Pass]) -> list[Pass]:
    """By stage; what trains stays behind the stage that it followed, and before LOWER."""
    keys, latest = list[Stage](), Stage.SIMPLIFY
    for one in passes:
        if one.stage not in _ANYWHERE:
            latest = one.stage
        keys.append(min(latest, Stage.QUANTIZE) if one.stage is Stage.RECOVER else one.stage)
    order = sorted(range(len(passes)), key=keys.__getitem__)
    return [passes[place] for place in order]


def run_pass(pass_: Pass, graph: Graph, context: Context) -> None:
    """Run one pass between the instruments' `before` and `after`, and add its record to the report.

    Raises UsageError for what the user can mend, PassError for any other failure of the pass or an instrument.
    """
    if graph.dialect not in pass_.dialects:
        raise UsageError(
            f"{pass_.name} works on {' or '.join(pass_.dialects)} graphs, and this target's dialect is {graph.dialect}"
        )
    record = PassRecord(pass_.name, str(pass_), stage=pass_.stage.name)
    context.begin(pass_, record)
    active = [instrument for instrument in context.instruments if instrument.should_run(pass_)]
    try:
        for instrument in active:
            instrument.before(pass_, graph, context)
        record.cost_before, record.nodes_before = context.cost(graph), len(graph.nodes)
        version, start = graph.version, time.perf_counter()
        held = remaining.nodes_with_weights(graph) if pass_.changes_weights else {}
        with ExitStack() as stack:
            for instrument in active:
                stack.enter_context(instrument.running(record.text))
            pass_.run(graph, context)
            _run_within(pass_, graph, context)
        pass_.require_effect(context)
        graph.sweep()
        remaining.decline_remaining(pass_, graph, context, held)
        if not pass_.lossless and not pass_.trains and graph.version > version:
            context.is_lossy = True
        record.seconds, record.changes = time.perf_counter() - start, graph.version - version
        record.cost_after, record.nodes_after = context.cost(graph), len(graph.nodes)
        for instrument in active:
            instrument.after(pass_, graph, context)
    except (RankError, UsageError):
        raise
    except SpellingError as error:
        raise UsageError(f"{pass_} needs a newer opset than the file has: {error}. Convert the file first") from error
    except Exception as error:
        reproducer: str | None = None
        for instrument in active:
            with suppress(Exception):  # a failing reproducer must not hide the failure
                reproducer = instrument.failed(pass_, graph, context, error) or reproducer
        node = getattr(error, "node", "")
        reason = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        raise PassError(pass_.name, reason, node, reproducer) from error
    context.report.passes.append(record)


def _run_within(pass_: Pass, graph: Graph, context: Context) -> None:
    """Run a pass in the bodies of the conditions and loops of a graph, as far as it enters them."""
    inner = pass_.within()
    if inner is None or not (bodies := graph.bodies):
        return
    apart = replace(context, feeds=(), calibration=None, current=inner)
    for body in bodies:
        inner.run(body, apart)
        body.sweep()
        graph.version += body.version
