"""linear(x, V), linear(x, W)  ->  parts of linear(x, [V; W]): what the pass merge-linear and the targets share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value

Split = Callable[[Value, Sequence[Node], Sequence[int]], Sequence[Value]]
"""(product, linears, widths) -> the part of the product's last axis that belongs to each linear."""


def merge_key(linear: Node) -> Hashable | None:
    """What linears must have in common to be merged: the operands before the weight, and how the weight is stored.

    linear: a node of linear or linear_int8. None where its weight is not stored with one row for each output.
    """
    rows, maker = _rows(linear), linear.required("weight").producer
    if not all(value.is_constant and value.rank for value in rows):
        return None
    before = linear.operands[: linear.operands.index(linear.required("weight"))]
    stored = tuple((row.dtype, row.shape[1:] if row.shape else None) for row in rows)
    return linear.kind, before, stored, None if maker is None else tuple(sorted(maker.attributes.items()))


def has_stored_bias(linear: Node) -> bool:
    """Whether a linear has no bias that the graph computes, or that is one number for all outputs."""
    return linear.bias is None or bool(linear.bias.is_constant and linear.bias.rank)


def weight_values(linear: Node) -> tuple[Value, ...]:
    """The values that hold a linear's weight: its operands, and the integers and scales of a dequantized one."""
    return tuple(dict.fromkeys((linear.required("weight"), *_rows(linear))))


def slices(product: Value, linears: Sequence[Node], widths: Sequence[int]) -> list[Value]:
    """One slice for each linear, where that linear stands."""
    parts, start = [], 0
    for linear, width in zip(linears, widths, strict=True):
        end = start + width
        parts.append(linear.graph.emit("slice", product, axis=-1, start=start, end=end, at=linear))
        start = end
    return parts


def merge(linears: Sequence[Node], split: Split = slices) -> dict[Value, Value]:
    """Emit the product of several linears at the first: by the result of each, the part of it to take instead.

    linears: two or more with one `merge_key` and stored biases, in topological order. Nothing is replaced.
    """
    first, graph = linears[0], linears[0].graph
    weight = first.required("weight")
    stacked = [
        graph.add_constant(torch.cat([_tensor(graph, row) for row in column]), column[0].name)
        for column in zip(*(_rows(linear) for linear in linears), strict=True)
    ]
    if weight.producer is not None:
        stacked = [graph.emit(weight.producer, *stacked, at=first)]
    widths = [_tensor(graph, _rows(linear)[0]).shape[0] for linear in linears]
    before = first.operands[: first.operands.index(weight)]
    product = graph.emit(first.kind, *before, *stacked, _bias(linears, widths), at=first)
    return dict(zip([linear.result for linear in linears], split(product, linears, widths), strict=True))


def _rows(linear: Node) -> tuple[Value, ...]:
    """What has a row, or an entry, for each output: integers and scales, or the float weight. A bias stands apart."""
    weight = linear.required("weight")
    if linear.kind == "linear_int8":
        return weight, linear.required("weight_scale")
    maker = weight.producer
    if maker is None or maker.kind != "dequantize":
        return (weight,)
    axis, block = maker.attributes["axis"], maker.attributes["block"]
    of_rows = axis == 1 if block else axis == 0
    return tuple(value for value in maker.operands if value is not None) if of_rows else (weight,)


def _bias(linears: Sequence[Node], widths: Sequence[int]) -> Value | None:
    """The biases one after the other, zeros where there is none; None where no linear has one."""
    graph = linears[0].graph
    given = [linear.bias for linear in linears if linear.bias is not None]
    if not given:
        return None
    dtype = _tensor(graph, given[0]).dtype
    parts = [
        torch.zeros(width, dtype=dtype) if linear.bias is None else _tensor(graph, linear.bias)
        for linear, width in zip(linears, widths, strict=True)
    ]
    return graph.add_constant(torch.cat(parts), given[0].name)


def _tensor(graph: Graph, value: Value) -> Tensor:
    tensor = graph.constant(value)
    assert tensor is not None  # as `merge_key` and `has_stored_bias` say
    return tensor
