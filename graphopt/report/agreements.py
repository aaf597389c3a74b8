"""How close outputs are to those of the original."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.numerics import metrics

if TYPE_CHECKING:

    pass
    pass


def agreement(output: str, reference: Tensor, candidate: Tensor) -> Agreement:
    """How close one output is to its reference. Raises ValueError when the shapes differ."""
    return Agreement(
        output,
        metrics.sqnr(reference, candidate),
        metrics.cosine(reference, candidate),
        metrics.max_error(reference, candidate),
    )


def worst(agreements: Iterable[Agreement]) -> Agreement:
    """The worst of each figure over several runs of one output; NaN is worse than any number."""
    seen = list(agreements)
    return Agreement(
        seen[0].output,
        min((one.sqnr for one in seen), key=lambda figure: -math.inf if math.isnan(figure) else figure),
        min((one.cosine for one in seen), key=lambda figure: -math.inf if math.isnan(figure) else figure),
        max((one.max_error for one in seen), key=lambda figure: math.inf if math.isnan(figure) else figure),
    )


@dataclass(frozen=True)
class Agreement:
    """How close one output is to the original's: SQNR in dB, cosine similarity, largest absolute difference."""

    output: str
    sqnr: float
    cosine: float
    max_error: float
