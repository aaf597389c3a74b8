"""Activations with a scale for each channel, between a conv and a depthwise conv -> activations with one scale.

Some quantizers give the input of a depthwise conv a scale a channel. No kernel computes that; but the channels do not
meet in such a conv, so its weight can take over their scales, and the conv in front can give its outputs in steps:

    dw(dq(q(conv(x, W·w, b), s), s), V·v)  ->  dw(dq(q(conv(x, W·(w/s), b/s), 1), 1), V·(v·s))

The integers between the two stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.numbers import saturates, stored


def share_one_scale(graph: Graph) -> None:
    """Do so where stored int8 weights are on both sides, and saturation does the work of a clip between them."""
    for quantize in graph.sites("quantize"):
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
    """The conv that alone makes what is quantized, at most behind a relu or clip that cuts off what integers do."""
    node = quantize.input.producer
    if node is not None and node.kind in ("relu", "clip") and node.result.only_user is not None:
        if not saturates(node, scale, step):
            return None
        node = node.input.producer
    if node is None or node.kind != "conv" or node.result.only_user is None or _weight(graph, node) is None:
        return None
    return node if node.bias is None or stored(graph, node.bias) is not None else None


def _readers(graph: Graph, quantize: Node, scale: Tensor, step: Tensor) -> list[Node]:
    """The depthwise convs that alone read what is quantized, through dequantizes of its scale; none if others do."""
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
    one, zero_point = graph.add_constant(torch.ones(())), graph.add_constant(step)
    bias = None if conv.bias is None else stored(graph, conv.bias)
    scaled = graph.emit(
        conv, conv.input, _rescaled(graph, conv, 1 / scale),
        None if bias is None else graph.add_constant(bias / scale), at=conv,
    )  # fmt: skip
    steps = graph.emit("quantize", scaled, one, zero_point, at=quantize)
    for reader in readers:
        x = graph.emit("dequantize", steps, one, zero_point, at=reader)
        outputs = reader.required("weight").shape
        assert outputs is not None  # of what is stored
        weight = _rescaled(graph, reader, scale.repeat_interleave(int(outputs[0]) // len(scale)))
        graph.replace(reader, graph.emit(reader, x, weight, reader.bias, at=reader))


def _rescaled(graph: Graph, conv: Node, factors: Tensor) -> Value:
    """The weight of a conv with other scales of its outputs."""
    held = _weight(graph, conv)
    assert held is not None  # as looked at before
    return graph.emit("dequantize", held[0], graph.add_constant(held[1] * factors), at=conv, axis=0)


def _weight(graph: Graph, conv: Node) -> tuple[Value, Tensor] | None:
    """The integers of a conv's weight, and the scale of each output; None of any other weight."""
    maker = conv.required("weight").producer
    if maker is None or maker.kind != "dequantize" or maker.attributes["axis"] != 0 or maker.operand("zero_point"):
        return None
    scale, integers = stored(graph, maker.operand("scale")), maker.required("x")
    return (integers, scale) if scale is not None and scale.dim() == 1 and integers.is_constant else None
