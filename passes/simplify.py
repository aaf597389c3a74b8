"""The same function with fewer nodes: nothing that is known, or changes nothing, or is computed twice."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.constants import fold_constants, static_sizes
from graphopt.graph import Graph, Node, Value
from graphopt.numerics.fold import fold_batch_norm
from graphopt.pipeline import Context, Pass, Stage
from graphopt.rewrite import Builder, Declined, Match, Pattern, Recorder, Rule, rewrite, scalar

_SMALL = 64
"""Most elements of constants that are compared by value when looking for common subexpressions."""

_ROUNDS = 8
"""Most rounds: one step makes room for another (nodes that are shared form a chain), but seldom more than twice."""


@dataclass(frozen=True)
class Simplify(Pass):
    """Fold constants and batch norms, drop dead code and what changes nothing, and compute equal things once.

    Random and stateful nodes and those with subgraphs are left as they are, and so are constants that would make the
    model larger (see `graphopt.constants`).
    """

    name = "simplify"
    stage = Stage.SIMPLIFY
    lossless = True

    def run(self, graph: Graph, context: Context) -> None:
        for _ in range(_ROUNDS):
            before = graph.version
            _erase_dead(graph)
            fold_constants(graph)
            _bypass(graph)
            _share(graph)
            context.record.rules.update(rewrite(graph, BATCH_NORM))
            graph.sweep()
            if graph.version == before:
                return


def _erase_dead(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        if node.signature is not None and not any(result.users or result.is_output for result in node.results):
            graph.erase(node)


# --- what changes nothing ------------------------------------------------------------------------------------------


def _bypass(graph: Graph) -> None:
    """Let the users of each node that has a shorter equal read that."""
    for node in graph.nodes:
        shorter = _shorter(graph, node)
        if shorter is not None and _may_stand_for(shorter, node.result):
            graph.replace(node, shorter)


def _may_stand_for(value: Value, result: Value) -> bool:
    """A graph returns each value once, and under its own name: not an input, a constant or a second output."""
    return not result.is_output or (value.producer is not None and not value.is_constant and not value.is_output)


def _shorter(graph: Graph, node: Node) -> Value | None:
    """The value that a node only passes on, or one operation in place of a chain of two."""
    match node.kind:
        case "identity":
            return node.input
        case "add" | "mul":
            a, b = node.required("a"), node.required("b")
            neutral = 0 if node.kind == "add" else 1
            return _unchanged(node, a, b, neutral) or _unchanged(node, b, a, neutral)
        case "sub" | "div":
            return _unchanged(node, node.required("a"), node.required("b"), 0 if node.kind == "sub" else 1)
        case "cast":
            return _shorter_cast(graph, node)
        case "transpose":
            return _shorter_transpose(graph, node)
        case "reshape":
            return _shorter_reshape(graph, node)
        case "linear" | "conv":
            return _without_zeros(graph, node)
        case "onnx.CastLike":
            return _cast_to_known(graph, node)
        case _:
            return None


def _unchanged(node: Node, x: Value, other: Value, neutral: int) -> Value | None:
    """x, where `other` is exactly the neutral number and neither widens x nor changes its dtype."""
    if x.rank is None or other.rank is None or other.rank > x.rank or x.dtype is None or x.dtype != node.result.dtype:
        return None
    return x if scalar(node.graph, other) == neutral else None


def _shorter_cast(graph: Graph, node: Node) -> Value | None:
    x, dtype = node.input, node.attributes["dtype"]
    if x.dtype == dtype:
        return x
    inner = _feeder(node)
    if inner is None or not _holds(x.dtype, inner.input.dtype):
        return None
    return inner.input if inner.input.dtype == dtype else graph.emit("cast", inner.input, at=node, dtype=dtype)


def _shorter_transpose(graph: Graph, node: Node) -> Value | None:
    perm = node.attributes["perm"]
    if list(perm) == sorted(perm):
        return node.input
    inner = _feeder(node)
    if inner is None:
        return None
    both = tuple(inner.attributes["perm"][axis] for axis in perm)
    return inner.input if list(both) == sorted(both) else graph.emit("transpose", inner.input, at=node, perm=both)


def _shorter_reshape(graph: Graph, node: Node) -> Value | None:
    inner = _feeder(node)
    x = node.input if inner is None else inner.input
    if x.shape is not None and x.shape == node.result.shape and "?" not in x.shape:  # equal names are equal sizes
        return x
    return None if inner is None else graph.emit("reshape", x, node.required("shape"), at=node)


def _without_zeros(graph: Graph, node: Node) -> Value | None:
    """A linear or conv without its bias of zeros, which the ONNX exporter gives to every conv that has none."""
    bias = node.bias
    tensor = graph.constant(bias) if bias is not None else None
    if tensor is None or bool(tensor.any()):
        return None
    return graph.emit(node.kind, node.input, node.required("weight"), at=node, **node.attributes)


def _cast_to_known(graph: Graph, node: Node) -> Value | None:
    """A cast in place of ONNX's CastLike, which reads its second operand for the dtype only."""
    x, like = node.operands
    return graph.emit("cast", x, at=node, dtype=like.dtype) if like is not None and like.dtype is not None else None


def _feeder(node: Node) -> Node | None:
    """The producer of a node's input, where it is of the same kind."""
    producer = node.input.producer
    return producer if producer is not None and producer.kind == node.kind else None


def _holds(wide: torch.dtype | None, narrow: torch.dtype | None) -> bool:
    """Whether every number of dtype `narrow` has its exact place in `wide`."""
    if wide is None or narrow is None:
        return False
    floats, integers = (torch.bfloat16, torch.float16, torch.float32, torch.float64), (
        torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
    )  # fmt: skip
    if narrow in floats:
        return wide in floats and torch.promote_types(wide, narrow) == wide
    if narrow in integers and wide in integers:
        return torch.iinfo(wide).min <= torch.iinfo(narrow).min and torch.iinfo(narrow).max <= torch.iinfo(wide).max
    if narrow in integers and wide in floats:
        return torch.iinfo(narrow).max <= 2 / torch.finfo(wide).eps
    return narrow == torch.bool and wide in floats + integers


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
