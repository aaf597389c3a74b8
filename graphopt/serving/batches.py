"""How requests make one batch: which axes grow, what is appended, and whether answers stay as they are; measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from graphopt.serving import golden
from graphopt.serving.engine import stacked
from graphopt.serving.golden import Arrays, Case
from graphopt.serving.manifest import BatchTiming, Padding, TensorSpec

Run = Callable[[Arrays], Arrays]

SIZES = (1, 2, 4, 8, 16, 32)
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Of the batch table, and so what requests are padded to."""
SAME = 80.0
"""SQNR (dB) from which an answer counts as unchanged: floats that are added in another order, no other rounding."""
_SECONDS, _RUNS = 0.03, 3
"""How long a row of the batch table is timed, and at least how often."""
_SLOWEST = 0.5
"""Seconds of a call above which no larger batch is tried."""


@dataclass(frozen=True)
class Axes:
    """Which axes of a model grow with a request."""

    batched: bool
    """Whether axis 0 of all inputs and outputs is open."""
    length: str | None
    """The name of the axis that integer inputs have in common (tokens); None where there is none."""

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Axes:
        """The axes of a model; none for a decode step, whose cache belongs to one request."""
        if is_decoder(inputs):
            return cls(False, None)
        batched = all(one.shape and not isinstance(one.shape[0], int) for one in (*inputs, *outputs))
        tokens = [one for one in inputs if len(one.shape) == 2 and np.dtype(one.dtype).kind in "iu"]
        names = {one.shape[1] for one in tokens}
        name = next(iter(names)) if len(names) == 1 else None
        others = [one for one in inputs if one not in tokens and name in one.shape]
        return cls(batched, name if isinstance(name, str) and not others else None)


def is_decoder(inputs: Sequence[TensorSpec]) -> bool:
    """Whether a model is the decode step of a language model, with a key-value cache."""
    return any(one.name.startswith("past_key_values.") for one in inputs)


def axis_of(spec: TensorSpec, name: str) -> int | None:
    """Which axis of a tensor has a name; None for no axis."""
    return spec.shape.index(name) if name in spec.shape else None


def padded(arrays: Arrays, specs: Sequence[TensorSpec], padding: Padding, length: int) -> Arrays:
    """Inputs with the axis of `padding` grown to a length."""
    found = dict(arrays)
    for spec in specs:
        axis = axis_of(spec, padding.axis)
        if axis is None or spec.name not in arrays:
            continue
        array = arrays[spec.name]
        if missing := length - array.shape[axis]:
            widths = [(0, missing if one == axis else 0) for one in range(array.ndim)]
            found[spec.name] = np.pad(array, widths, constant_values=padding.values[spec.name])
    return found


def cropped(arrays: Arrays, specs: Sequence[TensorSpec], padding: Padding, length: int) -> Arrays:
    """Outputs without what padding added."""
    found = dict(arrays)
    for spec in specs:
        axis = axis_of(spec, padding.axis)
        if axis is not None and arrays[spec.name].shape[axis] > length:
            found[spec.name] = arrays[spec.name][(slice(None),) * axis + (slice(length),)]
    return found


def named_outputs(
    cases: Sequence[Case], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], axes: Axes
) -> tuple[TensorSpec, ...]:
    """Outputs with the name of the axis that grows at the axes that are as long in all cases, of two lengths or more.

    Files of older exporters name each axis of an output for itself.
    """
    if axes.length is None:
        return tuple(outputs)
    lengths = [length_of(case.inputs, inputs, axes.length) for case in cases]
    found = []
    for spec in outputs:
        shape = list(spec.shape)
        for axis, size in enumerate(shape):
            follows = [case.outputs[spec.name].shape[axis] for case in cases] == lengths
            if axis and not isinstance(size, int) and len(set(lengths)) > 1 and follows and axes.length not in shape:
                shape[axis] = axes.length
        found.append(TensorSpec(spec.name, spec.dtype, tuple(shape)))
    return tuple(found)


def measured_padding(
    run: Run, cases: Sequence[Case], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], pad_id: int,
    most: int | None,
) -> Padding | None:  # fmt: skip
    """How inputs may be padded, and whether answers stay as good; None for models without such an axis. What no case
    could be tried on, or fails on one, is not measured, and nothing is padded.

    most: the longest input that the model takes, where it has a limit.
    """
    axis = Axes.of(inputs, outputs).length
    if axis is None:
        return None
    specs = [one for one in inputs if axis_of(one, axis) is not None]
    values = {one.name: pad_id if _holds_tokens(one) else 0 for one in specs}
    padding = Padding(axis, values, False, None)
    plain, wide, tried = golden.Score(), golden.Score(), 0
    for case in cases:
        length = length_of(case.inputs, inputs, axis)
        longer = next((one for one in LENGTHS if one > length), 2 * length)
        if length == 0 or (most is not None and longer > most):
            continue
        try:
            answers = cropped(run(padded(case.inputs, inputs, padding, longer)), outputs, padding, length)
        except Exception:  # the engine's own exceptions have no base of theirs
            return padding
        plain.add(case.outputs, run(case.inputs))
        wide.add(case.outputs, answers)
        tried += 1
    if not tried:
        return padding
    return Padding(axis, values, wide.sqnr >= golden.least(plain.sqnr), wide.sqnr)


def has_rows(run: Run, case: Case) -> bool:
    """Whether outputs have as many rows as inputs: an open axis 0 may count something else, such as detections, and a
    file may take one row alone in spite of it."""
    own = {name: array[:1] for name, array in case.inputs.items()}
    for count in (2, 3):
        try:
            outputs = run(stacked([own] * count))
        except Exception:  # the engine's own exceptions have no base of theirs
            return False
        if not are_rows(outputs, count):
            return False
    return True


def are_rows(outputs: Arrays, count: int) -> bool:
    """Whether each output has so many rows, one for each of the inputs."""
    return all(array.shape[:1] == (count,) for array in outputs.values())


def measured_invariance(run: Run, case: Case, inputs: Sequence[TensorSpec]) -> float:
    """SQNR (dB) of the answer to one row beside different rows, against the answer beside a copy of itself; the worst.

    The batches are of one shape, so that the engine adds the same floats in the same order: what changes is what the
    row shares with its neighbours, such as the scale of dynamic quantization.
    """
    own = {name: array[:1] for name, array in case.inputs.items()}
    reference = _first(run(stacked([own, own])))
    return min(golden.sqnr(reference, _first(run(stacked([own, other])))) for other in _neighbours(own, inputs))


def measured_table(
    run: Run, example: Arrays, inputs: Sequence[TensorSpec], axes: Axes, *, most: int | None, clock: Any
) -> tuple[BatchTiming, ...]:
    """The batch table. example: one row. most: the longest input. clock: seconds; None leaves latencies out.

    A size is left out where a smaller one answers more rows a second.
    """
    lengths: Sequence[int | None] = [None] if axes.length is None else [
        one for one in LENGTHS if most is None or one <= most
    ] or [most]  # fmt: skip
    sizes = SIZES if axes.batched else SIZES[:1]
    rows: list[BatchTiming] = []
    for length in lengths:
        fitted = example if length is None else _as_long(example, inputs, axes.length, length)
        best = 0.0
        for size in sizes:
            batch = stacked([fitted] * size)
            try:
                seconds = 0.0 if clock is None else _timed(partial(run, batch), clock)
            except Exception:  # longer than the model takes: the engine's own exceptions have no base
                return tuple(rows)
            if clock is not None and size / seconds < best * 1.02:
                break
            rows.append(BatchTiming(size, length, None if clock is None else round(seconds * 1e3, 4)))
            best = size / seconds if seconds else 0.0
            if seconds > _SLOWEST:
                break
        if clock is not None and rows and rows[-1].ms is not None and rows[-1].ms > 2e3 * _SLOWEST:
            break
    return tuple(rows)


def length_of(arrays: Mapping[str, Any], specs: Sequence[TensorSpec], axis: str) -> int:
    """How long the inputs are along an axis."""
    spec = next(one for one in specs if axis_of(one, axis) is not None and one.name in arrays)
    return int(arrays[spec.name].shape[spec.shape.index(axis)])


def _holds_tokens(spec: TensorSpec) -> bool:
    return "ids" in spec.name and "type" not in spec.name and "position" not in spec.name


def _first(outputs: Arrays) -> Arrays:
    return {name: array[:1] for name, array in outputs.items()}


def _neighbours(own: Arrays, inputs: Sequence[TensorSpec]) -> list[Arrays]:
    """Rows of the same shapes with other contents; masks stay as they are."""
    kept = {one.name for one in inputs if "mask" in one.name or one.dtype == "bool"}
    rows = []
    for of_integers, of_floats in _CHANGES:
        change = {name: of_floats if array.dtype.kind == "f" else of_integers for name, array in own.items()}
        rows.append({name: array if name in kept else change[name](array) for name, array in own.items()})
    return rows


_CHANGES: tuple[tuple[Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    (lambda array: array[..., ::-1], lambda array: array * array.dtype.type(8)),
    (lambda array: np.full_like(array, array.flat[0]), lambda array: -array),
    (lambda array: np.full_like(array, array.flat[-1]), lambda array: array / array.dtype.type(8)),
    (lambda array: np.roll(array, 1, -1), lambda array: np.roll(array, 1, -1) * array.dtype.type(3)),
)
"""What makes other integers (tokens that the model knows), and other floats, of those of a row."""


def _as_long(example: Arrays, specs: Sequence[TensorSpec], axis: str | None, length: int) -> Arrays:
    """An example whose contents are repeated, or cut, along an axis."""
    found = dict(example)
    for spec in specs:
        place = None if axis is None else axis_of(spec, axis)
        if place is not None:
            found[spec.name] = np.take(example[spec.name], np.arange(length) % example[spec.name].shape[place], place)
    return found


def _timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median seconds of a call."""
    call()
    seconds: list[float] = []
    start = clock()
    while len(seconds) < _RUNS or clock() - start < _SECONDS:
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return median(seconds)


CLOCK = time.perf_counter
