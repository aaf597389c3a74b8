"""Whether the graph keeps the rules of its dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments.instrument import Instrument

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


class Verify(Instrument):
    """Verifies after every pass that the graph keeps the rules of its dialect."""

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        graph.verify()
