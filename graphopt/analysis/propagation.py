"""How error grows through a network: the results of the same sites in two graphs, on the same inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.ir.graph import Graph, Node
from graphopt.numerics import metrics

LOST = 10.0
"""SQNR in dB below which a signal counts as lost: noise of a tenth of its energy."""

PART = 16
"""Sites whose results are held at a time, of one batch and both graphs."""

_SILENT = frozenset(
    ("quantize", "dequantize", "choose_qparams", "row_scale", "identity", "reshape", "transpose", "cast", "slice",
     "concat", "pad", "squeeze", "unsqueeze")
)  # fmt: skip
"""Ops that compute nothing, or stand between the sites of a quantized graph only."""


@dataclass(frozen=True)
class SiteComparison:
    """The result of one site, all batches as one vector, without padding."""

    site: str
    kind: str
    sqnr: float
    """In dB; inf where nothing differs, nan where a result holds NaN."""
    cosine: float
    before: float
    """The least SQNR among the compared sites that it reads, over what lies between; inf where it reads none."""

    @property
    def added(self) -> float:
        """Noise that this site adds to that of what it reads, as a share of the signal; nan is more than any."""
        noise = [math.inf if math.isnan(one) else 10 ** (-one / 10) for one in (self.sqnr, self.before)]
        return noise[0] - noise[1] if noise[1] < math.inf else 0.0


@dataclass(frozen=True)
class Propagation:
    """The sites that two graphs have in common, in the order of the graph."""

    sites: list[SiteComparison] = field(default_factory=list)
    unpaired: dict[str, str] = field(default_factory=dict)
    """Sites of the first graph that the second has no equal of, and why."""

    @property
    def lost(self) -> SiteComparison | None:
        """The first site whose SQNR is below LOST."""
        return next((one for one in self.sites if not one.sqnr >= LOST), None)

    @property
    def noisiest(self) -> SiteComparison | None:
        """The site that adds most noise; None where none adds any."""
        worst = max(self.sites, key=lambda one: one.added, default=None)
        return worst if worst is not None and worst.added > 0 else None


def propagate(a: Graph, b: Graph, batches: Iterable[Mapping[str, Tensor]]) -> Propagation:
    """Compare the results of sites that are of the same op and module path, in the order of each graph.

    batches: feeds of `a`, iterated once for each PART sites; `b` takes them by name, or in order where names differ.
    Sites without a path are paired by op and order, where both graphs have as many. Padding is left out.
    """
    pairs, unpaired = _pairs(a, b)
    sums = torch.zeros(len(pairs), 4, dtype=torch.float64)  # a·a, b·b, a·b, noise
    for start in range(0, len(pairs), PART):
        part = pairs[start : start + PART]
        for feeds in batches:
            found = a.evaluate(feeds, [x.result for x, _ in part])
            others = b.evaluate(_for(b, feeds), [y.result for _, y in part])
            for row, ((site, _), x, y) in enumerate(zip(part, found, others, strict=True), start):
                if x.shape != y.shape:
                    unpaired[site.label] = f"its result is {list(x.shape)} in one, and {list(y.shape)} in the other"
                    continue
                real = real_positions(site.result.shape, x, mask_inputs(a.inputs), feeds)
                x, y = ((one if real is None else one[real]).double() for one in (x, y))
                sums[row] += torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum(), (x - y).square().sum()])
    figures: dict[Node, tuple[float, float]] = {}
    for (site, _), (signal, other, product, noise) in zip(pairs, sums.tolist(), strict=True):
        if site.label not in unpaired:
            norms = math.sqrt(signal * other)
            figures[site] = metrics.decibels(signal, noise), product / norms if norms else float(signal == other)
    before = _before(a, {site: sqnr for site, (sqnr, _) in figures.items()})
    return Propagation(
        [SiteComparison(site.label, site.kind, *pair, before[site]) for site, pair in figures.items()], unpaired
    )


def _pairs(a: Graph, b: Graph) -> tuple[list[tuple[Node, Node]], dict[str, str]]:
    """The sites of both that are one, in the order of `a`; and the others of `a`, with the reason."""
    mine, others = _by_place(a), _by_place(b)
    paired, unpaired = dict[Node, Node](), dict[str, str]()
    for place, nodes in mine.items():
        same = others.get(place, [])
        if len(nodes) == len(same):
            paired.update(zip(nodes, same, strict=True))
        else:
            reason = f"the other model has {len(same) or 'no'} {place[0]} of this path, not {len(nodes)}"
            unpaired.update((node.label, reason) for node in nodes)
    return [(node, paired[node]) for node in a.nodes if node in paired], unpaired


def _by_place(graph: Graph) -> dict[tuple[str, str], list[Node]]:
    """Sites by op and module path."""
    found: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        dtype = node.result.dtype if node.op is not None and node.kind not in _SILENT else None
        if dtype is not None and dtype.is_floating_point:
            found[node.kind, node.path].append(node)
    return found


def _for(graph: Graph, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    names = [value.name for value in graph.inputs]
    return feeds if set(names) == set(feeds) else dict(zip(names, feeds.values(), strict=True))


def _before(graph: Graph, sqnr: Mapping[Node, float]) -> dict[Node, float]:
    """For each node the least SQNR among the nearest sites that it reads."""
    found: dict[Node, float] = {}
    for node in graph.nodes:
        producers = [value.producer for value in node.operands if value is not None and value.producer is not None]
        read = [sqnr.get(producer, found[producer]) for producer in producers]
        found[node] = _least(read)
    return found


def _least(figures: Sequence[float]) -> float:
    """The smallest, where NaN is smaller than any; inf of none."""
    return min(figures, key=lambda figure: -math.inf if math.isnan(figure) else figure, default=math.inf)
