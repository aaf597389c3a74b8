"""gelu(x)  ->  gelu(x, approximate=tanh)."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.graph import Graph
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class Approximate(Pass):
    """Take a formula that is cheaper on many CPUs in place of an exact one; never done unless it is asked for.

    Of gelu, the tanh form of Hendrycks & Gimpel (2016) in place of erf: it is at most 4.8e-4 away, whatever x is.
    Declined: a gelu that has that form already.
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
                context.decline(site, f"there is no approximation of {site.kind}")
            elif site.attributes["approximate"] != "none":
                context.decline(site, f"it is approximated by {site.attributes['approximate']} already")
            else:
                graph.replace(site, graph.emit("gelu", site.input, at=site, approximate="tanh"))
