"""From a mesh to the `Spread` of a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx, nn

from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.training.meshes.accelerated import Accelerated
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.sharded import Sharded
from graphopt.training.meshes.spread import Spread
from graphopt.training.meshes.stages import Stages
from graphopt.training.meshes.tensor_parallel import TensorParallel
from graphopt.training.meshes.zero import Zero, Zero3
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
    if mesh is None:
        return Spread(module, trained)
    if mesh.accelerator is not None:
        _require_named_precision(mesh, settings)
        return _by_engine(module, trained, mesh)
    if mesh.sizes.fsdp > 1 or mesh.sizes.pp > 1 or mesh.sizes.tp > 1:
        _require_whole_steps(mesh, settings)
    assert isinstance(module, fx.GraphModule) and isinstance(graph, FxGraph)
    if mesh.sizes.fsdp > 1:
        return Sharded(module, trained, mesh)
    if mesh.sizes.pp > 1:
        return Stages(module, trained, mesh)
    if mesh.sizes.tp > 1:
        return TensorParallel(graph, module, objective.also, trained, mesh, learn_scales=settings.learn_scales)
    return Spread(module, trained, mesh)


def _by_engine(module: nn.Module, trained: Collection[str], mesh: Mesh) -> Spread:
    """How the engine of a user's Accelerator spreads a training."""
    plugin = mesh.accelerator.state.deepspeed_plugin
    if plugin is None:
        return Accelerated(module, trained, mesh)
    if plugin.zero_stage < 3:
        return Zero(module, trained, mesh)
    assert isinstance(module, fx.GraphModule)
    return Zero3(module, trained, mesh)


def _require_whole_steps(mesh: Mesh, settings: Settings) -> None:
    """Raise UsageError for options that look at all gradients, or at the time of one process."""
    if settings.amp in ("auto", "float16"):
        raise UsageError(
            f"amp={settings.amp} with mesh={mesh}: auto times one process, and float16 scales the gradients of one; "
            "use amp=bfloat16 or off"
        )


def _require_named_precision(mesh: Mesh, settings: Settings) -> None:
    """Raise UsageError where one process would time steps in which all must take part."""
    if settings.amp == "auto" and mesh.world > 1:
        raise UsageError(
            f"amp=auto with an accelerator of {mesh.world} processes: auto times steps of one process, and DDP and "
            "DeepSpeed take every step with all of them; use amp=bfloat16 or off"
        )
