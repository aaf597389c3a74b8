"""What torch's exporter writes of a split: a sequence, whose items are read one by one."""

from __future__ import annotations

import torch

from graphopt.ir.graph import Graph, Node


def raise_sequence_splits(graph: Graph) -> None:
    """Put one Split in place of a sequence whose items are read one by one."""
    for node in graph.nodes:
        if node.kind == "onnx.SplitToSequence":
            _split(graph, node)


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
