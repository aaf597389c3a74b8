"""What a model returns: the names of its tensors, and how to rebuild the result from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError


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
    """What a model returns, with an `Output` for each tensor; mappings such as ModelOutput become dicts."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [plain(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value

    return plain(rebuild([Output(index) for index in range(count)]))


def structure_of(result: Any) -> Structure:
    """The structure of what a model returned. Raises CaptureError when there is no tensor in it."""
    leaves, tree = pytree.tree_flatten_with_path(result)
    places = [index for index, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not places:
        raise CaptureError(f"the model returns a {type(result).__name__} without a tensor in it")
    constants = [None if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]

    def rebuild(outputs: list[Any]) -> Any:
        filled = list(constants)
        for place, output in zip(places, outputs, strict=True):
            filled[place] = output
        return pytree.tree_unflatten(filled, tree)

    return Structure(tuple(_leaf_name(leaves[place][0]) for place in places), rebuild, places)


def _leaf_name(path: tuple[Any, ...]) -> str:
    keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
    if not keys:
        return "output"
    return ".".join(str(key) for key in keys) if isinstance(keys[0], str) else "output_" + "_".join(map(str, keys))
