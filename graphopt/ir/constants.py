"""Constant folding: nodes that read only constants become constants."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from graphopt.errors import GraphError, first_line
from graphopt.ir.cost import nbytes
from graphopt.ir.graph import Graph, Node, Shape, Value

_LARGE = 1_000_000
"""Bytes above which a result must not outgrow what it is computed from, so that files stay small."""


def fold_constants(graph: Graph, products: Collection[str] = ()) -> None:
    """Replace what reads only constants by its value; the graph is evaluated once for all of it.

    Left as they are: what is random or holds subgraphs, the dequantize of a stored weight, what ops read a constant
    through (linears and convs a transpose of their weight, in fx a dequantize a cast of its zero point), what the graph
    returns, and a result over 1 MB that is larger than its operands; weights in 16 bits are widened whatever their
    size, as no pass knows a weight through a cast. An identity of a constant is the constant, and no copy of it.
    products: kinds that read a stored matrix through its transpose too. Raises GraphError where the graph's engine
    cannot run a node.
    """
    for node in graph.nodes:
        if _passes_constant_on(node):
            graph.replace(node, node.input)
            continue
        shape = _static_shape(node) if node.kind == "onnx.Shape" else None
        if shape is not None and not node.result.is_output:
            graph.replace(node, graph.add_constant(shape))
    folded: dict[Node, None] = {}
    known: set[Value] = set()
    for node in graph.nodes:
        if _is_foldable(node, known, products):
            folded[node] = None
            known.update(node.results)
    edge = [node for node in folded if any(user not in folded for result in node.results for user in result.users)]
    fetch = [result for node in edge for result in node.results]
    values = _evaluated(graph, fetch)
    for node in edge:
        tensors = [values[result] for result in node.results]
        if all(isinstance(tensor, Tensor) for tensor in tensors):  # an engine may return sequences or strings
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if not _outgrows(node, size):
                graph.replace(node, *(graph.add_constant(tensor, node.name) for tensor in tensors))


def _evaluated(graph: Graph, fetch: Sequence[Value]) -> dict[Value, Tensor]:
    if not fetch:
        return {}
    try:
        return dict(zip(fetch, graph.evaluate({}, fetch), strict=True))
    except Exception as error:  # whatever the engine raises
        raise GraphError(
            f"what the model computes of its constants cannot be run: {first_line(error)}"
        ) from error


def _passes_constant_on(node: Node) -> bool:
    """Whether a node is a constant as it stands: an identity, or a transpose that moves no axis."""
    if node.signature is None or node.kind not in ("identity", "transpose") or node.result.is_output:
        return False
    perm = node.attributes.get("perm", ())
    return node.input.is_constant and list(perm) == sorted(perm)


def _is_foldable(node: Node, known: set[Value], products: Collection[str]) -> bool:
    if node.signature is None or node.kind == "dequantize" or _is_read_through(node, products):
        return False
    if any(result.is_output or result.is_constant for result in node.results):
        return False
    if not all(value is None or value.is_constant or value in known for value in node.operands):
        return False
    return not _outgrows(node, sum(nbytes(result, {}) for result in node.results))


def _is_read_through(node: Node, products: Collection[str]) -> bool:
    """Whether all that read a node take its constant operand for theirs: linears and convs, to have no copy of their
    weight, and what quantizes by zero points that fx holds in wider integers."""
    readers = _READ_THROUGH.get(node.kind, ())
    if node.kind == "transpose" and node.result.rank == 2:
        readers = (*readers, *products)
    return bool(readers) and bool(node.result.users) and all(user.kind in readers for user in node.result.users)


_SHORT = (torch.float16, torch.bfloat16)
_READ_THROUGH = {"transpose": ("linear", "conv"), "cast": ("quantize", "dequantize")}


def _outgrows(node: Node, size: int) -> bool:
    if node.kind == "cast" and node.input.dtype in _SHORT and node.attributes["dtype"] == torch.float32:
        return False
    return size > _LARGE and size > sum(nbytes(value, {}) for value in node.operands if value is not None)


def static_sizes(shape: Shape | None) -> list[int] | None:
    """A shape in numbers, or None where one is missing."""
    sizes = [size for size in shape or () if isinstance(size, int)]
    return sizes if shape is not None and len(sizes) == len(shape) else None


def _static_shape(node: Node) -> Tensor | None:
    """The result of an ONNX Shape whose axes are of fixed size."""
    operand = node.operands[0]
    if operand is None or operand.shape is None:
        return None
    sizes = static_sizes(operand.shape[node.attributes.get("start", 0) : node.attributes.get("end")])
    return None if sizes is None else torch.tensor(sizes, dtype=torch.int64)
