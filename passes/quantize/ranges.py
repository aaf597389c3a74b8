"""Calibration of activations: the scale and the zero point of each value that becomes integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from graphopt.errors import UsageError, few
from graphopt.ir.graph import Graph, Value, shapes_text
from graphopt.ir.qdq.regions import label_of
from graphopt.numerics import quantize
from graphopt.numerics.observe import OUTLIER, ChannelMinMax, MinMax, Observer, oddity
from graphopt.passes.quantize.plan import QuantizationPlan
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.inputs import unexercised

_SOFTMAX = 1 / 256, 0
"""Scale and zero point of a softmax in integers: its results are between 0 and 1, and need no calibration."""


NAMED = 3
"""Most activations that are named of those that an example takes out of their ranges."""

OUTSIDE = 1.05
"""How many times the calibrated range an example's must span to be told: other data is seldom wholly inside."""

Activation = tuple[Value, int]
"""A value that is quantized, and to how many bits."""


@dataclass(frozen=True)
class Parameters:
    """Scale and zero point of an activation, among the constants of the graph."""

    scale: Value
    """Float32, (), > 0, in units of activation per step."""
    zero_point: Value
    """(); its dtype is that of the quantized activation. 0 for int8 and float8, which are symmetric about zero."""
    grid: quantize.Grid | None
    """The values that the quantized activation can have; None for float8, whose steps are not equal."""


def calibrate(
    graph: Graph, context: Context, plan: QuantizationPlan, observer: Callable[..., Observer]
) -> Mapping[Activation, Parameters]:
    """The parameters of each value that is quantized with a calibrated range.

    observer: makes what chooses a range, for a number of `steps`. Parameters are added to the constants of the graph;
    no node changes. Ranges of a single number, outliers among channels, and example inputs that leave the ranges are
    noted. Raises UsageError without calibration, and where calibration never exercised a value; ValueError, naming the
    node, where a range is not finite.
    """
    found: dict[Activation, Parameters] = {}
    for (value, bits), seen in _observe(graph, context, plan, observer).items():
        dtype = plan.static_dtype if bits == 8 else torch.uint8
        try:
            scale, zero_point = _scale_and_zero_point(seen, dtype, bits)
        except ValueError as error:
            raise ValueError(f"activation of {label_of(value)}: {error}") from error
        found[value, bits] = _stored(graph, scale, zero_point, dtype, bits)
    for node in plan.regions.joined:
        if node.kind == "softmax":
            found[node.result, 8] = _stored(graph, *_SOFTMAX, torch.uint8)
    for value, source in plan.regions.inherited.items():
        found[value, 8] = found[source, 8]
    return found


def _stored(graph: Graph, scale: float, zero_point: int, dtype: torch.dtype, bits: int = 8) -> Parameters:
    step, zero = torch.tensor(scale), torch.tensor(zero_point, dtype=dtype)
    grid = None
    if not dtype.is_floating_point:
        signed = dtype == torch.int8
        low, high = (-128, 127) if signed else (0, 2**bits - 1)
        grid = quantize.Grid(step, None if signed else zero, low, high, axis=None)
    return Parameters(graph.add_constant(step, "scale"), graph.add_constant(zero, "zero_point"), grid)


def _scale_and_zero_point(seen: Observer, dtype: torch.dtype, bits: int) -> tuple[float, int]:
    if dtype == torch.uint8:
        return quantize.activation_parameters(*seen.range(), bits=bits)
    return quantize.symmetric_scale(*seen.range(), largest=quantize.largest(dtype)), 0


def _observe(
    graph: Graph, context: Context, plan: QuantizationPlan, observer: Callable[..., Observer]
) -> Mapping[Activation, Observer]:
    """The range of each value that the plan observes."""
    activations = [*((value, 8) for value in plan.regions.observed), *plan.narrow]
    if not activations:
        return {}
    values = {value for value, _ in activations}
    axes = {site.input: 1 if site.kind == "conv" else -1 for site in plan.static("linear", "conv")}
    channels = {value: value.shape[axis] for value, axis in axes.items() if value in values and value.shape is not None}
    by_channel = {value: ChannelMinMax(size, axes[value]) for value, size in channels.items() if isinstance(size, int)}
    ranges = [(value, observer(steps=2**bits - 1)) for value, bits in activations]
    wanted: list[tuple[Value, Observer]] = [*ranges, *by_channel.items()]
    seen = list(context.statistics(graph, wanted))
    found = dict(zip(activations, seen, strict=False))
    if silent := [label_of(value) for (value, _), one in found.items() if not one.count]:
        raise UsageError(f"quantize: {unexercised(', '.join(silent))}")
    strange = [f"{label_of(value)} is {what}" for (value, _), one in found.items() if (what := oddity(one))]
    if strange:
        context.note(f"degenerate ranges (calibration saw only these values): {', '.join(strange)}")
    _note_outliers(context, by_channel)
    _note_outside(graph, context, {value: one.extremes for (value, _), one in found.items()})
    return found


def _note_outliers(context: Context, by_channel: Mapping[Value, ChannelMinMax]) -> None:
    parts = []
    for value, one in by_channel.items():
        if one.count and (channels := one.outliers()):
            sizes = one.magnitudes()
            times = float(sizes.max() / sizes[sizes > 0].median())
            named = ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
            parts.append(f"{label_of(value)} ({len(channels)} of {one.channels}: {named}; up to {times:.0f} times)")
    if parts:
        context.note(
            f"outlier channels (max_abs over {OUTLIER:.0f} times the median channel's; the other channels lose "
            f"precision): {', '.join(parts)}"
        )


def _note_outside(graph: Graph, context: Context, seen: Mapping[Value, tuple[float, float]]) -> None:
    """Name the example inputs whose activations leave what calibration saw, by value (smallest, largest): the integers
    cannot hold them."""
    for feeds in () if context.made_up else context.feeds:
        ranges = Calibration([feeds], graph.inputs).observe(graph, [(value, MinMax()) for value in seen])
        spans = {value: span for (value, (low, high)), one in zip(seen.items(), ranges, strict=True)
                 if one.count and (span := _times_the_range(low, high, *one.extremes)) > OUTSIDE}  # fmt: skip
        if not spans:
            continue
        furthest = sorted(spans, key=lambda value: -spans[value])
        named = few([f"{label_of(value)} ({spans[value]:.3g} times the range)" for value in furthest], NAMED)
        context.note(
            f"warning: the example input {shapes_text(feeds)} leaves the calibrated ranges of {len(spans)} of "
            f"{len(seen)} activations: {named}; calibrate on inputs like it, or use scheme=dynamic"
        )


def _times_the_range(low: float, high: float, least: float, most: float) -> float:
    """How many times the range (low, high) spans together with (least, most)."""
    both = max(high, most) - min(low, least)
    return both / (high - low) if high > low else 1.0 if both == 0 else math.inf
