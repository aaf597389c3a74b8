"""Names for the pipelines that most users want. A preset is read as its text, so reports spell it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A pipeline by name."""

    text: str
    summary: str


PRESETS: Mapping[str, Preset] = {
    "safe": Preset("simplify", "Loses nothing."),
    "fast": Preset("simplify,quantize", "8 bits: static with calibration data, else dynamic."),
    "small": Preset(
        "simplify,quantize{scheme=weight-only bits=[4,8]},quantize",
        "Weights of linears and embeddings in 4 bits where blocks fit, else in 8; then 8 bits for what has no such "
        "form.",
    ),
}

RESERVED = frozenset({*PRESETS, "repeat"})
"""Names that no pass may have: the text form gives them another meaning."""
