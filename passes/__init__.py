"""The passes, by name. Importing this module imports none of them; `REGISTRY["quantize"]` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from graphopt.pipeline.passes import Pass

if TYPE_CHECKING:
    from graphopt.passes.approximate import Approximate
    from graphopt.passes.cast import Cast
    from graphopt.passes.fold_int8 import FoldInt8
    from graphopt.passes.low_rank.low_rank import LowRank
    from graphopt.passes.merge_linear import MergeLinear
    from graphopt.passes.prune.prune import Prune
    from graphopt.passes.quantize.quantize import Quantize
    from graphopt.passes.quantize.smooth import Smooth
    from graphopt.passes.simplify import Simplify
    from graphopt.passes.sparsify.sparsify import Sparsify

__all__ = [
    "REGISTRY", "Approximate", "Cast", "FoldInt8", "LowRank", "MergeLinear", "Prune", "Quantize", "Simplify", "Smooth",
    "Sparsify",
]  # fmt: skip

_HOMES = {
    "simplify": ("graphopt.passes.simplify", "Simplify"),
    "approximate": ("graphopt.passes.approximate", "Approximate"),
    "prune": ("graphopt.passes.prune", "Prune"),
    "sparsify": ("graphopt.passes.sparsify", "Sparsify"),
    "low-rank": ("graphopt.passes.low_rank", "LowRank"),
    "smooth": ("graphopt.passes.quantize", "Smooth"),
    "quantize": ("graphopt.passes.quantize", "Quantize"),
    "cast": ("graphopt.passes.cast", "Cast"),
    "merge-linear": ("graphopt.passes.merge_linear", "MergeLinear"),
    "fold-int8": ("graphopt.passes.fold_int8", "FoldInt8"),
}
"""Module and class of each pass."""


class _Registry(Mapping[str, type[Pass]]):
    """Pass classes by name, imported when looked up."""

    def __getitem__(self, name: str) -> type[Pass]:
        module, class_name = _HOMES[name]
        found: type[Pass] = getattr(import_module(module), class_name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _HOMES

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


REGISTRY = _Registry()


def __getattr__(name: str) -> type[Pass]:
    for kebab, (_, class_name) in _HOMES.items():
        if class_name == name:
            return REGISTRY[kebab]
    raise AttributeError(f"module 'graphopt.passes' has no attribute {name!r}")
