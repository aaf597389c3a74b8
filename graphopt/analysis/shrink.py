"""Cutting: the graph without some units of its groups, every tensor in it really smaller."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from graphopt.analysis.groups import Group
from graphopt.analysis.opaque import OPAQUE, axis_of, gather_index, padding, sequence_slice, slice_bounds, split
from graphopt.ir.axes import AxisRelations, NodeAxes
from graphopt.ir.cutting import Cut, EmitCut, Mask
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops.convolution import shrinks_inside_groups


def shrink(graph: Graph, cuts: Mapping[Group, Tensor]) -> None:
    """Keep only these units (sorted int64) of each group that `graphopt.analysis.groups` found in the graph as it
    is now.

    Constants are cut, and every node that reads a cut value is emitted again under its module path, with its sizes
    changed; nothing else is touched, and keeping all units changes nothing.

    Raises ValueError, naming the group, where it is locked or of another graph, where no unit is kept, or where one of
    its axes would be left with nothing (a half that a split makes, say).
    """
    kept = _kept(graph, cuts)
    if not kept:
        return
    relations = AxisRelations()
    before = [NodeAxes(relations, node) for node in graph.nodes]  # what a node reads changes while it is cut
    for node in before:
        for value in (*node.given, *node.results):
            relations.shape(value)
    cut = Cut(graph, kept, {value: node for node in before for value in node.results}, {})
    touched = {value for value, _ in kept}
    touched |= {node.y for node in before if node.kind == "onnx.SplitToSequence" and node.x in touched}
    for node in before:
        if touched.isdisjoint(node.given) and touched.isdisjoint(node.results):
            continue
        if node.kind == "onnx.SplitToSequence":  # its items become slices, and nothing reads the sequence then
            continue
        op = node.node.op
        emit = op.cut if op is not None else _OPAQUE.get(node.kind, Cut.same)
        results = emit(cut, node)
        cut.replacements |= zip(node.results, results, strict=True)
        graph.replace(node.node, *results)
    graph.sweep()


def _kept(graph: Graph, cuts: Mapping[Group, Tensor]) -> dict[tuple[Value, int], Mask]:
    """Which positions stay, for each axis that loses some."""
    nodes = set(graph.nodes)
    kept: dict[tuple[Value, int], Mask] = {}
    for group, units in cuts.items():
        chosen = np.zeros(group.size + 1, bool)
        chosen[-1] = True  # positions of no unit stay
        if group.locked is not None:
            raise ValueError(f"{group.name} is locked ({group.locked.code}) and cannot shrink")
        if not nodes.issuperset(group.producers):
            raise ValueError(f"{group.name} is not of this graph as it is now: find its groups anew")
        if units.numel() == 0:
            raise ValueError(f"{group.name} would lose all of its {group.size} {group.kind}: keep one at least")
        if units.dtype != torch.int64 or bool((units.diff() <= 0).any()) or not 0 <= units[0] <= units[-1] < group.size:
            raise ValueError(f"the units of {group.name} to keep must be sorted int64 in [0, {group.size})")
        chosen[units.numpy()] = True
        for axis in group.axes:
            mask = chosen[axis.units.numpy()]
            if not mask.all():
                key = axis.value, axis.axis
                kept[key] = kept[key] & mask if key in kept else mask
                if not kept[key].any():
                    raise ValueError(f"{group.name} would leave nothing of axis {axis.axis} of '{axis.value.name}'")
    return kept


# --- opaque operations that are told a size, an index or a number of groups ------------------------------------------


def _resize(cut: Cut, node: NodeAxes) -> list[Value]:
    """ONNX's, by sizes or by scales."""
    return cut.sized(node) if node.operand(3) is not None else cut.same(node)


def _onnx_conv(cut: Cut, node: NodeAxes) -> list[Value]:
    groups = int(node.attributes.get("group", 1))
    if groups == 1 or shrinks_inside_groups(node, groups):
        return cut.same(node)
    return cut.same(node, group=cut.share(node, node.x, 1, groups))


def _group_norm(cut: Cut, node: NodeAxes) -> list[Value]:
    return cut.same(node, num_groups=cut.share(node, node.x, 1, int(node.attributes["num_groups"])))


def _layer_norm(cut: Cut, node: NodeAxes) -> list[Value]:
    """aten's without a weight."""
    old = list(node.attributes["normalized_shape"])
    first, sizes = node.rank(node.x) - len(old), cut.sizes(node, node.y)
    return cut.same(node, normalized_shape=[sizes.get(first + i, size) for i, size in enumerate(old)])


def _unflatten(cut: Cut, node: NodeAxes) -> list[Value]:
    axis, sizes = axis_of(node), cut.sizes(node, node.y)
    old = node.attributes["sizes"]
    return cut.same(node, sizes=[size if size == -1 else sizes.get(axis + i, size) for i, size in enumerate(old)])


def _onnx_slice(cut: Cut, node: NodeAxes) -> list[Value]:
    bounds = {axis: cut.bounds(node, node.x, axis, part) for axis, part in slice_bounds(node).items()}
    columns = [[part.start for part in bounds.values()], [part.stop for part in bounds.values()], list(bounds)]
    if "starts" in node.attributes:
        return cut.same(node, **dict(zip(("starts", "ends", "axes"), columns, strict=True)))
    steps = [part.step or 1 for part in bounds.values()]
    constants = [cut.graph.add_constant(torch.tensor(column)) for column in (*columns, steps)]
    return cut.emit(node, node.node, cut.value(node.x), *constants)


def _split(cut: Cut, node: NodeAxes) -> list[Value]:
    """One slice per part; parts may have different sizes."""
    axis, start, results = axis_of(node), 0, []
    if all(cut.mask(node, value, axis) is None for value in (node.x, *node.results)):
        return cut.same(node)
    for y in node.results:
        size = node.shape(y)[axis]
        assert isinstance(size, int)
        results.append(cut.part(node, node.x, axis, slice(start, start + size)))
        start += size
    return results


def _sequence_item(cut: Cut, node: NodeAxes) -> list[Value]:
    whole = cut.makers[node.x]
    part = sequence_slice(node, whole)
    assert part is not None
    return [cut.part(node, whole.x, *part)]


def _gather(cut: Cut, node: NodeAxes) -> list[Value]:
    index, indices = gather_index(node)
    mask = cut.mask(node, node.x, axis_of(node))
    if mask is None or index is None:
        return cut.same(node)
    place = np.cumsum(mask) - 1
    size = len(mask)
    if indices is None:
        return cut.same(node, index=int(place[index]))
    old = [number % size for number in np.atleast_1d(index).tolist()]
    left = torch.tensor([int(place[number]) for number in old if mask[number]])
    constant = cut.graph.add_constant(left if isinstance(index, list) else left[0])
    return cut.emit(node, node.node, cut.value(node.x), constant)


def _pad(cut: Cut, node: NodeAxes) -> list[Value]:
    sides = cut.sides(node, padding(node))
    if "pad" in node.attributes:  # aten: from the last axis
        return cut.same(node, pad=[size for axis in sorted(sides, reverse=True) for size in sides[axis]])
    pads = [*(begin for begin, _ in sides.values()), *(end for _, end in sides.values())]
    if "pads" in node.attributes:
        return cut.same(node, pads=tuple(pads))
    operands = cut.operands(node)
    operands[1] = cut.graph.add_constant(torch.tensor(pads))
    return cut.emit(node, node.node, *operands)


_OPAQUE: dict[str, EmitCut] = {
    **dict.fromkeys(("onnx.Reshape", "onnx.Expand", "aten.expand.default"), Cut.sized),
    **dict.fromkeys(("aten.group_norm.default", "onnx.GroupNormalization"), _group_norm),
    **dict.fromkeys(("onnx.Gather", "aten.select.int", "aten.index_select.default"), _gather),
    **dict.fromkeys(("onnx.Pad", "aten.pad.default", "aten.constant_pad_nd.default"), _pad),
    **dict.fromkeys((kind for kind, relation in OPAQUE.items() if relation is split), _split),
    "onnx.Conv": _onnx_conv, "onnx.Resize": _resize, "onnx.Slice": _onnx_slice, "onnx.SequenceAt": _sequence_item,
    "aten.unflatten.int": _unflatten, "aten.layer_norm.default": _layer_norm,
}  # fmt: skip
"""Every other operation is the same on what is left of its operands."""
