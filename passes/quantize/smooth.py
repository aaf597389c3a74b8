"""g(f(x), W)  ->  g(f(x) / s, W s), with the division inside f.

The channels of f(x) get similar ranges, so that one scale fits all.
"""

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
    weights that read it multiply: nothing is added to the graph. Alpha of SmoothQuant (how much of
    the range moves into the weights) is searched per activation, by the estimated output error of int8. Declined: a
    value that others read too, or that nothing can scale, and one whose error no factors lower.
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
