"""The pass `prune` and its parts: whole units are removed, and shapes shrink."""

from graphopt.passes.prune.prune import Prune

__all__ = ["Prune"]
