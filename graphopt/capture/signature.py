"""How a captured model is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.capture.arguments import Constant, as_tensor
from graphopt.capture.decode import named_leaves
from graphopt.errors import CaptureError, nearest
from graphopt.ir.graph import Feeds, Graph, Value, dtype_name
from graphopt.ir.untouched import Untouched


def as_model(graph: Graph, signature: Signature) -> Callable[..., Any]:
    """A function that is called like the model and runs the graph; for numpy inputs it returns numpy arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        feeds, numpy = signature.bind(args, kwargs)
        results: list[Any] = graph.evaluate(in_dtypes(feeds, graph.inputs), graph.outputs)
        if numpy:
            results = [result.numpy() if isinstance(result, Tensor) else result for result in results]
        return signature.rebuild(results)

    return call


def in_dtypes(feeds: Feeds, inputs: Sequence[Value]) -> Feeds:
    """Feeds in the dtypes of a graph's inputs, where that keeps the numbers; floats are rounded, with a warning.

    An integer is widened, or narrowed where it fits. What differs in kind (an integer for a float) stays as it is, and
    so it is refused by whatever runs on it.
    """
    dtypes = {value.name: value.dtype for value in inputs}
    found = {name: _in_dtype(tensor, dtypes.get(name)) for name, tensor in feeds.items()}
    rounded = [
        f"{name} from {dtype_name(tensor.dtype)} to {dtype_name(found[name].dtype)}"
        for name, tensor in feeds.items()
        if found[name].dtype.itemsize < tensor.dtype.itemsize and tensor.is_floating_point()
    ]
    if rounded:
        warnings.warn(f"inputs are rounded to what the model takes: {', '.join(rounded)}", stacklevel=3)
    return found


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype is dtype:
        return tensor
    if tensor.is_floating_point() and dtype.is_floating_point:
        return tensor.to(dtype)
    integers = not (tensor.is_floating_point() or dtype.is_floating_point or torch.bool in (tensor.dtype, dtype))
    cast = tensor.to(dtype) if integers else tensor
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor


@dataclass(frozen=True)
class Signature:
    """How a model is called: the names of its inputs in order and of its outputs, and the structure that it returns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]
    """Makes what the model returns from the graph's outputs."""
    arguments: tuple[str, ...] = ()
    """What a call gives by position, where that is not the inputs: an argument may hold several, or be fixed."""
    constants: Mapping[str, Constant] = field(default_factory=dict)
    """What the capture fixed, by name."""
    optional: tuple[str, ...] = ()
    """Inputs that have a default, and are given by name."""
    untouched: tuple[str, ...] = ()
    """Inputs that are no tensors, or of a type that torch lacks: texts, sequences, maps."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Feeds, bool]:
        """Arguments as feeds, and whether they were numpy (then so is the result). Raises CaptureError on misuse."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            kwargs, args = {**args[0], **kwargs}, ()
        names = self.arguments or self.inputs
        if len(args) > len(names):
            raise CaptureError(f"the model takes {len(names)} inputs ({', '.join(names)}), not {len(args)}")
        named = self._leaves(dict(zip(names, args, strict=False)) | dict(kwargs))
        for name, value in named.items():
            if name in self.constants:
                self._require_constant(name, value)
            elif name not in (*self.inputs, *self.optional):
                raise CaptureError(f"the model has no input {name!r}{nearest(name, self.inputs)}")
        missing = [name for name in self.inputs if name not in named]
        if missing:
            raise CaptureError(f"missing inputs: {', '.join(missing)}")
        numpy = all(isinstance(named[name], np.ndarray) for name in self.inputs)
        given = [*self.inputs, *(name for name in self.optional if name in named)]
        feeds = {
            name: Untouched.of(named[name]) if name in self.untouched else as_tensor(named[name], name)
            for name in given
        }
        return feeds, numpy

    def _leaves(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments as values by input name: what is a structure, taken apart."""
        found: dict[str, Any] = {}
        for name, value in given.items():
            is_input = name in self.inputs or name in self.optional
            found |= {name: value} if is_input else named_leaves(name, value)
        return found

    def _require_constant(self, name: str, value: Any) -> None:
        fixed = self.constants[name]
        if type(value) is not type(fixed) or value != fixed:
            shown = f"a {type(value).__name__}" if isinstance(value, Tensor | np.ndarray) else repr(value)
            raise CaptureError(
                f"{name} was {fixed!r} in the example inputs, which fixed it, and is {shown} now: capture the model "
                "again with that in its example inputs"
            )
