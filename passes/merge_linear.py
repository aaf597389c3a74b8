"""linear(x, V), linear(x, W)  ->  slices of linear(x, [V; W])."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.lowering.merging import has_stored_bias, merge, merge_key, weight_values
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class MergeLinear(Pass):
    """Make one linear of those that read the same value, and slice its result.

    Float, quantized (dequantize of a stored weight) and int8 linears alike, each with its own kind. A linear alone on
    its input is not eligible. Declined: a bias that the graph computes, and a weight that another node reads too.
    """

    name = "merge-linear"
    stage = Stage.LOWER
    lossless = True

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def run(self, graph: Graph, context: Context) -> None:
        groups: dict[Hashable, list[Node]] = defaultdict(list)
        for site in context.sites(graph, Selector("linear", "linear_int8"), self.ignore):
            if (key := merge_key(site)) is not None:
                groups[key].append(site)
        context.record.eligible.clear()  # a linear that is alone on its input is not
        for group in groups.values():
            if len(group) > 1:
                context.record.eligible.extend(context.labels[site] for site in group)
                self._merge(graph, group, context)

    def _merge(self, graph: Graph, group: list[Node], context: Context) -> None:
        declines = {site: _why_not(site) for site in group}
        mergeable = [site for site in group if declines[site] is None]
        if len(mergeable) == 1:
            declines[mergeable[0]] = Decline("alone_on_input")
        for site, why in declines.items():
            if why is not None:
                context.decline(site, why)
        if len(mergeable) > 1:
            for site, part in zip(mergeable, merge(mergeable).values(), strict=True):
                graph.replace(site, part)


def _why_not(site: Node) -> Decline | None:
    if not has_stored_bias(site):
        return Decline("bias_computed")
    own = {site, site.required("weight").producer}
    others = [user for value in weight_values(site) for user in value.users if user not in own]
    return Decline("weight_shared", op=others[0].kind, site=others[0].label) if others else None
