"""The canonical ops: what passes match and emit, whatever the dialect. One file per family.

An op declares itself: what it means (a reference in torch), its FLOPs and how its axes relate stand together.
`elementwise` and `reduction` also name what decomposed forms of other ops are made of, so that these are recognized.
"""

from graphopt.ir.ops import (  # noqa: F401  importing a family declares its ops
    activations,
    attention,
    convolution,
    elementwise,
    integer,
    linear,
    movement,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
)
from graphopt.ir.ops.declaration import OPS, Op, op

__all__ = ["OPS", "Op", "op"]
