"""linear(dequantize(x), dequantize(W), b)  ->  linear_int8(x, W, b); so conv, add and moves in front of a quantize."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.integer_forms import normalize
from graphopt.ir.qdq.numbers import saturates, stored
from graphopt.ir.qdq.regions import MOVES
from graphopt.ir.rewrite import scalar
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector

_Quantized = tuple[Value, Value, Value]
"""An activation in integers: its steps, scale and zero point."""


@dataclass(frozen=True)
class FoldInt8(Pass):
    """Put one int8 op in place of an island of dequantize, float op and quantize.

    Eligible is each linear, conv and add that reads a dequantize. A linear gives float, so nothing needs to follow it;
    one whose weight alone is dequantized is none of them. A conv or an add gives integers: it is declined unless only a
    quantize reads it, at most with a relu or clip between that saturation stands for. Declined too: activations or
    weights in another form than uint8 with one scale, and int8 with a scale an output channel (zero points of weights
    are folded in where int8 has room for that); a conv whose bias is computed. A bias in integers becomes float. What
    only moves values between a dequantize and a quantize of the same scale and zero point moves integers.
    """

    name = "fold-int8"
    stage = Stage.LOWER
    lossless = True

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def run(self, graph: Graph, context: Context) -> None:
        normalize(graph)
        sites = context.sites(graph, Selector("linear", "conv", "add"), self.ignore)
        sites = [site for site in sites if any(_maker(value) for value in _data(site))]
        context.record.eligible[:] = [context.labels[site] for site in sites]
        for site in sites:
            folded = _fold_add(graph, site) if site.kind == "add" else _fold_weighted(graph, site)
            if isinstance(folded, str):
                context.decline(site, folded)
        for node in graph.sites(*MOVES):
            if node not in self.ignore:
                _fold_move(graph, node)


def _data(site: Node) -> list[Value]:
    """What flows into a site, weights of linears aside: those may be dequantized for the sake of size alone."""
    return [value for value in site.operands[: 1 if site.kind == "linear" else None] if value is not None]


def _fold_move(graph: Graph, node: Node) -> None:
    """Let a node move integers, where its input and its result have the same scale and zero point."""
    reader, x = node.result.only_user, _activation(node.input)
    if x is None or reader is None or reader.kind != "quantize" or node.attributes.get("value", 0) != 0:
        return
    numbers = [scalar(graph, value) for value in (*x[1:], reader.required("scale"), reader.operand("zero_point"))]
    if None in numbers or numbers[:2] != numbers[2:] or reader.result.dtype != torch.uint8:
        return
    padding = {"value": numbers[1]} if node.kind == "pad" else {}
    graph.replace(reader, graph.emit(node, x[0], *node.operands[1:], at=node, **padding))


def _fold_weighted(graph: Graph, site: Node) -> str | None:
    """Fold a linear or conv, or say why not."""
    x, weight = _activation(site.input), _weight(site.required("weight"))
    if x is None:
        return "input is not quantized to uint8 with one scale"
    if isinstance(weight, str):
        return weight
    if site.kind == "linear":
        graph.replace(site, graph.emit("linear_int8", *x, *weight, site.bias, at=site))
        return None
    if not x[1].is_constant:
        return "conv has no int8 form with a scale chosen at run time"
    bias = _bias(graph, site)
    if bias is not None and not bias.is_constant:
        return "conv has no int8 form with a bias that is computed"
    found = _quantize_behind(graph, site)
    if isinstance(found, str):
        return found
    steps, scale, zero_point = found
    y = graph.emit("conv_int8", *x, *weight, scale, zero_point, bias, at=site, **site.attributes)
    graph.replace(steps, y)
    return None


def _fold_add(graph: Graph, site: Node) -> str | None:
    """Fold an add, or say why not."""
    a, b = _activation(site.required("a")), _activation(site.required("b"))
    if a is None or b is None:
        return "one side is not quantized to uint8 with one scale"
    found = _quantize_behind(graph, site)
    if isinstance(found, str):
        return found
    steps, scale, zero_point = found
    graph.replace(steps, graph.emit("add_int8", *a, *b, scale, zero_point, at=site))
    return None


def _quantize_behind(graph: Graph, site: Node) -> tuple[Node, Value, Value] | str:
    """The quantize that alone reads a site, its scale and zero point; or why there is none.

    At most a relu or clip stands between, which saturation has to do the work of.
    """
    reader = site.result.only_user
    bounded = reader if reader is not None and reader.kind in ("relu", "clip") else None
    if bounded is not None:
        reader = bounded.result.only_user
    if reader is None or reader.kind != "quantize":
        return "result is read in float"
    zero_point = reader.operand("zero_point")
    if reader.required("scale").rank != 0 or zero_point is None or zero_point.dtype != torch.uint8:
        return "result is not quantized to uint8 with one scale"
    scale = reader.required("scale")
    step, zero = scalar(graph, scale), scalar(graph, zero_point)
    if bounded is not None and (step is None or zero is None or not saturates(bounded, step, zero)):
        return f"result goes through a {bounded.kind} that cuts off more than the integers do"
    return reader, scale, zero_point


def _maker(value: Value) -> Node | None:
    """The dequantize that makes a value."""
    return value.producer if value.producer is not None and value.producer.kind == "dequantize" else None


def _activation(value: Value) -> _Quantized | None:
    maker = _maker(value)
    if maker is None or maker.required("scale").rank != 0:
        return None
    steps, zero_point = maker.required("x"), maker.operand("zero_point")
    if steps.dtype != torch.uint8 or steps.is_constant:
        return None
    if zero_point is None:  # of a dequantize, it then is 0
        zero_point = maker.graph.add_constant(torch.zeros((), dtype=torch.uint8))
    return steps, maker.required("scale"), zero_point


def _bias(graph: Graph, site: Node) -> Value | None:
    """The bias, as floats where it is stored in integers behind a dequantize."""
    bias = site.bias
    floats = stored(graph, bias) if bias is not None and _maker(bias) is not None else None
    return bias if floats is None else graph.add_constant(floats)


def _weight(value: Value) -> tuple[Value, Value] | str:
    """The steps and scales of a weight, or why it has none."""
    maker = _maker(value)
    if maker is not None and maker.operand("zero_point") is not None:
        return "weight has zero points, which no int8 op has: a target with a kernel for them takes it as it stands"
    rows = maker is not None and maker.attributes["axis"] == 0 and not maker.attributes["block"]
    steps = maker.required("x") if maker is not None and rows else None
    if maker is None or steps is None or not steps.is_constant or steps.dtype != torch.int8:
        return "weight is not stored in int8 with a scale for each output channel"
    return steps, maker.required("scale")
