"""Numbers as strangers send them -> arrays; answers -> JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import UsageError

_DEEPEST = 64
"""Most axes of an array of numpy."""
_NO_NUMBERS = {str, bytes, dict, type(None)}


def array_of(given: Any, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """An array of a dtype: of numbers in nested lists, as JSON has them, or of another array.

    Integers are narrowed or widened where that keeps the numbers, integers become floats, and floats those of another
    width. Raises UsageError for anything else: ragged lists, what are no numbers, floats in place of integers, numbers
    beyond the dtype. name: of the input, for messages.
    """
    array = _array(given, dtype, name)
    if array.size == 0:
        return array.astype(dtype)
    if array.dtype.kind not in "iufb":
        raise UsageError(f"{name} holds no numbers, and should be {dtype}")
    if array.dtype == dtype:
        return array
    if (array.dtype.kind == "b") != (dtype.kind == "b") or (array.dtype.kind == "f" and dtype.kind in "iu"):
        raise UsageError(f"{name} is {array.dtype}, and should be {dtype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise UsageError(f"{name} holds numbers beyond {dtype}")
    with np.errstate(over="ignore"):  # which becomes infinity, and is refused
        return array.astype(dtype)


def reshaped(array: NDArray[Any], shape: Sequence[int], name: str) -> NDArray[Any]:
    """An array with another shape. Raises UsageError for another count, more axes, or larger ones, than numpy takes."""
    if array.size != math.prod(shape):
        raise UsageError(f"{name} has {array.size} numbers, and its shape has {math.prod(shape)}")
    try:
        return array.reshape(tuple(shape))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name} has a shape that no array can have: {len(shape)} axes") from error


def json_bytes(answer: Any) -> bytes:
    """JSON. NaN and infinity, which JSON lacks, are null."""
    try:
        return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(answer), separators=(",", ":"), allow_nan=False).encode()


def _array(given: Any, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    if isinstance(given, np.ndarray):
        return given
    if hasattr(given, "__array__"):
        return np.asarray(given)
    _require_numbers(given, dtype, name, 0)
    try:
        array = np.array(given)
        if array.dtype == np.object_ and dtype.kind == "f":  # integers beyond 64 bits
            array = np.array(given, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{name} is ragged: all its rows must be of one length") from error
    return array


def _require_numbers(given: Any, dtype: np.dtype[Any], name: str, depth: int) -> None:
    """Raise UsageError for lists with anything but numbers: numpy makes each number as wide as the longest text."""
    if depth > _DEEPEST:
        raise UsageError(f"{name} is nested more than {_DEEPEST} deep")
    several = given if isinstance(given, list | tuple) else [given]
    kinds = set(map(type, several))
    if kinds & _NO_NUMBERS:
        raise UsageError(f"{name} holds no numbers, and should be {dtype}")
    if kinds & {list, tuple}:
        for one in several:
            if isinstance(one, list | tuple):
                _require_numbers(one, dtype, name, depth + 1)


def _finite(answer: Any) -> Any:
    if isinstance(answer, Mapping):
        return {key: _finite(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [_finite(one) for one in answer]
    return None if isinstance(answer, float) and not math.isfinite(answer) else answer
