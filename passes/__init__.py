"""The passes, by name. Importing this module imports none of them; `REGISTRY["quantize"]` does.

A package adds its own by an entry point of the group `graphopt.passes` (`graphopt.pipeline.registry`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.pipeline import aliases, presets
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.registry import Registry

if TYPE_CHECKING:
    from graphopt.passes.approximate import Approximate
    from graphopt.passes.cast import Cast
    from graphopt.passes.dequantize import Dequantize
    from graphopt.passes.fold_int8 import FoldInt8
    from graphopt.passes.low_rank.low_rank import LowRank
    from graphopt.passes.merge_linear import MergeLinear
    from graphopt.passes.prune.prune import Prune
    from graphopt.passes.quantize.quantize import Quantize
    from graphopt.passes.quantize.smooth import Smooth
    from graphopt.passes.recover.distill import Distill
    from graphopt.passes.recover.finetune import FineTune
    from graphopt.passes.simplify import Simplify
    from graphopt.passes.sparsify.sparsify import Sparsify

__all__ = [
    "REGISTRY", "Approximate", "Cast", "Dequantize", "Distill", "FineTune", "FoldInt8", "LowRank", "MergeLinear",
    "Prune", "Quantize", "Simplify", "Smooth", "Sparsify",
]  # fmt: skip

_BUILT_IN = {
    "simplify": "graphopt.passes.simplify:Simplify",
    "approximate": "graphopt.passes.approximate:Approximate",
    "prune": "graphopt.passes.prune:Prune",
    "sparsify": "graphopt.passes.sparsify:Sparsify",
    "low-rank": "graphopt.passes.low_rank:LowRank",
    "smooth": "graphopt.passes.quantize:Smooth",
    "distill": "graphopt.passes.recover:Distill",
    "finetune": "graphopt.passes.recover:FineTune",
    "quantize": "graphopt.passes.quantize:Quantize",
    "cast": "graphopt.passes.cast:Cast",
    "merge-linear": "graphopt.passes.merge_linear:MergeLinear",
    "fold-int8": "graphopt.passes.fold_int8:FoldInt8",
    "dequantize": "graphopt.passes.dequantize:Dequantize",
}

REGISTRY: Registry[Pass] = Registry("graphopt.passes", "pass", Pass, _BUILT_IN, aliases.PASSES, presets.RESERVED)
"""The class of each pass; `REGISTRY["quantize"]` imports it."""


def __getattr__(name: str) -> type[Pass]:
    for pass_name, home in _BUILT_IN.items():
        if home.endswith(f":{name}"):
            return REGISTRY[pass_name]
    raise AttributeError(f"module 'graphopt.passes' has no attribute {name!r}")
