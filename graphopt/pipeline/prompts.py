"""Prompts -> the steps of a decoder with a cache: calibration gives whole prompts, the graph takes steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.capture.decode import IDS, MASK, PAST, POSITIONS, PRESENT, has_past
from graphopt.errors import UsageError, user_batches
from graphopt.ir.graph import Graph
from graphopt.pipeline.batches import SAMPLES, opened

STEPS = 4
"""Most steps that a prompt is cut into. A causal model computes the same for a token in a long step as in a short one,
so few steps show all of its activations. The first step has an empty cache."""


def in_steps(source: Any, graph: Graph, outputs: Sequence[str], name: str, most: int | None = None) -> Any:
    """A source of batches, its prompts cut into steps where the graph is a decode step, else as it is.

    A batch that holds the graph's cache is left as it is. A prompt is a dict with input_ids (batch, length), or these
    alone; its attention_mask is of ones unless given, and its position_ids count the tokens that the mask keeps.
    outputs: the names of the graph's outputs. name: what messages call the source. most: at most so many prompts are
    read.
    """
    if not _is_decode_step(graph, outputs):
        return source
    steps = _Steps(source, graph, outputs, name, most)
    return iter(steps) if isinstance(source, Iterator) else steps


def _is_decode_step(graph: Graph, outputs: Sequence[str]) -> bool:
    """Whether a graph is a decode step, which takes the cache and returns it with more in it."""
    inputs = [value.name for value in graph.inputs]
    return has_past(inputs) and IDS in inputs and f"{PRESENT}.0.key" in outputs


class _Steps:
    """The steps of the prompts of a source, from its beginning each time."""

    def __init__(self, source: Any, graph: Graph, outputs: Sequence[str], name: str, most: int | None) -> None:
        self.source, self.graph, self.name, self.most = source, graph, name, most
        self.inputs = {value.name: value for value in graph.inputs}
        self.past = [name for name in self.inputs if name.startswith(f"{PAST}.")]
        named = dict(zip(outputs, graph.outputs, strict=True))
        self.present = [named[PRESENT + name.removeprefix(PAST)] for name in self.past]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        batches = user_batches(f"{self.name} batches", self._batches())
        for number, raw in enumerate(itertools.islice(batches, self.most)):
            given = raw[0] if isinstance(raw, tuple | list) and raw and isinstance(raw[0], Mapping) else raw
            if isinstance(given, Tensor | np.ndarray):
                given = {IDS: given}
            if not isinstance(given, Mapping) or IDS not in given:
                raise UsageError(f"{self.name} batch {number} has no {IDS}, of which the steps of a prompt are made")
            if all(name in given for name in self.past):
                yield given
            else:
                yield from self._steps(given)

    def _batches(self) -> Iterable[Any]:
        """The batches; of stacked arrays, SAMPLES at a time."""
        if not isinstance(self.source, Mapping):
            return opened(self.source, self.name)
        starts = range(0, len(self.source[IDS]) if IDS in self.source else 1, SAMPLES)
        return [{name: array[start : start + SAMPLES] for name, array in self.source.items()} for start in starts]

    def _steps(self, prompt: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        ids = _matrix(prompt[IDS])
        mask = _matrix(prompt[MASK]) if MASK in prompt else torch.ones_like(ids)
        positions = _matrix(prompt[POSITIONS]) if POSITIONS in prompt else (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = {name: self._empty(name, len(ids)) for name in self.past}
        for part in torch.arange(ids.shape[1]).tensor_split(min(STEPS, ids.shape[1])):
            start, end = int(part[0]), int(part[-1]) + 1
            own = {IDS: ids[:, start:end], MASK: mask[:, :end], POSITIONS: positions[:, start:end]}
            step = {**prompt, **{name: tensor for name, tensor in own.items() if name in self.inputs}, **cache}
            yield step
            if end < ids.shape[1]:
                feeds = {name: torch.as_tensor(step[name]) for name in self.inputs}
                cache = dict(zip(self.past, self.graph.evaluate(feeds, self.present), strict=True))

    def _empty(self, name: str, batch: int) -> Tensor:
        """An empty cache, of shape (batch, heads, 0, size of a head). Raises UsageError where these are unknown."""
        shape = self.inputs[name].shape
        if shape is None or len(shape) != 4 or not all(isinstance(shape[axis], int) for axis in (1, 3)):
            raise UsageError(
                f"prompts cannot be cut into steps, since the heads of {name} and their size are not known: give "
                f"{self.name} batches that hold it"
            )
        return torch.zeros(batch, int(shape[1]), 0, int(shape[3]), dtype=self.inputs[name].dtype)


def _matrix(array: Any) -> Tensor:
    """Integers (batch, length); a row of a dataset gets the batch."""
    tensor = torch.as_tensor(array).cpu()
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
