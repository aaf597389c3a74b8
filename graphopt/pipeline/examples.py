"""The first batch of calibration or training as example inputs, where the user gives none."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.capture.arguments import is_structure
from graphopt.capture.decode import is_cache
from graphopt.capture.labels import is_label, optional_labels
from graphopt.capture.sources import declared_inputs
from graphopt.errors import UsageError, nearest, user_batches
from graphopt.pipeline.batches import SAMPLES, Argument, Batch, Batches, opened


def first_batch(model: Any, source: Any, *, name: str = "calibration") -> Any:
    """Example inputs of a model: the first batch of a source without its labels, as `capture` takes it.

    model: as `capture` takes it. source, name: as `Batches` takes them. Files and programs declare what they take; it
    is cast and given a batch axis as calibration is. Of a module, the arguments of `forward` tell: of a dict, those
    that it names (all, where it takes any and names none of them); of a tuple, as many leading tensors as it cannot do
    without. A row of a dataset, whose label is one number, gets a batch axis.

    Raises UsageError where the source gives its batches once, so that the first would be lost; where it is empty, or
    its batches do not fit; and where it cannot be told which tensors are inputs. CaptureError as `capture`.
    """
    if isinstance(source, Iterator) or (hasattr(source, "get_next") and not hasattr(source, "rewind")):
        raise UsageError(
            f"without example_inputs the first {name} batch is read twice, and a generator gives it once; pass a list "
            "or a DataLoader, or example_inputs"
        )
    if not isinstance(model, nn.Module):
        return _only(Batches(source, declared_inputs(model), name=name, steps=1)).feeds
    raw = _first_raw(source, name)
    given = raw[0] if isinstance(raw, tuple | list) and raw and isinstance(raw[0], Mapping) else raw
    by_name = isinstance(given, Mapping)
    names = _named(model, given, name) if by_name else _leading(model, given, name)
    if not by_name and isinstance(given, tuple | list) and any(map(is_structure, given)):
        return tuple(given[: len(names)])
    whole = {one: given[one] for one in names if not _may_be_array(given[one])} if by_name else {}
    names = [one for one in names if one not in whole]
    batch = _only(Batches([raw], [Argument(one) for one in names], name=name))
    feeds = _as_module_takes(model, batch)
    return {**feeds, **whole} if by_name else tuple(feeds.values())


def _may_be_array(value: Any) -> bool:
    """Whether a value is no structure of several arrays, no cache and no flag, and so an array or a number of a row."""
    return not (is_structure(value) or is_cache(value) or isinstance(value, bool | str))


def _only(batches: Batches) -> Batch:
    (batch,) = batches.with_batches()
    return batch


def _first_raw(source: Any, name: str) -> Any:
    """The first batch as the user gave it; of stacked arrays, the first rows."""
    if isinstance(source, Tensor | np.ndarray):
        return source[:SAMPLES]
    if isinstance(source, Mapping):
        return {key: array[:SAMPLES] for key, array in source.items() if getattr(array, "ndim", 1) > 0}
    for raw in user_batches(f"{name} batches", opened(source, name)):
        return raw
    raise UsageError(f"{name} holds no batch")


def _named(module: nn.Module, given: Mapping[str, Any], name: str) -> list[str]:
    """The entries of a dict that are inputs."""
    parameters = inspect.signature(module.forward).parameters
    takes = [key for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    inputs = [str(key) for key in given if key not in optional_labels(module, given) and given[key] is not None]
    named = [key for key in inputs if key in takes]
    for key in takes:
        if parameters[key].default is inspect.Parameter.empty and key not in given:
            raise UsageError(f"{name} batch 0 has no {key!r}{nearest(key, inputs)}")
    if takes_any:
        others = [key for key in inputs if key not in takes and not is_label(key)]
        if not named:
            return others
        if others:
            warnings.warn(
                f"example_inputs are the first {name} batch without what {type(module).__name__}.forward does not "
                f"name: {', '.join(others)}",
                stacklevel=3,
            )
    if not named:
        raise UsageError(
            f"{name} batch 0 holds {', '.join(inputs) or 'nothing'}, and {type(module).__name__}.forward takes "
            f"{', '.join(takes) or 'tensors by position'}"
        )
    return named


def _leading(module: nn.Module, given: Any, name: str) -> list[str]:
    """Names for the leading tensors that are inputs."""
    number = len(given) if isinstance(given, tuple | list) else 1
    parameters = inspect.signature(module.forward).parameters.values()
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in by_position if p.default is p.empty]
    if needed:
        return needed
    if number > 1 and len(by_position) != 1:
        raise UsageError(
            f"{name} batch 0 holds {number} tensors, and {type(module).__name__}.forward needs none of them, so which "
            "are its inputs cannot be told: give dicts, or example_inputs"
        )
    return [by_position[0].name if by_position else "0"]


def _as_module_takes(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The feeds with a batch axis, and not in the float64 of numpy where the module has other floats."""
    is_row = isinstance(batch.labels, Tensor) and batch.labels.dim() == 0
    floats = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    feeds = {name: tensor.unsqueeze(0) if is_row else tensor for name, tensor in batch.feeds.items()}
    if not floats or torch.float64 in floats:
        return feeds
    return {name: tensor.float() if tensor.dtype == torch.float64 else tensor for name, tensor in feeds.items()}
