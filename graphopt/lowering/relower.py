"""Checks a model that came in quantized and is re-lowered: each site gives what it gave in the file, within one step.

A step is one unit of the result's integers. The outputs of the whole model cannot be compared so closely: values that
round to the other neighbour add up over layers to the size of the quantization noise. So each site is given the same
integers in both graphs, those that reach it in the file, and its own results are compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import GraphError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import JOINED
from graphopt.lowering.backend import Backend
from graphopt.numerics import metrics
from graphopt.report.records import Relowering

_WEIGHTED = ("linear", "conv")
_OPS = (*_WEIGHTED, "matmul", *JOINED)
_INT8 = "_int8"
"""What the names of folded ops end with: linear_int8 is a linear."""


@dataclass(frozen=True)
class _Site:
    """An op that computes on integers: a folded op, or a float op between dequantize and quantize."""

    node: Node
    integers: tuple[Value, ...]
    """Its activations."""
    zero_points: tuple[Tensor, ...]
    """One number for each activation."""
    result: Value
    """Integers where a quantize follows, at most after a relu or clip; else floats."""
    zero_point: Tensor | None
    """Of the result; None where it is float."""

    @property
    def form(self) -> tuple[int, bool]:
        """How many activations it reads, and whether its result is in integers."""
        return len(self.integers), self.zero_point is not None


def compare_sites(captured: Graph, folded: Graph, target: Backend, feeds: Mapping[str, Tensor]) -> Relowering:
    """Compare each site of the folded graph, as the target lowers and runs it, with that of the captured, at one batch.

    Raises LoweringError where the target cannot build a site by itself.
    """
    before, after = _sites(captured), _sites(folded)
    pairs: list[tuple[_Site, _Site]] = []
    left_out: dict[str, Decline] = {}
    for key in dict.fromkeys((*before, *after)):
        sites, others = before.get(key, []), after.get(key, [])
        if [site.form for site in sites] == [site.form for site in others]:
            pairs += zip(sites, others, strict=True)
        else:
            left_out.update({site.node.label: Decline("no_counterpart") for site in sites or others})
    wanted = list(dict.fromkeys(value for site, _ in pairs for value in site.integers))
    flow = dict(zip(wanted, captured.evaluate(feeds, wanted), strict=True))
    distances: dict[str, float] = {}
    different = total = 0
    for site, other in pairs:
        shared = zip(site.integers, other.integers, site.zero_points, other.zero_points, strict=True)
        given = {now: _shifted(flow[then], zero, new_zero, now) for then, now, zero, new_zero in shared}
        (y,), label = _run(folded, target, given, other.result), site.node.label
        # By itself: in the whole graph, an engine may move a quantize in front of a float that is fetched.
        alone = captured.extract(list(dict.fromkeys(site.integers)), [site.result])
        (expected,) = alone.evaluate({value.name: flow[value] for value in site.integers}, alone.outputs)
        if site.zero_point is None or other.zero_point is None:
            distance = _in_tolerances(expected, y)
        else:
            steps = ((expected.int() - site.zero_point) - (y.int() - other.zero_point)).abs()
            distance = float(steps.max()) if steps.numel() else 0.0
            different, total = different + int((steps > 0).sum()), total + steps.numel()
        distances[label] = max(distance, distances.get(label, 0.0))
    return Relowering(distances, different / total if total else 0.0, left_out)


def require_within_one_step(found: Relowering) -> None:
    """Raise GraphError where the result of a site is more than one step from what the file computes."""
    if found.furthest is not None and found.furthest[1] > 1:
        site, distance = found.furthest
        others = sum(other > 1 for other in found.distances.values()) - 1
        besides = f", and {others} more sites" if others else ""
        raise GraphError(
            f"given the same integers, {site} is {distance:.3g} steps from what the file computes there{besides}"
        )


def has_quantized_sites(graph: Graph) -> bool:
    """Whether a graph holds ops that compute on integers."""
    return any(True for _ in _found(graph))


def _sites(graph: Graph) -> dict[tuple[str, str], list[_Site]]:
    """By module path and op, which passes keep: the sites that share both, in order."""
    sites = defaultdict[tuple[str, str], list[_Site]](list)
    for site in _found(graph):
        sites[site.node.path, site.node.kind.removesuffix(_INT8)].append(site)
    return sites


def _found(graph: Graph) -> Iterator[_Site]:
    for node in graph.nodes:
        if node.kind.removesuffix(_INT8) in _OPS and (site := _site(graph, node)) is not None:
            yield site


def _site(graph: Graph, node: Node) -> _Site | None:
    """The site of an op on integers with stored zero points; None for any other op."""
    read: list[tuple[Value, Value | None]]
    if node.kind.endswith(_INT8):
        names = [("a", "a_zero_point"), ("b", "b_zero_point")] if node.kind == "add_int8" else [("x", "zero_point")]
        read = [(node.required(integers), node.required(zero)) for integers, zero in names]
        quantized = None if node.kind == "linear_int8" else node
        zero_point = None if quantized is None else node.required("y_zero_point")
    else:
        values = [node.input] if node.kind in _WEIGHTED else [value for value in node.operands if value is not None]
        producers = [value.producer for value in values]
        dequantizes = [node for node in producers if node is not None and node.kind == "dequantize"]
        if len(dequantizes) < len(producers) or any(
            one.attributes["bits"] < 8 and not one.required("x").is_constant for one in dequantizes
        ):  # activations of fewer bits are floats between a quantize and a dequantize
            return None
        read = [(dequantize.required("x"), dequantize.operand("zero_point")) for dequantize in dequantizes]
        quantized = _quantize_behind(node)
        zero_point = None if quantized is None else quantized.operand("zero_point")
    read = [(integers, zero) for integers, zero in read if not integers.is_constant]
    zeros = [_stored(graph, zero) for _, zero in read]
    stored = [zero for zero in zeros if zero is not None]
    if not read or len(stored) != len(zeros):
        return None
    activations = tuple(integers for integers, _ in read)
    if quantized is None or node.kind.removesuffix(_INT8) == "linear":  # which is read in float
        return _Site(node, activations, tuple(stored), node.result, None)
    number = _stored(graph, zero_point)
    return None if number is None else _Site(node, activations, tuple(stored), quantized.result, number)


def _quantize_behind(node: Node) -> Node | None:
    """The quantize that is the only reader of an op's result, directly or after a relu or clip."""
    for bounds in (("relu", "clip"), ()):
        reader = node.result.only_user
        if reader is None or reader.kind == "quantize":
            return reader if reader is not None and reader.attributes["bits"] == 8 else None
        if reader.kind not in bounds:
            return None
        node = reader
    return None


def _stored(graph: Graph, zero_point: Value | None) -> Tensor | None:
    """A stored zero point as one number, 0 where it is left out; None where it is computed or has several values."""
    tensor = torch.zeros((), dtype=torch.int32) if zero_point is None else graph.constant(zero_point)
    if tensor is None or bool((tensor != tensor.flatten()[0]).any()):
        return None
    return tensor.flatten()[0].int()


def _in_tolerances(expected: Tensor, found: Tensor) -> float:
    """The largest distance of floats, in units of the tolerance for lossless rewrites (metrics.tolerance)."""
    finite = expected.isfinite() & found.isfinite()
    if not bool((finite | (expected == found) | (expected.isnan() & found.isnan())).all()):
        return math.inf
    relative, absolute = metrics.tolerance(expected.dtype)
    expected, found = expected[finite], found[finite]
    unit = relative * float(expected.abs().max()) + absolute if expected.numel() else 1.0
    return metrics.max_error(expected, found) / unit


def _shifted(integers: Tensor, zero: Tensor, new_zero: Tensor, like: Value) -> Tensor:
    """Integers with another zero point, in the dtype of `like`."""
    dtype = like.dtype or integers.dtype
    limits = torch.iinfo(dtype)
    return (integers.int() - zero + new_zero).clamp(limits.min, limits.max).to(dtype)


def _run(folded: Graph, target: Backend, given: Mapping[Value, Tensor], result: Value) -> list[Tensor]:
    """One site by itself, lowered and compiled."""
    lowered, _ = target.lower(folded.extract(list(given), [result]), lossless=True)
    return target.compile(lowered)({value.name: tensor for value, tensor in given.items()})
