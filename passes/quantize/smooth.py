"""g(f(x), W)  ->  g(f(x) / s, W s), with the division inside f: channels of similar size, for one scale of all."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.graph import Graph
from graphopt.passes.quantize.channel_scaling import smooth_channels
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class Smooth(Pass):
    """Move outlier channels of activations into weights, before a `quantize` (Xiao et al., 2023; Nagel et al., 2019).

    A norm, linear or conv divides by the factors with its own weight, through homogeneous activations, and the
    weights that read it multiply: nothing is added to the graph. The share of the difficulty that weights take over is
    searched for each value, by the output error that 8 bits would make. Declined: a value that others read too, or that
    nothing can scale, and one that no factors help.
    """

    name = "smooth"
    stage = Stage.QUANTIZE
    lossless = True

    targets: Selector = Selector("linear", "conv")
    """Sites whose inputs are smoothed: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def run(self, graph: Graph, context: Context) -> None:
        sites = context.sites(graph, self.targets, self.ignore)
        _, declined = smooth_channels(graph, context, sites)
        for site, why in declined.items():
            context.decline(site, why)
