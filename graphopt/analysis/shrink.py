"""Cutting: the graph without some units of its groups, every tensor in it really smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.analysis.facts import Facts, Op
from graphopt.analysis.groups import Group
from graphopt.analysis.relations import RELATIONS, gather_index, padding, sequence_slice, slice_bounds, split
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS

Mask = NDArray[np.bool_]
"""For each position of an axis, whether it is kept."""


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
    facts = Facts()
    before = [Op(facts, node) for node in graph.nodes]  # as they are now: what they read changes under them
    for op in before:
        for value in (*op.given, *op.results):
            facts.shape(value)
    touched = {value for value, _ in kept}
    sources = {op.y: op for op in before if op.kind == "onnx.SplitToSequence"}
    touched |= {sequence for sequence, op in sources.items() if op.x in touched}
    cut = _Cut(graph, kept, {}, sources)
    for op in before:
        if not touched.isdisjoint(op.given) or not touched.isdisjoint(op.results):
            emit = _EMITTERS.get(op.kind, _again)
            results = emit(cut, op)
            if results is not None:
                cut.now |= zip(op.results, results, strict=True)
                graph.replace(op.node, *results)
    graph.sweep()


def _kept(graph: Graph, cuts: Mapping[Group, Tensor]) -> dict[tuple[Value, int], Mask]:
    """Which positions stay, for each axis that loses some."""
    nodes = set(graph.nodes)
    kept: dict[tuple[Value, int], Mask] = {}
    for group, units in cuts.items():
        chosen = np.zeros(group.size + 1, bool)
        chosen[-1] = True  # of no unit: stays
        if group.locked is not None:
            raise ValueError(f"{group.name} cannot shrink: it {group.locked}")
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


@dataclass
class _Cut:
    """What is kept of each axis that is cut, and what stands for each value by now."""

    graph: Graph
    kept: Mapping[tuple[Value, int], Mask]
    now: dict[Value, Value]
    sources: Mapping[Value, Op]
    """What made each sequence."""

    def mask(self, op: Op, value: Value, axis: int) -> Mask | None:
        """What is kept of an axis, None where all of it is."""
        return self.kept.get((value, axis % op.rank(value)))

    def sizes(self, op: Op, value: Value) -> dict[int, int]:
        """The new sizes of the axes that are cut."""
        masks = {axis: self.mask(op, value, axis) for axis in range(op.rank(value))}
        return {axis: int(mask.sum()) for axis, mask in masks.items() if mask is not None}

    def value(self, value: Value | None) -> Value | None:
        """What stands for an operand: of a constant, what is left of it, the same for all who read it."""
        if value is None or value in self.now:
            return None if value is None else self.now[value]
        whole = tensor = self.graph.constant(value) if value.is_constant else None
        if tensor is None:
            return value
        for axis in range(tensor.dim()):
            if (value, axis) in self.kept:
                tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(self.kept[value, axis])))
        self.now[value] = value if tensor is whole else self.graph.add_constant(tensor.contiguous(), value.name)
        return self.now[value]

    def operands(self, op: Op) -> list[Value | None]:
        return [self.value(value) for value in op.operands]

    def emit(self, op: Op, kind: str | Node, *operands: Value | None, **attributes: Any) -> list[Value]:
        return list(self.graph.emit_all(kind, *operands, at=op.node, **attributes))

    def part(self, op: Op, x: Value, axis: int, bounds: slice) -> Value:
        """What is left of the part of x that a slice took."""
        size = op.shape(x)[axis]
        assert isinstance(size, int)
        start, end, _ = self.moved(op, x, axis, bounds).indices(size)
        return self.emit(op, "slice", self.value(x), axis=axis, start=start, end=end)[0]

    def moved(self, op: Op, x: Value, axis: int, bounds: slice) -> slice:
        """The bounds among the positions that are kept."""
        mask = self.mask(op, x, axis)
        if mask is None:
            return bounds
        start, end, _ = bounds.indices(len(mask))
        return slice(int(mask[:start].sum()), int(mask[: max(start, end)].sum()))


# --- how nodes are emitted again, where that takes more than other operands ------------------------------------------


def _again(cut: _Cut, op: Op, **changed: Any) -> list[Value]:
    """The same operation on what is left of its operands, some attributes changed."""
    if op.kind in OPS:
        return cut.emit(op, op.kind, *cut.operands(op), **{**op.attributes, **changed})
    return cut.emit(op, op.node, *cut.operands(op), **changed)


def _sized(cut: _Cut, op: Op) -> list[Value]:
    return [cut.graph.emit_sized(op.node, *cut.operands(op), sizes=cut.sizes(op, op.y), at=op.node)]


def _resize(cut: _Cut, op: Op) -> list[Value]:
    """ONNX's, by sizes or by scales."""
    return _sized(cut, op) if op.operand(3) is not None else _again(cut, op)


def _share(cut: _Cut, op: Op, value: Value, axis: int, count: int) -> int:
    """How many of `count` equal blocks of an axis are left."""
    mask = cut.mask(op, value, axis)
    return count if mask is None else count * int(mask.sum()) // len(mask)


def _conv(cut: _Cut, op: Op) -> list[Value]:
    name = "groups" if "groups" in op.attributes else "group"
    groups = int(op.attributes.get(name, 1))
    return _again(cut, op) if groups == 1 else _again(cut, op, **{name: _share(cut, op, op.x, 1, groups)})


def _attention(cut: _Cut, op: Op) -> list[Value]:
    counts = {name: op.attributes[name] for name in ("heads", "kv_heads") if op.attributes[name]}
    return _again(cut, op, **{name: _share(cut, op, op.x, -1, count) for name, count in counts.items()})


def _group_norm(cut: _Cut, op: Op) -> list[Value]:
    return _again(cut, op, num_groups=_share(cut, op, op.x, 1, int(op.attributes["num_groups"])))


def _plain_norm(cut: _Cut, op: Op) -> list[Value]:
    told = list(op.attributes["normalized_shape"])
    first, sizes = op.rank(op.x) - len(told), cut.sizes(op, op.y)
    return _again(cut, op, normalized_shape=[sizes.get(first + i, size) for i, size in enumerate(told)])


def _unflatten(cut: _Cut, op: Op) -> list[Value]:
    axis = op.axis("dim")
    sizes = cut.sizes(op, op.y)
    told = [size if size == -1 else sizes.get(axis + i, size) for i, size in enumerate(op.attributes["sizes"])]
    return _again(cut, op, sizes=told)


def _slice(cut: _Cut, op: Op) -> list[Value]:
    bounds = slice(op.attributes["start"], op.attributes["end"])
    return [cut.part(op, op.x, op.axis("axis"), bounds)]


def _onnx_slice(cut: _Cut, op: Op) -> list[Value]:
    bounds = {axis: cut.moved(op, op.x, axis, one) for axis, one in slice_bounds(op).items()}
    columns = [[one.start for one in bounds.values()], [one.stop for one in bounds.values()], list(bounds)]
    if "starts" in op.attributes:
        return _again(cut, op, **dict(zip(("starts", "ends", "axes"), columns, strict=True)))
    steps = [one.step or 1 for one in bounds.values()]
    constants = [cut.graph.add_constant(torch.tensor(column)) for column in (*columns, steps)]
    return cut.emit(op, op.node, cut.value(op.x), *constants)


def _split(cut: _Cut, op: Op) -> list[Value]:
    axis, start, results = op.axis("axis", "dim"), 0, []
    if all(cut.mask(op, value, axis) is None for value in (op.x, *op.results)):
        return _again(cut, op)
    for y in op.results:
        size = op.shape(y)[axis]
        assert isinstance(size, int)
        results.append(cut.part(op, op.x, axis, slice(start, start + size)))
        start += size
    return results


def _sequence(cut: _Cut, op: Op) -> None:
    """A sequence of parts: its items become slices, and nobody reads it then."""


def _sequence_item(cut: _Cut, op: Op) -> list[Value]:
    source = cut.sources[op.x]
    part = sequence_slice(op, source)
    assert part is not None
    return [cut.part(op, source.x, *part)]


def _gather(cut: _Cut, op: Op) -> list[Value]:
    axis = op.axis("axis", "dim")
    index, indices = gather_index(op)
    mask = cut.mask(op, op.x, axis)
    if mask is None or index is None:
        return _again(cut, op)
    place = np.cumsum(mask) - 1
    size = len(mask)
    if indices is None:
        return _again(cut, op, index=int(place[index]))
    found = [number % size for number in np.atleast_1d(index).tolist()]
    left = torch.tensor([int(place[number]) for number in found if mask[number]])
    constant = cut.graph.add_constant(left if isinstance(index, list) else left[0])
    return cut.emit(op, op.node if op.kind not in OPS else op.kind, cut.value(op.x), constant)


def _pad(cut: _Cut, op: Op) -> list[Value]:
    """With as much before and behind as is left of it."""
    sides = padding(op)
    for axis, (begin, end) in sides.items():
        mask = cut.mask(op, op.y, axis)
        if mask is not None and (begin or end):
            sides[axis] = int(mask[:begin].sum()), int(mask[len(mask) - end :].sum())
    if "pad" in op.attributes:
        return _again(cut, op, pad=[number for axis in sorted(sides, reverse=True) for number in sides[axis]])
    flat = [side[0] for side in sides.values()] + [side[1] for side in sides.values()]
    name = next((name for name in ("padding", "pads") if name in op.attributes), None)
    if name is not None:
        return _again(cut, op, **{name: tuple(flat)})
    operands = cut.operands(op)
    operands[1] = cut.graph.add_constant(torch.tensor(flat))
    return cut.emit(op, op.node, *operands)


_EMITTERS: dict[str, Callable[[_Cut, Op], list[Value] | None]] = {
    **dict.fromkeys(("conv", "onnx.Conv"), _conv),
    **dict.fromkeys(("reshape", "onnx.Reshape", "onnx.Expand", "aten.expand.default"), _sized),
    **dict.fromkeys(("aten.group_norm.default", "onnx.GroupNormalization"), _group_norm),
    **dict.fromkeys(("onnx.Gather", "aten.select.int", "aten.index_select.default"), _gather),
    **dict.fromkeys(("pad", "onnx.Pad", "aten.pad.default", "aten.constant_pad_nd.default"), _pad),
    **dict.fromkeys((kind for kind, relation in RELATIONS.items() if relation is split), _split),
    "attention": _attention, "onnx.Resize": _resize, "aten.unflatten.int": _unflatten,
    "aten.layer_norm.default": _plain_norm,
    "slice": _slice, "onnx.Slice": _onnx_slice,
    "onnx.SplitToSequence": _sequence, "onnx.SequenceAt": _sequence_item,
}  # fmt: skip
