"""What came in quantized is re-lowered in the target's form: each site gives what it gave, within one step.

End to end that cannot be held: roundings that fall the other way add up over layers to the size of the quantization
noise. So each site gets the very integers that reach it in the file, in both forms, and its own result is compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.errors import GraphError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import JOINED
from graphopt.numerics import metrics
from graphopt.report.records import Relowering

if TYPE_CHECKING:
    from graphopt.lowering.backend import Backend

_WEIGHTED = ("linear", "conv")
_OPS = (*_WEIGHTED, "matmul", *JOINED)
_FOLDED = "_int8"


@dataclass(frozen=True)
class _Site:
    """One op that computes on integers, in either form."""

    node: Node
    steps: tuple[Value, ...]
    """Its activations, in integers."""
    zero_points: tuple[Tensor, ...]
    result: Value
    """In integers where a quantize is behind, at most after a relu or clip; else in float."""
    zero_point: Tensor | None
    """Of the result; None where it is float."""

    @property
    def form(self) -> tuple[int, bool]:
        """How many activations it reads, and whether its result is in integers."""
        return len(self.steps), self.zero_point is not None


def compare(original: Graph, made: Graph, target: Backend, feeds: Mapping[str, Tensor]) -> Relowering:
    """Hold each site of `made`, as the target lowers and runs it, to the same site of `original`, at one batch.

    Raises LoweringError where the target cannot build a site by itself.
    """
    before, after = _sites(original), _sites(made)
    pairs: list[tuple[_Site, _Site]] = []
    left_out: dict[str, str] = {}
    for key in dict.fromkeys((*before, *after)):
        sites, others = before.get(key, []), after.get(key, [])
        if [one.form for one in sites] == [one.form for one in others]:
            pairs += zip(sites, others, strict=True)
        else:
            left_out.update({one.node.label: "it has no counterpart" for one in sites or others})
    wanted = list(dict.fromkeys(value for site, _ in pairs for value in site.steps))
    flow = dict(zip(wanted, original.evaluate(feeds, wanted), strict=True))
    distances: dict[str, float] = {}
    different = total = 0
    for site, other in pairs:
        given = {
            now: _moved(flow[then], zero, new, now)
            for then, now, zero, new in zip(site.steps, other.steps, site.zero_points, other.zero_points, strict=True)
        }
        (y,), label = _run(made, target, given, other.result), site.node.label
        # By itself: in the whole graph, an engine may move a quantize in front of a float that is fetched.
        alone = original.extract(list(dict.fromkeys(site.steps)), [site.result])
        (expected,) = alone.evaluate({value.name: flow[value] for value in site.steps}, alone.outputs)
        if site.zero_point is None or other.zero_point is None:
            distance = _in_tolerances(expected, y)
        else:
            away = ((expected.int() - site.zero_point) - (y.int() - other.zero_point)).abs()
            distance = float(away.max()) if away.numel() else 0.0
            different, total = different + int((away > 0).sum()), total + away.numel()
        distances[label] = max(distance, distances.get(label, 0.0))
    return Relowering(distances, different / total if total else 0.0, left_out)


def require_steps(found: Relowering) -> None:
    """Raise GraphError where a site is further than one step from what it was."""
    if found.furthest is not None and found.furthest[1] > 1:
        site, distance = found.furthest
        others = sum(one > 1 for one in found.distances.values()) - 1
        besides = f", and {others} more sites" if others else ""
        raise GraphError(
            f"given the same integers, {site} is {distance:.3g} steps from what the file computes there{besides}"
        )


def rounds_activations(graph: Graph) -> bool:
    """Whether a graph holds sites that this is about."""
    return any(True for _ in _found(graph))


def _sites(graph: Graph) -> dict[tuple[str, str], list[_Site]]:
    """By what a site keeps through passes: its module path and its op; in order, where several have the same."""
    sites = defaultdict[tuple[str, str], list[_Site]](list)
    for site in _found(graph):
        sites[site.node.path, site.node.kind.removesuffix(_FOLDED)].append(site)
    return sites


def _found(graph: Graph) -> Iterator[_Site]:
    for node in graph.nodes:
        if node.kind.removesuffix(_FOLDED) in _OPS and (site := _site(graph, node)) is not None:
            yield site


def _site(graph: Graph, node: Node) -> _Site | None:
    """An op on integers whose scales are stored; None of any other."""
    read: list[tuple[Value, Value | None]]
    if node.kind.endswith(_FOLDED):
        names = [("a", "a_zero_point"), ("b", "b_zero_point")] if node.kind == "add_int8" else [("x", "zero_point")]
        read = [(node.required(steps), node.required(zero)) for steps, zero in names]
        quantized = None if node.kind == "linear_int8" else node
        zero_point = None if quantized is None else node.required("y_zero_point")
    else:
        values = [node.input] if node.kind in _WEIGHTED else [value for value in node.operands if value is not None]
        makers = [value.producer for value in values]
        if not all(one is not None and one.kind == "dequantize" for one in makers):
            return None
        read = [(one.required("x"), one.operand("zero_point")) for one in makers if one is not None]
        quantized = _quantize_behind(node)
        zero_point = None if quantized is None else quantized.operand("zero_point")
    read = [(steps, zero) for steps, zero in read if not steps.is_constant]
    zeros = [_stored(graph, zero) for _, zero in read]
    stored = [zero for zero in zeros if zero is not None]
    if not read or len(stored) != len(zeros):
        return None
    steps = tuple(steps for steps, _ in read)
    if quantized is None or node.kind.removesuffix(_FOLDED) == "linear":  # which is read in float
        return _Site(node, steps, tuple(stored), node.result, None)
    number = _stored(graph, zero_point)
    return None if number is None else _Site(node, steps, tuple(stored), quantized.result, number)


def _quantize_behind(node: Node) -> Node | None:
    """The quantize that alone reads an op's result, at most behind a relu or clip."""
    for bounds in (("relu", "clip"), ()):
        reader = node.result.only_user
        if reader is None or reader.kind == "quantize":
            return reader
        if reader.kind not in bounds:
            return None
        node = reader
    return None


def _stored(graph: Graph, zero_point: Value | None) -> Tensor | None:
    """A stored zero point as one number, 0 where there is none; None of computed ones, or of several."""
    tensor = torch.zeros((), dtype=torch.int32) if zero_point is None else graph.constant(zero_point)
    if tensor is None or bool((tensor != tensor.flatten()[0]).any()):
        return None
    return tensor.flatten()[0].int()


def _in_tolerances(expected: Tensor, found: Tensor) -> float:
    """The largest distance of floats, in the units that lossless rewrites are held to (metrics.tolerance)."""
    finite = expected.isfinite() & found.isfinite()
    if not bool((finite | (expected == found) | (expected.isnan() & found.isnan())).all()):
        return math.inf
    relative, absolute = metrics.tolerance(expected.dtype)
    expected, found = expected[finite], found[finite]
    unit = relative * float(expected.abs().max()) + absolute if expected.numel() else 1.0
    return metrics.max_error(expected, found) / unit


def _moved(steps: Tensor, zero: Tensor, new: Tensor, like: Value) -> Tensor:
    """Integers about another zero point."""
    dtype = like.dtype or steps.dtype
    limits = torch.iinfo(dtype)
    return (steps.int() - zero + new).clamp(limits.min, limits.max).to(dtype)


def _run(made: Graph, target: Backend, given: Mapping[Value, Tensor], result: Value) -> list[Tensor]:
    """One site by itself, lowered and compiled."""
    lowered, _ = target.lower(made.extract(list(given), [result]))
    return target.compile(lowered)({value.name: tensor for value, tensor in given.items()})
