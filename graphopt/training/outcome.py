"""What a training leaves: its record, and the best weights so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Line = dict[str, Any]
"""One line of a training's record: a step ("step", "loss", its terms, "lr") or an evaluation ("step", "metric")."""


@dataclass
class Outcome:
    """What a training did."""

    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    metric: float | None = None
    """Of the weights that were kept."""


@dataclass
class Best:
    """The best weights so far; without `evaluate`, the latest whose loss was finite."""

    state: dict[str, Tensor]
    """Of the module, with the weights as its forward pass reads them, and of the rules."""
    metric: float
    step: int
    settled: bool = True
    """Whether the weights have the form that their rules are to give them; others never ship."""
    waited: int = 0
    """Evaluations since."""
