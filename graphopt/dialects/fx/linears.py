"""matmul with a weight that is constant once constants are folded -> linear: a matrix plus a low-rank update, say.

A product with a stored matrix is a linear as soon as the program is read (`reading.Loader`).
"""

from __future__ import annotations

import math

from graphopt.ir.constants import static_sizes
from graphopt.ir.graph import Graph, Node, Value


def raise_products(graph: Graph) -> None:
    """Put a linear in place of each matmul of a computed value with one stored matrix, with the stored row that is
    added to it. The matrix may have leading axes of size 1. [changes]"""
    for node in graph.sites("matmul"):
        x, stored = node.required("a"), node.required("b")
        sizes = static_sizes(stored.shape)
        if x.is_constant or not stored.is_constant or sizes is None or x.rank is None or stored.dtype is None:
            continue
        if not stored.dtype.is_floating_point or not 2 <= len(sizes) <= x.rank or math.prod(sizes[:-2]) != 1:
            continue
        if len(sizes) > 2:
            tensor = graph.constant(stored)
            assert tensor is not None  # it is stored
            stored = graph.add_constant(tensor.reshape(sizes[-2:]).contiguous(), stored.name)
        weight = graph.emit("transpose", stored, perm=(1, 0), at=node)
        site, bias = _row_behind(node, sizes[-1])
        graph.replace(site, graph.emit("linear", x, weight, bias, at=node))
        if site != node:
            graph.erase(node)


def _row_behind(node: Node, width: int) -> tuple[Node, Value | None]:
    """The add that alone reads a node and adds a stored row to it, and that row; the node where there is none."""
    user, y = node.result.only_user, node.result
    if user is None or user.kind != "add" or (y.shape or ())[-1:] != (width,):
        return node, None
    rows = (value for value in user.operands if value is not None and value.is_constant and value.shape == (width,))
    row = next((value for value in rows if value.dtype == y.dtype), None)
    return (node if row is None else user), row
