"""The same function with fewer nodes: nothing that is known, or changes nothing, or is computed twice."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from graphopt.ir.bypass import bypass
from graphopt.ir.constants import fold_constants, static_sizes
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, rewrite
from graphopt.numerics.fold import fold_batch_norm
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage

_SMALL = 64
"""Most elements of constants that are compared by value when looking for common subexpressions."""

_ROUNDS = 8
"""Most rounds: one step makes room for another (nodes that are shared form a chain), but seldom more than twice."""


@dataclass(frozen=True)
class Simplify(Pass):
    """Fold constants and batch norms, drop dead code and what changes nothing, and compute equal things once.

    Random and stateful nodes and those with subgraphs are left as they are, and so are constants that would make the
    model larger (see `graphopt.ir.constants`).
    """

    name = "simplify"
    stage = Stage.SIMPLIFY
    lossless = True

    def run(self, graph: Graph, context: Context) -> None:
        for _ in range(_ROUNDS):
            before = graph.version
            _erase_dead(graph)
            fold_constants(graph)
            bypass(graph)
            _share(graph)
            context.record.rules.update(rewrite(graph, BATCH_NORM))
            graph.sweep()
            if graph.version == before:
                return


def _erase_dead(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        if node.signature is not None and not any(result.users or result.is_output for result in node.results):
            graph.erase(node)


# --- what is computed twice ----------------------------------------------------------------------------------------


def _share(graph: Graph) -> None:
    """Let equal nodes on equal operands be one: the first."""
    first: dict[Hashable, Node] = {}
    for node in graph.nodes:
        if node.signature is None:
            continue
        key = node.signature, tuple(_identity(graph, value) for value in node.operands)
        known = first.setdefault(key, node)
        pairs = list(zip(known.results, node.results, strict=True))
        if known != node and not any(old.is_output and new.is_output for new, old in pairs):
            graph.replace(node, *known.results)


def _identity(graph: Graph, value: Value | None) -> Hashable:
    """What makes an operand the same as another: the value itself, or the content of a small constant."""
    if value is None or not value.is_constant:
        return value
    sizes = static_sizes(value.shape)
    tensor = graph.constant(value) if sizes is not None and math.prod(sizes) <= _SMALL else None
    if tensor is None:
        return value
    return tensor.dtype, tuple(tensor.shape), str(tensor.flatten().tolist())  # as text: 0.0 is not -0.0


# --- batch norm ----------------------------------------------------------------------------------------------------


def conv_then_norm(
    op: Recorder, x: Any, weight: Any, gamma: Any, beta: Any, mean: Any, var: Any, bias: Any = None
) -> Pattern:
    return op.batch_norm(op.conv(x, weight, bias, bind="before"), gamma, beta, mean, var, bind="norm")


def linear_then_norm(
    op: Recorder, x: Any, weight: Any, gamma: Any, beta: Any, mean: Any, var: Any, bias: Any = None
) -> Pattern:
    return op.batch_norm(op.linear(x, weight, bias, bind="before"), gamma, beta, mean, var, bind="norm")


def fold_norm(op: Builder, m: Match) -> Value:
    """The norm scales and shifts each output channel, and so can the weight and the bias."""
    before: Node = m.before
    if before.kind == "linear" and m.norm.result.rank != 2:
        raise Declined("the norm's axis 1 is not the linear's outputs")
    if len(m.weight.users) > 1:
        raise Declined("another node reads the weight too")
    given = [value for value in (m.weight, m.bias, m.gamma, m.beta, m.mean, m.var) if value is not None]
    if not all(value.is_constant for value in given):
        raise Declined("a weight of the pair is computed by the graph")
    known: dict[Value, Any] = {value: op.graph.constant(value) for value in given}
    gamma, beta, mean, var = (known[value] for value in (m.gamma, m.beta, m.mean, m.var))
    folded = fold_batch_norm(known[m.weight], known.get(m.bias), gamma, beta, mean, var, m.norm.attributes["eps"])
    weight, bias = (op.constant(tensor) for tensor in folded)
    return op.graph.emit(before.kind, m.x, weight, bias, at=before, **before.attributes)  # there, to keep its path


BATCH_NORM = (
    Rule("fold-batch-norm-into-conv", conv_then_norm, fold_norm),
    Rule("fold-batch-norm-into-linear", linear_then_norm, fold_norm),
)
