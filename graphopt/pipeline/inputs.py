"""Moments of the inputs of weights on the calibration batches, computed once for weights that read the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.numerics.moments import Covariance, Mean, Norm, QuantizedMoments, Rows
from graphopt.numerics.quantize import Grid
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import Weight

S = TypeVar("S", Norm, Mean, Covariance, QuantizedMoments)


def unexercised(what: str) -> str:
    """The message for values that are empty, or all padding, in every batch."""
    return f"no calibration batch has numbers for {what}; add batches that do, or name what reads it in ignore"


def covariances(graph: Graph, context: Context, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """Of each weight, the mean of x xᵀ over the inputs x of all its sites: float64 (groups, features, features).

    Weights with the same inputs come one after the other, not in the given order. The graph must not change until the
    last is read. Raises UsageError without calibration, and where all batches leave a weight's inputs empty or padded.
    """
    return _observed(graph, context, weights, _anywhere(Covariance), Covariance.matrix)


def affine(graph: Graph, context: Context, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """As `covariances`, with one more input that is always 1, whose row holds the means of the others."""
    return _observed(graph, context, weights, _anywhere(Covariance), Covariance.affine)


def quantized_moments(
    graph: Graph, context: Context, weights: Sequence[Weight], grids: Mapping[Value, Grid]
) -> Iterator[tuple[Weight, Tensor]]:
    """As `affine`: r rᵀ of the quantized inputs r, and the cross moments x rᵀ with the float inputs x.

    Both are in one tensor (`QuantizedMoments.affine`). grids: the quantization of the input of every site.
    """

    def statistic(value: Value, features: int, rows: Rows | None) -> QuantizedMoments:
        return QuantizedMoments(features, rows, grids[value])

    return _observed(graph, context, weights, statistic, QuantizedMoments.affine)


def norms(graph: Graph, context: Context, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """As `covariances`, the root mean square of each input: float64 (groups, features)."""
    squares = _observed(graph, context, weights, _anywhere(Norm), lambda norm: norm.norms().square())
    return ((weight, mean.sqrt()) for weight, mean in squares)


def means(graph: Graph, context: Context, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Tensor]]:
    """As `covariances`, the mean of each input: float64 (groups, features)."""
    return _observed(graph, context, weights, _anywhere(Mean), Mean.mean)


def _anywhere(statistic: Callable[[int, Rows | None], S]) -> Callable[[Value, int, Rows | None], S]:
    """A statistic that is the same for all values."""
    return lambda value, features, rows: statistic(features, rows)


def _observed(
    graph: Graph,
    context: Context,
    weights: Sequence[Weight],
    statistic: Callable[[Value, int, Rows | None], S],
    mean: Callable[[S], Tensor],
) -> Iterator[tuple[Weight, Tensor]]:
    """Each weight with the mean over all rows that it multiplies. mean: of one statistic."""
    readers: dict[tuple[tuple[Value, Rows | None], ...], list[Weight]] = {}
    for weight in weights:
        readers.setdefault(tuple((site.input, _rows(site)) for site in weight.sites), []).append(weight)
    wanted = (
        (value, statistic(value, reading[0].tensor[0].numel(), rows))
        for inputs, reading in readers.items() for value, rows in inputs
    )  # fmt: skip
    seen = context.statistics(graph, wanted)
    for inputs, reading in readers.items():
        several = [one for one in [next(seen) for _ in inputs] if one.count]
        if not several:
            raise UsageError(unexercised(f"the input of {reading[0].sites[0].label}"))
        moments = _weighted_mean(several, mean)
        several.clear()  # each may be as large as the moments
        for weight in reading:
            yield weight, moments


def _weighted_mean(statistics: Sequence[S], mean: Callable[[S], Tensor]) -> Tensor:
    """The mean over the rows of all statistics, by their counts."""
    if len(statistics) == 1:
        return mean(statistics[0])
    total = sum(statistic.count for statistic in statistics)
    parts = (mean(statistic) * (statistic.count / total) for statistic in statistics)
    found = next(parts)
    for part in parts:
        found = found + part
    return found


def _rows(site: Node) -> Rows | None:
    """How a conv cuts its input into rows; None for a linear, whose input has rows."""
    if site.kind != "conv":
        return None
    attributes = site.attributes
    kernel = tuple(int(size) for size in (site.required("weight").shape or ())[2:])
    stride, padding, dilation = (tuple(attributes[name]) for name in ("stride", "padding", "dilation"))
    return kernel, stride, padding, dilation, int(attributes["groups"])
