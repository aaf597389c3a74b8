"""What passes say about zeros and units to the training that follows: which stay, and which are to go."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class KeptZeros:
    """Single weights of a site that are zero, and stay so."""

    pattern: str
    """Where they lie: `numerics.sparsity.Pattern` as text."""
    mask: Tensor | None
    """Boolean, of the weight's shape (out, in, ...), False at zeros; None where nothing was to be trained: then all
    zeros that the weight has are meant."""


@dataclass(frozen=True)
class MarkedZeros:
    """How many weights of a site the next training is to make zero."""

    pattern: str
    share: float
    """Of the weights, those that are zero already included."""


@dataclass(frozen=True)
class MarkedUnits:
    """How many units of a group the next training is to leave."""

    size: int
    stay: int


@dataclass
class Marks:
    """What passes with criterion=movement marked: the next training learns what of it goes."""

    zeros: dict[str, MarkedZeros] = field(default_factory=dict)
    """By the label of a site."""
    units: dict[str, MarkedUnits] = field(default_factory=dict)
    """By the name of a group (`analysis.groups`)."""

    def __bool__(self) -> bool:
        return bool(self.zeros or self.units)
