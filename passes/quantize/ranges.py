"""What calibration says of the activations that become integers, and what of it is worth a word to the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Value
from graphopt.ir.qdq.regions import label_of
from graphopt.numerics.observe import OUTLIER, ChannelMinMax, Observer, oddity
from graphopt.passes.quantize.islands import Islands
from graphopt.pipeline.context import Context
from graphopt.pipeline.inputs import unexercised


def observe(
    graph: Graph, context: Context, islands: Islands, observer: Callable[[], Observer]
) -> Mapping[Value, Observer]:
    """The range of each value that islands observe; those of one number, and outliers among channels, are noted.

    Raises UsageError where calibration never exercised a value.
    """
    values = islands.observed()
    if not values:
        return {}
    axes = {site.input: 1 if site.kind == "conv" else -1 for site in islands.static("linear", "conv")}
    channels = {value: value.shape[axis] for value, axis in axes.items() if value in values and value.shape is not None}
    wide = {value: ChannelMinMax(size, axes[value]) for value, size in channels.items() if isinstance(size, int)}
    wanted: list[tuple[Value, Observer]] = [*((value, observer()) for value in values), *wide.items()]
    seen = list(context.statistics(graph, wanted))
    found = dict(zip(values, seen, strict=False))
    if silent := [label_of(value) for value, one in found.items() if not one.count]:
        raise UsageError(f"quantize: {unexercised(', '.join(silent))}")
    strange = [f"{label_of(value)} is {what}" for value, one in found.items() if (what := oddity(one))]
    if strange:
        context.note(f"ranges that say little, as calibration saw nothing else: {', '.join(strange)}")
    _note_outliers(context, wide)
    return found


def _note_outliers(context: Context, wide: Mapping[Value, ChannelMinMax]) -> None:
    parts = []
    for value, one in wide.items():
        if one.count and (channels := one.outliers()):
            sizes = one.magnitudes()
            times = float(sizes.max() / sizes[sizes > 0].median())
            named = ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
            parts.append(f"{label_of(value)} ({len(channels)} of {one.channels}: {named}; up to {times:.0f} times)")
    if parts:
        context.note(
            f"channels that reach over {OUTLIER:.0f} times as far as the median channel, which the others' precision "
            f"pays for: {', '.join(parts)}"
        )
