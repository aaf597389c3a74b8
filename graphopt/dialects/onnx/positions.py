"""Attention masks that exporters write as arithmetic on positions -> the padding mask itself.

A mask that is given as a function of (batch, head, query, key) is exported as aranges, one along each axis, and a
GatherND of the padding mask by them. Where the positions of an axis are 0, 1, 2, ..., the gather changes nothing, and a
comparison `position >= 0` always holds: what remains is the padding mask with axes of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from graphopt.dialects.onnx import shapes as onnx_shapes
from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.shapes import Size
from graphopt.dialects.onnx.whole_slices import FAR


@dataclass(frozen=True)
class Position:
    """A value whose entries are their own index along one axis; axes count from the last (-1)."""

    axis: int
    size: Size
    """The size of that axis, where it is known."""
    limit: ir.Value
    """The same as a scalar of the graph."""


def raise_positions(graph: OnnxGraph) -> None:
    """Replace each gather that changes nothing by its data, and drop comparisons that always hold. [changes]"""
    held = onnx_shapes.sizes_held(graph.model)
    positions: dict[ir.Value, Position] = {}
    always: set[ir.Value] = set()
    for native in list(graph.model.graph):
        if native.domain not in ("", "ai.onnx"):
            continue
        found = _position(native, positions, held)
        if found is not None:
            positions[native.outputs[0]] = found
        elif _always_true(native, positions, always, held):
            always.add(native.outputs[0])
        elif native.op_type == "GatherND":
            _replace_gather(graph, native, positions)
        elif native.op_type == "Expand":
            _expand_one_side(graph, native, always, held)


def _numbers(value: ir.Value | None, held: dict[ir.Value, list[Size]]) -> list[Size] | None:
    producer = None if value is None or value in held else value.producer()
    if producer is not None and producer.op_type == "CastLike":  # an export casts the bounds of an arange so
        stored = producer.inputs[0].const_value if producer.inputs[0] is not None else None
        number = stored.numpy() if stored is not None and stored.size == 1 else None
        return [int(number)] if number is not None and int(number) == number else None
    return onnx_shapes.held_in(value, held)


def _position(
    native: ir.Node, positions: dict[ir.Value, Position], held: dict[ir.Value, list[Size]]
) -> Position | None:
    first = native.inputs[0] if native.inputs else None
    if native.op_type == "Range":
        start, limit, delta = (_numbers(value, held) for value in native.inputs)
        in_order = start == [0] and delta == [1] and native.inputs[1] is not None
        return Position(-1, limit[0] if limit else None, native.inputs[1]) if in_order else None  # type: ignore[arg-type]
    known = positions.get(first) if first is not None else None
    if known is None:
        return None
    rank = _rank(first)
    match native.op_type:
        case "Cast" | "Identity":
            integers = native.outputs[0].dtype in (ir.DataType.INT64, ir.DataType.INT32)
            return known if integers else None
        case "Unsqueeze":
            axes = _numbers(native.inputs[1], held)
            if axes is None or rank is None or not all(isinstance(axis, int) for axis in axes):
                return None
            added = sorted(int(axis or 0) % (rank + len(axes)) for axis in axes)
            kept = [axis for axis in range(rank + len(axes)) if axis not in added]
            return replace(known, axis=kept[rank + known.axis] - rank - len(axes))
        case "Expand":
            return known
        case "Add":  # the number of cached positions, which is 0 without a cache
            return known if _numbers(native.inputs[1], held) == [0] else None
        case "Slice":
            bounds = [_numbers(value, held) for value in native.inputs[1:]]
            whole = bounds[0] == [0] and (len(bounds) < 4 or bounds[3] == [1])
            end = bounds[1][0] if bounds[1] else None
            to_the_end = end == known.size if isinstance(end, str) else end is not None and end >= FAR
            return known if whole and to_the_end else None
    return None


def _always_true(
    native: ir.Node,
    positions: dict[ir.Value, Position],
    always: set[ir.Value],
    held: dict[ir.Value, list[Size]],
) -> bool:
    def true(value: ir.Value | None) -> bool:
        tensor = None if value is None or value.is_graph_input() else value.const_value
        stored = tensor is not None and tensor.dtype is ir.DataType.BOOL and bool(tensor.numpy().all())
        return stored or value in always

    if native.op_type == "And":
        return all(map(true, native.inputs))
    if native.op_type == "GreaterOrEqual" and native.inputs[0] in positions:
        bound = _numbers(native.inputs[1], held)
        return bound is not None and all(isinstance(number, int) and number <= 0 for number in bound)
    return False


def _replace_gather(graph: OnnxGraph, native: ir.Node, positions: dict[ir.Value, Position]) -> None:
    """GatherND(x, stacked positions, one along each axis of x) is x with axes of size 1 between its own."""
    data, indices = native.inputs
    parts = _stacked(indices)
    shape = None if data is None else data.shape
    batched = "batch_dims" in native.attributes and native.attributes["batch_dims"].as_int()
    if parts is None or shape is None or len(parts) != len(shape) or batched:
        return
    found = [positions[part] for part in parts if part in positions]
    rank, broadcast = _rank(parts[0]), None if indices is None else indices.shape
    if rank is None or broadcast is None or len(found) < len(parts):
        return
    axes = [one.axis + rank for one in found]
    others = [axis for axis in range(rank) if axis not in axes]
    if axes != sorted(set(axes)) or any(broadcast[axis] != 1 for axis in others):
        return
    node, x = OnnxNode(graph, native), OnnxValue(graph, data)  # type: ignore[arg-type]
    for axis, (one, size) in enumerate(zip(found, shape, strict=True)):
        if one.size is None or one.size != (size if isinstance(size, int) else size.value):
            x = _first(graph, x, one.limit, axis, node)
    gathered = graph.emit("unsqueeze", x, axes=tuple(others), at=node) if others else x
    if others:
        sizes = dict(zip(axes, (one.size for one in found), strict=True))
        gathered.native.shape = ir.Shape([sizes.get(axis, 1) for axis in range(rank)])
    graph.replace(node, gathered)


def _first(graph: OnnxGraph, x: OnnxValue, count: ir.Value, axis: int, at: OnnxNode) -> OnnxValue:
    """The first `count` entries along an axis: an export may not know that two axes are of one size."""
    bounds = [graph.add_constant(torch.tensor([number])) for number in (0, axis)]
    end = graph.emit("reshape", OnnxValue(graph, count), graph.add_constant(torch.tensor([1])), at=at)
    return graph.emit("onnx.Slice", x, bounds[0], end, bounds[1], at=at)


def _stacked(indices: ir.Value | None) -> list[ir.Value] | None:
    """The values that a Concat stacks along a new last axis."""
    concat = indices.producer() if indices is not None else None
    if concat is None or concat.op_type != "Concat":
        return None
    found = []
    for part in concat.inputs:
        unsqueeze = part.producer() if part is not None else None
        if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.inputs[0] is None:
            return None
        rank = _rank(unsqueeze.inputs[0])
        axes = unsqueeze.inputs[1].const_value if unsqueeze.inputs[1] is not None else None
        if rank is None or axes is None or axes.numpy().tolist() not in ([-1], [rank]):
            return None
        found.append(unsqueeze.inputs[0])
    return found


def _expand_one_side(
    graph: OnnxGraph, native: ir.Node, always: set[ir.Value], held: dict[ir.Value, list[Size]]
) -> None:
    """Expand(And(true, x), shape) is Expand(x, shape), where every size in `shape` is known."""
    x, shape = native.inputs
    both = x.producer() if x is not None else None
    sizes = _numbers(shape, held)
    if both is None or both.op_type != "And" or sizes is None or None in sizes:
        return
    true = [value for value in both.inputs if value in always]
    other = [value for value in both.inputs if value not in always]
    if len(true) != 1 or not _fits(true[0], sizes) or not _fits(other[0], sizes):
        return
    node = OnnxNode(graph, native)
    graph.replace(node, graph.emit(node, OnnxValue(graph, other[0]), OnnxValue(graph, shape), at=node))  # type: ignore[arg-type]


def _fits(value: ir.Value | None, sizes: list[Size]) -> bool:
    """Whether a value broadcasts to exactly these sizes."""
    if value is None or value.shape is None or len(value.shape) > len(sizes):
        return False
    own = [size if isinstance(size, int) else size.value for size in value.shape]
    return all(size in (1, target) for size, target in zip(own, sizes[len(sizes) - len(own) :], strict=True))


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None
