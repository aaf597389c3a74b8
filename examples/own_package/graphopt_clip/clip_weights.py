"""linear(x, W, b) -> linear(x, clip(W, -limit, limit), b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.pipeline import Context, Pass, Selector, Stage
from graphopt.pipeline.options import Range


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Limit the magnitude of weights, so that fewer outliers set the scale that quantize takes.

    A site whose weights are all within the limit is declined.
    """

    name: ClassVar[str] = "clip-weights"
    stage: ClassVar[Stage] = Stage.PRUNE

    limit: Annotated[float, Range(0, open_low=True)] = 1.0
    """Largest magnitude of a weight."""
    targets: Selector = Selector("linear")  # noqa: RUF009
    """Ops, module paths or patterns."""

    def run(self, graph: Graph, context: Context) -> None:
        for site in context.sites(graph, self.targets):
            weight = site.weight
            if weight is None:
                context.decline(site, Decline("weight_computed"))
            elif (largest := float(weight.abs().max())) <= self.limit:
                context.decline(site, Decline("within_the_limit", largest=largest, limit=self.limit))
            else:
                clipped = graph.add_constant(weight.clamp(-self.limit, self.limit))
                graph.replace(site, graph.emit(site, site.input, clipped, site.bias, at=site))
