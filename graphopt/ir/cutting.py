"""How a node is emitted again when axes of its operands and results have lost positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphopt.ir.axes import NodeAxes

if TYPE_CHECKING:  # graph imports the ops, and the ops this file
    from graphopt.ir.graph import Graph, Node, Value

Mask = NDArray[np.bool_]
"""For each position of an axis, whether it is kept."""


@dataclass
class Cut:
    """What is kept of each axis that shrinks, and which value stands for each old one by now."""

    graph: Graph
    kept: Mapping[tuple[Value, int], Mask]
    makers: Mapping[Value, NodeAxes]
    """The node that made each value, as it was before the cut."""
    replacements: dict[Value, Value]

    def mask(self, node: NodeAxes, value: Value, axis: int) -> Mask | None:
        """What is kept of an axis, None where all of it is."""
        return self.kept.get((value, axis % node.rank(value)))

    def sizes(self, node: NodeAxes, value: Value) -> dict[int, int]:
        """The sizes after the cut, of the axes that shrink."""
        masks = {axis: self.mask(node, value, axis) for axis in range(node.rank(value))}
        return {axis: int(mask.sum()) for axis, mask in masks.items() if mask is not None}

    def share(self, node: NodeAxes, value: Value, axis: int, count: int) -> int:
        """How many of `count` equal blocks of an axis are left."""
        mask = self.mask(node, value, axis)
        return count if mask is None else count * int(mask.sum()) // len(mask)

    def value(self, value: Value | None) -> Value | None:
        """What stands for an operand: of a constant, what is left of it, stored once for all who read it."""
        if value is None or value in self.replacements:
            return None if value is None else self.replacements[value]
        whole = tensor = self.graph.constant(value) if value.is_constant else None
        if tensor is None:
            return value
        for axis in range(tensor.dim()):
            if (value, axis) in self.kept:
                tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(self.kept[value, axis])))
        left = value if tensor is whole else self.graph.add_constant(tensor.contiguous(), value.name)
        self.replacements[value] = left
        return left

    def operands(self, node: NodeAxes) -> list[Value | None]:
        return [self.value(value) for value in node.operands]

    def emit(self, node: NodeAxes, kind: str | Node, *operands: Value | None, **attributes: Any) -> list[Value]:
        return list(self.graph.emit_all(kind, *operands, at=node.node, **attributes))

    def same(self, node: NodeAxes, **changed: Any) -> list[Value]:
        """The same operation on what is left of its operands, some attributes changed."""
        if node.node.op is None:
            return self.emit(node, node.node, *self.operands(node), **changed)
        return self.emit(node, node.kind, *self.operands(node), **{**node.attributes, **changed})

    def sized(self, node: NodeAxes) -> list[Value]:
        """The same operation, which is told the shape of its result, told the sizes after the cut."""
        sizes = self.sizes(node, node.y)
        return [self.graph.emit_sized(node.node, *self.operands(node), sizes=sizes, at=node.node)]

    def part(self, node: NodeAxes, x: Value, axis: int, bounds: slice) -> Value:
        """What is left of the part of x that a slice took."""
        size = node.shape(x)[axis]
        assert isinstance(size, int)
        start, end, _ = self.bounds(node, x, axis, bounds).indices(size)
        return self.emit(node, "slice", self.value(x), axis=axis, start=start, end=end)[0]

    def bounds(self, node: NodeAxes, x: Value, axis: int, bounds: slice) -> slice:
        """The bounds of a slice among the positions that are kept."""
        mask = self.mask(node, x, axis)
        if mask is None:
            return bounds
        start, end, _ = bounds.indices(len(mask))
        return slice(int(mask[:start].sum()), int(mask[: max(start, end)].sum()))

    def sides(self, node: NodeAxes, sides: Mapping[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
        """The padding before and after each axis that is left after the cut."""
        left = dict(sides)
        for axis, (begin, end) in sides.items():
            mask = self.mask(node, node.y, axis)
            if mask is not None and (begin or end):
                left[axis] = int(mask[:begin].sum()), int(mask[len(mask) - end :].sum())
        return left


EmitCut = Callable[[Cut, NodeAxes], "list[Value]"]
"""Emits a node again, before itself, and returns what stands for its results."""
