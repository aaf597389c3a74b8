"""The pass `sparsify` and its parts: weights become zero where they stand."""

from graphopt.passes.sparsify.sparsify import Sparsify

__all__ = ["Sparsify"]
