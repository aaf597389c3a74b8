"""Inputs that strangers send -> feeds that fit the model, or one sentence that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import UsageError, nearest
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import Manifest, TensorSpec
from graphopt.serving.numbers import array_of


def checked(given: Mapping[str, Any], manifest: Manifest) -> Arrays:
    """Feeds for the model: arrays by name, in its dtypes (`numbers.array_of`).

    Raises UsageError for names, dtypes and shapes that are not the model's, for ragged lists, for NaN and
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
    """An array of the input's dtype, whose numbers the model takes."""
    array = array_of(given, np.dtype(spec.dtype), spec.name)
    if spec.below is not None and array.size and (int(array.min()) < 0 or int(array.max()) >= spec.below):
        raise UsageError(f"{spec.name} holds {_outside(array, spec.below)}, and the model knows 0 to {spec.below - 1}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"{spec.name} holds NaN or infinity")
    return array


def _outside(array: NDArray[Any], below: int) -> int:
    """The first number that is no index."""
    return int(array[(array < 0) | (array >= below)].flat[0])


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
