"""dequantize(quantize(x, s, z), s, z)  ->  clip(x), and dequantize(W, s, z) of stored integers  ->  floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops.quantization import integer_range
from graphopt.ir.qdq.integer_forms import unfold
from graphopt.ir.qdq.numbers import stored
from graphopt.ir.qdq.regions import MOVES, label_of
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector

_MOVES = tuple(op for op in MOVES if op != "pad")
"""The zeros that a pad puts in are integers."""

_RANGES = {"relu": (0.0, math.inf), "sigmoid": (0.0, 1.0), "softmax": (0.0, 1.0), "tanh": (-1.0, 1.0)}
"""The least and the largest number that an op gives."""


@dataclass(frozen=True)
class Dequantize(Pass):
    """Compute in floats what a model computes in integers, for targets that have no kernels for these.

    Stored integers become the floats that they stand for, exactly. Activations are not rounded any more. They are still
    clipped to the range of their integers, as a relu or clip may have been left to that range; the clip is left out
    where the numbers are known to lie within it. A site is a dequantize; it is declined where its integers are an input
    of the model or come from anything but a quantize of the same scale, and where their range is no stored one.
    """

    name = "dequantize"
    stage = Stage.LOWER

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def within(self) -> Dequantize:
        return self

    def run(self, graph: Graph, context: Context) -> None:
        unfold(graph)
        clipped: dict[Node, Value] = {}
        for site in context.sites(graph, Selector("dequantize"), self.ignore):
            try:
                graph.replace(site, _floats(graph, site, clipped))
            except Declined as declined:
                context.decline(site, declined.decline)


def _floats(graph: Graph, site: Node, clipped: dict[Node, Value]) -> Value:
    """What a dequantize gives without rounding. clipped: what stands for each quantize so far.

    Raises Declined where that is not known.
    """
    dtype = site.result.dtype or torch.float32
    tensor = stored(graph, site.result)
    if tensor is not None:
        return graph.add_constant(tensor.to(dtype), site.required("x").name)
    x = _before(graph, site.required("x"), site, clipped)
    return x if x.dtype == dtype else graph.emit("cast", x, dtype=dtype, at=site)


def _before(graph: Graph, integers: Value, site: Node, clipped: dict[Node, Value]) -> Value:
    """The floats behind some integers: what their quantize reads, clipped and moved as they are. Raises Declined."""
    maker = integers.producer
    if maker is not None and maker.kind == "quantize" and _same_scale(graph, maker, site):
        if maker not in clipped:
            clipped[maker] = _clipped(graph, maker)
        return clipped[maker]
    whole = site.required("scale").rank == 0  # else an axis may have moved
    if maker is None or maker.kind not in _MOVES or not whole:
        raise Declined(Decline("integers_from_elsewhere", maker=label_of(integers)))
    return graph.emit(maker, _before(graph, maker.input, site, clipped), *maker.operands[1:], at=maker)


def _clipped(graph: Graph, quantize: Node) -> Value:
    """What a quantize reads, clipped to what its integers stand for; not where that changes it by half a step at most.

    Raises Declined where their range is computed from something else, or is another for each channel.
    """
    x = quantize.input
    if _is_covered(quantize):
        return x
    scale, low, high = _integers_range(graph, quantize)
    least, largest = _range(x)
    is_low, is_high = least >= low - scale / 2, largest <= high + scale / 2
    if is_low and is_high:
        return x
    return graph.emit("clip", x, low=None if is_low else low, high=None if is_high else high, at=quantize)


def _is_covered(quantize: Node) -> bool:
    """Whether the scale is computed from the very numbers that are quantized, so that none lies outside."""
    maker = quantize.required("scale").producer
    if maker is None or maker.kind not in ("choose_qparams", "row_scale") or maker.input != quantize.input:
        return False
    if maker.kind == "choose_qparams":
        zero_point = quantize.operand("zero_point")
        return zero_point is not None and zero_point.producer == maker and quantize.attributes["bits"] == 8
    dtype = quantize.result.dtype
    return dtype is not None and bool(maker.attributes["largest"] <= _most(dtype, quantize.attributes["bits"])[1])


def _integers_range(graph: Graph, quantize: Node) -> tuple[float, float, float]:
    """The scale of a quantize, and the least and the largest number that its integers stand for. Raises Declined."""
    scale, zero_point = (
        torch.zeros(()) if value is None else graph.constant(value)
        for value in (quantize.required("scale"), quantize.operand("zero_point"))
    )
    dtype = quantize.result.dtype
    if scale is None or zero_point is None or dtype is None:
        raise Declined(Decline("range_not_stored"))
    step, zero = scale.float().unique(), zero_point.float().unique()  # as dequantize computes
    if step.numel() > 1 or zero.numel() > 1:
        raise Declined(Decline("range_not_stored"))
    least, largest = (float((bound - zero) * step) for bound in _most(dtype, quantize.attributes["bits"]))
    return float(step), least, largest


def _most(dtype: torch.dtype, bits: int) -> tuple[float, float]:
    """The least and the largest number that a quantize gives."""
    if dtype.is_floating_point:
        return -torch.finfo(dtype).max, torch.finfo(dtype).max
    return integer_range(dtype, bits)


def _range(value: Value) -> tuple[float, float]:
    """The least and the largest number that a value can hold, by the op behind it."""
    maker = value.producer
    if maker is None:
        return -math.inf, math.inf
    if maker.kind in _MOVES:
        return _range(maker.input)
    if maker.kind == "clip":
        least, largest = _range(maker.input)
        low, high = maker.attributes["low"], maker.attributes["high"]
        return least if low is None else max(least, low), largest if high is None else min(largest, high)
    return _RANGES.get(maker.kind, (-math.inf, math.inf))


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
