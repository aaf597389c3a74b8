"""Groups of axes: which of them shrink together, and what locks one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.analysis.facts import Facts, Fold, Numbers
from graphopt.analysis.relations import RELATIONS, norm, reduce, relate
from graphopt.ir.graph import Graph, Node, Value


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a value, and the unit that each of its positions belongs to: (size,) int64, -1 where it stays."""

    value: Value
    axis: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Axes that shrink together, by units: a unit goes whole, from every axis.

    A unit is a neuron, a channel (or all of a group, of a grouped conv), a head (with grouped queries a key head and
    the heads that read it), or a position of the width that a residual stream has.
    """

    name: str
    """The module path of its first producer, made unique."""
    kind: str
    """neurons, heads, channels or width."""
    size: int
    """How many units it has."""
    axes: tuple[Axis, ...]
    """Every axis that shrinks, those of weights and biases too."""
    producers: tuple[Node, ...]
    """The sites (linear, conv, embedding) whose weight's output axis is in the group, in the order of the graph."""
    consumers: tuple[Node, ...]
    """The sites whose weight's input axis is."""
    norms: tuple[Node, ...]
    """What sums over the units (a layer norm, a product of two that are computed): without some, it computes
    something else.

    In a group without any, to remove units is exactly to zero the consumers' weights for them."""
    locked: str | None
    """Why it cannot shrink, or None where it can."""


def groups(graph: Graph) -> list[Group]:
    """The groups of a graph, in the order of their first producers, locked ones included.

    They hold for this graph as it is: find them anew after a change. Linear in the sum of the sizes of all axes.
    """
    facts = relate(graph)
    roots = _units(facts)
    locked = _first_lock(facts, roots)
    members = []
    for node, numbers in facts.producers:  # what is free of a producer's output axis is of one group
        units = roots[numbers]
        free = units[locked[units] < 0]
        members.append((node, free if len(free) else units))
    joined = components(
        facts.count,
        np.concatenate([_NONE, *(np.full(len(units), units[0]) for _, units in members)]),
        np.concatenate([_NONE, *(units for _, units in members)]),
    )
    found: dict[int, list[tuple[Node, Numbers]]] = {}
    for node, units in members:
        found.setdefault(int(joined[units[0]]), []).append((node, units))
    group_of, unit_of = np.full(facts.count, -1), np.full(facts.count, -1)
    for index, parts in enumerate(found.values()):
        units, first = np.unique(np.concatenate([units for _, units in parts]), return_index=True)
        units = units[np.argsort(first)]
        group_of[units], unit_of[units] = index, np.arange(len(units))
    _mark_heads(facts, roots)
    return _described(facts, group_of[roots], unit_of[roots], locked[roots], list(found.values()))


def _mark_heads(facts: Facts, roots: Numbers) -> None:
    """Call heads what attention takes for heads behind reshapes too, where a lock keeps these from carrying units."""
    marked = np.zeros(facts.count, bool)
    for numbers in facts.heads:
        marked[roots[numbers]] = True
    for fold in reversed(facts.folds):  # from attention back to what projects its operands
        for side, other in ((fold.left, fold.right), (fold.right, fold.left)):
            if any(marked[roots[numbers]].any() for numbers in side):
                outer = next((numbers for numbers in other if len(numbers) > 1), other[0])
                marked[roots[outer]] = True
                facts.heads.append(outer)


def _described(
    facts: Facts, group_of: Numbers, unit_of: Numbers, locked: Numbers, members: list[list[tuple[Node, Numbers]]]
) -> list[Group]:
    """The groups, of what is known of each position: its group, its unit there, and its first lock (-1: none)."""
    values, starts = list(facts.axes), np.array([*facts.axes.values(), facts.count])
    axis_of = np.repeat(np.arange(len(values)), np.diff(starts))
    inside = group_of >= 0
    axes: list[list[Axis]] = [[] for _ in members]
    for pair in np.unique(axis_of[inside] * len(members) + group_of[inside]).tolist():
        index, group = divmod(pair, len(members))
        part = slice(starts[index], starts[index + 1])
        units = np.where(group_of[part] == group, unit_of[part], -1)
        value, axis = values[index]
        axes[group].append(Axis(value, axis, torch.from_numpy(units)))

    def nodes(marked: Iterable[tuple[Node, Numbers]]) -> list[dict[Node, None]]:
        """The nodes, by group, that are marked on one of its positions."""
        by_group: list[dict[Node, None]] = [{} for _ in members]
        for node, numbers in marked:
            for group in np.unique(group_of[numbers]).tolist():
                if group >= 0:
                    by_group[group][node] = None
        return by_group

    consumers, norms = nodes(facts.consumers), nodes(facts.reduced)
    heads = {int(group) for numbers in facts.heads for group in np.unique(group_of[numbers])}
    split = {int(group) for numbers in facts.split for group in np.unique(group_of[numbers])}
    first = np.full(len(members), len(facts.locks))
    held = inside & (locked >= 0)
    np.minimum.at(first, group_of[held], locked[held])
    taken: set[str] = set()
    described = []
    for index, parts in enumerate(members):
        producers = list(dict.fromkeys(node for node, _ in parts))
        size = max(int(axis.units.max()) for axis in axes[index]) + 1
        wide = any(len(units) > len(np.unique(units)) for _, units in parts)  # several outputs are one unit
        reason = facts.locks[first[index]][1] if first[index] < len(facts.locks) else None
        described.append(
            Group(
                name=_unique(producers[0].label, taken),
                kind=_kind(producers, norms[index], index in heads, index in split and wide),
                size=size,
                axes=tuple(axes[index]),
                producers=tuple(producers),
                consumers=tuple(consumers[index]),
                norms=tuple(norms[index]),
                locked=reason or ("has a single unit" if size == 1 else None),
            )
        )
    return described


def _kind(producers: Sequence[Node], norms: Iterable[Node], heads: bool, split: bool) -> str:
    convs = any("conv" in producer.kind.lower() for producer in producers)
    relations = [RELATIONS[node.kind] for node in norms]
    normalized = norm in relations or (reduce in relations and not convs)
    if heads:
        return "heads"
    if normalized or any(producer.kind == "embedding" for producer in producers):
        return "width"
    return "channels" if convs else "heads" if split else "neurons"


def _unique(name: str, taken: set[str]) -> str:
    names = (name, *(f"{name}#{number}" for number in range(2, len(taken) + 3)))
    found = next(option for option in names if option not in taken)
    taken.add(found)
    return found


# --- units ---------------------------------------------------------------------------------------------------------

_NONE: Numbers = np.empty(0, np.int64)


def _units(facts: Facts) -> Numbers:
    """The unit of each position, called by its least one, once it is settled which axes of each reshape carry.

    An axis is split before others are merged: what its parts meet between the two tells which of them stays.
    """
    for folds in ([f for f in facts.folds if len(f.left) == 1], [f for f in facts.folds if len(f.left) > 1]):
        if folds:
            roots = _connected(facts)
            locked = _first_lock(facts, roots)[roots]
            for fold in folds:
                _settle(facts, fold, locked)
    return _connected(facts)


def _connected(facts: Facts) -> Numbers:
    a, b = (np.concatenate([_NONE, *side]) for side in (zip(*facts.links, strict=True) if facts.links else ((), ())))
    return components(facts.count, a, b)


def _first_lock(facts: Facts, roots: Numbers) -> Numbers:
    """For each root the index of its first lock, -1 for those without."""
    first = np.full(facts.count, len(facts.locks))
    for index in reversed(range(len(facts.locks))):
        first[roots[facts.locks[index][0]]] = index
    first[first == len(facts.locks)] = -1
    return first


def _settle(facts: Facts, fold: Fold, locked: Numbers) -> None:
    """Let one axis on either side of a reshape carry the units, the outermost that can; the others stay.

    locked: for each position its first lock, -1 for none.
    """
    carried, reason = [], fold.reason
    for side in (fold.left, fold.right):
        lengths = [len(numbers) for numbers in side]
        held = np.array([locked[numbers].max() for numbers in side])
        carrier = next((i for i, length in enumerate(lengths) if length > 1 and held[i] < 0), None)
        facts.locks += [(numbers, fold.reason) for i, numbers in enumerate(side) if i != carrier]
        if carrier is not None:
            inner = math.prod(lengths[carrier + 1 :])
            carried.append(side[carrier][np.arange(math.prod(lengths)) // inner % lengths[carrier]])
        elif held.max() >= 0:
            outer = next((lock for lock, length in zip(held, lengths, strict=True) if length > 1), held.max())
            reason = facts.locks[outer][1]
    if len(carried) == 2:
        facts.links.append((carried[0], carried[1]))
        if len(fold.left) == 1:
            facts.split.append(fold.left[0])
    else:
        facts.locks += [(numbers, reason) for numbers in carried]


def components(count: int, a: Numbers, b: Numbers) -> Numbers:
    """For each of `count` positions the least one that it is connected to by the edges (a, b).

    Each round hooks every root to the least root beside it and makes the trees flat, which at least halves the number
    of roots that have an edge left (Shiloach & Vishkin, 1982), so there are at most log2(count) rounds.
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
