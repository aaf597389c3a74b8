"""Reductions over axes."""

from __future__ import annotations

from torch import Tensor

from graphopt.ir.axes import NodeAxes, reduced
from graphopt.ir.ops.declaration import op


def _axes(node: NodeAxes) -> None:
    reduced(node, node.attributes["axes"] or range(node.rank(node.x)), node.attributes["keepdim"])


@op(flops=0, axes=_axes)
def mean(x: Tensor, *, axes: tuple[int, ...] = (), keepdim: bool = True) -> Tensor:
    """Mean over axes (all of them where there are none named)."""
    return x.mean(axes, keepdim)
