"""g(f(x), W)  ->  g(f(x) / s, W s), with the division inside f: channels of like size, for a scale that all share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graphopt.graph import Graph, Node, Value
from graphopt.inputs import covariances
from graphopt.numerics.observe import ChannelMinMax
from graphopt.pipeline import Context, Pass, Selector, Stage
from graphopt.quantizing.islands import label_of
from graphopt.quantizing.smoothing import Scalable, error_of, rescale, scalable
from graphopt.weights import Weight


@dataclass(frozen=True)
class Smooth(Pass):
    """Move outlier channels of activations into weights, before a `quantize` (Xiao et al., 2023; Nagel et al., 2019).

    A norm, linear or conv divides by the factors with its own weight, through activations that keep multiples, and the
    weights that read it multiply: nothing is added to the graph. The share of the difficulty that weights take over is
    searched for each value, by the output error that 8 bits would make. Declined: a value that others read too, or that
    nothing can scale, and one that no factors help.
    """

    name = "smooth"
    stage = Stage.QUANTIZE
    lossless = True

    targets: Selector = Selector("linear", "conv")
    """Sites whose inputs are to be evened: words, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def run(self, graph: Graph, context: Context) -> None:
        groups: dict[Value, tuple[Scalable, list[Node]]] = {}
        for site in context.sites(graph, self.targets, self.ignore):
            one = scalable(site) if site.kind in ("linear", "conv") else f"{site.kind} has no weight to take factors"
            if isinstance(one, str):
                context.decline(site, one)
            else:
                groups.setdefault(one.value, (one, []))[1].append(site)
        chosen = []
        for value, factors in _factors(graph, context, {value: one for value, (one, _) in groups.items()}).items():
            one, sites = groups[value]
            if factors is not None:
                chosen.append((one, factors))
            for site in sites if factors is None else ():
                context.decline(site, "no factors lower the error that 8 bits are expected to make")
        rescale(graph, chosen)


def _factors(graph: Graph, context: Context, groups: Mapping[Value, Scalable]) -> dict[Value, Tensor | None]:
    """The factors of each value that are expected to make the least error, None where it is best left alone."""
    wanted = [(value, ChannelMinMax(one.channels, one.axis)) for value, one in groups.items()]
    ranges = dict(zip(groups, context.statistics(graph, wanted), strict=True)) if groups else {}
    candidates = {value: one.candidates(ranges[value].low, ranges[value].high) for value, one in groups.items()
                  if ranges[value].count}  # fmt: skip
    weights, owners = [], dict[Value, Value]()
    for value in candidates:
        for site in groups[value].readers if not groups[value].depthwise else ():
            weight = site.required("weight")
            weights.append(Weight(weight, [site]))
            owners[weight] = value
    errors = {value: dict.fromkeys(found, 0.0) for value, found in candidates.items()}
    for one, covariance in covariances(graph, context, weights) if weights else ():
        value = owners[one.value]
        for alpha, factors in candidates[value].items():
            ends = ranges[value].low, ranges[value].high
            errors[value][alpha] += error_of(one.tensor, covariance[0], *ends, factors)
    best = {value: min(found, key=lambda alpha: found[alpha]) for value, found in errors.items()}
    notes = [f"{label_of(value)} {alpha}" for value, alpha in best.items() if alpha is not None]
    if notes:
        context.note(f"share of the difficulty that weights take over: {', '.join(notes)}")
    return {value: candidates[value][best[value]] if best.get(value) is not None else None for value in groups}
