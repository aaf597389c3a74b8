"""How error propagates through a network: the results of the same sites in two graphs, on the same inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, unique_labels
from graphopt.ir.scaled import Place
from graphopt.numerics import metrics

LOST = 10.0
"""SQNR in dB below which a signal counts as lost: noise of a tenth of its energy."""

RECOVERED = 20.0
"""How many dB more all that reads a lost site must have, for the site to mean something else: only a mean over 100
numbers takes away as much noise."""

SITES_AT_ONCE = 16
"""How many sites' results are held in memory, of one batch and both graphs."""

_NOT_COMPARED = ("movement", "quantization")
"""Families of ops that compute no new numbers, or that stand only between the sites of a quantized graph."""


@dataclass(frozen=True)
class SiteComparison:
    """The results of one site in both graphs, all batches as one vector, without padding."""

    site: str
    kind: str
    sqnr: float
    """In dB; inf where nothing differs, nan where a result holds NaN."""
    cosine: float
    before: float
    """The lowest SQNR among the nearest compared sites that it reads; inf where it reads none."""
    alike: bool = True
    """Whether the results mean the same in both graphs. False where they are lost, and what reads them agrees by
    RECOVERED more: then a scaling, a shift or an order of channels stands between the two, and their SQNR says
    nothing (or so many are averaged that it does not matter)."""

    @property
    def added(self) -> float:
        """Noise that this site adds to the noise of what it reads, as a share of the signal; inf where it holds NaN."""
        after, before = (math.inf if math.isnan(sqnr) else 10 ** (-sqnr / 10) for sqnr in (self.sqnr, self.before))
        return after - before if before < math.inf else 0.0


@dataclass(frozen=True)
class Propagation:
    """The sites that two graphs have in common, in the order of the graph."""

    sites: list[SiteComparison] = field(default_factory=list)
    unpaired: dict[str, Decline] = field(default_factory=dict)
    """Sites of the first graph without a counterpart in the second, and why."""

    @property
    def lost(self) -> SiteComparison | None:
        """The first site whose SQNR is below LOST, of those that are alike."""
        return next((site for site in self.sites if site.alike and not site.sqnr >= LOST), None)

    @property
    def noisiest(self) -> SiteComparison | None:
        """The site that adds most noise, of those that are alike; None where none adds any."""
        worst = max((site for site in self.sites if site.alike), key=lambda site: site.added, default=None)
        return worst if worst is not None and worst.added > 0 else None


def propagate(a: Graph, b: Graph, batches: Iterable[Mapping[str, Tensor]]) -> Propagation:
    """Compare the results of sites of the same op and module path, in the order of each graph.

    batches: feeds of `a`, iterated once for each SITES_AT_ONCE sites; `b` takes them by name, or in order where names
    differ. Sites without a path are paired by op and order, where both graphs have as many. Padding is left out.
    What was divided in one of the graphs (`Graph.scaled`) is compared without that. A conv or linear with a batch norm
    behind it is compared by the result of that, where the other graph has it folded.
    """
    labels = unique_labels(node for nodes in _by_op_and_path(a).values() for node in nodes)
    pairs, missing = _pairs(a, b)
    unpaired = {labels[node]: reason for node, reason in missing.items()}
    of_site = {site: (_behind_norm(site, other), _behind_norm(other, site)) for site, other in pairs}
    scaled_a, scaled_b, place = a.scaled, b.scaled, places(a)
    sums = torch.zeros(len(pairs), 4, dtype=torch.float64)  # a·a, b·b, a·b, noise
    for start in range(0, len(pairs), SITES_AT_ONCE):
        part = pairs[start : start + SITES_AT_ONCE]
        for feeds in batches:
            of_a = a.evaluate(feeds, [of_site[site][0].result for site, _ in part])
            of_b = b.evaluate(_feeds_of(b, feeds), [of_site[site][1].result for site, _ in part])
            for row, ((site, _), x, y) in enumerate(zip(part, of_a, of_b, strict=True), start):
                if x.shape != y.shape:
                    unpaired[labels[site]] = Decline("result_shapes_differ", a=list(x.shape), b=list(y.shape))
                    continue
                if (divided := scaled_a.get(place[site])) is not None:
                    x = divided.undone(x)
                if (divided := scaled_b.get(place[site])) is not None:
                    y = divided.undone(y)
                real = real_positions(site.result.shape, x, mask_inputs(a.inputs), feeds)
                x, y = ((result if real is None else result[real]).double() for result in (x, y))
                sums[row] += torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum(), (x - y).square().sum()])
    figures: dict[Node, tuple[float, float]] = {}
    for (site, _), (signal, other, product, noise) in zip(pairs, sums.tolist(), strict=True):
        if labels[site] not in unpaired:
            norms = math.sqrt(signal * other)
            figures[site] = metrics.decibels(signal, noise), product / norms if norms else float(signal == other)
    sqnr = {site: sqnr for site, (sqnr, _) in figures.items()}
    unlike = _unlike(a, sqnr)
    before = _before(a, {site: one for site, one in sqnr.items() if site not in unlike})
    sites = [
        SiteComparison(labels[site], site.kind, *pair, before[site], site not in unlike)
        for site, pair in figures.items()
    ]
    return Propagation(sites, unpaired)


def _behind_norm(site: Node, other: Node) -> Node:
    """The batch norm behind a conv or linear that has none in the other graph, as it is folded there; else the site."""

    def norm(node: Node) -> Node | None:
        reader = node.result.only_user if node.kind in ("conv", "linear") else None
        return reader if reader is not None and reader.kind == "batch_norm" else None

    found = norm(site)
    return found if found is not None and norm(other) is None else site


def _unlike(graph: Graph, sqnr: Mapping[Node, float]) -> set[Node]:
    """Sites whose signal is lost, while all that reads it agrees by RECOVERED more (see `SiteComparison.alike`)."""
    found: set[Node] = set()
    after: dict[Node, float] = {}
    for node in reversed(graph.nodes):
        own, users = sqnr.get(node), {user for result in node.results for user in result.users}
        read = metrics.worst(after[user] for user in users)
        if any(result.is_output for result in node.results):
            read = -math.inf if own is None else metrics.worst([own, read])
        if own is not None and own < LOST and own + RECOVERED <= read < math.inf:
            found.add(node)
        after[node] = read if own is None or node in found else own
    return found


def places(graph: Graph) -> dict[Node, Place]:
    """The sites that are compared, by their places."""
    return {node: (*key, number) for key, nodes in _by_op_and_path(graph).items() for number, node in enumerate(nodes)}


def _pairs(a: Graph, b: Graph) -> tuple[list[tuple[Node, Node]], dict[Node, Decline]]:
    """Each site of `a` with its counterpart in `b`, in the order of `a`; and the sites without one, with the reason."""
    of_b = _by_op_and_path(b)
    paired, unpaired = dict[Node, Node](), dict[Node, Decline]()
    for (op, path), nodes in _by_op_and_path(a).items():
        counterparts = of_b.get((op, path), [])
        if len(nodes) == len(counterparts):
            paired.update(zip(nodes, counterparts, strict=True))
        else:
            why = Decline("counterparts_differ", others=len(counterparts), op=op, count=len(nodes))
            unpaired.update(dict.fromkeys(nodes, why))
    return [(node, paired[node]) for node in a.nodes if node in paired], unpaired


def _by_op_and_path(graph: Graph) -> dict[tuple[str, str], list[Node]]:
    """The sites that are compared, by op and module path."""
    sites: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        dtype = node.result.dtype if node.op is not None and node.op.family not in _NOT_COMPARED else None
        if dtype is not None and dtype.is_floating_point:
            sites[node.kind, node.path].append(node)
    return sites


def _feeds_of(graph: Graph, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    names = [value.name for value in graph.inputs]
    return feeds if set(names) == set(feeds) else dict(zip(names, feeds.values(), strict=True))


def _before(graph: Graph, sqnr: Mapping[Node, float]) -> dict[Node, float]:
    """For each node the lowest SQNR among the nearest compared sites that it reads."""
    before: dict[Node, float] = {}
    for node in graph.nodes:
        producers = [value.producer for value in node.operands if value is not None and value.producer is not None]
        before[node] = metrics.worst(sqnr.get(producer, before[producer]) for producer in producers)
    return before
