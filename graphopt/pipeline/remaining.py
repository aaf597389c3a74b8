"""What a pass that changes weights has not considered is declined with a reason, so that no weights pass in silence.

A pass reports on the sites that it considered. The rest are ops that it has no form for, and operations that are no
ops, whose weights may lie in their subgraphs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Shape, Value, every_node
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass


def nodes_with_weights(graph: Graph) -> dict[Node, list[Value]]:
    """The nodes that hold weights, with the stored tensors that they read: a matrix of floats, or more axes, in 32 bits
    or more; also in bodies of the graph.

    Of ops, those with products (which have FLOPs) and tables; of other operations, all that read such a constant or
    have one in a subgraph.
    """
    return {node: stored_operands(node) for node in every_node(graph) if _holds_weights(node)}


def stored_operands(node: Node) -> list[Value]:
    """The constants that a node reads. Its other operands are others too where what computes them was replaced."""
    return [value for value in node.operands if value is not None and value.is_constant]


def _holds_weights(node: Node) -> bool:
    if node.op is not None and node.op.flops == 0 and node.kind != "embedding":
        return False
    return any(_is_weight(value.dtype, value.shape) for value in stored_operands(node)) or any(
        _is_weight(dtype, shape) for dtype, shape in node.held
    )


def _is_weight(dtype: torch.dtype | None, shape: Shape | None) -> bool:
    floats = dtype is not None and dtype.is_floating_point and dtype.itemsize >= 4
    return floats and sum(size != 1 for size in shape or ()) > 1


def decline_remaining(pass_: Pass, graph: Graph, context: Context, before: Mapping[Node, list[Value]]) -> None:
    """Decline the nodes that hold weights, are as they were, and that a pass did not consider.

    before: `nodes_with_weights` of the graph as the pass found it. What the user left out by targets or ignore is left
    out here too.
    """
    left = [
        node for node in every_node(graph)
        if node in before and stored_operands(node) == before[node] and node not in context.considered
        and not _is_left_out(pass_, node)
    ]  # fmt: skip
    context.consider(left)
    for node in left:
        code = "opaque_operator" if node.op is None else "op_without_form"
        code = code if node.graph is graph or pass_.within() is not None else "in_body"
        context.decline(node, Decline(code, op=node.kind))


def _is_left_out(pass_: Pass, node: Node) -> bool:
    given = pass_.given()
    return ("targets" in given and node not in given["targets"]) or ("ignore" in given and node in given["ignore"])
