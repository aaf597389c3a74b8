"""Shorter equals of nodes: the input of a node that changes nothing, one op in place of a chain of two."""

from __future__ import annotations

import torch

from graphopt.errors import SpellingError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import scalar

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def bypass(graph: Graph) -> None:
    """Replace each node that has a shorter equal."""
    for node in graph.nodes:
        try:
            shorter = _shorter(graph, node)
        except SpellingError:  # two nodes say what the graph's opset cannot say in one
            continue
        if shorter is not None and _may_stand_for(shorter, node.result):
            graph.replace(node, shorter)


def _may_stand_for(value: Value, result: Value) -> bool:
    """Whether a graph may return `value` in place of `result`: each output is computed, and is returned once."""
    return not result.is_output or (value.producer is not None and not value.is_constant and not value.is_output)


def _shorter(graph: Graph, node: Node) -> Value | None:
    """The value that a node passes on as it is, or that of one op in place of a chain of two; None of other nodes."""
    match node.kind:
        case "identity":
            written = graph.stateful and any(user.signature is None for user in node.input.users)
            return None if written else node.input  # an identity keeps a copy of what is written to later
        case "add" | "mul":
            a, b = node.required("a"), node.required("b")
            number = 0 if node.kind == "add" else 1
            return _unchanged(node, a, b, number) or _unchanged(node, b, a, number)
        case "sub" | "div":
            return _unchanged(node, node.required("a"), node.required("b"), 0 if node.kind == "sub" else 1)
        case "cast":
            return _shorter_cast(graph, node)
        case "transpose":
            return _shorter_transpose(graph, node)
        case "reshape":
            return _shorter_reshape(graph, node)
        case "conv":
            return _without_zeros(graph, node)
        case "onnx.CastLike":
            return _cast_to_known(graph, node)
        case "onnx.GatherElements":
            return _spread(graph, node)
        case _:
            return None


def _unchanged(node: Node, x: Value, other: Value, number: int) -> Value | None:
    """x, where `other` is exactly the number that changes nothing, and neither broadcasts x nor changes its dtype."""
    if x.rank is None or other.rank is None or other.rank > x.rank or x.dtype is None or x.dtype != node.result.dtype:
        return None
    return x if scalar(node.graph, other) == number else None


def _shorter_cast(graph: Graph, node: Node) -> Value | None:
    x, dtype = node.input, node.attributes["dtype"]
    if x.dtype == dtype:
        return x
    inner = _producer_of_same_kind(node)
    if inner is None or not _holds(x.dtype, inner.input.dtype):
        return None
    return inner.input if inner.input.dtype == dtype else graph.emit("cast", inner.input, at=node, dtype=dtype)


def _shorter_transpose(graph: Graph, node: Node) -> Value | None:
    perm = node.attributes["perm"]
    if list(perm) == sorted(perm):
        return node.input
    inner = _producer_of_same_kind(node)
    if inner is None:
        return None
    both = tuple(inner.attributes["perm"][axis] for axis in perm)
    return inner.input if list(both) == sorted(both) else graph.emit("transpose", inner.input, at=node, perm=both)


def _shorter_reshape(graph: Graph, node: Node) -> Value | None:
    inner = _producer_of_same_kind(node)
    x = node.input if inner is None else inner.input
    if x.shape is not None and x.shape == node.result.shape and "?" not in x.shape:  # equal names are equal sizes
        return x
    return None if inner is None else graph.emit("reshape", x, node.required("shape"), at=node)


def _without_zeros(graph: Graph, node: Node) -> Value | None:
    """A conv without its bias of zeros, which the ONNX exporter gives to every conv that has none."""
    bias = node.bias
    tensor = graph.constant(bias) if bias is not None else None
    if tensor is None or bool(tensor.any()):
        return None
    return graph.emit("conv", node.input, node.required("weight"), at=node, **node.attributes)


def _cast_to_known(graph: Graph, node: Node) -> Value | None:
    """A cast in place of ONNX's CastLike, which reads its second operand only for the dtype."""
    x, like = node.operands
    return graph.emit("cast", x, at=node, dtype=like.dtype) if like is not None and like.dtype is not None else None


def _spread(graph: Graph, node: Node) -> Value | None:
    """One number expanded to the shape of the indices, in place of a gather from a constant of equal entries.

    Exporters of BERT write the token types so when none are given.
    """
    source, indices = node.operands
    tensor = graph.constant(source) if source is not None else None
    if tensor is None or tensor.numel() == 0 or bool((tensor != tensor.flatten()[0]).any()):
        return None
    shape = graph.emit("onnx.Shape", indices, at=node)
    return graph.emit("onnx.Expand", graph.add_constant(tensor.flatten()[0].clone()), shape, at=node)


def _producer_of_same_kind(node: Node) -> Node | None:
    """The producer of a node's input, where it is of the same kind."""
    producer = node.input.producer
    return producer if producer is not None and producer.kind == node.kind else None


def _holds(wide: torch.dtype | None, narrow: torch.dtype | None) -> bool:
    """Whether dtype `wide` represents every number of dtype `narrow` exactly."""
    if wide is None or narrow is None:
        return False
    if narrow in _FLOATS:
        return wide in _FLOATS and torch.promote_types(wide, narrow) == wide
    if narrow in _INTEGERS and wide in _INTEGERS:
        return torch.iinfo(wide).min <= torch.iinfo(narrow).min and torch.iinfo(narrow).max <= torch.iinfo(wide).max
    if narrow in _INTEGERS and wide in _FLOATS:
        return torch.iinfo(narrow).max <= 2 / torch.finfo(wide).eps
    return narrow == torch.bool and wide in _FLOATS + _INTEGERS
