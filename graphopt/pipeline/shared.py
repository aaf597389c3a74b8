"""Passes that several targets have in common, run once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.errors import GraphError
from graphopt.ir.graph import Graph, digest
from graphopt.measure.timing import Ratio
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline, leaves
from graphopt.pipeline.target import Target, TimedBy
from graphopt.pipeline.zeros import KeptZeros
from graphopt.report.records import PassRecord


@dataclass(frozen=True)
class _Left:
    """What the first passes left."""

    graph: Graph
    records: tuple[PassRecord, ...]
    original: Graph | None
    trained: tuple[str, ...]
    sparse: Mapping[str, KeptZeros]
    is_lossy: bool


def shared(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The first passes of a pipeline, which leave the same on every target: those before the first that measures, as a
    time is one engine's own, and before the first of QUANTIZE, as integers and the precision of floats differ by
    target. What a pass marks, and the training that learns from it, stay together."""
    last, marked = 0, False
    for place, one in enumerate(passes):
        for leaf in leaves(one):
            if leaf.measures or leaf.stage >= Stage.QUANTIZE:
                return tuple(passes[:last])
            marked = not leaf.trains and (marked or leaf.marks)
        last = last if marked else place + 1
    return tuple(passes[:last])


def _unmeasured(target: Target) -> TimedBy:
    """A target for passes that are shared, which may not measure: another target would take what is found on this one.
    Raises GraphError where they do."""

    def refuse(measure: Callable[[], list[Ratio]]) -> list[Ratio]:
        raise GraphError(
            f"it times graphs on {target.name}, and its property `measures` is False, by which other targets "
            "would take its result: let it be True"
        )

    return TimedBy(target, refuse)


@dataclass
class SharedPasses:
    """Applies pipelines, and keeps what the passes leave that are `shared`. Equal passes on an equal graph run once."""

    _known: dict[tuple[str, str, tuple[str, ...]], _Left] = field(default_factory=dict)

    def apply(self, pipeline: Pipeline, graph: Graph, context: Context) -> Graph:
        """As `Pipeline.apply`."""
        first = shared(pipeline.passes)
        if not first:
            return pipeline.apply(graph, context)
        key = digest(graph), str(Pipeline(first)), tuple(sorted(context.reverted))
        left = self._known.get(key)
        if left is None:
            number, target = len(context.report.passes), context.target
            context.target = _unmeasured(target)
            try:
                after = Pipeline(first).apply(graph, context)
            finally:
                context.target = target
            self._known[key] = _Left(
                after, tuple(context.report.passes[number:]), context.original, tuple(context.trained),
                dict(context.sparse), context.is_lossy,
            )  # fmt: skip
        else:
            after = left.graph
            context.report.passes += left.records
            context.original, context.trained = left.original, list(left.trained)
            context.sparse, context.is_lossy = dict(left.sparse), left.is_lossy
            for one in context.instruments:
                one.resume(after)
        return Pipeline(pipeline.passes[len(first) :]).apply(after, context)
