"""From a mesh to the `Spread` of a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from graphopt.ir.graph import Graph
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.spread import Spread
from graphopt.training.objective import Objective
from graphopt.training.rules import WeightRule
from graphopt.training.settings import Settings


def spread(
    mesh: Mesh | None,
    graph: Graph,
    module: nn.Module,
    objective: Objective,
    trained: Collection[str],
    rules: Mapping[str, WeightRule],
    settings: Settings,
) -> Spread:
    """How a mesh spreads the training of a graph's module. Raises UsageError where it cannot."""
    return Spread(module, trained, mesh)
