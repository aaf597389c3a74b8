"""How a captured model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from graphopt.capture.tracing import as_tensor
from graphopt.errors import CaptureError, nearest
from graphopt.ir.graph import Feeds, Graph


def as_model(graph: Graph, signature: Signature) -> Callable[..., Any]:
    """A function that is called like the model and runs the graph; for numpy inputs it returns numpy arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        feeds, numpy = signature.bind(args, kwargs)
        results: list[Any] = graph.evaluate(feeds, graph.outputs)
        if numpy:
            results = [result.numpy() if isinstance(result, Tensor) else result for result in results]
        return signature.rebuild(results)

    return call


@dataclass(frozen=True)
class Signature:
    """How a model is called: the names of its inputs in order and of its outputs, and the structure that it returns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]
    """Makes what the model returns from the graph's outputs."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Feeds, bool]:
        """Arguments as feeds, and whether they were numpy (then so is the result). Raises CaptureError on misuse."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            kwargs, args = {**args[0], **kwargs}, ()
        if len(args) > len(self.inputs):
            raise CaptureError(f"the model takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not {len(args)}")
        named = dict(zip(self.inputs, args, strict=False)) | dict(kwargs)
        for name in named:
            if name not in self.inputs:
                raise CaptureError(f"the model has no input {name!r}{nearest(name, self.inputs)}")
        missing = [name for name in self.inputs if name not in named]
        if missing:
            raise CaptureError(f"missing inputs: {', '.join(missing)}")
        numpy = all(isinstance(value, np.ndarray) for value in named.values())
        return {name: as_tensor(named[name], name) for name in self.inputs}, numpy
