"""linear(dequantize(x), dequantize(W), b)  ->  linear_int8(x, W, b); likewise conv, add and moves before a quantize."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from graphopt.errors import SpellingError
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops.quantization import integer_range
from graphopt.ir.qdq.integer_forms import normalize
from graphopt.ir.qdq.numbers import fits_integers, saturates, stored
from graphopt.ir.qdq.regions import MOVES, has_row_scale
from graphopt.ir.rewrite import scalar
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector

_Quantized = tuple[Value, Value, Value]
"""An activation in integers: the integers, scale and zero point."""


@dataclass(frozen=True)
class FoldInt8(Pass):
    """Put one int8 op in place of dequantize, float op and quantize.

    A site is a linear, conv or add that reads a dequantized activation; a weight alone that is dequantized makes none.
    linear_int8 gives float, so nothing needs to follow it. conv_int8 and add_int8 give integers: a site is declined
    unless only a quantize reads it, at most with a relu or clip between that the saturation of the integers makes up
    for. Declined too: activations other than uint8 with one scale (of linears also one for each row), weights other
    than int8 with a scale for each output channel (zero points of weights are folded in where int8 has room for that),
    and a conv whose bias is computed. A bias in integers becomes float. An op that only moves values, between a
    dequantize and a quantize of the same scale and zero point, moves integers instead.

    A quantize to fewer than 8 bits becomes a clip and a quantize to 8, which makes the same integers: kernels that read
    them need not know of it, and are no faster for it.
    """

    name = "fold-int8"
    stage = Stage.LOWER
    lossless = True

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def within(self) -> FoldInt8:
        return self

    def run(self, graph: Graph, context: Context) -> None:
        normalize(graph)
        for node in graph.sites("quantize"):
            _widen(graph, node)
        for site in context.sites(graph, Selector("linear", "conv", "add"), self.ignore, where=_reads_integers):
            try:
                _FOLDS[site.kind](graph, site)
            except Declined as declined:
                context.decline(site, declined.decline)
            except SpellingError as error:
                context.decline(site, Decline("not_spelled", reason=str(error)))
        for node in graph.sites(*MOVES):
            if node not in self.ignore:
                with suppress(SpellingError):  # an old opset moves no integers of 8 bits
                    _fold_move(graph, node)


def _widen(graph: Graph, node: Node) -> None:
    """quantize(x, bits=4)  ->  quantize(clip(x)), and likewise each dequantize that reads it: the same integers."""
    step, zero_point = scalar(graph, node.required("scale")), node.operand("zero_point")
    zero = 0.0 if zero_point is None else scalar(graph, zero_point)
    readers = node.result.users
    if node.attributes["bits"] == 8 or step is None or zero is None or node.result.is_output:
        return
    if any(user.kind != "dequantize" for user in readers) or node.result.dtype not in (torch.uint8, torch.int8):
        return
    low, high = integer_range(node.result.dtype, node.attributes["bits"])
    x = graph.emit("clip", node.input, low=(low - zero) * step, high=(high - zero) * step, at=node)
    integers = graph.emit("quantize", x, *_widened(graph, node), at=node)
    for reader in readers:
        graph.replace(reader, graph.emit("dequantize", integers, *_widened(graph, reader), at=reader))
    graph.erase(node)


def _widened(graph: Graph, node: Node) -> list[Value]:
    """Scale and zero point of a quantize or dequantize, the zero point in all 8 bits."""
    stored = graph.constant(zero_point) if (zero_point := node.operand("zero_point")) is not None else None
    scale = node.required("scale")
    return [scale] if stored is None else [scale, graph.add_constant(stored, "zero_point")]


def _reads_integers(site: Node) -> bool:
    return any(_maker(value) for value in _data(site))


def _data(site: Node) -> list[Value]:
    """What a site reads, without the weight of a linear: that may be dequantized for the sake of size alone."""
    return [value for value in site.operands[: 1 if site.kind == "linear" else None] if value is not None]


def _fold_move(graph: Graph, node: Node) -> None:
    """quantize(move(dequantize(x)))  ->  move(x), where both have the same scale and zero point."""
    reader, x = node.result.only_user, _activation(node.input)
    if x is None or reader is None or not _is_8_bit(reader) or node.attributes.get("value", 0) != 0:
        return
    numbers = [scalar(graph, value) for value in (*x[1:], reader.required("scale"), reader.operand("zero_point"))]
    if None in numbers or numbers[:2] != numbers[2:] or reader.result.dtype != torch.uint8:
        return
    padding = {"value": numbers[1]} if node.kind == "pad" else {}
    graph.replace(reader, graph.emit(node, x[0], *node.operands[1:], at=node, **padding))


def _fold_linear(graph: Graph, site: Node) -> None:
    """linear(dequantize(x), dequantize(W), b)  ->  linear_int8(x, W, b)."""
    x, weight = _input(site), _weight(site.required("weight"))
    graph.replace(site, graph.emit("linear_int8", *x, *weight, site.bias, at=site))


def _fold_conv(graph: Graph, site: Node) -> None:
    """quantize(relu(conv(dequantize(x), dequantize(W), b)))  ->  conv_int8(x, W, b)."""
    x, weight = _input(site), _weight(site.required("weight"))
    if not x[1].is_constant:
        raise Declined("conv_scale_at_run_time")
    bias = _bias(graph, site)
    if bias is not None and not bias.is_constant:
        raise Declined("conv_bias_computed")
    parts = [graph.constant(one) for one in (bias, x[1], weight[1]) if one is not None]
    known = [part for part in parts if part is not None]
    if len(known) == 3 and not fits_integers(*known):
        raise Declined("bias_too_large")
    quantize, scale, zero_point = _quantize_behind(graph, site)
    y = graph.emit("conv_int8", *x, *weight, scale, zero_point, bias, at=site, **site.attributes)
    graph.replace(quantize, y)


def _fold_add(graph: Graph, site: Node) -> None:
    """quantize(relu(add(dequantize(a), dequantize(b))))  ->  add_int8(a, b)."""
    a, b = _activation(site.required("a")), _activation(site.required("b"))
    if a is None or b is None:
        raise Declined("side_not_uint8")
    quantize, scale, zero_point = _quantize_behind(graph, site)
    graph.replace(quantize, graph.emit("add_int8", *a, *b, scale, zero_point, at=site))


_FOLDS = {"linear": _fold_linear, "conv": _fold_conv, "add": _fold_add}
"""By op, what puts an int8 op in its place. Each raises Declined where there is none."""


def _quantize_behind(graph: Graph, site: Node) -> tuple[Node, Value, Value]:
    """The quantize that alone reads a site, its scale and zero point. Raises Declined where there is none.

    At most a relu or clip stands between, which the saturation of the integers has to make up for.
    """
    reader = site.result.only_user
    bounded = reader if reader is not None and reader.kind in ("relu", "clip") else None
    if bounded is not None:
        reader = bounded.result.only_user
    if reader is None or not _is_8_bit(reader):
        raise Declined("read_in_float")
    scale, zero_point = reader.required("scale"), reader.operand("zero_point")
    if scale.rank != 0 or zero_point is None or zero_point.dtype != torch.uint8:
        raise Declined("output_not_uint8")
    step, zero = scalar(graph, scale), scalar(graph, zero_point)
    if bounded is not None and (step is None or zero is None or not saturates(bounded, step, zero)):
        raise Declined("bound_within_integers", op=bounded.kind)
    return reader, scale, zero_point


def _is_8_bit(node: Node) -> bool:
    """Whether a node quantizes to all 8 bits."""
    return node.kind == "quantize" and node.attributes["bits"] == 8


def _maker(value: Value) -> Node | None:
    """The dequantize that makes a value."""
    return value.producer if value.producer is not None and value.producer.kind == "dequantize" else None


def _input(site: Node) -> _Quantized:
    """The quantized input of a site. Raises Declined where it is none."""
    x, maker = _activation(site.input, rows=site.kind == "linear"), _maker(site.input)
    if x is None and maker is not None and maker.attributes["bits"] < 8:
        raise Declined("activation_bits", bits=maker.attributes["bits"])
    if x is None:
        raise Declined("input_not_uint8")
    return x


def _activation(value: Value, *, rows: bool = False) -> _Quantized | None:
    """The integers, scale and zero point of a dequantized activation in uint8. rows: whether it may have a scale for
    each row."""
    maker = _maker(value)
    if maker is None or maker.attributes["bits"] < 8:
        return None
    if maker.required("scale").rank != 0 and not (rows and has_row_scale(maker)):
        return None
    integers, zero_point = maker.required("x"), maker.operand("zero_point")
    if integers.dtype != torch.uint8 or integers.is_constant:
        return None
    if zero_point is None:  # of a dequantize, it then is 0
        zero_point = maker.graph.add_constant(torch.zeros((), dtype=torch.uint8))
    return integers, maker.required("scale"), zero_point


def _bias(graph: Graph, site: Node) -> Value | None:
    """The bias, in floats where a dequantize of stored integers gives it."""
    bias = site.bias
    floats = stored(graph, bias) if bias is not None and _maker(bias) is not None else None
    return bias if floats is None else graph.add_constant(floats)


def _weight(value: Value) -> tuple[Value, Value]:
    """The integers and scales of a weight. Raises Declined where int8 ops cannot take it."""
    maker = _maker(value)
    if maker is not None and maker.operand("zero_point") is not None:
        raise Declined("weight_zero_points")
    rows = maker is not None and maker.attributes["axis"] == 0 and not maker.attributes["block"]
    integers = maker.required("x") if maker is not None and rows else None
    tensor = None if maker is None or integers is None else maker.graph.constant(integers)
    if maker is None or integers is None or tensor is None or tensor.dtype != torch.int8:
        raise Declined("weight_not_int8")
    if maker.attributes["bits"] < 8:  # which may be stored packed
        integers = maker.graph.add_constant(tensor, integers.name)
    return integers, maker.required("scale")
