"""How the axes of a whole graph relate: what each node's op or opaque operation says of its own axes, collected."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.analysis.opaque import OPAQUE
from graphopt.ir.axes import AxisRelations, NodeAxes, Unclear
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value


def relate(graph: Graph) -> AxisRelations:
    """What the relations of all nodes say. Linear in the number of positions that their axes have."""
    relations = AxisRelations(computed=set(graph.inputs))
    for value in graph.inputs:
        relations.lock(value, Decline("axis_of_input", input=value.name))
    for value in graph.outputs:
        relations.lock(value, Decline("axis_of_output", output=value.name))
    nodes = graph.nodes
    known = {*graph.inputs, *(result for node in nodes for result in node.results)}
    holders = [node for node in nodes if node.signature is None]
    for node in nodes:
        if not relations.computed.isdisjoint(node.operands):
            relations.computed.update(node.results)
        axes = NodeAxes(relations, node)
        try:
            if not all(value.is_constant or value in known or value.rank == 1 for value in axes.given):
                raise Unclear("axis_of_a_view")
            _relate_node(axes)
        except Unclear as unclear:
            found = unclear.decline
            reason = Decline(found.code, **found.values, op=axes.kind, node=node.label)
            for value in (*axes.given, *axes.results):
                relations.lock(value, reason)
            continue
        axes.lock_rest()
    for node in holders:
        _lock_captured(relations, node, known)
    return relations


def _relate_node(axes: NodeAxes) -> None:
    relation = axes.node.op.axes if axes.node.op is not None else OPAQUE.get(axes.kind)
    if relation is None:
        raise Unclear("axis_at_unknown_operation")
    relation(axes)


def _lock_captured(relations: AxisRelations, node: Node, known: Iterable[Value]) -> None:
    """Lock what the subgraphs of a node read from around it, which are not among its operands."""
    operands = set(node.operands)
    for value in known:
        if value not in operands and node in value.users:
            relations.lock(value, Decline("axis_read_in_subgraph", op=node.kind, node=node.label))
