"""The same function with fewer nodes, by small rewrites that make room for each other."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from graphopt.ir.bypass import bypass
from graphopt.ir.constants import fold_constants, static_sizes
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, RuleLog, rewrite
from graphopt.numerics.fold import fold_batch_norm
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage

_ROUNDS = 8
"""Most rounds: a rewrite may enable one before it (merged nodes form a chain to bypass), seldom more than twice."""

_SMALL = 64
"""Most elements of a constant that is compared by value when equal nodes are looked for."""


@dataclass(frozen=True)
class Simplify(Pass):
    """Drop dead nodes, fold constants, bypass what changes nothing, merge equal nodes and fold batch norms.

    Left as they are: random and stateful nodes, nodes with subgraphs, and constants whose folding would make the model
    larger (see `graphopt.ir.constants`). A batch norm is declined where its neighbour's weight cannot take it up.
    """

    name = "simplify"
    stage = Stage.SIMPLIFY
    lossless = True

    def within(self) -> Simplify:
        return self

    def run(self, graph: Graph, context: Context) -> None:
        rules = context.record.rules
        for _ in range(_ROUNDS):
            before = graph.version
            erase_dead(graph)
            fold_constants(graph)
            bypass(graph)
            merge_equal(graph)
            for name, log in fold_batch_norms(graph).items():
                rules[name] = rules.get(name, RuleLog()).then(log)
            graph.sweep()
            if graph.version == before:
                return


# --- dead nodes ----------------------------------------------------------------------------------------------------


def erase_dead(graph: Graph) -> None:
    """Erase nodes without side effects whose results nobody reads."""
    for node in reversed(graph.nodes):
        if node.signature is not None and not any(result.users or result.is_output for result in node.results):
            graph.erase(node)


# --- equal nodes ---------------------------------------------------------------------------------------------------


def merge_equal(graph: Graph) -> None:
    """Merge nodes that compute the same of the same operands into the first (common subexpressions)."""
    firsts: dict[Hashable, Node] = {}
    for node in graph.nodes:
        if node.signature is None:
            continue
        key = node.signature, tuple(_identity(graph, value) for value in node.operands)
        first = firsts.setdefault(key, node)
        both_returned = any(
            ours.is_output and theirs.is_output for ours, theirs in zip(node.results, first.results, strict=True)
        )
        if first != node and not both_returned:
            graph.replace(node, *first.results)


def _identity(graph: Graph, value: Value | None) -> Hashable:
    """What equal operands have in common: the value itself, or the content of a small constant."""
    if value is None or not value.is_constant:
        return value
    sizes = static_sizes(value.shape)
    tensor = graph.constant(value) if sizes is not None and math.prod(sizes) <= _SMALL else None
    if tensor is None:
        return value
    return tensor.dtype, tuple(tensor.shape), str(tensor.flatten().tolist())  # as text, 0.0 differs from -0.0


# --- batch norms ---------------------------------------------------------------------------------------------------


def fold_batch_norms(graph: Graph) -> dict[str, RuleLog]:
    """Fold each batch norm into the conv or linear before it; what became of the rules, by name."""
    return rewrite(graph, FOLD_BATCH_NORM)


def conv_then_norm(
    op: Recorder, x: Any, weight: Any, gamma: Any, beta: Any, mean: Any, var: Any, bias: Any = None
) -> Pattern:
    return op.batch_norm(op.conv(x, weight, bias, bind="before"), gamma, beta, mean, var, bind="norm")


def linear_then_norm(
    op: Recorder, x: Any, weight: Any, gamma: Any, beta: Any, mean: Any, var: Any, bias: Any = None
) -> Pattern:
    return op.batch_norm(op.linear(x, weight, bias, bind="before"), gamma, beta, mean, var, bind="norm")


def fold_norm(op: Builder, m: Match) -> Value:
    """The weight and the bias take up the factor and the shift of each output channel."""
    before: Node = m.before
    if before.kind == "linear" and m.norm.result.rank != 2:
        raise Declined("norm_not_on_outputs")
    if len(m.weight.users) > 1:
        raise Declined("weight_read_twice")
    given = [value for value in (m.weight, m.bias, m.gamma, m.beta, m.mean, m.var) if value is not None]
    if not all(value.is_constant for value in given):
        raise Declined("pair_computed")
    known: dict[Value, Any] = {value: op.graph.constant(value) for value in given}
    gamma, beta, mean, var = (known[value] for value in (m.gamma, m.beta, m.mean, m.var))
    folded = fold_batch_norm(known[m.weight], known.get(m.bias), gamma, beta, mean, var, m.norm.attributes["eps"])
    weight, bias = (op.constant(tensor) for tensor in folded)
    return op.graph.emit(before.kind, m.x, weight, bias, at=before, **before.attributes)  # there, to keep its path


FOLD_BATCH_NORM = (
    Rule("fold-batch-norm-into-conv", conv_then_norm, fold_norm),
    Rule("fold-batch-norm-into-linear", linear_then_norm, fold_norm),
)
