"""Inputs that strangers send -> feeds that fit the model, or one sentence that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import UsageError, nearest
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import Manifest, TensorSpec


def checked(given: Mapping[str, Any], manifest: Manifest) -> Arrays:
    """Feeds for the model: arrays by name, in its dtypes.

    Integers are narrowed or widened where that keeps the numbers, and so are lists of numbers and floats of another
    width. Raises UsageError for names, dtypes and shapes that are not the model's, for ragged lists, for NaN and
    infinity, for empty batches, and for more tokens than the model takes.
    """
    specs = {one.name: one for one in manifest.inputs}
    for name in given:
        if name not in specs:
            raise UsageError(f"there is no input {name!r}{nearest(name, list(specs))}")
    if missing := [name for name in specs if name not in given]:
        raise UsageError(f"missing inputs: {', '.join(missing)}")
    feeds = {name: _array(given[name], spec) for name, spec in specs.items()}
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in specs.items():
        _require_shape(feeds[name], spec, sizes)
    _require_length(feeds, manifest)
    return feeds


def _array(given: Any, spec: TensorSpec) -> NDArray[Any]:
    """An array of the input's dtype."""
    wanted = np.dtype(spec.dtype)
    if isinstance(given, np.ndarray):
        array = given
    elif hasattr(given, "__array__"):
        array = np.asarray(given)
    else:
        try:
            array = np.array(given)
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"{spec.name} is ragged: all its rows must be of one length") from error
        if array.size == 0:
            array = array.astype(wanted)
    if array.dtype.kind not in "iufb":
        raise UsageError(f"{spec.name} holds no numbers, and should be {spec.dtype}")
    if array.dtype != wanted:
        array = _converted(array, wanted, spec)
    if spec.below is not None and array.size and (int(array.min()) < 0 or int(array.max()) >= spec.below):
        raise UsageError(f"{spec.name} holds {_outside(array, spec.below)}, and the model knows 0 to {spec.below - 1}")
    if wanted.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"{spec.name} holds NaN or infinity")
    return array


def _outside(array: NDArray[Any], below: int) -> int:
    """The first number that is no index."""
    return int(array[(array < 0) | (array >= below)].flat[0])


def _converted(array: NDArray[Any], wanted: np.dtype[Any], spec: TensorSpec) -> NDArray[Any]:
    if (array.dtype.kind == "b") != (wanted.kind == "b") or (array.dtype.kind == "f" and wanted.kind in "iu"):
        raise UsageError(f"{spec.name} is {array.dtype}, and should be {spec.dtype}")
    if wanted.kind in "iu" and array.size:
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise UsageError(f"{spec.name} holds numbers beyond {spec.dtype}")
    with np.errstate(over="ignore"):  # which becomes infinity, and is refused
        return array.astype(wanted)


def _require_shape(array: NDArray[Any], spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    """sizes: of the named axes of the inputs before, and of which input each is."""
    wanted = ", ".join("any" if one is None else str(one) for one in spec.shape)
    if array.ndim != len(spec.shape):
        raise UsageError(f"{spec.name} has the shape {list(array.shape)}, and should have [{wanted}]")
    for size, axis in zip(array.shape, spec.shape, strict=True):
        if isinstance(axis, int) and size != axis:
            raise UsageError(f"{spec.name} has the shape {list(array.shape)}, and should have [{wanted}]")
        if size == 0 and not (isinstance(axis, str) and axis.startswith("past")):
            raise UsageError(f"{spec.name} has the shape {list(array.shape)}, which holds nothing")
        if isinstance(axis, str) and axis.isidentifier():
            first, name = sizes.setdefault(axis, (size, spec.name))
            if first != size:
                raise UsageError(f"{name} and {spec.name} differ along {axis}: {first} and {size}")


def _require_length(feeds: Arrays, manifest: Manifest) -> None:
    most, padding = manifest.max_length, manifest.padding
    if most is None or padding is None:
        return
    for spec in manifest.inputs:
        if padding.axis in spec.shape:
            length = feeds[spec.name].shape[spec.shape.index(padding.axis)]
            if length > most:
                raise UsageError(f"{spec.name} has {length} tokens, and the model takes at most {most}")
