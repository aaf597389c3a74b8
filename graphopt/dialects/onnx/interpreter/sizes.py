"""What a graph computes of sizes (the target of a Reshape, say), on Python numbers, which keep dynamic axes symbolic.

By kind of node: a function of a `Call` and of the inputs as arrays of numbers (None where one is left out), which
returns an array, a tuple of arrays, or None where the node must be computed as tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphopt.dialects.onnx.interpreter.call import Call, Numbers, Traced, numbers

Array = NDArray[np.object_]
MOST_COMPUTED = 64
"""Most entries of what is computed as numbers."""


def of_sizes(call: Call) -> Traced | tuple[Traced, ...]:
    """The results as `Numbers`, where the node reads nothing but sizes and small stored tensors; else None."""
    if call.kind in ("onnx.Shape", "onnx.Size"):
        return _shape(call)
    form = _FORMS.get(call.kind)
    if form is None or not any(isinstance(value, Numbers) for value in call.given):
        return None
    arrays = [_array(value, known) for value, known in zip(call.given, call.stored, strict=True)]
    if any(array is None and value is not None for array, value in zip(arrays, call.given, strict=True)):
        return None
    found = form(call, *arrays)
    if found is None:
        return None
    dtype = _dtype(call)
    if isinstance(found, tuple):
        return tuple(Numbers(np.asarray(one, dtype=object), dtype) for one in found)
    return Numbers(np.asarray(found, dtype=object), dtype)


def _array(value: Traced, known: Numbers | None) -> Array | None:
    found = value if isinstance(value, Numbers) else known
    return None if found is None or found.array.size > MOST_COMPUTED else found.array


def _dtype(call: Call) -> torch.dtype:
    if call.kind in _BOOLEAN:
        return torch.bool
    if call.kind == "cast":
        dtype: torch.dtype = call.attributes["dtype"]
        return dtype
    if call.kind == "onnx.ConstantOfShape":
        return torch.int64
    values = call.given[1:] if call.kind == "where" else call.given
    return next(value.dtype for value in values if value is not None)


def _shape(call: Call) -> Numbers:
    value = call.given[0]
    shape = list(value.array.shape if isinstance(value, Numbers) else call[0].shape)
    if call.kind == "onnx.Size":
        return numbers(math.prod(shape))
    return numbers(shape[call.attribute("start", 0) : call.attributes.get("end")])


# --- entry by entry ------------------------------------------------------------------------------------------------


def _each(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda call, array: np.frompyfunc(function, 1, 1)(array)


def _joined(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Of two inputs, or of any number of them (Min, Max)."""
    return lambda call, *arrays: reduce(np.frompyfunc(function, 2, 1), arrays)


def _divide(call: Call, a: Array, b: Array) -> Any:
    return np.frompyfunc(operator.truediv if _dtype(call).is_floating_point else _whole_part, 2, 1)(a, b)


def _whole_part(a: Any, b: Any) -> Any:
    """ONNX divides integers towards zero; a size that torch knows by a symbol is not negative."""
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b


def _cast(call: Call, array: Array) -> Any:
    """An integer stays one where its dtype becomes a float, so that a size is no less exact."""
    dtype: torch.dtype = call.attributes["dtype"]
    if dtype.is_floating_point:
        return array
    return np.frompyfunc(bool if dtype is torch.bool else torch.sym_int, 1, 1)(array)


def _where(call: Call, condition: Array, a: Array, b: Array) -> Any:
    return np.where(np.asarray(condition, dtype=bool), a, b)


def _compared(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return _joined(lambda a, b: bool(function(a, b)))


_BOOLEAN = (
    "onnx.Equal", "onnx.Greater", "onnx.GreaterOrEqual", "onnx.Less", "onnx.LessOrEqual", "onnx.Not", "onnx.And",
    "onnx.Or",
)  # fmt: skip


# --- what moves entries --------------------------------------------------------------------------------------------


def _whole(array: Array) -> list[int] | None:
    """Its numbers as integers, None where one is symbolic."""
    return None if any(not isinstance(item, int) for item in array.flat) else [int(item) for item in array.flat]


def _gather(call: Call, array: Array, indices: Array) -> Any:
    picked = _whole(indices)
    if picked is None:
        return None
    return np.take(array, np.asarray(picked, dtype=int).reshape(indices.shape), call.attribute("axis", 0))


def _slice(call: Call, array: Array, *bounds: Array | None) -> Any:
    if call.kind == "slice":
        axis, start, end = (call.attributes[name] for name in ("axis", "start", "end"))
        return array[(slice(None),) * (axis % array.ndim) + (slice(start, end),)]
    if "starts" in call.attributes:  # before opset 10
        starts, ends = call.attributes["starts"], call.attributes["ends"]
        axes, steps = list(call.attribute("axes", tuple(range(len(starts))))), [1] * len(starts)
    else:
        listed = [None if bound is None else _whole(bound) for bound in (*bounds, None, None)[:4]]
        if any(one is None and bound is not None for one, bound in zip(listed, bounds, strict=False)):
            return None
        starts, ends = listed[0] or [], listed[1] or []
        axes, steps = listed[2] or list(range(len(starts))), listed[3] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        array = array[(slice(None),) * (axis % array.ndim) + (slice(start, end, step),)]
    return array


def _axes(call: Call, axes: Array | None) -> tuple[int, ...] | None:
    if axes is not None:
        whole = _whole(axes)
        return None if whole is None else tuple(whole)
    found = call.attributes.get("axes")
    return None if found is None else tuple(found)


def _squeeze(call: Call, array: Array, axes: Array | None = None) -> Any:
    found = _axes(call, axes)
    return np.squeeze(array) if not found else np.squeeze(array, found)


def _unsqueeze(call: Call, array: Array, axes: Array | None = None) -> Any:
    found = _axes(call, axes)
    return None if found is None else np.expand_dims(array, found)


def _reshape(call: Call, array: Array, shape: Array) -> Any:
    sizes = _whole(shape)
    if sizes is None:
        return None
    return array.reshape([array.shape[axis] if size == 0 and array.size else size for axis, size in enumerate(sizes)])


def _split(call: Call, array: Array, sizes: Array | None = None) -> Any:
    axis = call.attribute("axis", 0)
    listed = call.attributes.get("split") if sizes is None else _whole(sizes)
    if listed is None:
        return tuple(np.array_split(array, call.results, axis))
    return tuple(np.split(array, np.cumsum(listed)[:-1], axis))


def _expand(call: Call, array: Array, shape: Array) -> Any:
    sizes = _whole(shape)
    if sizes is None or math.prod(sizes) > MOST_COMPUTED:
        return None
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(sizes)))


def _tile(call: Call, array: Array, repeats: Array) -> Any:
    listed = _whole(repeats)
    return None if listed is None or array.size * math.prod(listed) > MOST_COMPUTED else np.tile(array, listed)


def _constant_of_shape(call: Call, shape: Array) -> Any:
    sizes, value = _whole(shape), call.attributes.get("value")
    if sizes is None or len(sizes) != 1 or sizes[0] > MOST_COMPUTED or value is None or value.dtype is not torch.int64:
        return None
    return np.full(sizes, value.array.item(), dtype=object)


def _range(call: Call, start: Array, limit: Array, step: Array) -> Any:
    listed = [_whole(bound) for bound in (start, limit, step)]
    if any(one is None for one in listed):
        return None
    bounds = [one[0] for one in listed if one is not None]
    return np.asarray(range(*bounds), dtype=object) if len(range(*bounds)) <= MOST_COMPUTED else None


def _reduced(function: Callable[[Any, Any], Any], empty: Any) -> Callable[..., Any]:
    """Along all axes, of what has at most one."""

    def apply(call: Call, array: Array, axes: Array | None = None) -> Any:
        if array.ndim > 1:
            return None
        total = reduce(function, array.flat) if array.size else empty
        return np.asarray(total, dtype=object).reshape((1,) * array.ndim if call.attribute("keepdims", 1) else ())

    return apply


def _concat(call: Call, *arrays: Array) -> Any:
    return np.concatenate(arrays, call.attributes["axis"])


_FORMS: dict[str, Callable[..., Any]] = {
    "add": _joined(operator.add),
    "sub": _joined(operator.sub),
    "mul": _joined(operator.mul),
    "div": _divide,
    "pow": _joined(operator.pow),
    "sqrt": _each(torch.sym_sqrt),
    "reciprocal": _each(lambda x: 1 / x),
    "identity": lambda call, array, *others: array,
    "cast": _cast,
    "where": _where,
    "onnx.Neg": _each(operator.neg),
    "onnx.Abs": _each(abs),
    "onnx.Floor": _each(math.floor),
    "onnx.Ceil": _each(math.ceil),
    "onnx.Mod": _joined(operator.mod),
    "onnx.Min": _joined(torch.sym_min),
    "onnx.Max": _joined(torch.sym_max),
    "onnx.Sum": _joined(operator.add),
    "onnx.Equal": _compared(operator.eq),
    "onnx.Greater": _compared(operator.gt),
    "onnx.GreaterOrEqual": _compared(operator.ge),
    "onnx.Less": _compared(operator.lt),
    "onnx.LessOrEqual": _compared(operator.le),
    "onnx.Not": _each(lambda x: not x),
    "onnx.And": _joined(lambda a, b: bool(a and b)),
    "onnx.Or": _joined(lambda a, b: bool(a or b)),
    "onnx.Gather": _gather,
    "slice": _slice,
    "onnx.Slice": _slice,
    "concat": _concat,
    "squeeze": _squeeze,
    "onnx.Squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "onnx.Unsqueeze": _unsqueeze,
    "reshape": _reshape,
    "onnx.Reshape": _reshape,
    "onnx.Split": _split,
    "onnx.Expand": _expand,
    "onnx.Tile": _tile,
    "onnx.ConstantOfShape": _constant_of_shape,
    "onnx.Range": _range,
    "onnx.ReduceProd": _reduced(operator.mul, 1),
    "onnx.ReduceSum": _reduced(operator.add, 0),
    "onnx.ReduceMax": _reduced(torch.sym_max, 0),
    "onnx.ReduceMin": _reduced(torch.sym_min, 0),
}
