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
    pooled: float | None = None
    """Of an output with a vector for each token: the SQNR (dB) of its means over the tokens of each row. Errors that
    differ from token to token cancel out in these."""


def agreement(output: str, reference: Tensor, candidate: Tensor, real: Tensor | None = None) -> Agreement:
    """How close one output is to its reference, at real positions. Raises ValueError when the shapes differ.

    real: where there is no padding, boolean, the shape of the leading axes; with (batch, length) a vector (batch,
    length, width) is one of a token. None: everywhere.
    """
    kept = (reference, candidate) if real is None else (reference[real], candidate[real])
    pooled = None
    if real is not None and (real.dim(), reference.dim()) == (2, 3) and reference.is_floating_point():
        pooled = metrics.sqnr(*(_means(one, real) for one in (reference, candidate)))
    return Agreement(output, metrics.sqnr(*kept), metrics.cosine(*kept), metrics.max_error(*kept), pooled)


def _means(vectors: Tensor, real: Tensor) -> Tensor:
    """The means (batch, width) of vectors (batch, length, width) over the real positions of each row that has any."""
    present = real.any(1)
    weights = real[present].double().unsqueeze(-1)
    kept = vectors[present].double().masked_fill(weights == 0, 0.0)
    return kept.sum(1) / weights.sum(1)


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
        metrics.worst(pooled) if (pooled := [run.pooled for run in runs if run.pooled is not None]) else None,
    )
