"""What is known of how the axes of a graph relate, and a node as the relation of its operation sees it.

Every position along an axis of a fixed size has a number of its own. A relation links the numbers of positions that
are one and the same (channel 3 of a conv's result, row 3 of its weight), and locks those that have to stay. What a
relation says nothing about is locked, so that a missing line costs a cut and never a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graphopt.ir.graph import Node, Shape, Value

Numbers = NDArray[np.int64]
"""Positions of axes, by their numbers."""


class Unclear(Exception):
    """Raised by a relation that cannot say how the axes of a node relate, with the reason."""


@dataclass
class Fold:
    """A reshape between axes of fixed sizes: which one carries the units is known only when locks are."""

    left: list[Numbers]
    right: list[Numbers]
    reason: str
    """Why the axes that do not carry stay."""


@dataclass
class Facts:
    """What the relations of a graph say."""

    shapes: dict[Value, Shape | None] = field(default_factory=dict)
    axes: dict[tuple[Value, int], int] = field(default_factory=dict)
    """The number of the first position of each axis, in the order of numbers."""
    count: int = 0
    """How many positions have a number."""
    fed: set[Value] = field(default_factory=set)
    """What is computed from the inputs, so that it is no weight."""
    links: list[tuple[Numbers, Numbers]] = field(default_factory=list)
    locks: list[tuple[Numbers, str]] = field(default_factory=list)
    """Positions that stay, with the reason; the first reason of a unit is the one that is told."""
    folds: list[Fold] = field(default_factory=list)
    producers: list[tuple[Node, Numbers]] = field(default_factory=list)
    """Sites with the positions of their weight's output axis."""
    consumers: list[tuple[Node, Numbers]] = field(default_factory=list)
    """Sites with the positions of their weight's input axis."""
    reduced: list[tuple[Node, Numbers]] = field(default_factory=list)
    """Nodes that average or sum over an axis: without some positions, they compute something else."""
    heads: list[Numbers] = field(default_factory=list)
    """Positions that attention takes for heads."""
    split: list[Numbers] = field(default_factory=list)
    """Positions that a reshape splits into blocks."""

    def shape(self, value: Value) -> Shape | None:
        if value not in self.shapes:
            self.shapes[value] = value.shape
        return self.shapes[value]

    def at(self, value: Value, axis: int) -> Numbers | None:
        """The positions of an axis; None where its size is not fixed."""
        shape = self.shape(value)
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            return None
        key = value, axis
        if key not in self.axes:
            self.axes[key] = self.count
            self.count += size
        return np.arange(self.axes[key], self.axes[key] + size)

    def lock(self, value: Value, reason: str) -> None:
        """All axes of a value stay."""
        for axis in range(len(self.shape(value) or ())):
            numbers = self.at(value, axis)
            if numbers is not None:
                self.locks.append((numbers, reason))


class Op:
    """A node as a relation sees it."""

    def __init__(self, facts: Facts, node: Node) -> None:
        self.facts, self.node, self.kind = facts, node, node.kind
        self.operands, self.results, self.attributes = node.operands, node.results, node.attributes
        self._seen: set[tuple[Value, int]] = set()

    @property
    def where(self) -> str:
        return f"{self.kind} ({self.node.label})"

    @property
    def given(self) -> list[Value]:
        """The operands that are not left out."""
        return [value for value in self.operands if value is not None]

    @property
    def x(self) -> Value:
        return self.given[0]

    @property
    def y(self) -> Value:
        return self.results[0]

    def operand(self, index: int) -> Value | None:
        return self.operands[index] if index < len(self.operands) else None

    def shape(self, value: Value) -> Shape:
        shape = self.facts.shape(value)
        if shape is None:
            raise Unclear(f"where the rank of '{value.name}' is not known")
        return shape

    def rank(self, value: Value) -> int:
        return len(self.shape(value))

    def constant(self, index: int) -> list[int] | None:
        """The integers in a constant operand."""
        value = self.operand(index)
        tensor = self.node.graph.constant(value) if value is not None else None
        return None if tensor is None else [int(number) for number in tensor.flatten().tolist()]

    def at(self, value: Value, axis: int) -> Numbers | None:
        axis %= self.rank(value)
        self._seen.add((value, axis))
        return self.facts.at(value, axis)

    def free(self, *values: Value) -> None:
        """The positions of these values relate to nothing here."""
        self._seen.update((value, axis) for value in values for axis in range(self.rank(value)))

    def link(self, a: Numbers, b: Numbers) -> None:
        self.facts.links.append((a.reshape(-1), b.reshape(-1)))

    def lock(self, value: Value, axis: int, reason: str) -> None:
        """An axis stays; the reason goes before the node."""
        numbers = self.at(value, axis)
        if numbers is not None:
            self.facts.locks.append((numbers, f"{reason} {self.where}"))

    def lock_rest(self) -> None:
        """Lock the axes that the relation did not speak of."""
        for value in (*self.given, *self.results):
            for axis in range(len(self.facts.shape(value) or ())):
                if (value, axis) not in self._seen:
                    self.lock(value, axis, "is read whole by")

    def same(self, a: Value, i: int, b: Value, j: int) -> None:
        """Axis i of a is axis j of b, or is broadcast to it."""
        x, y = self.at(a, i), self.at(b, j)
        if x is not None and y is not None and len(x) == len(y):
            self.link(x, y)
        elif (x is None) != (y is None) or (x is not None and y is not None and 1 not in (len(x), len(y))):
            for value, axis, numbers in ((a, i, x), (b, j, y)):
                if numbers is not None and len(numbers) > 1:
                    self.lock(value, axis, "meets an axis of another size or an unknown one at")

    def aligned(self, a: Value, b: Value, skip: Sequence[int] = ()) -> None:
        """The axes of a are the trailing ones of b, as in broadcasting; `skip` are axes of b."""
        offset = self.rank(b) - self.rank(a)
        for axis in range(self.rank(a)):
            if axis + offset >= 0 and axis + offset not in skip:
                self.same(a, axis, b, axis + offset)

    def axis(self, *names: str, default: int = 0) -> int:
        """The axis that the first of these attributes names, counted from the front of x."""
        found = next((self.attributes[name] for name in names if name in self.attributes), default)
        return int(found) % max(self.rank(self.x), 1)
