"""What a model takes or returns: the names of its tensors, and how to rebuild the whole from them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

Path = tuple[Any, ...]
"""The keys, places and fields that lead to a leaf of a structure."""


@dataclass(frozen=True)
class Structure:
    """What a model returns: its tensors' names, how to rebuild the result from them, their places among its leaves."""

    names: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]
    places: list[int]


@dataclass(frozen=True)
class Output:
    """A placeholder for output `index` of a graph, in the structure of what a model returns."""

    index: int


def plain_structure(rebuild: Callable[[list[Any]], Any], count: int) -> Any:
    """What a model returns, with an `Output` for each tensor; mappings such as ModelOutput become dicts, and so do
    dataclasses."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [plain(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if _is_record(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return value

    return plain(rebuild([Output(index) for index in range(count)]))


def flattened(value: Any) -> tuple[list[tuple[Path, Any]], Callable[[Sequence[Any]], Any]]:
    """The leaves of a structure with their paths, in order, and a function that rebuilds it from as many leaves.

    Structures are what torch's pytrees know (lists, tuples, dicts, ModelOutputs) and other dataclasses.
    """
    leaves, tree = pytree.tree_flatten_with_path(value)
    found: list[tuple[Path, Any]] = []
    makers: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
    for keys, leaf in leaves:
        path = tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in keys)
        inner, make = _fields(leaf) if _is_record(leaf) else ([((), leaf)], _only)
        found += [((*path, *rest), one) for rest, one in inner]
        makers.append((len(inner), make))

    def rebuild(given: Sequence[Any]) -> Any:
        parts, start = [], 0
        for count, make in makers:
            parts.append(make(given[start : start + count]))
            start += count
        return pytree.tree_unflatten(parts, tree)

    return found, rebuild


def _is_record(value: Any) -> bool:
    """Whether a value is of a dataclass that torch does not take apart by itself."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Output)


def _fields(record: Any) -> tuple[list[tuple[Path, Any]], Callable[[Sequence[Any]], Any]]:
    leaves, rebuild = flattened({field.name: getattr(record, field.name) for field in dataclasses.fields(record)})

    def make(given: Sequence[Any]) -> Any:
        made = copy.copy(record)
        for name, value in rebuild(given).items():
            object.__setattr__(made, name, value)  # also of a frozen dataclass
        return made

    return leaves, make


def _only(given: Sequence[Any]) -> Any:
    return given[0]


def structure_of(result: Any, sizes: Collection[int] = ()) -> Structure:
    """The structure of what a model returned. Raises CaptureError when there is no tensor in it.

    sizes: the places of leaves that are integers computed from the sizes of the inputs; they are outputs, as tensors.
    Other leaves that are no tensors come back as they are.
    """
    leaves, rebuild_all = flattened(result)
    places = [place for place, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor) or place in sizes]
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise CaptureError(f"the model returns a {type(result).__name__} without a tensor in it")
    constants = [None if place in places else leaf for place, (_, leaf) in enumerate(leaves)]

    def rebuild(outputs: list[Any]) -> Any:
        filled = list(constants)
        for place, output in zip(places, outputs, strict=True):
            filled[place] = int(output) if place in sizes and not isinstance(output, Output) else output
        return rebuild_all(filled)

    return Structure(tuple(_leaf_name(leaves[place][0]) for place in places), rebuild, places)


def _leaf_name(path: Path) -> str:
    if not path:
        return "output"
    return ".".join(map(str, path)) if isinstance(path[0], str) else "output_" + "_".join(map(str, path))
