"""What torch's exporter writes around linears: reshapes that flatten rows and restore them, splits into sequences."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, RuleLog, rewrite


def raise_sequence_splits(graph: Graph) -> None:
    """Put one Split in place of a sequence whose items are read one by one."""
    for node in graph.nodes:
        if node.kind == "onnx.SplitToSequence":
            _split(graph, node)


def raise_flattened_linears(graph: Graph) -> dict[str, RuleLog]:
    """Let linears read values whose rows were flattened for them, and drop the two reshapes."""
    return rewrite(graph, [Rule("flattened-linear", _flattened, _linear, shared=True, check=_only_reader)])


def _flattened(op: Recorder, x: Any, flat: Any, weight: Any, shape: Any, bias: Any = None) -> Pattern:
    return op.reshape(op.linear(op.reshape(x, flat), weight, bias, bind="linear"), shape)


def _only_reader(m: Match) -> bool:
    return m.linear.result.only_user is not None


def _linear(op: Builder, m: Match) -> Value:
    """A linear on x itself, where its trailing axes are joined before it, and its leading axes restored after it."""
    x, rows, y = m.x.shape, m.linear.input.shape, m.root.result.shape
    if x is None or y is None or rows is None or not isinstance(rows[-1], int) or "?" in (*x, *y):
        raise Declined("linear_shapes_unknown")
    leading = len(y) - 1
    trailing = x[leading:]
    joined = all(isinstance(size, int) for size in trailing) and math.prod(map(int, trailing)) == rows[-1]
    if x[:leading] != y[:-1] or not trailing or not joined:
        raise Declined("linear_rows_regrouped", before=list(x), after=list(y))
    value = m.x
    if len(trailing) > 1:
        value = op("onnx.Reshape", value, op.constant(torch.tensor([*[0] * leading, rows[-1]])))
    return op.linear(value, m.weight, m.bias)


def _split(graph: Graph, node: Node) -> None:
    """SplitToSequence is Split, where each item is read by a stored index."""
    x, sizes = node.operands[0], _stored(graph, node, 1)
    axis = int(node.attributes.get("axis", 0))
    items = node.result.users
    read = [_stored(graph, item, 1) if item.kind == "onnx.SequenceAt" else None for item in items]
    if x is None or x.shape is None or sizes is None or None in read or node.attributes.get("keepdims", 1) != 1:
        return
    whole = x.shape[axis]
    if not isinstance(whole, int):
        return
    if sizes.dim() == 0:
        size = int(sizes)
        sizes = torch.tensor([min(size, whole - start) for start in range(0, whole, size)])
    parts = graph.emit_all("onnx.Split", x, graph.add_constant(sizes), at=node, axis=axis, _outputs=len(sizes))
    for item, index in zip(items, read, strict=True):
        assert index is not None  # checked above
        graph.replace(item, parts[int(index)])


def _stored(graph: Graph, node: Node, index: int) -> torch.Tensor | None:
    value = node.operands[index] if index < len(node.operands) else None
    return graph.constant(value) if value is not None else None
