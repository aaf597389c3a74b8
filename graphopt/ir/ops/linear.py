"""Products with a weight and of two values; rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import NodeAxes, Unclear
from graphopt.ir.ops.declaration import op

if TYPE_CHECKING:  # graph imports the ops
    from graphopt.ir.graph import Value


def weight_flops(weight: Sequence[int], y: Sequence[int]) -> int:
    """Of a linear or conv: each entry of y sums over one output slice of the weight."""
    return 2 * prod(y) * prod(weight[1:])


def _linear_axes(node: NodeAxes) -> None:
    x, weight, *bias = node.given
    node.same(x, -1, weight, 1)
    node.same(weight, 0, node.y, -1)
    for value in bias:
        node.same(value, -1, node.y, -1)
    node.broadcast(x, node.y, skip=[node.rank(node.y) - 1])
    node.has_weight(weight, 0, 1)


@op(flops=weight_flops, axes=_linear_axes)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    return F.linear(x, weight, bias)


def _matmul_flops(a: Sequence[int], y: Sequence[int]) -> int:
    return 2 * prod(y) * a[-1]


def product_axes(
    node: NodeAxes, a: Value, b: Value, *, a_axes: tuple[int, int] = (-2, -1), b_axes: tuple[int, int] = (-2, -1)
) -> None:
    """a (..., m, k) by b (..., k, n): `a_axes` are m and k of a, `b_axes` k and n of b; leading axes are broadcast.

    Where both are computed, no weight can be zeroed for what goes of k: a sum over fewer entries is another sum.
    """
    y, rank = node.y, node.rank(node.y)
    if node.rank(a) < 2 or node.rank(b) < 2:
        raise Unclear("axis_in_product_of_vector")
    if node.is_computed(a, b):
        node.reduces(a, a_axes[1], "product")
    node.same(a, a_axes[1], b, b_axes[0])
    node.same(a, a_axes[0], y, -2)
    node.same(b, b_axes[1], y, -1)
    for value in (a, b):
        node.broadcast(value, y, skip=[rank - 2, rank - 1])


def _matmul_axes(node: NodeAxes) -> None:
    product_axes(node, *node.given)


@op(flops=_matmul_flops, axes=_matmul_axes)
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product of two values; with a constant 2-D right operand it is a linear."""
    return torch.matmul(a, b)


def _embedding_axes(node: NodeAxes) -> None:
    table, ids = node.given
    node.same(table, 1, node.y, -1)
    node.lock(table, 0, "axis_looked_up")
    for axis in range(node.rank(ids)):
        node.same(ids, axis, node.y, axis)
    node.has_weight(table, 1, None)


@op(flops=0, axes=_embedding_axes)
def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of table (entries, width) picked by integer ids of any shape."""
    return F.embedding(ids.long(), table)
