"""Weights that were cut, factored or rounded are trained on labels."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.graph import Graph
from graphopt.passes.recover.recover import Recover
from graphopt.pipeline.context import Context
from graphopt.training.objective import Labels


@dataclass(frozen=True)
class FineTune(Recover):
    """Train on labels: with `loss=`, or the cross-entropy to the labels of the training batches.

    In front of the first lossy pass it makes the teacher of later `distill` passes. After `quantize` it trains
    through the rounding (straight-through, Bengio et al., 2013), so that what is trained is what ships.
    """

    name = "finetune"

    def run(self, graph: Graph, context: Context) -> None:
        self.train(graph, context, Labels(self.hard(context)))
        if not context.is_lossy:
            context.original = graph.clone()
