"""linear(x, V), linear(x, W)  ->  slices of linear(x, [V; W])."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.ir.rewrite import Pattern, Recorder, Rule, rewrite
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
        kinds = "linear", "linear_int8"
        eligible = _with_partners([site for site in graph.sites(*kinds) if site not in self.ignore])
        sites = context.sites(graph, Selector(*kinds), self.ignore, where=eligible.__contains__)
        declines = {site: _why_not(site) for site in sites}
        mergeable = _with_partners([site for site in sites if declines[site] is None])
        for site in sites:
            if site not in mergeable:
                context.decline(site, declines[site] or Decline("alone_on_input"))
        rewrite(graph, [_rule(pattern, mergeable) for pattern in (linear, linear_int8)])


def linear(op: Recorder, x: Any, weight: Any, bias: Any = None) -> Pattern:
    return op.linear(x, weight, bias)


def linear_int8(
    op: Recorder, x: Any, scale: Any, zero_point: Any, weight: Any, weight_scale: Any, bias: Any = None
) -> Pattern:
    return op.linear_int8(x, scale, zero_point, weight, weight_scale, bias)


def _rule(pattern: Any, mergeable: Collection[Node]) -> Rule:
    return Rule(
        f"merge-{pattern.__name__}",
        pattern,
        lambda op, match: merge([one.root for one in match.group]),
        check=lambda match: match.root in mergeable,
        group_by=lambda match: merge_key(match.root),
    )


def _with_partners(linears: Collection[Node]) -> set[Node]:
    """Those that have something to be merged with among them."""
    keys = {linear: merge_key(linear) for linear in linears}
    often = Counter(keys.values())
    return {linear for linear, key in keys.items() if key is not None and often[key] > 1}


def _why_not(site: Node) -> Decline | None:
    if not has_stored_bias(site):
        return Decline("bias_computed")
    own = {site, site.required("weight").producer}
    others = [user for value in weight_values(site) for user in value.users if user not in own]
    return Decline("weight_shared", op=others[0].kind, site=others[0].label) if others else None
