"""A model that came in quantized, in the form that kernels take: activations in uint8, weights in int8 at zero point 0.

quantize(x, s, z:int8) -> quantize(x, s, z + 128:uint8), and likewise each dequantize that reads it: exact.
dequantize(W, s, z) -> dequantize(W - z, s per output channel): exact.
quantize(x * c, s, z) -> quantize(x, s / c, z): the same up to the last bit of a float. (Exported attention scales
its queries and keys so.)
Scales per channel between a conv and a depthwise conv move into the weights of both (`per_channel_activations`).

`unfold` is the way back from int8 ops (linear_int8, ...) to dequantize, float op and quantize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.per_channel_activations import share_one_scale
from graphopt.ir.rewrite import scalar

_MOVES = ("max_pool", "reshape", "transpose", "slice", "squeeze", "unsqueeze", "identity")
"""Ops that move integers and do not compute with them, so that they commute with adding 128: those of `regions.MOVES`
but pad, whose zeros do not, and identity."""
_HALF = 128


def normalize(graph: Graph) -> None:
    """Rewrite integers to the form above wherever that is exact, up to the last bit of floats before rounding.

    These stay as they are: int8 activations that the graph returns, or that anything but a dequantize reads, and
    weights for which W - z does not fit int8. [changes]
    """
    for node in [node for node in graph.nodes if _is_signed(node)]:
        if (behind := _behind(node.result)) is not None:
            _shift(graph, node, behind)
    for node in [node for node in graph.nodes if _is_weight(node) and not _is_normal(node)]:
        _center(graph, node)
    for node in graph.sites("quantize"):
        _take_factor(graph, node)
    share_one_scale(graph)


def unfold(graph: Graph) -> None:
    """Replace int8 ops by what they mean: dequantize, the float op, quantize. [changes]"""
    floats: dict[tuple[Value, ...], Value] = {}

    def activation(site: Node, side: str) -> Value:
        names = (side, *(f"{side}_{name}" if site.kind == "add_int8" else name for name in ("scale", "zero_point")))
        key = tuple(site.required(name) for name in names)
        if key not in floats:  # linears that read the same integers share one dequantize
            floats[key] = graph.emit("dequantize", *key, at=site)
        return floats[key]

    for site in graph.sites("linear_int8", "conv_int8", "add_int8"):
        if site.kind == "add_int8":
            y = graph.emit("add", activation(site, "a"), activation(site, "b"), at=site)
        else:
            weight = graph.emit(
                "dequantize", site.required("weight"), site.required("weight_scale"), axis=0, at=site
            )
            y = graph.emit(
                site.kind.removesuffix("_int8"), activation(site, "x"), weight, site.bias, at=site, **site.attributes
            )
        if site.kind != "linear_int8":
            y = graph.emit("quantize", y, site.required("y_scale"), site.required("y_zero_point"), at=site)
        graph.replace(site, y)
    graph.sweep()


# --- activations ---------------------------------------------------------------------------------------------------


def _is_signed(node: Node) -> bool:
    """Whether a node is a quantize to int8 with one scale and a stored zero point (0 where it has none)."""
    if node.kind != "quantize" or node.result.dtype != torch.int8 or node.required("scale").rank != 0:
        return False
    if node.attributes["bits"] < 8:  # which no kernel takes
        return False
    zero_point = node.operand("zero_point")
    return zero_point is None or zero_point.is_constant


def _behind(integers: Value) -> list[Node] | None:
    """The ops that move integers and the dequantizes that end each path, in order; None where others read them."""
    found: list[Node] = []
    if integers.is_output:
        return None
    for user in integers.users:
        if user.kind == "dequantize":
            zero_point = user.operand("zero_point")
            if user.required("scale").rank != 0 or not (zero_point is None or zero_point.is_constant):
                return None
            found.append(user)
        elif user.kind in _MOVES and user.input == integers and (further := _behind(user.result)) is not None:
            found += [user, *further]
        else:
            return None
    return found


def _shift(graph: Graph, node: Node, behind: list[Node]) -> None:
    """Emit a quantize and all nodes after it again, with integers that are 128 higher."""
    scale = node.required("scale")
    moved = {node.result: graph.emit("quantize", node.input, scale, _higher(graph, node), at=node)}
    for user in behind:
        x = moved[user.input]
        if user.kind == "dequantize":
            graph.replace(user, graph.emit("dequantize", x, user.required("scale"), _higher(graph, user), at=user))
        else:
            moved[user.result] = graph.emit(user, x, *user.operands[1:], at=user)
    for integers in reversed(moved):
        if integers.producer is not None:
            graph.erase(integers.producer)


def _higher(graph: Graph, node: Node) -> Value:
    """The zero point of a node plus 128, in uint8."""
    given = node.operand("zero_point")
    tensor = graph.constant(given) if given is not None else torch.zeros((), dtype=torch.int8)
    assert tensor is not None
    return graph.add_constant((tensor.to(torch.int16) + _HALF).to(torch.uint8).reshape(()))


def _take_factor(graph: Graph, node: Node) -> None:
    """Fold a mul or div by one positive number into the scale of a quantize that reads it, through moves too."""
    factor = node.input.producer
    while factor is not None and factor.kind in _MOVES and factor.result.only_user is not None:
        factor = factor.input.producer
    scale, taken = graph.constant(node.required("scale")), None if factor is None else _factor(graph, factor)
    if factor is None or scale is None or taken is None or factor.result.only_user is None:
        return
    x, number = taken
    if x.dtype != scale.dtype or not bool((scale / number).isfinite().all() and (scale / number > 0).all()):
        return
    graph.replace(factor, x)
    rescaled = graph.emit(node, node.input, graph.add_constant(scale / number), *node.operands[2:], at=node)
    graph.replace(node, rescaled)


def _factor(graph: Graph, node: Node) -> tuple[Value, float] | None:
    """Of a mul or div by one positive number: x and the factor. None for other ops, and where x is broadcast."""
    sides = {"mul": [(0, 1), (1, 0)], "div": [(0, 1)]}.get(node.kind, [])
    for x, number in ((node.operands[side], scalar(graph, node.operands[other])) for side, other in sides):
        if x is not None and number is not None and number > 0 and x.shape == node.result.shape:
            return x, number if node.kind == "mul" else 1 / number
    return None


# --- weights -------------------------------------------------------------------------------------------------------


def _is_weight(node: Node) -> bool:
    """Whether a node dequantizes a stored 8-bit weight for linears and convs only, with one scale or one per output."""
    if node.kind != "dequantize" or not all(value is None or value.is_constant for value in node.operands):
        return False
    if node.required("x").dtype not in (torch.int8, torch.uint8) or node.result.is_output:
        return False
    attributes, users = node.attributes, node.result.users
    whole = attributes["bits"] == 8 and not attributes["block"] and attributes["axis"] in (None, 0)
    return whole and bool(users) and all(
        user.kind in ("linear", "conv") and user.operand("weight") == node.result and user.input != node.result
        for user in users
    )  # fmt: skip


def _is_normal(node: Node) -> bool:
    integers = node.required("x").dtype
    return integers == torch.int8 and node.operand("zero_point") is None and node.required("scale").rank == 1


def _center(graph: Graph, node: Node) -> None:
    """Emit the dequantize of a weight without a zero point and with a scale per output, where W - z fits int8."""
    integers, scale, zero_point = (None if v is None else graph.constant(v) for v in (*node.operands, None)[:3])
    assert integers is not None and scale is not None
    steps = integers.to(torch.int16)
    if zero_point is not None:
        steps = steps - _column(zero_point.to(torch.int16), steps)
    if int(steps.min()) < -_HALF or int(steps.max()) >= _HALF:
        return
    stored = graph.add_constant(steps.to(torch.int8)), graph.add_constant(scale.expand(steps.shape[0]).contiguous())
    graph.replace(node, graph.emit("dequantize", *stored, at=node, axis=0))


def _column(vector: Tensor, weight: Tensor) -> Tensor:
    """One number, or one per output channel, shaped to broadcast over a weight (out, ...)."""
    return vector.reshape([-1, *[1] * (weight.dim() - 1)])
