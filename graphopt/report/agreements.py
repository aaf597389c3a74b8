"""How close outputs are to those of the original."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from graphopt.numerics import metrics


@dataclass(frozen=True)
class Agreement:
    """How close one output is to the original's."""

    output: str
    sqnr: float
    """Signal to quantization noise, in dB; inf where the two are equal, nan where one holds NaN."""
    cosine: float
    """Cosine similarity, each tensor taken as one vector."""
    max_error: float
    """The largest absolute difference."""


def agreement(output: str, reference: Tensor, candidate: Tensor) -> Agreement:
    """How close one output is to its reference. Raises ValueError when the shapes differ."""
    return Agreement(
        output,
        metrics.sqnr(reference, candidate),
        metrics.cosine(reference, candidate),
        metrics.max_error(reference, candidate),
    )


def worst_of_each(examples: Iterable[Iterable[Agreement]]) -> list[Agreement]:
    """The worst of each output over several examples."""
    by_output: dict[str, list[Agreement]] = {}
    for one in chain.from_iterable(examples):
        by_output.setdefault(one.output, []).append(one)
    return [worst(several) for several in by_output.values()]


def worst(agreements: Iterable[Agreement]) -> Agreement:
    """The worst of each figure over several runs of one output; NaN is worse than any number."""
    runs = list(agreements)
    return Agreement(
        runs[0].output,
        metrics.worst(run.sqnr for run in runs),
        metrics.worst(run.cosine for run in runs),
        -metrics.worst(-run.max_error for run in runs),
    )
