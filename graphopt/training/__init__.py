"""Training of a graph at any point of a pipeline: batches in, an objective, the loop, and what is kept on disk.

It knows graphs and batches, and no passes: `graphopt.passes.recover` calls it. `plan` says what a mesh costs, before
there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.training.meshes.evaluating import on_every_rank
    from graphopt.training.meshes.plans import plan

__all__ = ["on_every_rank", "plan"]


def __getattr__(name: str) -> Any:
    if name == "plan":
        from graphopt.training.meshes.plans import plan

        return plan
    if name == "on_every_rank":
        from graphopt.training.meshes.evaluating import on_every_rank

        return on_every_rank
    raise AttributeError(f"module 'graphopt.training' has no attribute {name!r}")
