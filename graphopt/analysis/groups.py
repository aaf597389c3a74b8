"""Groups of axes: which of them shrink together, and what locks one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.analysis.opaque import axis_of, gather_index
from graphopt.analysis.relations import relate
from graphopt.ir.axes import AxisRelations, NodeAxes, Positions, ReshapeBlock
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a value, and the unit of each of its positions: (size,) int64, -1 for positions that cannot go."""

    value: Value
    axis: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Axes that shrink together, by units: a unit is removed from every axis, or from none.

    A unit is a neuron (of a pooler too, a linear that reads one position taken out of a sequence), a channel (of a
    grouped conv: all channels of a group, or the same channel of each group), a head (with grouped queries a key head
    and the heads that read it), or a position of the width of a residual stream.
    """

    name: str
    """The module path of its first producer, made unique."""
    kind: str
    """neurons, heads, channels, pooler or width."""
    size: int
    """How many units it has."""
    axes: tuple[Axis, ...]
    """Every axis that shrinks, those of weights and biases too."""
    producers: tuple[Node, ...]
    """The sites (linear, conv, embedding) whose weight's output axis is in the group, in the order of the graph."""
    consumers: tuple[Node, ...]
    """The sites whose weight's input axis is in the group, in the order of the graph."""
    reductions: tuple[Node, ...]
    """Nodes that sum over the units: norms, means, products of two computed values.

    In a group without any, removing units gives the same outputs as zeroing the consumers' weights for them. With one
    it does not: the sum or mean is then over fewer entries."""
    locked: Decline | None
    """Why it cannot shrink, or None where it can."""


def groups(graph: Graph) -> list[Group]:
    """The groups of a graph, in the order of their first producers, locked ones included.

    Valid until the graph changes. Takes time linear in the sum of the sizes of all axes.
    """
    relations = relate(graph)
    roots = _units(relations)
    locked = _first_lock(relations, roots)
    members = []
    for node, positions in relations.producers:  # the unlocked positions of a producer's output axis
        units = roots[positions]
        free = units[locked[units] < 0]
        members.append((node, free if len(free) else units))
    joined = components(
        relations.count,
        np.concatenate([_NONE, *(np.full(len(units), units[0]) for _, units in members)]),
        np.concatenate([_NONE, *(units for _, units in members)]),
    )
    by_group: dict[int, list[tuple[Node, Positions]]] = {}
    for node, units in members:
        by_group.setdefault(int(joined[units[0]]), []).append((node, units))
    group_of, unit_of = np.full(relations.count, -1), np.full(relations.count, -1)
    for index, parts in enumerate(by_group.values()):
        units, first = np.unique(np.concatenate([units for _, units in parts]), return_index=True)
        units = units[np.argsort(first)]
        group_of[units], unit_of[units] = index, np.arange(len(units))
    _mark_heads(relations, roots)
    return _described(relations, group_of[roots], unit_of[roots], locked[roots], list(by_group.values()))


def _mark_heads(relations: AxisRelations, roots: Positions) -> None:
    """Mark heads across reshapes too, where a lock keeps the reshape from carrying them."""
    marked = np.zeros(relations.count, bool)
    for positions in relations.heads:
        marked[roots[positions]] = True
    for block in reversed(relations.reshapes):  # from attention back to what projects its operands
        for side, other in ((block.left, block.right), (block.right, block.left)):
            if any(marked[roots[positions]].any() for positions in side):
                outer = next((positions for positions in other if len(positions) > 1), other[0])
                marked[roots[outer]] = True
                relations.heads.append(outer)


def _described(
    relations: AxisRelations,
    group_of: Positions,
    unit_of: Positions,
    locked: Positions,
    members: list[list[tuple[Node, Positions]]],
) -> list[Group]:
    """The groups, from the group, the unit and the first lock (-1: none) of each position."""
    values, starts = list(relations.axes), np.array([*relations.axes.values(), relations.count])
    axis_of = np.repeat(np.arange(len(values)), np.diff(starts))
    inside = group_of >= 0
    axes: list[list[Axis]] = [[] for _ in members]
    for pair in np.unique(axis_of[inside] * len(members) + group_of[inside]).tolist():
        index, group = divmod(pair, len(members))
        part = slice(starts[index], starts[index + 1])
        units = np.where(group_of[part] == group, unit_of[part], -1)
        value, axis = values[index]
        axes[group].append(Axis(value, axis, torch.from_numpy(units)))

    def groups_of(several: Iterable[Positions]) -> set[int]:
        """The groups that have one of these positions, and -1 where one is in none."""
        return {group for positions in several for group in np.unique(group_of[positions]).tolist()}

    def nodes(marked: Iterable[tuple[Node, Positions]]) -> list[list[Node]]:
        """By group, the nodes that are marked on one of its positions."""
        found: list[dict[Node, None]] = [{} for _ in members]
        for node, positions in marked:
            for group in groups_of([positions]) - {-1}:
                found[group][node] = None
        return [list(several) for several in found]

    consumers = nodes(relations.consumers)
    reductions = nodes((reduction.node, reduction.positions) for reduction in relations.reductions)
    heads, split = groups_of(relations.heads), groups_of(relations.split)
    normed = groups_of(reduction.positions for reduction in relations.reductions if reduction.by == "norm")
    averaged = groups_of(reduction.positions for reduction in relations.reductions if reduction.by == "mean")
    first = np.full(len(members), len(relations.locks))
    held = inside & (locked >= 0)
    np.minimum.at(first, group_of[held], locked[held])
    taken: set[str] = set()
    described = []
    for index, parts in enumerate(members):
        producers = list(dict.fromkeys(node for node, _ in parts))
        size = max(int(axis.units.max()) for axis in axes[index]) + 1
        several = any(len(units) > len(np.unique(units)) for _, units in parts)  # outputs of a producer are one unit
        kind = _kind(
            producers,
            heads=index in heads,
            several=index in split and several,
            normed=index in normed,
            averaged=index in averaged,
        )
        if kind == "neurons" and all(_sees_one_position(relations, node) for node in producers):
            kind = "pooler"
        lock = relations.locks[first[index]][1] if first[index] < len(relations.locks) else None
        described.append(
            Group(
                name=_unique(producers[0].label, taken),
                kind=kind,
                size=size,
                axes=tuple(axes[index]),
                producers=tuple(producers),
                consumers=tuple(consumers[index]),
                reductions=tuple(reductions[index]),
                locked=lock or (Decline("axis_of_one_unit") if size == 1 else None),
            )
        )
    return described


def _kind(producers: Sequence[Node], *, heads: bool, several: bool, normed: bool, averaged: bool) -> str:
    """heads: attention reads the units as such; several: a reshape splits a producer's output into its units."""
    convs = any("conv" in producer.kind.lower() for producer in producers)
    if heads:
        return "heads"
    if normed or (averaged and not convs) or any(producer.kind == "embedding" for producer in producers):
        return "width"
    if convs:
        return "channels"
    return "heads" if several else "neurons"


def _sees_one_position(relations: AxisRelations, node: Node) -> bool:
    """Whether what a linear reads is one position of a sequence, taken out of a 3-D value, and what is made of it."""
    if node.kind != "linear":
        return False
    value = node.input
    while (producer := value.producer) is not None:
        axes = NodeAxes(relations, producer)
        if producer.kind in ("aten.select.int", "onnx.Gather"):
            one, axis = isinstance(gather_index(axes)[0], int), axis_of(axes)
        elif producer.kind == "slice":
            one = producer.attributes["end"] - producer.attributes["start"] == 1
            axis = producer.attributes["axis"] % axes.rank(axes.x)
        elif producer.kind in _OF_EACH_POSITION or (producer.op is not None and producer.op.family == "activations"):
            value = producer.input
            continue
        else:
            return False
        return one and axes.rank(axes.x) == 3 and axis < 2
    return False


_OF_EACH_POSITION = ("linear", "layer_norm", "rms_norm", "identity", "cast", "squeeze", "reshape")
"""Besides activations, the ops that compute each position of a sequence by itself."""


def _unique(name: str, taken: set[str]) -> str:
    names = (name, *(f"{name}#{number}" for number in range(2, len(taken) + 3)))
    found = next(option for option in names if option not in taken)
    taken.add(found)
    return found


# --- units -----------------------------------------------------------------------------------------------------------

_NONE: Positions = np.empty(0, np.int64)


def _units(relations: AxisRelations) -> Positions:
    """The unit of each position, as the least position in that unit.

    First decides which axes of each reshape carry the units. Reshapes that split an axis come first: their links tell,
    for the reshapes that merge, which axes are locked.
    """
    splits = [block for block in relations.reshapes if len(block.left) == 1]
    merges = [block for block in relations.reshapes if len(block.left) > 1]
    for blocks in (splits, merges):
        if blocks:
            roots = _connected(relations)
            locked = _first_lock(relations, roots)[roots]
            for block in blocks:
                _settle(relations, block, locked)
    return _connected(relations)


def _connected(relations: AxisRelations) -> Positions:
    a, b = (
        np.concatenate([_NONE, *side])
        for side in (zip(*relations.links, strict=True) if relations.links else ((), ()))
    )
    return components(relations.count, a, b)


def _first_lock(relations: AxisRelations, roots: Positions) -> Positions:
    """The index of the first lock of each root; -1 for roots without a lock."""
    first = np.full(relations.count, len(relations.locks))
    for index in reversed(range(len(relations.locks))):
        first[roots[relations.locks[index][0]]] = index
    first[first == len(relations.locks)] = -1
    return first


def _settle(relations: AxisRelations, block: ReshapeBlock, locked: Positions) -> None:
    """On each side of a reshape, let the outermost axis without a lock carry the units (the innermost, of channels that
    are shuffled); lock the other axes.

    locked: the first lock of each position, -1 for none.
    """
    carried, reason = [], block.reason
    for side in (block.left, block.right):
        lengths = [len(positions) for positions in side]
        held = np.array([locked[positions].max() for positions in side])
        free = [i for i, length in enumerate(lengths) if length > 1 and held[i] < 0]
        carrier = free[-1 if block.is_shuffle else 0] if free else None
        relations.locks += [(positions, block.reason) for i, positions in enumerate(side) if i != carrier]
        if carrier is not None:
            inner = math.prod(lengths[carrier + 1 :])
            carried.append(side[carrier][np.arange(math.prod(lengths)) // inner % lengths[carrier]])
        elif held.max() >= 0:
            outer = next((lock for lock, length in zip(held, lengths, strict=True) if length > 1), held.max())
            reason = relations.locks[outer][1]
    if len(carried) == 2:
        relations.links.append((carried[0], carried[1]))
        if len(block.left) == 1:
            relations.split.append(block.left[0])
    else:
        relations.locks += [(positions, reason) for positions in carried]


def components(count: int, a: Positions, b: Positions) -> Positions:
    """The connected components of `count` positions with the edges (a, b), each named by its least position.

    Each round links every root to its least neighbouring root and flattens the trees, which at least halves the number
    of roots with an edge (Shiloach & Vishkin, 1982), so there are at most log2(count) rounds.
    """
    parent = np.arange(count)
    while len(a):
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        apart = low != high
        a, b, low, high = a[apart], b[apart], low[apart], high[apart]
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
    return parent
