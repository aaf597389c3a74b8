"""Residual branches: the parts of a graph that are added to a value which they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops.recurrent import RECURRENT

WEIGHTED = ("linear", "conv", "conv_transpose", *RECURRENT)
"""Layers with weights. A branch holds at least one, so x + x³, which is part of a decomposed gelu, is no branch."""


@dataclass(frozen=True, eq=False)
class Branch:
    """f of a sum x + f(x): an attention or a feed-forward sublayer, the convs beside a shortcut.

    A norm that f starts with is part of it, a norm of the sum is not. Without the branch the sum is x.
    """

    name: str
    """The label of its last layer with weights, made unique."""
    sum: Node
    shortcut: Value
    """x, which stays."""
    sites: tuple[Node, ...]
    """The layers of f that have weights, in the order of the graph."""
    nodes: tuple[Node, ...]
    """What computes f of x, and nothing else reads, in the order of the graph."""
    locked: Decline | None
    """Why it cannot be removed, or None where it can."""

    kind: ClassVar[str] = "layers"
    """What the report calls it, as `groups.Group.kind`."""
    size: ClassVar[int] = 1
    """It goes whole."""

    def remove(self, graph: Graph) -> None:
        """Use x in place of the sum, and sweep f."""
        graph.replace(self.sum, self.shortcut)
        graph.sweep()


def branches(graph: Graph) -> list[Branch]:
    """The residual branches of a graph, in the order of their sums, locked ones included. Valid until it changes.

    Of branches inside a branch, only the inner ones are given. A sum of two branches that are both computed from one
    value (a projection shortcut) is given with the one of more layers, and is locked.
    """
    above = _Above(graph)
    sums = [node for node in graph.nodes if node.kind == "add"]
    found = {node: branch for node in sums if (branch := _residual(node, above))}
    found = {node: branch for node, branch in found.items() if found.keys().isdisjoint(branch.nodes)}
    inside = {node for branch in found.values() for node in branch.nodes}
    others = (node for node in sums if node not in found and node not in inside)
    found |= {node: branch for node in others if (branch := _projected(node, above))}
    often = Counter(branch.name for branch in found.values())
    return [
        branch if often[branch.name] == 1 else replace(branch, name=f"{branch.name} ({node.name})")
        for node in sums
        if (branch := found.get(node))
    ]


class _Above:
    """What each value is computed from, itself included: inputs and nodes, each a bit of a number."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        inputs = graph.inputs
        self._bits = {value: 1 << index for index, value in enumerate(inputs)}
        self._masks = dict(self._bits)
        for index, node in enumerate(self.nodes, len(inputs)):
            mask = 1 << index
            for value in node.operands:
                mask |= 0 if value is None else self.mask(value)
            for value in node.results:
                self._bits[value], self._masks[value] = 1 << index, mask

    def bit(self, value: Value) -> int:
        """Of a value itself; 0 of a constant."""
        return self._bits.get(value, 0)

    def mask(self, value: Value) -> int:
        """Of all that a value is computed from."""
        return self._masks.get(value, 0)

    def between(self, sources: int, value: Value, without: int = 0) -> tuple[Node, ...]:
        """The nodes that `value` is computed from and that read one of `sources`, but for those of `without`."""
        inside = self.mask(value) & ~without
        return tuple(
            node
            for node in self.nodes
            if any(self.bit(result) & inside for result in node.results)
            and any(value is not None and self.mask(value) & sources for value in node.operands)
        )


def _residual(node: Node, above: _Above) -> Branch | None:
    """The branch of a sum x + f(x); None where neither term is computed from the other, or from a term of the other."""
    a, b = node.required("a"), node.required("b")
    for shortcut, value in ((a, b), (b, a)):
        terms = sum({above.bit(term) for term in _terms(shortcut)})
        nodes = above.between(terms & above.mask(value), value, above.mask(shortcut))
        if sites := _weighted(nodes):
            own = _own(node, nodes)
            return Branch(sites[-1].label, node, shortcut, sites, own, _lock(node, shortcut, own, sites))
    return None


def _own(node: Node, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Those of the nodes that only the sum depends on: a norm that two branches read belongs to neither."""
    own = {node: None}
    for one in reversed(nodes):
        if not any(value.is_output or not own.keys() >= set(value.users) for value in one.results):
            own[one] = None
    return tuple(one for one in nodes if one in own)


def _projected(node: Node, above: _Above) -> Branch | None:
    """The longer branch of a sum g(x) + f(x); None of other sums."""
    a, b = node.required("a"), node.required("b")
    common = above.mask(a) & above.mask(b)
    sides = [(above.between(common, value, common), other) for value, other in ((a, b), (b, a))]
    (nodes, shortcut), (others, _) = sorted(sides, key=lambda side: -len(_weighted(side[0])))
    sites, beside = _weighted(nodes), _weighted(others)
    if not (sites and beside) or a.shape != b.shape:
        return None
    lock = Decline("shortcut_not_identity", site=beside[-1].label)
    return Branch(sites[-1].label, node, shortcut, sites, nodes, lock)


def _weighted(nodes: Sequence[Node]) -> tuple[Node, ...]:
    return tuple(node for node in nodes if node.kind in WEIGHTED)


def _terms(value: Value) -> Iterator[Value]:
    """The value itself, and the terms of the sums that it is made of."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        if value.producer is not None and value.producer.kind == "add":
            waiting += [operand for operand in value.producer.operands if operand is not None]


def _lock(node: Node, shortcut: Value, own: Sequence[Node], sites: Sequence[Node]) -> Decline | None:
    """Why x cannot stand for x + f(x). sites: the layers of f that have weights."""
    result = node.result
    if shortcut.shape is None or shortcut.shape != result.shape or shortcut.dtype != result.dtype:
        return Decline("shortcut_differs", shortcut=shortcut.shape, result=result.shape)
    shared = next((site for site in sites if site not in own), None)
    if shared is not None:
        return Decline("branch_read_elsewhere", site=shared.label)
    unsafe = next((one for one in own if one.op is None and one.signature is None), None)
    if unsafe is not None:
        return Decline("branch_not_pure", op=unsafe.kind)
    if result.is_output and (shortcut.producer is None or shortcut.is_output):
        return Decline("shortcut_returned")
    return None
