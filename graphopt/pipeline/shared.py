"""Passes that several targets have in common, run once: what they measure is measured on the first of the targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from graphopt.ir.graph import Graph, digest
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Stage
from graphopt.pipeline.runner import Pipeline, leaves
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


@dataclass
class SharedPasses:
    """Applies pipelines, and keeps what the passes before the first of QUANTIZE leave: those that follow differ by
    target, in the placement of integers and the precision of floats. Equal passes on an equal graph run once."""

    _known: dict[tuple[str, str, tuple[str, ...]], _Left] = field(default_factory=dict)

    def apply(self, pipeline: Pipeline, graph: Graph, context: Context) -> Graph:
        """As `Pipeline.apply`."""
        first = tuple(
            takewhile(lambda one: all(leaf.stage < Stage.QUANTIZE for leaf in leaves(one)), pipeline.passes)
        )
        if not first:
            return pipeline.apply(graph, context)
        key = digest(graph), str(Pipeline(first)), tuple(sorted(context.reverted))
        left = self._known.get(key)
        if left is None:
            number = len(context.report.passes)
            after = Pipeline(first).apply(graph, context)
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
