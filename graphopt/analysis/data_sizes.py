"""Which outputs have sizes that depend on what values are: how many boxes are kept, how many entries are not zero."""

from __future__ import annotations

import torch

from graphopt.ir.graph import Graph, Node, Value

_CHOOSING = {
    "onnx.NonZero", "onnx.NonMaxSuppression", "onnx.Unique", "onnx.Compress", "aten.nonzero.default",
    "aten.nonzero_numpy.default", "aten.masked_select.default", "aten._unique2.default", "aten.unique_dim.default",
    "aten.unique_consecutive.default", "aten.bincount.default", "torchvision.nms.default",
}  # fmt: skip
"""Operations that keep as many entries as meet a condition."""

_SHAPE = ("onnx.Shape", "onnx.Size")

_SIZES = {
    "reshape": (1,), "onnx.Reshape": (1,), "onnx.Expand": (1,), "onnx.Tile": (1,), "onnx.Pad": (1,), "onnx.TopK": (1,),
    "onnx.OneHot": (1,), "onnx.Split": (1,), "onnx.Slice": (1, 2), "onnx.Range": (0, 1, 2), "onnx.Resize": (2, 3),
    "onnx.ConstantOfShape": (0,), "aten.repeat_interleave.Tensor": (0, 1), "aten._local_scalar_dense.default": (0,),
    "aten.item.default": (0,),
}  # fmt: skip
"""By kind, the operands that give sizes of the result."""


def sized_by_data(graph: Graph) -> list[bool]:
    """For each output of a graph, whether its sizes may depend on values of the inputs, and not on their sizes alone.

    That is so behind an operation that chooses entries by value, behind one that is given a computed size, and behind
    one that is not known: a loop, a branch, a custom operator.
    """
    computed, sized = set(graph.inputs), set[Value]()
    for node in graph.nodes:
        read = {value for value in node.operands if value is not None}
        if node.kind not in _SHAPE and read & computed:
            computed.update(node.results)
        if read & sized or (read & computed and _chooses(node, computed)):
            sized.update(node.results)
            computed.update(node.results)
    return [value in sized for value in graph.outputs]


def _chooses(node: Node, computed: set[Value]) -> bool:
    if node.kind in _CHOOSING or (node.op is None and node.signature is None):
        return True
    if node.kind == "aten.index.Tensor":  # by a mask it chooses, by integers it does not
        return any(value is not None and value.dtype is torch.bool for value in node.operands[1:])
    return any(place < len(node.operands) and node.operands[place] in computed for place in _SIZES.get(node.kind, ()))
