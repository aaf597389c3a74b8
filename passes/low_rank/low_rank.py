"""f(x, W, b)  ->  f(f(x, V), U, b), with U V the best approximation of rank r: a linear or conv as two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.passes.low_rank.pairs import Candidate, candidates, split_of
from graphopt.passes.low_rank.ranks import Choice, break_even, within_budget
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.weights import changeable, selected

_ENERGY = 0.95
"""Kept where ranks are not chosen otherwise."""


@dataclass(frozen=True)
class LowRank(Pass):
    """Split each linear and conv into two thin ones by truncated singular value decomposition.

    Of the weight (Eckart & Young, 1936), or with calibration of what it computes (Wang et al., 2024). Ranks are chosen
    in one way: rank, energy, error, params or flops; by an energy of 0.95 without any. But for a count, they go up to
    what the target runs fast, where the pair still gains. Declined: a site where the pair would hold as many numbers as
    the original or multiply as often, one that is half of such a pair, a conv of several groups, and a weight that the
    graph computes, that is quantized, or that a node outside the selection reads too.
    """

    name = "low-rank"
    stage = Stage.FACTORIZE

    rank: int | float | str | None = None
    """Of each pair: a count (8), a share of the full rank (0.25), or break-even: the largest measured faster."""

    energy: float | None = None
    """Share of the squared singular values that each pair keeps, in (0, 1]."""

    error: float | None = None
    """Largest error of each pair, relative to its output (root mean square), in (0, 1)."""

    params: float | None = None
    """Share of the model's parameters that may stay, in (0, 1); spent where they buy most."""

    flops: float | None = None
    """Share of the model's FLOPs that may stay, in (0, 1); spent where they buy most."""

    fit: str = "auto"
    """What a pair is closest to: the weights, or the outputs on calibration data; auto is outputs where it can be."""

    conv: str = "auto"
    """How a conv is split: spatial (k x 1, 1 x k) or channel (its kernel, 1x1); auto is spatial where that can be."""

    targets: Selector = Selector("linear", "conv")
    """Sites to consider: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = self.rank
        is_count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        is_share = isinstance(rank, float) and 0 < rank <= 1
        if rank is not None and rank != "break-even" and not is_count and not is_share:
            raise UsageError(
                f"low-rank: rank is {rank!r}; give a whole number of at least 1, a share in (0, 1], or break-even"
            )
        if self.energy is not None and not _is_share(self.energy) and (self.energy is True or self.energy != 1):
            raise UsageError(f"low-rank: energy is {self.energy!r}; give a share in (0, 1]")
        for name in ("error", "params", "flops"):
            value = getattr(self, name)
            if value is not None and not _is_share(value):
                raise UsageError(f"low-rank: {name} is {value!r}; give a number above 0 and below 1")
        ways = [name for name in ("rank", "energy", "error", "params", "flops") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise UsageError(f"low-rank: {' and '.join(ways)} choose ranks in different ways; give one of them")
        for name, values in {"fit": ("auto", "weights", "outputs"), "conv": ("auto", "channel", "spatial")}.items():
            if getattr(self, name) not in values:
                raise UsageError(f"low-rank: {name} is {getattr(self, name)!r}; give {' or '.join(values)}")

    def run(self, graph: Graph, context: Context) -> None:
        whole = []
        for site in selected(graph, context, self.targets, self.ignore):
            split = split_of(site, self.conv)
            if isinstance(split, str):
                context.decline(site, split)
            else:
                whole.append(site)
        weights = changeable(whole, context)
        outputs = self.fit == "outputs" or (self.fit == "auto" and context.calibration is not None)
        found = candidates(graph, context, weights, conv=self.conv, outputs=outputs)
        for one, choice in zip(found, self._choices(found, graph, context), strict=True):
            if isinstance(choice, int):
                one.put(graph, one.weight.sites, choice)
                continue
            for site in one.weight.sites:
                context.decline(site, choice)

    def _choices(self, found: list[Candidate], graph: Graph, context: Context) -> list[Choice]:
        for kind in ("params", "flops"):
            if getattr(self, kind) is not None:
                return within_budget(found, graph, context, kind, getattr(self, kind))
        if self.rank == "break-even":
            return break_even(found, graph, context)
        ranks = [(one, self._rank(one)) for one in found]
        return [rank if rank <= one.most else one.why_no_gain(rank) for one, rank in ranks]

    def _rank(self, one: Candidate) -> int:
        spectrum = one.spectrum
        if isinstance(self.rank, int):
            return min(self.rank, len(spectrum.squares))
        if isinstance(self.rank, float):
            return one.rounded(spectrum.rank_for_share(self.rank))
        if self.error is not None:
            return one.rounded(spectrum.rank_for_error(self.error))
        return one.rounded(spectrum.rank_for_energy(_ENERGY if self.energy is None else self.energy))


def _is_share(value: object) -> bool:
    """Whether it is a number above 0 and below 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
