"""How far two models are apart: SQNR, cosine, largest error and agreement of their outputs on the same inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.analysis.data_sizes import sized_by_data
from graphopt.analysis.propagation import propagate
from graphopt.capture.sources import capture
from graphopt.dialects.adapter import adapter
from graphopt.errors import GraphError, UsageError, outer_door, require_positive_integer, user_batches
from graphopt.ir.graph import Graph, Value
from graphopt.numerics import metrics
from graphopt.passes import REGISTRY
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.text import parse
from graphopt.report.agreements import Agreement, agreement, worst
from graphopt.report.records import Comparison, OutputComparison
from graphopt.result import Optimized


def compare(
    a: Any, b: Any, batches: Any, *, steps: int | None = None, sites: bool = False, custom_ops: Sequence[Any] = ()
) -> Comparison:
    """Compare two models on batches of inputs; `a` is the reference.

    a, b: an Optimized, an nn.Module, a Graph, or a path to .onnx. batches: as for calibration (`Calibration`); for two
    modules, dicts of keyword arguments, tuples of arguments, or tensors. steps: most batches to use. sites: compare the
    results of the sites inside too (`propagation.propagate`), of models that are graphs; both are simplified first, so
    that what a pass folds does not stand apart. That runs over the batches several times.
    Outputs are paired by name where the names are the same, else in order. An output whose sizes depend on data (the
    boxes that a detector keeps) is compared on the batches where both have the same; the result says where it was not.
    A module runs in the mode that it is in. custom_ops: of ONNX files, as `optimize` takes them.

    Raises UsageError when there is no batch, the outputs do not pair, or a model does not run on a batch; CaptureError
    where a file cannot be read; nothing but a GraphoptError.
    """
    with outer_door(GraphError, "the models cannot be compared"):
        if custom_ops:
            adapter("onnx").register(custom_ops)
        return _compared(a, b, batches, steps, sites)


def _compared(a: Any, b: Any, batches: Any, steps: int | None, sites: bool) -> Comparison:
    if steps is not None:
        require_positive_integer("steps", steps)
    first, second = _Runner(a, "the first model"), _Runner(b, "the second model")
    if sites and (first.graph is None or second.graph is None):
        which = a if first.graph is None else b
        raise UsageError(
            f"sites are compared in graphs, and a {type(which).__qualname__} has none; give what optimize returned, a "
            "Graph, or a path to an .onnx file"
        )
    inputs = first.inputs or second.inputs
    given = Calibration(batches, inputs, steps) if inputs else _limited(batches, steps)
    found: dict[str, list[tuple[Agreement, float | None, int]]] = {}
    sized = first.sized_by_data or second.sized_by_data
    left_out: dict[str, int] = {}
    count = 0
    for batch in given:
        count += 1
        for place, (name, x, y) in enumerate(_paired(first(batch), second(batch))):
            if x.shape != y.shape:
                if not (place < len(sized) and sized[place]):
                    raise UsageError(
                        f"output {name!r} has shape {list(x.shape)} in one model and {list(y.shape)} in the other"
                    )
                left_out[name] = left_out.get(name, 0) + 1
                continue
            rows = x.numel() // x.shape[-1] if x.dim() > 1 and x.shape[-1] > 1 else 0
            top1 = metrics.top1_agreement(x, y) if rows else None
            found.setdefault(name, []).append((agreement(name, x, y), top1, rows))
    if not count:
        raise UsageError("there is no batch to compare on")
    inside = None
    if sites and isinstance(given, Calibration):
        assert first.graph is not None and second.graph is not None
        inside = propagate(_simplified(first.graph), _simplified(second.graph), given)
    return Comparison([_over_batches(name, seen) for name, seen in found.items()], count, inside, left_out)


def _simplified(graph: Graph) -> Graph:
    return parse("simplify", REGISTRY).apply(graph, Context())


def _over_batches(name: str, seen: Sequence[tuple[Agreement, float | None, int]]) -> OutputComparison:
    figures = worst(one for one, _, _ in seen)
    total = sum(rows for _, _, rows in seen)
    top1 = sum((share or 0.0) * rows for _, share, rows in seen) / total if total else None
    return OutputComparison(name, figures.sqnr, figures.cosine, figures.max_error, top1)


def _paired(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Outputs of both by name, or in order where the names differ."""
    if set(a) == set(b):
        pairs = [(name, a[name], b[name]) for name in a]
    elif len(a) == len(b):
        pairs = [(name, x, y) for (name, x), y in zip(a.items(), b.values(), strict=True)]
    else:
        raise UsageError(f"the outputs do not pair: {', '.join(a)} and {', '.join(b)}")
    return iter(pairs)


class _Runner:
    """One model as a function from a batch to its outputs by name."""

    def __init__(self, model: Any, label: str) -> None:
        """label: what messages call it."""
        self._label = label
        self.inputs: tuple[Value, ...] = ()
        self.graph: Graph | None = None
        self._names: tuple[str, ...] | None = None
        if isinstance(model, str | Path):
            model = capture(model, "onnx", run=False).graph  # it is run on the batches
        if isinstance(model, Graph):
            self.graph, self.inputs, self._names = model, model.inputs, tuple(value.name for value in model.outputs)
            self._call: Callable[..., Any] = lambda **feeds: model.evaluate(feeds, model.outputs)
        elif isinstance(model, nn.Module):
            self._call = model
        elif isinstance(model, Optimized):
            # In the folded graph, ops on integers stand in place of the float ops that the other model has.
            self.graph, self.inputs, self._call = model.transformed, model.folded.inputs, model
        else:
            raise UsageError(
                f"cannot compare a {type(model).__qualname__}; give what optimize returned, an nn.Module, a Graph, "
                "or a path to an .onnx file"
            )

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad(), outer_door(UsageError, f"{self._label} does not run on a batch"):
            if isinstance(batch, Mapping):
                result = self._call(*batch.values()) if self._positional(batch) else self._call(**batch)
            else:
                result = self._call(*(batch if isinstance(batch, tuple | list) else (batch,)))
        if self._names is not None:
            result = dict(zip(self._names, result, strict=True))
        outputs = dict(_leaves("", result))
        if not outputs:
            raise UsageError(f"the model returns a {type(result).__qualname__} without a tensor in it")
        return outputs

    @cached_property
    def sized_by_data(self) -> list[bool]:
        """For each output of a graph, whether its sizes depend on values; nothing is known of a module's."""
        return [] if self.graph is None else sized_by_data(self.graph)

    def _positional(self, batch: Mapping[str, Any]) -> bool:
        """Whether a module calls its inputs by other names than the batch, so that their order must do."""
        if not isinstance(self._call, nn.Module):
            return False
        parameters = inspect.signature(self._call.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return not open_ended and any(name not in parameters for name in batch)


def _leaves(path: str, result: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a model returned, named by where they are: last_hidden_state, output_0, output."""
    if isinstance(result, Tensor | np.ndarray):
        yield path or "output", torch.as_tensor(result)
    elif isinstance(result, Mapping):
        for key, item in result.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        yield from _leaves(path, {field.name: getattr(result, field.name) for field in dataclasses.fields(result)})
    elif isinstance(result, tuple | list):
        for index, item in enumerate(result):
            yield from _leaves(f"{path or 'output'}_{index}", item)


def _limited(batches: Any, steps: int | None) -> Iterator[Any]:
    if isinstance(batches, Tensor | np.ndarray | Mapping | str) or not isinstance(batches, Iterable):
        raise UsageError(f"batches must be an iterable of batches, not one {type(batches).__qualname__}")
    for index, batch in enumerate(user_batches("batches", batches)):
        if steps is not None and index >= steps:
            return
        yield batch
