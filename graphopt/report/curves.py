"""The course of a training: loss and metric over the steps, as a line of blocks for terminals and as points for SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 200
"""Most points of a curve: of more, each is the mean of neighbours."""
WIDTH, HEIGHT = 640, 160
"""Of an SVG plot, in pixels."""


@dataclass(frozen=True)
class Curve:
    """One figure over the steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]

    def thinned(self, most: int = POINTS) -> Curve:
        """At most so many points, each the mean of as many neighbours."""
        size = -(-len(self.steps) // most)
        if size <= 1:
            return self
        parts = range(0, len(self.steps), size)
        means = [[sum(one[i : i + size]) / len(one[i : i + size]) for i in parts] for one in (self.steps, self.values)]
        return Curve(self.name, *means)

    def blocks(self, width: int = 40) -> str:
        """A line of block characters, the lowest value the lowest block."""
        values = self.thinned(width).values
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(BLOCKS[int((value - low) / span * (len(BLOCKS) - 1))] for value in values)

    def polyline(self, last_step: float) -> str:
        """The points of an SVG polyline, WIDTH x HEIGHT, the highest value on top."""
        curve = self.thinned()
        low, span = min(curve.values), (max(curve.values) - min(curve.values)) or 1.0
        return " ".join(
            f"{step / (last_step or 1.0) * WIDTH:.1f},{HEIGHT - (value - low) / span * HEIGHT:.1f}"
            for step, value in zip(curve.steps, curve.values, strict=True)
        )

    def __str__(self) -> str:
        first, last = self.values[0], self.values[-1]
        return f"{self.name} {first:.4g} {self.blocks()} {last:.4g}"


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The loss, and the metric where there is one, of the lines of a training (`PassRecord.training`).

    A metric may be infinite (a log of 0): such points are left out, as nothing can be drawn for them.
    """
    found = []
    for name in ("loss", "metric"):
        points = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
        if points:
            steps, values = zip(*points, strict=True)
            found.append(Curve(name, steps, values))
    return found
