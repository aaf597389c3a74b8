"""How long each pass takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments.instrument import Instrument

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


class Timing(Instrument):
    """Seconds of each pass, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self.seconds.append((str(pass_), context.record.seconds))

    def __str__(self) -> str:
        rows = [*self.seconds, ("total", sum(seconds for _, seconds in self.seconds))]
        return "\n".join(f"{seconds:8.3f} s  {name}" for name, seconds in rows)
