"""linear(x, V), linear(x, W)  ->  slices of linear(x, [V; W])."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from graphopt.ir.graph import Graph, Node, Value
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class MergeLinear(Pass):
    """Make one linear of those that read the same value, and slice its result.

    Float, quantized (dequantize of a stored weight) and int8 linears alike, each with its own kind. A linear alone on
    its input is not eligible. Declined: a bias that the graph computes, and a weight that another node reads too.
    """

    name = "merge-linear"
    stage = Stage.LOWER
    lossless = True

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def run(self, graph: Graph, context: Context) -> None:
        groups: dict[Hashable, list[Node]] = defaultdict(list)
        for site in context.sites(graph, Selector("linear", "linear_int8"), self.ignore):
            rows = _rows(site)
            if rows:
                groups[_key(site, rows)].append(site)
        context.record.eligible.clear()  # only those in company are
        for group in groups.values():
            if len(group) < 2:
                continue
            context.record.eligible.extend(site.label for site in group)
            free = []
            for site in group:
                reason = _why_not(site)
                if reason:
                    context.decline(site, reason)
                else:
                    free.append(site)
            if len(free) == 1:
                context.decline(free[0], "no other linear on its input can be merged")
            elif free:
                _merge(graph, free)


def _rows(site: Node) -> tuple[Value, ...]:
    """The constants that have a row, or an entry, for each output: integers and scales, or the float weight."""
    weight = site.required("weight")
    if site.kind == "linear_int8":
        rows = [weight, site.required("weight_scale")]
    elif weight.producer is not None and weight.producer.kind == "dequantize":
        maker = weight.producer
        plain = maker.attributes["axis"] == 0 and maker.operand("zero_point") is None
        rows = [maker.required("x"), maker.required("scale")] if plain else []
    else:
        rows = [weight]
    return tuple(rows) if all(value.is_constant for value in rows) else ()


def _key(site: Node, rows: tuple[Value, ...]) -> Hashable:
    """What linears must have in common: the operands before the weight, dtypes, and the width of the input."""
    before = site.operands[: site.operands.index(site.required("weight"))]
    shape = rows[0].shape
    return site.kind, before, tuple(row.dtype for row in rows), shape[1:] if shape else None


def _why_not(site: Node) -> str | None:
    if site.bias is not None and not site.bias.is_constant:
        return "bias is computed by the graph"
    weight = site.required("weight")
    own = {site, weight.producer}
    others = [user for value in (weight, *_rows(site)) for user in value.users if user not in own]
    return f"weight is tied with {others[0].kind} {others[0].label}" if others else None


def _merge(graph: Graph, group: list[Node]) -> None:
    first = group[0]
    stacked = [
        graph.add_constant(torch.cat([_tensor(graph, row) for row in column]), column[0].name)
        for column in zip(*(_rows(site) for site in group), strict=True)
    ]
    before = first.operands[: first.operands.index(first.required("weight"))]
    if first.kind == "linear" and len(stacked) == 2:
        stacked = [graph.emit("dequantize", *stacked, axis=0, at=first)]
    merged = graph.emit(first.kind, *before, *stacked, _bias(graph, group), at=first)
    start = 0
    for site in group:
        end = start + _tensor(graph, _rows(site)[0]).shape[0]
        graph.replace(site, graph.emit("slice", merged, axis=-1, start=start, end=end, at=site))
        start = end


def _bias(graph: Graph, group: list[Node]) -> Value | None:
    """The biases one after the other, zeros where there is none; None where nobody has one."""
    given = [site.bias for site in group]
    present = [bias for bias in given if bias is not None]
    if not present:
        return None
    dtype = _tensor(graph, present[0]).dtype
    widths = [_tensor(graph, _rows(site)[0]).shape[0] for site in group]
    parts = [
        torch.zeros(width, dtype=dtype) if bias is None else _tensor(graph, bias)
        for bias, width in zip(given, widths, strict=True)
    ]
    return graph.add_constant(torch.cat(parts), present[0].name)


def _tensor(graph: Graph, value: Value) -> torch.Tensor:
    tensor = graph.constant(value)
    assert tensor is not None  # only constants are taken
    return tensor
