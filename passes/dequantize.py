"""dequantize(quantize(x, s, z), s, z)  ->  x, and dequantize(W, s, z) of stored integers  ->  floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.integer_forms import unfold
from graphopt.ir.qdq.numbers import stored
from graphopt.ir.qdq.regions import MOVES, label_of
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector

_MOVES = tuple(op for op in MOVES if op != "pad")
"""The zeros that a pad puts in are integers."""


@dataclass(frozen=True)
class Dequantize(Pass):
    """Compute in floats what a model computes in integers, for targets that have no kernels for these.

    Stored integers become the floats that they stand for, exactly. Activations are not rounded or saturated any more,
    so that outputs come nearer to those of the model before it was quantized. A site is a dequantize; it is declined
    where its integers are an input of the model, or come from anything but a quantize of the same scale.
    """

    name = "dequantize"
    stage = Stage.LOWER

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def within(self) -> Dequantize:
        return self

    def run(self, graph: Graph, context: Context) -> None:
        unfold(graph)
        for site in context.sites(graph, Selector("dequantize"), self.ignore):
            try:
                graph.replace(site, _floats(graph, site))
            except Declined as declined:
                context.decline(site, declined.decline)


def _floats(graph: Graph, site: Node) -> Value:
    """What a dequantize gives without rounding. Raises Declined where that is not known."""
    dtype = site.result.dtype or torch.float32
    tensor = stored(graph, site.result)
    if tensor is not None:
        return graph.add_constant(tensor.to(dtype), site.required("x").name)
    x = _before(graph, site.required("x"), site)
    return x if x.dtype == dtype else graph.emit("cast", x, dtype=dtype, at=site)


def _before(graph: Graph, integers: Value, site: Node) -> Value:
    """The floats behind some integers: what their quantize reads, moved as they are. Raises Declined."""
    maker = integers.producer
    if maker is not None and maker.kind == "quantize" and _same_scale(graph, maker, site):
        return maker.input
    whole = site.required("scale").rank == 0  # else an axis may have moved
    if maker is None or maker.kind not in _MOVES or not whole:
        raise Declined(Decline("integers_from_elsewhere", maker=label_of(integers)))
    return graph.emit(maker, _before(graph, maker.input, site), *maker.operands[1:], at=maker)


def _same_scale(graph: Graph, quantize: Node, site: Node) -> bool:
    if quantize.attributes["axis"] != site.attributes["axis"] or site.attributes["block"]:
        return False
    return all(_same(graph, quantize.operand(name), site.operand(name)) for name in ("scale", "zero_point"))


def _same(graph: Graph, a: Value | None, b: Value | None) -> bool:
    """Whether two parameters are equal; a zero point that is left out is 0."""
    if a == b:
        return True
    one, other = (torch.zeros(()) if value is None else graph.constant(value) for value in (a, b))
    return one is not None and other is not None and bool((one == other).all())
