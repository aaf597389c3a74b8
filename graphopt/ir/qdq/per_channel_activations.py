"""Scales per channel of the activations between a conv and a depthwise conv -> one scale.

Some quantizers give the input of a depthwise conv one scale per channel. No kernel computes that. A depthwise conv
never mixes channels, so its weight can take over the scales, and the conv before it can compute in units of one step:

    dw(dq(q(conv(x, W·w, b), s), s), V·v)  ->  dw(dq(q(conv(x, W·(w/s), b/s), 1), 1), V·(v·s))

The integers between the two convs stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.numbers import saturates, stored


def share_one_scale(graph: Graph) -> None:
    """Do so where both convs have stored int8 weights, and saturation makes a relu or clip between them superfluous."""
    for quantize in (node for node in graph.sites("quantize") if node.attributes["bits"] == 8):
        scale, zero_point = (stored(graph, quantize.operand(name)) for name in ("scale", "zero_point"))
        if scale is None or scale.dim() != 1 or quantize.attributes["axis"] != 1 or zero_point is None:
            continue
        step = zero_point.flatten()[0].clone()
        if zero_point.dtype is not torch.uint8 or bool((zero_point != step).any()):
            continue
        conv, readers = _maker(graph, quantize, scale, float(step)), _readers(graph, quantize, scale, step)
        if conv is not None and readers:
            _rewrite(graph, quantize, conv, readers, scale, step)
    graph.sweep()


def _maker(graph: Graph, quantize: Node, scale: Tensor, step: float) -> Node | None:
    """The conv whose only reader is the quantize, also by way of a relu or clip that saturation makes superfluous."""
    node = quantize.input.producer
    if node is not None and node.kind in ("relu", "clip") and node.result.only_user is not None:
        if not saturates(node, scale, step):
            return None
        node = node.input.producer
    if node is None or node.kind != "conv" or node.result.only_user is None or _weight(graph, node) is None:
        return None
    return node if node.bias is None or stored(graph, node.bias) is not None else None


def _readers(graph: Graph, quantize: Node, scale: Tensor, step: Tensor) -> list[Node]:
    """The depthwise convs that read a quantize through dequantizes of its scale; none if others read the integers."""
    convs: list[Node] = []
    for node in quantize.result.users:
        found, zero_point = (stored(graph, node.operand(name)) if node.kind == "dequantize" else None
                             for name in ("scale", "zero_point"))  # fmt: skip
        if found is None or not found.equal(scale) or zero_point is None or bool((zero_point != step).any()):
            return []
        convs += node.result.users
        if node.result.is_output:
            return []
    depthwise = all(conv.kind == "conv" and conv.attributes["groups"] == len(scale) and _weight(graph, conv) is not None
                    for conv in convs)  # fmt: skip
    return convs if depthwise and not quantize.result.is_output else []


def _rewrite(graph: Graph, quantize: Node, conv: Node, readers: list[Node], scale: Tensor, step: Tensor) -> None:
    unit, zero_point = graph.add_constant(torch.ones(())), graph.add_constant(step)
    bias = None if conv.bias is None else stored(graph, conv.bias)
    scaled = graph.emit(
        conv, conv.input, _rescaled(graph, conv, 1 / scale),
        None if bias is None else graph.add_constant(bias / scale), at=conv,
    )  # fmt: skip
    steps = graph.emit("quantize", scaled, unit, zero_point, at=quantize)
    for reader in readers:
        x = graph.emit("dequantize", steps, unit, zero_point, at=reader)
        outputs = reader.required("weight").shape
        assert outputs is not None  # a stored weight has a shape
        weight = _rescaled(graph, reader, scale.repeat_interleave(int(outputs[0]) // len(scale)))
        graph.replace(reader, graph.emit(reader, x, weight, reader.bias, at=reader))


def _rescaled(graph: Graph, conv: Node, factors: Tensor) -> Value:
    """The weight of a conv, its scale per output channel multiplied by `factors`."""
    held = _weight(graph, conv)
    assert held is not None  # checked by _maker and _readers
    return graph.emit("dequantize", held[0], graph.add_constant(held[1] * factors), at=conv, axis=0)


def _weight(graph: Graph, conv: Node) -> tuple[Value, Tensor] | None:
    """The integers of a conv's weight and its scale per output channel; None for a weight of another form."""
    maker = conv.required("weight").producer
    if maker is None or maker.kind != "dequantize" or maker.attributes["axis"] != 0 or maker.operand("zero_point"):
        return None
    scale, integers = stored(graph, maker.operand("scale")), maker.required("x")
    return (integers, scale) if scale is not None and scale.dim() == 1 and integers.is_constant else None
