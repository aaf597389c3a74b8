"""linear(dequantize(x), dequantize(W), b)  ->  linear_int8(x, W, b), and so conv and add in front of a quantize."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.graph import Graph, Node, Value
from graphopt.integer_forms import normalize
from graphopt.pipeline import Context, Pass, Selector, Stage
from graphopt.rewrite import scalar
from graphopt.words import WORDS

_Quantized = tuple[Value, Value, Value]
"""An activation in integers: its steps, scale and zero point."""


@dataclass(frozen=True)
class FoldInt8(Pass):
    """Put one int8 word in place of an island of dequantize, float word and quantize.

    Eligible is each linear, conv and add that reads a dequantize. A linear gives float, so nothing needs to follow it.
    A conv or an add gives integers: it is declined unless only a quantize reads it, at most with a relu between, which
    the saturation at zero point 0 stands for. Declined too: activations or weights in another form than uint8 with one
    scale, and int8 with a scale an output channel; a conv whose bias is computed. A bias in integers becomes float.
    """

    name = "fold-int8"
    stage = Stage.LOWER
    lossless = True

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def run(self, graph: Graph, context: Context) -> None:
        normalize(graph)
        sites = context.sites(graph, Selector("linear", "conv", "add"), self.ignore)
        sites = [site for site in sites if any(value is not None and _maker(value) for value in site.operands)]
        context.record.eligible[:] = [site.label for site in sites]
        for site in sites:
            folded = _fold_add(graph, site) if site.kind == "add" else _fold_weighted(graph, site)
            if isinstance(folded, str):
                context.decline(site, folded)


def _fold_weighted(graph: Graph, site: Node) -> str | None:
    """Fold a linear or conv, or say why not."""
    x, weight = _activation(site.input), _weight(site.required("weight"))
    if x is None:
        return "input is not quantized to uint8 with one scale"
    if weight is None:
        return "weight is not stored in int8 with a scale for each output channel"
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
    """The quantize that alone reads a site, at most through a relu, its scale and zero point; or why there is none."""
    reader = _only_reader(site)
    relu = reader is not None and reader.kind == "relu"
    if reader is not None and relu:
        reader = _only_reader(reader)
    if reader is None or reader.kind != "quantize":
        return "result is read in float"
    zero_point = reader.operand("zero_point")
    if not _one_scale(reader) or zero_point is None or zero_point.dtype != torch.uint8:
        return "result is not quantized to uint8 with one scale"
    if relu and scalar(graph, zero_point) != 0:
        return "result goes through a relu, and its zero point is not 0"
    return reader, reader.required("scale"), zero_point


def _only_reader(node: Node) -> Node | None:
    users = node.result.users
    return users[0] if len(users) == 1 and not node.result.is_output else None


def _maker(value: Value) -> Node | None:
    """The dequantize that makes a value."""
    return value.producer if value.producer is not None and value.producer.kind == "dequantize" else None


def _activation(value: Value) -> _Quantized | None:
    maker = _maker(value)
    if maker is None or not _one_scale(maker):
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
    maker = _maker(bias) if bias is not None else None
    if maker is None:
        return bias
    stored = [None if value is None else graph.constant(value) for value in maker.operands]
    if any(value is not None and tensor is None for value, tensor in zip(maker.operands, stored, strict=True)):
        return bias
    return graph.add_constant(WORDS["dequantize"].reference(*stored, **maker.attributes))


def _one_scale(node: Node) -> bool:
    return node.required("scale").rank == 0


def _weight(value: Value) -> tuple[Value, Value] | None:
    maker = _maker(value)
    if maker is None or maker.attributes["axis"] != 0 or maker.operand("zero_point") is not None:
        return None
    steps, scale = maker.required("x"), maker.required("scale")
    return (steps, scale) if steps.is_constant and steps.dtype == torch.int8 else None
