"""What a graph may be run on besides tensors: arrays of texts, sequences, maps, numbers of a type that torch lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphError

_COPIES = ("clone", "detach", "cpu", "contiguous")


class Untouched(Tensor):
    """Stands among feeds for `held`, which goes to the engine as it is.

    As a tensor it has the shape of an array that is held, and no numbers: it can be copied and cut like a batch, and
    whatever else is computed of it raises GraphError.
    """

    held: Any

    @classmethod
    def of(cls, value: Any) -> Self:
        """value: what the engine takes; an array of texts may be of numpy's text types or of objects."""
        if isinstance(value, cls):
            return value
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "US":
            value = np.asarray(value).astype(object)  # the only type of texts that engines take
        shape = np.shape(value) if isinstance(value, np.ndarray) else ()
        made = torch.zeros(shape, dtype=torch.uint8).as_subclass(cls)
        made.held = value
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, given = func.__name__, args[0] if args else None
        if isinstance(given, cls) and name in _COPIES:
            return given
        if isinstance(given, cls) and name in ("__getitem__", "unsqueeze") and isinstance(given.held, np.ndarray):
            cut = given.held[args[1]] if name == "__getitem__" else np.expand_dims(given.held, args[1])
            return cls.of(np.asarray(cut, given.held.dtype))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            raise GraphError("an input that holds texts, a sequence or a map has no numbers to compute with")
        return found
