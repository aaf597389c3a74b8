"""Which activations are quantized between sites: in closed quantized regions, or only where int8 ops read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import JOINED, MOVES, end_of, is_dequantized, is_global, label_of

Stays = Callable[[Node], Decline | None]
"""Why a node must stay float; None where it need not."""

_SEVERAL = ("add", "mul", "concat")

_POOLS = ("max_pool", "average_pool", "mean")


@dataclass(frozen=True)
class Regions:
    """The ops that compute or move integers besides the sites, and the values that are quantized for all of them."""

    joined: tuple[Node, ...] = ()
    """Ops that read integers and compute in integers, in the order of the graph."""
    moves: tuple[Node, ...] = ()
    """Ops that move integers and keep their scale, in the order of the graph."""
    closed: frozenset[Node] = frozenset()
    """Sites, joined ops and moves whose result is quantized after the following relu or clip."""
    floats: frozenset[Value] = frozenset()
    """Values that joined ops read in float."""
    observed: tuple[Value, ...] = ()
    """Values whose range has to be observed."""
    inherited: Mapping[Value, Value] = field(default_factory=dict)
    """By value, the one whose scale and zero point it keeps, in the order of the graph."""
    declined: Mapping[Node, Decline] = field(default_factory=dict)
    """Ops that read integers, or were asked for, and stay float."""


def closed_regions(
    graph: Graph, schemes: Mapping[Node, str], legal: Callable[[str], bool], stays: Stays, softmaxes: Collection[Node]
) -> Regions:
    """Quantized regions whose results are quantized too: static convs, and the ops that compute with or move these.

    schemes: of each linear, conv and matmul that is quantized. legal: whether the target has a static kernel for an op.
    softmaxes: those that may join, after a static matmul; others do not. An op with several operands joins if every
    operand is quantized and at least one comes from inside a region. An op with one operand, and an op that moves
    integers, joins if its result is read in integers. The result of a static matmul is quantized if it is read in
    integers.
    """
    convs, matmuls = _static(schemes, "conv"), _static(schemes, "matmul")
    inputs = {conv.input for conv in convs}
    results = {end_of(site).result for site in [*convs, *matmuls]}
    parts: list[Node] = []
    declined: dict[Node, Decline] = {}
    for node in graph.nodes:
        if node.kind not in (*JOINED, *MOVES) or (node.kind == "softmax" and node not in softmaxes):
            continue
        if not any(value in results for value in node.operands):
            if node in softmaxes:
                declined[node] = Decline("input_in_float", value=label_of(node.input))
            continue
        why = stays(node) or _why_float(node, results | inputs)
        if why is None and node.kind in JOINED and not legal(node.kind):
            why = Decline("no_static_kernel")
        if why is None:
            parts.append(node)
            results.add(end_of(node).result)
        elif node.kind in JOINED:
            declined[node] = why
    read = _read(schemes)
    kept = _read_in_integers(parts, read)
    for node in reversed(parts):
        if node not in kept and node.kind in JOINED:
            declined[node] = Decline("read_in_float")
    joined, moves = (tuple(node for node in kept if node.kind in kinds) for kinds in (JOINED, MOVES))
    read_by_any = {*read, *_data(kept)}
    matmuls = [site for site in matmuls if site.result in read_by_any]
    closed = [*convs, *matmuls, *joined]
    known = {node.result for node in kept if node.kind in (*MOVES, "softmax")}
    return Regions(
        joined, moves, frozenset([*closed, *moves]),
        observed=_observed([*read, *(end_of(node).result for node in closed)], known),
        inherited={node.result: node.input for node in moves}, declined=declined,
    )  # fmt: skip


def read_regions(
    graph: Graph, schemes: Mapping[Node, str], legal: Callable[[str], bool], stays: Stays, *, fuses_sum: bool
) -> Regions:
    """Activations are quantized only where static sites, and adds and pools of the results of static convs, read them.

    Nothing is quantized for its own sake, so that a target can fuse what follows a conv. A pool joins where a static
    site reads its result; a softmax has no form in integers here. fuses_sum: whether an add takes the result of the
    last conv that it reads in float, as the sum is fused into that conv. Other arguments: as of `closed_regions`.
    """
    convs = _static(schemes, "conv")
    results = {end_of(conv).result for conv in convs}
    read = {site.input for site in _static(schemes, "linear", "conv")}
    joined: list[Node] = []
    declined: dict[Node, Decline] = {}
    for node in graph.sites("add", *_POOLS):
        if not (legal(node.kind) and any(value in results for value in node.operands)):
            continue
        stored = next((value for value in _data([node]) if value.is_constant), None)
        why = stays(node)
        if node.kind in _POOLS and (why or node.result not in read):
            continue
        if why is None and stored is not None:
            why = Decline("side_stored", value=label_of(stored))
        if why is not None:
            declined[node] = why
        else:
            joined.append(node)
            results.add(end_of(node).result)
    alone = {conv.result for conv in convs if len(conv.result.users) == 1}
    adds = [node for node in joined if node.kind == "add"] if fuses_sum else []
    floats = {value for add in adds for value in [value for value in _data([add]) if value in alone][-1:]}
    pools = {node.result: node.input for node in joined if node.kind == "max_pool"}
    return Regions(
        tuple(joined), floats=frozenset(floats), inherited=pools, declined=declined,
        observed=_observed([*_read(schemes), *_data(joined)], floats | pools.keys()),
    )  # fmt: skip


def _static(schemes: Mapping[Node, str], *kinds: str) -> list[Node]:
    return [site for site, scheme in schemes.items() if scheme == "static" and site.kind in kinds]


def _read(schemes: Mapping[Node, str]) -> list[Value]:
    """The values that static sites read in integers."""
    return [site.input for site in _static(schemes, "linear", "conv")] + _data(_static(schemes, "matmul"))


def _data(nodes: Iterable[Node]) -> list[Value]:
    """The operands of nodes that hold data: not the shape of a reshape."""
    values = [value for node in nodes for value in (node.operands[:1] if node.kind == "reshape" else node.operands)]
    return [value for value in values if value is not None]


def _observed(values: Iterable[Value], known: Collection[Value]) -> tuple[Value, ...]:
    return tuple(value for value in dict.fromkeys(values) if not is_dequantized(value) and value not in known)


def _read_in_integers(parts: Iterable[Node], read: Iterable[Value]) -> list[Node]:
    """The parts, in order, without ops of one operand whose result nobody reads in integers."""
    kept: list[Node] = []
    wanted = set(read)
    for node in reversed(list(parts)):
        if node.kind in _SEVERAL or end_of(node).result in wanted:
            kept.append(node)
            wanted.update(_data([node]))
    return kept[::-1]


def _why_float(node: Node, integers: Collection[Value]) -> Decline | None:
    """Why a node that reads integers cannot compute in them."""
    if node.kind == "mean" and not is_global(node):
        return Decline("mean_not_global")
    if node.kind == "pad" and (node.attributes["value"] or min(node.attributes["padding"]) < 0):
        return Decline("padding_not_zero")
    floats = [value for value in _data([node]) if value not in integers]
    return Decline("side_in_float", value=label_of(floats[0])) if floats else None
