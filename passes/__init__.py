"""The passes, by name. Importing this module imports none of them; `REGISTRY["quantize"]` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from graphopt.pipeline import Pass

if TYPE_CHECKING:
    from graphopt.passes.approximate import Approximate
    from graphopt.passes.cast import Cast
    from graphopt.passes.fold_int8 import FoldInt8
    from graphopt.passes.low_rank import LowRank
    from graphopt.passes.merge_linear import MergeLinear
    from graphopt.passes.prune import Prune
    from graphopt.passes.quantize import Quantize
    from graphopt.passes.simplify import Simplify
    from graphopt.passes.smooth import Smooth
    from graphopt.passes.sparsify import Sparsify

__all__ = [
    "REGISTRY", "Approximate", "Cast", "FoldInt8", "LowRank", "MergeLinear", "Prune", "Quantize", "Simplify", "Smooth",
    "Sparsify",
]  # fmt: skip

_CLASSES = {
    "simplify": "Simplify",
    "approximate": "Approximate",
    "prune": "Prune",
    "sparsify": "Sparsify",
    "low-rank": "LowRank",
    "smooth": "Smooth",
    "quantize": "Quantize",
    "cast": "Cast",
    "merge-linear": "MergeLinear",
    "fold-int8": "FoldInt8",
}


class _Registry(Mapping[str, type[Pass]]):
    """Pass classes by name, imported when looked up. A pass named low-rank is LowRank in low_rank.py."""

    def __getitem__(self, name: str) -> type[Pass]:
        module = import_module(f"graphopt.passes.{name.replace('-', '_')}") if name in _CLASSES else None
        if module is None:
            raise KeyError(name)
        found: type[Pass] = getattr(module, _CLASSES[name])
        return found

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


REGISTRY = _Registry()


def __getattr__(name: str) -> type[Pass]:
    for kebab, class_name in _CLASSES.items():
        if class_name == name:
            return REGISTRY[kebab]
    raise AttributeError(f"module 'graphopt.passes' has no attribute {name!r}")
