"""How the axes of values relate: what an op says of its operands and its results, position by position.

Every position along an axis of a fixed size has a number. A relation links the numbers of positions that stand for the
same channel, neuron or head (channel 3 of a conv's result and row 3 of its weight), and locks positions that have to
stay. An axis that a relation does not mention is locked: a missing relation loses a chance to prune, and is never
unsafe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.ir.decline import Decline, Declined

if TYPE_CHECKING:  # graph imports the ops, and the ops this file
    from graphopt.ir.graph import Node, Shape, Value

Positions = NDArray[np.int64]
"""Positions along axes, by their numbers."""


class Unclear(Declined):
    """Raised by a relation that cannot say how the axes of its node relate: all of them are locked.

    The sentence of its code may name `op` and `node`, which `relate` fills in.
    """


@dataclass(frozen=True, eq=False)
class ReshapeBlock:
    """Axes of fixed sizes that a reshape splits or merges. Which axis carries the units is decided after all locks are
    known."""

    left: list[Positions]
    """The axes of the operand, outermost first."""
    right: list[Positions]
    """The axes of the result."""
    reason: Decline
    """Why the axes that do not carry units stay."""
    is_shuffle: bool = False
    """Whether the axes that an axis is split into are swapped and merged again: then the inner one carries the units,
    so that each part loses the same channels, and no part goes whole."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """A node that sums over an axis: its result changes if positions are removed, even zero ones."""

    node: Node
    positions: Positions
    by: Literal["norm", "mean", "product"]
    """A layer or RMS norm; a mean, sum, maximum and the like; a product of two computed values."""


@dataclass
class AxisRelations:
    """What the relations of a graph's nodes say."""

    shapes: dict[Value, Shape | None] = field(default_factory=dict)
    axes: dict[tuple[Value, int], int] = field(default_factory=dict)
    """The number of the first position of each axis, in increasing order."""
    count: int = 0
    """How many positions have a number."""
    computed: set[Value] = field(default_factory=set)
    """The inputs and what is computed from them: no weights."""
    links: list[tuple[Positions, Positions]] = field(default_factory=list)
    locks: list[tuple[Positions, Decline]] = field(default_factory=list)
    """Positions that cannot be removed, with the reason; of several reasons for one unit, the first is reported."""
    reshapes: list[ReshapeBlock] = field(default_factory=list)
    producers: list[tuple[Node, Positions]] = field(default_factory=list)
    """Sites with the positions of their weight's output axis."""
    consumers: list[tuple[Node, Positions]] = field(default_factory=list)
    """Sites with the positions of their weight's input axis."""
    reductions: list[Reduction] = field(default_factory=list)
    heads: list[Positions] = field(default_factory=list)
    """Positions that attention takes for heads."""
    split: list[Positions] = field(default_factory=list)
    """Positions that a reshape splits into blocks."""

    def shape(self, value: Value) -> Shape | None:
        if value not in self.shapes:
            self.shapes[value] = value.shape
        return self.shapes[value]

    def positions(self, value: Value, axis: int) -> Positions | None:
        """The positions along an axis; None where its size is not fixed."""
        shape = self.shape(value)
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            return None
        key = value, axis
        if key not in self.axes:
            self.axes[key] = self.count
            self.count += size
        return np.arange(self.axes[key], self.axes[key] + size)

    def lock(self, value: Value, reason: Decline) -> None:
        """All axes of a value stay."""
        for axis in range(len(self.shape(value) or ())):
            positions = self.positions(value, axis)
            if positions is not None:
                self.locks.append((positions, reason))


class NodeAxes:
    """A node as a relation sees it: its operands and results, and what may be said of their axes.

    Operands are those at construction, even if the graph changes later. An axis may be given from the end (-1).
    """

    def __init__(self, relations: AxisRelations, node: Node) -> None:
        self.relations, self.node, self.kind = relations, node, node.kind
        self.operands, self.results, self.attributes = node.operands, node.results, node.attributes
        self._mentioned: set[tuple[Value, int]] = set()

    # --- what the node is ---

    @property
    def given(self) -> list[Value]:
        """The operands that are not left out."""
        return [value for value in self.operands if value is not None]

    @property
    def x(self) -> Value:
        """The first operand."""
        return self.given[0]

    @property
    def y(self) -> Value:
        """The first result."""
        return self.results[0]

    def operand(self, index: int) -> Value | None:
        return self.operands[index] if index < len(self.operands) else None

    def shape(self, value: Value) -> Shape:
        shape = self.relations.shape(value)
        if shape is None:
            raise Unclear("axis_of_unknown_rank", value=value.name)
        return shape

    def rank(self, value: Value) -> int:
        return len(self.shape(value))

    def constant(self, index: int) -> list[int] | None:
        """The integers in a constant operand; None where it is left out or computed."""
        value = self.operand(index)
        tensor = self.node.graph.constant(value) if value is not None else None
        return None if tensor is None else [int(number) for number in tensor.flatten().tolist()]

    def positions(self, value: Value, axis: int) -> Positions | None:
        """The positions along an axis, which counts as mentioned; None where its size is not fixed."""
        axis %= self.rank(value)
        self._mentioned.add((value, axis))
        return self.relations.positions(value, axis)

    def is_computed(self, *values: Value) -> bool:
        """Whether all of these are computed from the model's inputs, so that none is a weight."""
        return self.relations.computed.issuperset(values)

    # --- what a relation says ---

    def link(self, a: Positions, b: Positions) -> None:
        """Each position of a stands for the same thing as that of b."""
        self.relations.links.append((a.reshape(-1), b.reshape(-1)))

    def same(self, a: Value, i: int, b: Value, j: int) -> None:
        """Axis i of a is axis j of b, or is broadcast to it."""
        x, y = self.positions(a, i), self.positions(b, j)
        if x is not None and y is not None and len(x) == len(y):
            self.link(x, y)
        elif (x is None) != (y is None) or (x is not None and y is not None and 1 not in (len(x), len(y))):
            for value, axis, positions in ((a, i, x), (b, j, y)):
                if positions is not None and len(positions) > 1:
                    self.lock(value, axis, "axis_meets_another_size")

    def broadcast(self, a: Value, b: Value, skip: Sequence[int] = ()) -> None:
        """The axes of a are the trailing ones of b; `skip` are axes of b of which this says nothing."""
        offset = self.rank(b) - self.rank(a)
        for axis in range(self.rank(a)):
            if axis + offset >= 0 and axis + offset not in skip:
                self.same(a, axis, b, axis + offset)

    def unrelated(self, *values: Value) -> None:
        """The axes of these values have no relation here; this node lets them shrink."""
        self._mentioned.update((value, axis) for value in values for axis in range(self.rank(value)))

    def reason(self, code: str) -> Decline:
        """A lock by this node; the sentences of these codes name `op` and `node`."""
        return Decline(code, op=self.kind, node=self.node.label)

    def lock(self, value: Value, axis: int, code: str) -> None:
        """An axis stays, for the reason that the code names."""
        positions = self.positions(value, axis)
        if positions is not None:
            self.relations.locks.append((positions, self.reason(code)))

    def lock_rest(self) -> None:
        """Lock the axes that the relation did not mention."""
        for value in (*self.given, *self.results):
            for axis in range(len(self.relations.shape(value) or ())):
                if (value, axis) not in self._mentioned:
                    self.lock(value, axis, "axis_read_whole")

    def has_weight(self, weight: Value, out: int, into: int | None) -> None:
        """The node is a site, and its weight has these output and input axes; a computed one makes it a product."""
        if self.is_computed(weight):
            if into is not None:
                self.reduces(weight, into, "product")
            return
        rows = self.positions(weight, out)
        if rows is not None:
            self.relations.producers.append((self.node, rows))
        columns = self.positions(weight, into) if into is not None else None
        if columns is not None:
            self.relations.consumers.append((self.node, columns))

    def reduces(self, value: Value, axis: int, by: Literal["norm", "mean", "product"]) -> None:
        """The node sums over an axis."""
        positions = self.positions(value, axis)
        if positions is not None:
            self.relations.reductions.append(Reduction(self.node, positions, by))


Relation = Callable[[NodeAxes], None]
"""Says how the axes of a node relate. Raises Unclear where it cannot."""


# --- relations that many operations share ----------------------------------------------------------------------------


def elementwise(node: NodeAxes) -> None:
    """Operands are broadcast to every result."""
    for y in node.results:
        node.unrelated(y)
        for value in node.given:
            node.broadcast(value, y)


def unrelated(node: NodeAxes) -> None:
    """It reads a size, a range or a scale, and no positions."""
    node.unrelated(*node.given, *node.results)


def locked(node: NodeAxes) -> None:
    """None of its axes may shrink."""
    raise Unclear("axis_at_a_fixed_op")


def per_channel(node: NodeAxes) -> None:
    """x (N, C, ...) with parameters (C,), such as those of a batch or instance norm."""
    node.broadcast(node.x, node.y)
    for parameter in node.given[1:]:
        node.same(parameter, -1, node.y, 1)


def over_space(node: NodeAxes) -> None:
    """x (N, C, *space): windows along space; batch and channels stay apart."""
    for y in node.results:
        for axis in range(min(2, node.rank(y))):
            node.same(node.x, axis, y, axis)
    for value in (node.x, *node.results):
        for axis in range(2, node.rank(value)):
            node.lock(value, axis, "axis_of_space")


def reduced(node: NodeAxes, axes: Iterable[int], keepdim: bool) -> None:
    """Mean, sum, maximum, ... over these axes."""
    rank, kept = node.rank(node.x), 0
    over = {axis % rank for axis in axes}
    for axis in range(rank):
        if axis in over:
            node.reduces(node.x, axis, "mean")
            if keepdim:
                node.positions(node.y, kept)
        else:
            node.same(node.x, axis, node.y, kept)
        kept += keepdim or axis not in over
    for value in node.given[1:]:
        node.unrelated(value)


def taken(node: NodeAxes, y: Value, axis: int, positions: Positions | None) -> None:
    """y is x with only these of its positions along an axis."""
    node.positions(node.x, axis)
    found = node.positions(y, axis)
    if positions is not None and found is not None and len(positions) == len(found):
        node.link(positions, found)
    else:
        node.lock(node.x, axis, "axis_taken_in_part")
        node.lock(y, axis, "axis_taken_in_part")
    node.broadcast(node.x, y, skip=[axis])


def joined(node: NodeAxes, axis: int) -> None:
    """The operands are concatenated along an axis of the result."""
    axis %= node.rank(node.x)
    whole, start = node.positions(node.y, axis), 0
    for value in node.given:
        node.broadcast(value, node.y, skip=[axis])
        positions = node.positions(value, axis)
        if positions is None or whole is None:
            node.lock(value, axis, "axis_joined_to_unknown_size")
            node.lock(node.y, axis, "axis_joined_to_unknown_size")
            whole = None
        else:
            node.link(positions, whole[start : start + len(positions)])
            start += len(positions)


Sides = dict[int, tuple[int, int]]
"""How many entries a pad adds before and after each axis; negative where it crops."""


def padded(node: NodeAxes, sides: Sides, with_constant: bool = True) -> None:
    """x with entries added around it; axes that are padded with entries of x are locked."""
    node.unrelated(*node.given[1:])
    for axis in range(node.rank(node.x)):
        begin, end = sides.get(axis, (0, 0))
        positions, found = node.positions(node.x, axis), node.positions(node.y, axis)
        if begin == end == 0:
            node.same(node.x, axis, node.y, axis)
        elif positions is None or found is None or min(begin, end) < 0 or not with_constant:
            node.lock(node.x, axis, "axis_padded")
            node.lock(node.y, axis, "axis_padded")
        else:
            node.link(positions, found[begin : begin + len(positions)])


def trailing_sides(node: NodeAxes, padding: Sequence[int]) -> Sides:
    """`padding`, (begin of each axis ..., end of each axis ...), of the trailing axes of x."""
    count = len(padding) // 2
    first = node.rank(node.x) - count
    return {first + i: (int(padding[i]), int(padding[i + count])) for i in range(count)}


# --- reshapes --------------------------------------------------------------------------------------------------------


def reshaped(node: NodeAxes) -> None:
    """Axes that stay, and blocks of axes that are split or merged, whatever operation does it."""
    x, y, relations = node.x, node.y, node.relations
    node.unrelated(*node.given, y)
    for left, right in reshape_blocks(node.shape(x), node.shape(y)):
        if len(left) == len(right) == 1:
            node.same(x, left[0], y, right[0])
            continue
        sides = [[node.positions(value, axis) for axis in part] for value, part in ((x, left), (y, right))]
        fixed = [[positions for positions in side if positions is not None] for side in sides]
        reason = node.reason("axis_split_or_merged")
        if all(sides) and [*map(len, sides)] == [*map(len, fixed)]:
            relations.reshapes.append(ReshapeBlock(fixed[0], fixed[1], reason, _is_shuffled(node, left, right)))
        else:
            relations.locks += [(positions, reason) for side in fixed for positions in side]


def _is_shuffled(node: NodeAxes, left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether a reshape splits one axis in two, which the only reader of its result swaps and the next merges again."""
    swap = node.y.only_user
    merge = swap.result.only_user if swap is not None and swap.kind == "transpose" else None
    if swap is None or merge is None or merge.kind != "reshape" or len(left) != 1 or len(right) != 2:
        return False
    order = list(range(node.rank(node.y)))
    order[right[0]], order[right[1]] = right[1], right[0]
    return list(swap.attributes["perm"]) == order and merge.result.shape == node.shape(node.x)


def reshape_blocks(left: Shape, right: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes with the same entries in the same order, as pairs of the smallest blocks that are known.

    First from the end, as far as sizes are numbers, then from the front, where equal names are equal sizes; what is
    between them is one block.
    """
    i, j = len(left), len(right)
    while block := _numbered_block(left[:i][::-1], right[:j][::-1]):
        yield list(range(i - block[0], i)), list(range(j - block[1], j))
        i, j = i - block[0], j - block[1]
    a = b = 0
    while block := _numbered_block(left[a:i], right[b:j]) or _named_block(left[a:i], right[b:j]):
        yield list(range(a, a + block[0])), list(range(b, b + block[1]))
        a, b = a + block[0], b + block[1]
    if a < i or b < j:
        yield list(range(a, i)), list(range(b, j))


def _numbered_block(left: Shape, right: Shape) -> tuple[int, int] | None:
    """How many leading axes of either have the same product, the fewest; None without any that are numbers."""
    counts, products = [0, 0], [1, 1]
    while 0 in counts or products[0] != products[1]:
        side = counts.index(0) if 0 in counts else int(products[1] < products[0])
        shape = (left, right)[side]
        size = shape[counts[side]] if counts[side] < len(shape) else None
        if not isinstance(size, int):
            return None
        products[side] *= size
        counts[side] += 1
    return counts[0], counts[1]


def _named_block(left: Shape, right: Shape) -> tuple[int, int] | None:
    """(1, 1) where both begin with the same dynamic axis: by its name, or as the only one of unknown size."""
    if not left or not right or isinstance(left[0], int) or isinstance(right[0], int):
        return None
    if left[0] == right[0] != "?":
        return 1, 1
    products = [math.prod(size for size in shape if isinstance(size, int)) for shape in (left, right)]
    dynamic = [sum(not isinstance(size, int) for size in shape) for shape in (left, right)]
    return (1, 1) if dynamic == [1, 1] and products[0] == products[1] else None
