"""f(x, W, b)  ->  f(f(x, V), U, b), with U V the best approximation of rank r: a linear or conv as two thin ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Literal

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.numerics.split import Split
from graphopt.passes.low_rank.pairs import Candidate, candidates, split_of
from graphopt.passes.low_rank.ranks import Choice, break_even, within_budget
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import Range
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.weights import changeable, selected

Share = Annotated[float, Range(0, 1, open_low=True)]
Part = Annotated[float, Range(0, 1, open_low=True, open_high=True)]

_ENERGY = 0.95
"""Where no option chooses ranks."""


@dataclass(frozen=True)
class LowRank(Pass):
    """Split each linear and conv into two thin ones by truncated singular value decomposition (SVD).

    The SVD is of the weight (Eckart & Young, 1936), or with calibration data of the site's outputs (Wang et al., 2024).
    One option chooses the ranks: rank, energy, error, params or flops; energy=0.95 without any. Ranks are rounded up to
    what the target runs fast where the pair still gains, except a rank that is a count. Declined: a site where the pair
    would hold as many numbers as the original or take as many multiply-adds, half of such a pair, a conv of several
    groups, and a weight that the graph computes, that is quantized, or that a node outside the selection reads too.
    """

    name = "low-rank"
    stage = Stage.FACTORIZE
    changes_weights = True
    whole_model_options = MappingProxyType(dict.fromkeys(("params", "flops"), "energy=0.9 or rank=0.25"))

    rank: Annotated[int, Range(1)] | Share | Literal["break-even"] | None = None
    """Of each pair: a count (8), a share of the full rank (0.25), or break-even: the largest measured to be faster."""

    energy: Share | None = None
    """Share of the squared singular values that each pair keeps, in (0, 1]."""

    error: Part | None = None
    """Largest error of each pair, relative to its output (root mean square), in (0, 1)."""

    params: Part | None = None
    """Share of the model's parameters to keep, in (0, 1), with the least error in all."""

    flops: Part | None = None
    """Share of the model's FLOPs to keep, in (0, 1), with the least error in all."""

    fit: Literal["auto", "weights", "outputs"] = "auto"
    """What a pair approximates: the weights, or the outputs on calibration data; auto is outputs where there is any."""

    conv: Literal["auto", "channel", "spatial"] = "auto"
    """How a conv is split: spatial (k x 1, 1 x k) or channel (its kernel, 1x1); auto is spatial for kernels of 2-D."""

    targets: Selector = Selector("linear", "conv")
    """Sites to consider: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def contradiction(self) -> str | None:
        given = [name for name in ("rank", "energy", "error", "params", "flops") if getattr(self, name) is not None]
        if len(given) > 1:
            return f"{' and '.join(given)} choose ranks in different ways; give one of them"
        return None

    def within(self) -> LowRank | None:
        budgeted = self.params is not None or self.flops is not None or self.measures
        return None if budgeted else replace(self, fit="weights")

    @property
    def measures(self) -> bool:
        return self.rank == "break-even"

    def run(self, graph: Graph, context: Context) -> None:
        splits: dict[Node, Split] = {}
        for site in selected(graph, context, self.targets, self.ignore):
            split = split_of(site, self.conv)
            if isinstance(split, Decline):
                context.decline(site, split)
            else:
                splits[site] = split
        weights = [(weight, splits[weight.sites[0]]) for weight in changeable(splits, context)]
        outputs = self.fit == "outputs" or (self.fit == "auto" and context.calibration is not None)
        found = candidates(graph, context, weights, outputs=outputs)
        for candidate, choice in zip(found, self._choices(found, graph, context), strict=True):
            if not isinstance(choice, Decline):
                candidate.apply(graph, candidate.weight.sites, choice)
                continue
            for site in candidate.weight.sites:
                context.decline(site, choice)

    def _choices(self, found: list[Candidate], graph: Graph, context: Context) -> list[Choice]:
        """The rank of each candidate, or why its sites stay whole."""
        if self.params is not None:
            return within_budget(found, graph, context, "params", self.params)
        if self.flops is not None:
            return within_budget(found, graph, context, "flops", self.flops)
        if self.rank == "break-even":
            return break_even(found, graph, context)
        ranks = [(candidate, self._rank(candidate)) for candidate in found]
        return [rank if rank <= candidate.most else candidate.why_no_gain(rank) for candidate, rank in ranks]

    def _rank(self, candidate: Candidate) -> int:
        spectrum = candidate.spectrum
        if isinstance(self.rank, int):
            return min(self.rank, len(spectrum.squares))
        if isinstance(self.rank, float):
            return candidate.rounded(spectrum.rank_for_share(self.rank))
        if self.error is not None:
            return candidate.rounded(spectrum.rank_for_error(self.error))
        return candidate.rounded(spectrum.rank_for_energy(_ENERGY if self.energy is None else self.energy))
