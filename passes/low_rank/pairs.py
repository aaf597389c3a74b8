"""linear or conv -> a thin pair of them: which sites can be split, and what each rank of a pair brings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.numerics.factor import Spectrum, decompose
from graphopt.numerics.split import Split
from graphopt.pipeline.context import Context
from graphopt.pipeline.inputs import covariances
from graphopt.pipeline.weights import Weight


@dataclass(frozen=True)
class Candidate:
    """A weight that can be split, and what each rank of the pair brings."""

    weight: Weight
    split: Split
    spectrum: Spectrum
    """Up to the largest rank that gains."""
    work: float
    """Multiply-adds of a pair of rank 1, relative to those of the original."""
    flops: int | None
    """Of all its sites as they are; None where sizes are not known."""
    step: int
    """Ranks that the target runs fast are multiples of this."""

    @property
    def most(self) -> int:
        """The largest rank that gains; 0 where none does."""
        return self.split.most(self.work)

    def rounded(self, rank: int) -> int:
        """The rank up to the next multiple of the step, where the pair still gains."""
        up = -(-rank // self.step) * self.step
        return up if up <= self.most else rank

    def ranks(self) -> list[int]:
        """The ranks that gain: multiples of the step, or all of them where none is so large."""
        return list(range(self.step, self.most + 1, self.step)) or list(range(1, self.most + 1))

    def why_no_gain(self, rank: int) -> Decline:
        """Why a pair of a rank above `most` is of no use."""
        pair, whole, shape = self.split.numbers(rank), math.prod(self.split.shape), list(self.split.shape)
        if pair >= whole:
            return Decline("pair_not_smaller", rank=rank, pair=pair, whole=whole, shape=shape)
        return Decline("pair_not_cheaper", rank=rank, factor=rank * self.work, shape=shape)

    def apply(self, graph: Graph, sites: Sequence[Node], rank: int) -> None:
        """Replace sites by pairs of a rank. sites: the candidate's own, or those of the same names in a clone."""
        name = self.weight.value.name
        inner, outer = (graph.add_constant(half, name) for half in self.split.halves(*self.spectrum.cut(rank)))
        for site in sites:
            first, second = self.split.attributes(site.attributes)
            thin = graph.emit(site.kind, site.input, inner, at=site, **first)
            graph.replace(site, graph.emit(site.kind, thin, outer, site.bias, at=site, **second))


def split_of(site: Node, conv: str) -> Split | Decline:
    """How a site can be split, or why it cannot. conv: as the option of the pass."""
    if site.kind not in ("linear", "conv"):
        return Decline("not_linear_or_conv", op=site.kind)
    if in_pair(site):
        return Decline("half_of_pair")
    shape = site.required("weight").shape
    sizes = tuple(size for size in shape or () if isinstance(size, int))
    groups = site.attributes.get("groups", 1)
    if groups > 1:
        return Decline("grouped_conv", groups=groups, channels=sizes[1])
    two_axes = len(sizes) == 4 and min(sizes[2:]) > 1
    if conv == "spatial" and site.kind == "conv" and not two_axes:
        return Decline("kernel_of_one_axis", kernel=list(sizes[2:]))
    return Split(sizes, conv != "channel" and two_axes)


def in_pair(site: Node) -> bool:
    """Whether a site is half of f(f(x, V), U, b) with a middle narrower than both ends."""
    feeder = site.input.producer
    readers = site.result.users
    if feeder is not None and _is_pair(feeder, site):
        return True
    return len(readers) == 1 and _is_pair(site, readers[0])


def _is_pair(inner: Node, outer: Node) -> bool:
    kinds = inner.kind == outer.kind and inner.kind in ("linear", "conv")
    if not kinds or outer.input != inner.result or inner.result.only_user is None or inner.bias is not None:
        return False
    u, v = outer.weight, inner.weight
    return u is not None and v is not None and u.shape[1] ** 2 < min(u.numel(), v.numel())


def candidates(
    graph: Graph, context: Context, weights: Sequence[tuple[Weight, Split]], *, outputs: bool
) -> list[Candidate]:
    """Each weight with its spectrum: that of the weight, or of its outputs on the calibration batches (`outputs`).

    A spatial split is fitted to what each column of its kernel adds to the output: their sum has no closed form.
    """
    step = context.target.round_to.get("rank", 1)
    sizes = cost.sizes(graph, context.feeds[0]) if context.feeds else {}
    splits = {weight.value: split for weight, split in weights}
    several = [weight for weight, _ in weights]
    found: list[Candidate] = []
    damped: list[str] = []
    for weight, moments in covariances(graph, context, several) if outputs else ((weight, None) for weight in several):
        split = splits[weight.value]
        work = split.work(**_lengths(weight.sites[0], sizes))
        metric = None if moments is None else split.moments(moments[0])
        spectrum = decompose(split.matrix(weight.tensor), metric, most=max(1, split.most(work)))
        if spectrum.damped:
            damped += [site.label for site in weight.sites]
        flops = [cost.flops(site, sizes) for site in weight.sites]
        total = None if None in flops else sum(count for count in flops if count is not None)
        found.append(Candidate(weight, split, spectrum, work, total, step))
    if damped:
        context.note(
            "the calibration batches span only some directions of the input, and the others count a thousandth of the "
            f"mean; give more batches for these sites: {', '.join(damped)}"
        )
    return found


def _lengths(site: Node, sizes: dict[str, int]) -> dict[str, int]:
    """Sizes of the last axis before and after a site; where they are not known, in the ratio of its stride."""
    ends = (site.input.shape or ("?",))[-1], (site.result.shape or ("?",))[-1]
    before, after = (end if isinstance(end, int) else sizes.get(end) for end in ends)
    if before is None or after is None:
        before, after = (site.attributes.get("stride") or (1,))[-1], 1
    return {"before": before, "after": after}
