"""How far the outputs of a changed graph are from those of the unchanged one, on a few batches."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphopt.analysis.data_sizes import sized_by_data
from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.errors import UsageError
from graphopt.ir.graph import Feeds, Graph, Value
from graphopt.numerics import metrics
from graphopt.pipeline.calibration import MEMORY
from graphopt.report.records import Damage

Evaluate = Callable[[Graph], float]
"""A graph -> its metric; more is better."""


class Reference:
    """The outputs of a graph on a few batches, with which those of the changed graph are compared."""

    def __init__(self, graph: Graph, batches: Sequence[Feeds], evaluate: Evaluate | None = None) -> None:
        """Outputs of at most MEMORY bytes are kept; those of further batches are computed again when needed.

        Raises UsageError where `evaluate` gives no number for `graph`, and, without it, where the sizes of all outputs
        depend on data, so that none is compared.
        """
        self.graph, self.batches, self._evaluate = graph, batches, evaluate
        self._masks = mask_inputs(graph.inputs)
        fixed = [index for index, sized in enumerate(sized_by_data(graph)) if not sized]
        floats = [index for index in fixed if (dtype := graph.outputs[index].dtype) and dtype.is_floating_point]
        self._compared = floats or fixed
        if not self._compared and evaluate is None:
            raise UsageError(
                "no output can be compared, as the sizes of all of them depend on values of the inputs: let the model "
                "also return what they are chosen from"
            )
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self.baseline = None if evaluate is None else _metric(evaluate, graph, "the unchanged model")
        """The metric of the unchanged model."""

    def damage(self, changed: Graph, what: str = "the changed model") -> Damage:
        """How far the outputs of a changed graph are from the reference. what: its name in errors.

        Raises UsageError where `evaluate` gives no number for it.
        """
        count = len(self._compared)
        signal, noise, cosines = [0.0] * count, [0.0] * count, [list[float]() for _ in range(count)]
        for number, feeds in enumerate(self.batches):
            pairs = zip(self._expected(number), self._outputs(changed, feeds), strict=True)
            for index, (expected, found) in enumerate(pairs):
                energies = metrics.energies(expected, found)
                signal[index] += energies[0]
                noise[index] += energies[1]
                cosines[index].append(metrics.cosine(expected, found))
        return Damage(
            sqnr=metrics.worst(map(metrics.decibels, signal, noise)),
            cosine=metrics.worst(sum(several) / len(several) for several in cosines),
            worst_cosine=metrics.worst(figure for several in cosines for figure in several),
            metric=None if self._evaluate is None else _metric(self._evaluate, changed, what),
        )

    def _expected(self, number: int) -> list[Tensor]:
        if number in self._kept:
            return self._kept[number]
        outputs = self._outputs(self.graph, self.batches[number])
        size = sum(output.nbytes for output in outputs)
        if self._bytes + size <= MEMORY:
            self._kept[number] = outputs
            self._bytes += size
        return outputs

    def _outputs(self, graph: Graph, feeds: Feeds) -> list[Tensor]:
        """The outputs that are compared, without padding."""
        found = []
        for index, tensor in zip(self._compared, graph.evaluate(feeds, self._fetched(graph)), strict=True):
            real = real_positions(self.graph.outputs[index].shape, tensor, self._masks, feeds)
            found.append(tensor if real is None else tensor[real])
        return found

    def _fetched(self, graph: Graph) -> list[Value]:
        return [graph.outputs[index] for index in self._compared]


def _metric(evaluate: Evaluate, graph: Graph, what: str) -> float:
    figure: Any = evaluate(graph)
    if isinstance(figure, Tensor) and figure.numel() == 1:
        figure = figure.item()
    if isinstance(figure, bool) or not isinstance(figure, numbers.Real) or math.isnan(figure):
        raise UsageError(f"evaluate gives {figure!r} for {what}; it must return one number, larger where better")
    return float(figure)
