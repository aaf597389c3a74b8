"""Shapes that ONNX's inference leaves unknown, because the graph computes them: through Shape, Slice, Concat, ...

Exported files compute the shape of a Reshape from sizes of other values. The entries of such a tensor of sizes are
numbers or names of axes, in part unknown. With them, a reshape to (batch, length, 12, 32) has a known number of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import onnx_ir as ir

from graphopt.dialects.onnx.spellings import STANDARD
from graphopt.errors import GraphError

Size = int | str | None
"""A number, the name of an axis, or unknown."""
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


def refine(model: ir.Model, infer: Callable[[ir.Node], None]) -> dict[ir.Node, list[int]]:
    """Complete the shapes of all results in one walk in topological order. `infer` infers one node, in place.

    Returns the nodes whose integer results are known as numbers now, such as a slice of the fixed sizes of a shape.
    """
    held: dict[ir.Value, list[Size]] = {}
    for node in model.graph:
        if node.op_type in ("Reshape", "Expand") and node.domain in STANDARD:
            if node.outputs[0].type is None and node.inputs[0] is not None:
                node.outputs[0].type = node.inputs[0].type
            _shape_from_held(node, held)
        elif any(_is_open(output.shape) for output in node.outputs) and not _subgraphs(node):
            before = [output.shape for output in node.outputs]
            infer(node)
            for output, known in zip(node.outputs, before, strict=True):
                output.shape = _merge(output.shape, known)
        _follow(node, held)
    numbers = {value: [size for size in sizes if isinstance(size, int)] for value, sizes in held.items()}
    return {
        producer: numbers[value]
        for value, sizes in held.items()
        if len(numbers[value]) == len(sizes)
        and value.dtype in _INTEGERS
        and value.shape is not None and value.shape.is_static()
        and (producer := value.producer()) is not None
    }  # fmt: skip


def infer_anew(graph: ir.Graph, infer: Callable[[ir.Node], None]) -> list[str]:
    """Set the types and shapes of all results to what their nodes give, in one walk in topological order that goes
    through subgraphs too.

    What was stated before is kept where inference tells nothing, and completes what it leaves open; a statement that
    it denies is dropped. Returns the names of values of which another type or shape was stated. [changes]
    """
    denied = []
    for node in graph:
        inner = _subgraphs(node)
        for subgraph in inner:
            _type_inputs(node, subgraph)
            denied += infer_anew(subgraph, infer)
        if inner:
            _type_results(node, inner[0])
        else:
            denied += infer_node_anew(node, infer)
    return denied


def _type_inputs(node: ir.Node, body: ir.Graph) -> None:
    """Give inputs of a loop's body that state no type those of what is carried; its shape may change at each turn."""
    if node.op_type == "Loop" and node.domain in STANDARD:
        for carried, first in zip(body.inputs[2:], node.inputs[2:], strict=False):
            if carried.type is None and first is not None:
                carried.type = first.type


def _type_results(node: ir.Node, body: ir.Graph) -> None:
    """Give results of a condition or a loop that state no type those of what its subgraph returns: also sequences."""
    returned = body.outputs[1:] if node.op_type == "Loop" else body.outputs
    if node.domain in STANDARD:
        for result, inner in zip(node.outputs, returned, strict=False):
            if result.type is None:
                result.type = inner.type


def infer_node_anew(node: ir.Node, infer: Callable[[ir.Node], None]) -> list[str]:
    """See `infer_anew`: of one node. What holds subgraphs stays as it is stated."""
    if _subgraphs(node):
        return []
    denied = []
    stated = [(output.type, output.shape) for output in node.outputs]
    for output in node.outputs:
        output.type = output.shape = None
    with suppress(GraphError):  # an engine may run what inference refuses
        infer(node)
    for output, (type_, shape) in zip(node.outputs, stated, strict=True):
        if output.type is None:
            output.type, output.shape = type_, shape
        elif (type_ is not None and type_ != output.type) or _contradict(output.shape, shape):
            denied.append(output.name or "")
        else:
            output.shape = _merge(output.shape, shape)
    return denied


def complete(value: ir.Value, known: ir.Shape | None) -> None:
    """Complete what inference found of a value by what was known of it, unless the two contradict each other."""
    if not _contradict(value.shape, known):
        value.shape = _merge(value.shape, known)


def _contradict(found: ir.Shape | None, stated: ir.Shape | None) -> bool:
    """Whether two shapes cannot be those of one value."""
    if found is None or stated is None:
        return False
    pairs = zip(_sizes(found), _sizes(stated), strict=False)
    return len(found) != len(stated) or any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def _is_open(shape: ir.Shape | None) -> bool:
    return shape is None or any(not isinstance(size, int) for size in shape)


def _merge(found: ir.Shape | None, known: ir.Shape | None) -> ir.Shape | None:
    """The shape that was inferred, completed by numbers and names that were known before."""
    if found is None or known is None or len(found) != len(known):
        return found if found is not None else known
    sizes: list[Size] = []
    for new, old in zip(_sizes(found), _sizes(known), strict=True):
        sizes.append(new if new is not None and not (isinstance(old, int) and not isinstance(new, int)) else old)
    return ir.Shape(sizes)


def _sizes(shape: ir.Shape | None) -> list[Size]:
    if shape is None:
        return []
    return [size if isinstance(size, int) else size.value for size in shape]


def _follow(node: ir.Node, held: dict[ir.Value, list[Size]]) -> None:
    """Record the entries of a node's result, where it is an integer tensor of rank 0 or 1 that is made of sizes."""
    follow = _FOLLOW.get(node.op_type) if node.domain in STANDARD else None
    if follow is not None and _is_list(node.outputs[0].shape):
        result = follow(node, held)
        if result is not None:
            held[node.outputs[0]] = result


def _is_list(shape: ir.Shape | None) -> bool:
    return shape is not None and len(shape) <= 1


def sizes_held(model: ir.Model) -> dict[ir.Value, list[Size]]:
    """By value, the entries of integer tensors of rank 0 or 1 that are made of sizes."""
    found: dict[ir.Value, list[Size]] = {}
    for node in model.graph:
        _follow(node, found)
    return found


def held_in(value: ir.Value | None, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    """The entries of a stored or computed tensor of sizes, or None where they are not known."""
    if value is None:
        return None
    if value in held:
        return held[value]
    tensor = None if value.is_graph_input() else value.const_value
    if tensor is not None and tensor.dtype in _INTEGERS and tensor.size <= 64 and len(tensor.shape) <= 1:
        return [int(n) for n in tensor.numpy().reshape(-1)]
    return None


def _shape_op(node: ir.Node, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return _sizes(shape)[slice(start.as_int() if start else None, end.as_int() if end else None)]


def _slice_op(node: ir.Node, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    parts = [held_in(value, held) for value in node.inputs]
    if any(part is None for part in parts):
        return None
    bounds = [part[0] for part in parts[1:] if part is not None and len(part) == 1]
    numbers = [bound for bound in bounds if isinstance(bound, int)]
    if len(numbers) != len(parts) - 1 or len(numbers) < 2 or parts[0] is None:  # before opset 10 they are attributes
        return None
    return parts[0][numbers[0] : numbers[1] : numbers[3] if len(numbers) > 3 else 1]


def _gather_op(node: ir.Node, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    data, index = held_in(node.inputs[0], held), held_in(node.inputs[1], held)
    if data is None or index is None or not all(isinstance(i, int) and -len(data) <= i < len(data) for i in index):
        return None
    return [data[i] for i in index if isinstance(i, int)]


def _concat_op(node: ir.Node, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    result: list[Size] = []
    for value in node.inputs:
        part = held_in(value, held)
        if part is None:
            count = value.shape[0] if value is not None and value.shape is not None and len(value.shape) == 1 else None
            if not isinstance(count, int):
                return None
            part = [None] * count
        result += part
    return result


def _same_op(node: ir.Node, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    return held_in(node.inputs[0], held)


def _cast_op(node: ir.Node, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    return _same_op(node, held) if ir.DataType(node.attributes["to"].as_int()) in _INTEGERS else None


_FOLLOW: dict[str, Callable[[ir.Node, dict[ir.Value, list[Size]]], list[Size] | None]] = {
    "Shape": _shape_op, "Slice": _slice_op, "Gather": _gather_op, "Concat": _concat_op, "Unsqueeze": _same_op,
    "Squeeze": _same_op, "Reshape": _same_op, "Cast": _cast_op, "Identity": _same_op,
}  # fmt: skip


def _shape_from_held(node: ir.Node, held: dict[ir.Value, list[Size]]) -> None:
    sizes = held_in(node.inputs[1], held)
    x, output = node.inputs[0], node.outputs[0]
    if sizes is None or x is None:
        return
    if node.op_type == "Reshape":
        found: list[Size] | None = _reshaped(_sizes(x.shape) if x.shape is not None else None, sizes, node)
    else:
        found = _expanded(_sizes(x.shape) if x.shape is not None else None, sizes)
    if found is not None:
        output.shape = _merge(ir.Shape(found), output.shape)


def _reshaped(x: list[Size] | None, sizes: list[Size], node: ir.Node) -> list[Size]:
    allow_zero = node.attributes.get("allowzero")
    result = list(sizes)
    if allow_zero is None or not allow_zero.as_int():
        for axis, size in enumerate(sizes):
            if size == 0:
                result[axis] = x[axis] if x is not None and axis < len(x) else None
    if -1 in result:
        axis = result.index(-1)
        result[axis] = _rest(x, result[:axis] + result[axis + 1 :])
    return result


def _rest(x: list[Size] | None, others: list[Size]) -> Size:
    """The size that -1 stands for: the sizes of x divided by the others, where equal names cancel."""
    if x is None or None in x or None in others:
        return None
    left: list[Any] = list(x)
    number = 1
    for size in others:
        if isinstance(size, str):
            if size not in left:
                return None
            left.remove(size)
        else:
            number *= int(size or 0)
    names = [size for size in left if isinstance(size, str)]
    product = math.prod(size for size in left if isinstance(size, int))
    if number == 0 or product % number:
        return None
    if not names:
        return product // number
    return names[0] if len(names) == 1 and product == number else None


def _expanded(x: list[Size] | None, sizes: list[Size]) -> list[Size] | None:
    if x is None:
        return None
    rank = max(len(x), len(sizes))
    left, right = [1] * (rank - len(x)) + x, [1] * (rank - len(sizes)) + sizes
    return [b if a == 1 else a if b == 1 else (a if a == b else None) for a, b in zip(left, right, strict=True)]
