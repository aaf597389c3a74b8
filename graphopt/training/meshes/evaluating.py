"""Who evaluates: rank 0 for all, or every rank on its part of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphopt.training.meshes.mesh import Mesh

Evaluate = Callable[[Any], float]


class OnEveryRank:
    """A function that every rank calls; the metric is the mean of what they return."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate

    def __call__(self, model: Any) -> float:
        return self.evaluate(model)


def on_every_rank(evaluate: Evaluate) -> Evaluate:
    """An `evaluate=` that every rank of a mesh calls, on the part of the data that it chooses by its rank; the metric
    is the mean of what they return. Any other function is called by rank 0 alone."""
    return OnEveryRank(evaluate)


def evaluated(evaluate: Evaluate, model: Any, mesh: Mesh | None) -> float:
    """The metric of a model; every rank must call it."""
    if mesh is None:
        return evaluate(model)
    if isinstance(evaluate, OnEveryRank):
        found = mesh.gather(float(evaluate(model)))
        return sum(found) / len(found)
    return mesh.first(lambda: evaluate(model))
