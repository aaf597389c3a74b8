"""linear or conv -> a thin pair of them: which sites can be split, and what each rank of a pair brings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import cost
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
    """Multiply-adds of the pair for each rank, over those of the whole."""
    flops: int | None
    """Of all its sites, whole; None where sizes are not known."""
    step: int
    """Ranks that the target runs fast are multiples of it."""

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

    def why_no_gain(self, rank: int) -> str:
        whole, shape = math.prod(self.split.shape), list(self.split.shape)
        if self.split.numbers(rank) >= whole:
            return f"rank {rank} holds {self.split.numbers(rank)} numbers, no fewer than the {whole} of {shape}"
        return f"rank {rank} takes {rank * self.work:.2f} times the multiply-adds of {shape}"

    def put(self, graph: Graph, sites: Sequence[Node], rank: int) -> None:
        """Split `sites` of a graph: the candidate's own, or the same ones in a clone."""
        name = self.weight.value.name
        inner, outer = (graph.add_constant(half, name) for half in self.split.halves(*self.spectrum.cut(rank)))
        for site in sites:
            first, second = self.split.attributes(site.attributes)
            thin = graph.emit(site.kind, site.input, inner, at=site, **first)
            graph.replace(site, graph.emit(site.kind, thin, outer, site.bias, at=site, **second))


def split_of(site: Node, conv: str) -> Split | str:
    """How a site can be split, or why it cannot. conv: as the option of the pass."""
    if site.kind not in ("linear", "conv"):
        return f"{site.kind} is neither linear nor conv"
    if in_pair(site):
        return "half of a pair already"
    shape = site.required("weight").shape
    sizes = tuple(size for size in shape or () if isinstance(size, int))
    groups = site.attributes.get("groups", 1)
    if groups > 1:
        return f"a conv of {groups} groups: each kernel reads {sizes[1]} of its channels"
    two_axes = len(sizes) == 4 and min(sizes[2:]) > 1
    if conv == "spatial" and site.kind == "conv" and not two_axes:
        return f"a kernel {list(sizes[2:])} has no two axes to split; conv=channel splits it"
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
    graph: Graph, context: Context, weights: Sequence[Weight], *, conv: str, outputs: bool
) -> list[Candidate]:
    """Each weight with its spectrum: of the weight, or of what it computes on the calibration batches (`outputs`).

    A spatial split is fitted to what each column of its kernel adds to the output: their sum has no closed form.
    """
    step = context.target.round_to.get("rank", 1)
    sizes = cost.sizes(graph, context.feeds[0]) if context.feeds else {}
    found: list[Candidate] = []
    damped: list[str] = []
    seen = covariances(graph, context, weights) if outputs else ((weight, None) for weight in weights)
    for weight, moments in seen:
        split = split_of(weight.sites[0], conv)
        assert isinstance(split, Split), split
        work = split.work(**_lengths(weight.sites[0], sizes))
        metric = None if moments is None else split.moments(moments[0])
        spectrum = decompose(split.matrix(weight.tensor), metric, most=max(1, split.most(work)))
        if spectrum.damped:
            damped += [one.label for one in weight.sites]
        flops = [cost.flops(one, sizes) for one in weight.sites]
        total = None if None in flops else sum(n for n in flops if n is not None)
        found.append(Candidate(weight, split, spectrum, work, total, step))
    if damped:
        context.note(
            "the calibration batches reach only some directions of the input, and the rest counts by a thousandth of "
            f"the mean; give more batches where it matters: {', '.join(damped)}"
        )
    return found


def _lengths(site: Node, sizes: dict[str, int]) -> dict[str, int]:
    """The last axis of input and result; where that is not known, as a conv that keeps it but for its stride."""
    ends = (site.input.shape or ("?",))[-1], (site.result.shape or ("?",))[-1]
    before, after = (end if isinstance(end, int) else sizes.get(end) for end in ends)
    if before is None or after is None:
        before, after = (site.attributes.get("stride") or (1,))[-1], 1
    return {"before": before, "after": after}
