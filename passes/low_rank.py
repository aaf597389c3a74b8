"""linear(x, W, b)  ->  linear(linear(x, V), U, b), with U V the best approximation of W of rank r."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.graph import Graph, Node
from graphopt.numerics import factor
from graphopt.pipeline import Context, Pass, Selector, Stage, UsageError
from graphopt.weights import changeable


@dataclass(frozen=True)
class LowRank(Pass):
    """Split each linear into two thin ones by truncated SVD (Eckart & Young, 1936).

    Declined: a site where the pair would hold as many numbers as the original, one that is half of such a pair, and a
    weight that the graph computes, that is quantized, or that a node outside the selection reads too.
    """

    name = "low-rank"
    stage = Stage.FACTORIZE

    rank: int | float | None = None
    """Rank of each pair: a count (8), or a share of the full rank in (0, 1] (0.25); none chooses it by energy."""

    energy: float = 0.95
    """Share of the squared singular values that the pair keeps, in (0, 1]; counts where rank is none."""

    targets: Selector = Selector("linear")
    """Sites to consider: words, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def __post_init__(self) -> None:
        rank, energy = self.rank, self.energy
        is_count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        is_share = isinstance(rank, float) and 0 < rank <= 1
        if rank is not None and not is_count and not is_share:
            raise UsageError(f"low-rank: rank is {rank!r}; give a whole number of at least 1, or a share in (0, 1]")
        if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
            raise UsageError(f"low-rank: energy is {energy!r}; give a share in (0, 1]")

    def run(self, graph: Graph, context: Context) -> None:
        whole = []
        for site in context.sites(graph, self.targets, self.ignore):
            if site.kind != "linear":
                context.decline(site, f"{site.kind} is not a linear")
            elif _in_pair(site):
                context.decline(site, "half of a pair already")
            else:
                whole.append(site)
        for weight in changeable(whole, context):
            energy = self.energy if self.rank is None else None
            u, v = factor.truncate(weight.tensor, rank=self.rank, energy=energy)
            if u.numel() + v.numel() >= weight.tensor.numel():
                for site in weight.sites:
                    reason = f"rank {v.shape[0]} holds no fewer numbers than {list(weight.tensor.shape)}"
                    context.decline(site, reason)
                continue
            outer, inner = (graph.add_constant(half, weight.value.name) for half in (u, v))
            for site in weight.sites:
                thin = graph.emit("linear", site.input, inner, at=site)
                graph.replace(site, graph.emit("linear", thin, outer, site.bias, at=site))


def _in_pair(site: Node) -> bool:
    """Whether a site is half of linear(linear(x, V), U, b) with a middle narrower than both ends."""
    feeder = site.input.producer
    readers = site.result.users
    if feeder is not None and _is_pair(feeder, site):
        return True
    return len(readers) == 1 and _is_pair(site, readers[0])


def _is_pair(inner: Node, outer: Node) -> bool:
    if inner.kind != "linear" or outer.kind != "linear" or outer.input != inner.result or inner.bias is not None:
        return False
    u, v = outer.weight, inner.weight
    alone = len(inner.result.users) == 1 and not inner.result.is_output
    return alone and u is not None and v is not None and v.shape[0] < min(u.shape[0], v.shape[1])
