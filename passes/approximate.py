"""gelu(x)  ->  gelu(x, approximate=tanh)."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class Approximate(Pass):
    """Replace an exact function by an approximation that is cheaper on many CPUs. Runs only where it is asked for.

    gelu by erf becomes the tanh form of Hendrycks & Gimpel (2016), whose absolute error is at most 4.8e-4 for any x.
    Declined: a gelu in that form already, and any other op.
    """

    name = "approximate"
    stage = Stage.SIMPLIFY

    targets: Selector = Selector("gelu")
    """Sites to consider: ops (gelu), module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave exact."""

    def run(self, graph: Graph, context: Context) -> None:
        for site in context.sites(graph, self.targets, self.ignore):
            if site.kind != "gelu":
                context.decline(site, Decline("no_approximation", op=site.kind))
            elif (form := site.attributes["approximate"]) != "none":
                context.decline(site, Decline("already_approximate", form=form))
            else:
                graph.replace(site, graph.emit("gelu", site.input, at=site, approximate="tanh"))
