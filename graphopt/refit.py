"""Consumers that make up for the units that go: their weights solved again, in the shape they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt import axes, inputs
from graphopt.axes import Group
from graphopt.graph import Graph, Node, Value
from graphopt.numerics.compensate import DAMPING, refit
from graphopt.numerics.moments import Drift
from graphopt.pipeline import Context
from graphopt.weights import Weight, why_fixed

PARTS = 6
"""In how many parts weights are solved again: each runs the batches through the original and through the graph as it is
by then, so that the time stays linear in the number of layers."""


@dataclass(frozen=True)
class _Reader:
    """A weight that reads units that go, and which positions of its input axis stay (bool)."""

    weight: Weight
    keep: Tensor


def compensate(graph: Graph, context: Context, cuts: Mapping[Group, Tensor]) -> None:
    """Refit what reads the units that go, on the calibration batches, with zeros in the columns that are to be cut.

    cuts: the units that stay, by group. The graph computes nearly what it did before, and `shrink` then changes nothing
    of that; its groups must be found anew. It is done in PARTS from the first layer to the last: each comes near to the
    outputs of the original, on what the parts ahead of it leave. Left as they are, and noted: consumers in a group with
    norms, whose other inputs change, and weights that something else reads too. Raises UsageError without calibration.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    readers = sorted(_readers(graph, context, cuts), key=lambda reader: places[reader.weight.sites[0]])
    size = max(1, -(-len(readers) // PARTS))
    original = graph.clone()
    before = dict(zip(places, original.nodes, strict=True))
    singular: list[str] = []
    for start in range(0, len(readers), size):
        part = readers[start : start + size]
        found: dict[Value, tuple[Tensor, Tensor | None]]
        if start == 0:
            seen = inputs.affine(graph, context, [reader.weight for reader in part])
            found = {weight.value: (moments[0], None) for weight, moments in seen}
        else:
            found = _drifts(graph, original, before, context, [reader.weight for reader in part])
        for reader in part:
            singular += _solve(graph, reader, *found[reader.weight.value])
    if singular:
        context.note(
            "the calibration does not tell all inputs apart (a singular covariance; more batches may): damping of "
            f"{DAMPING:g} of each variance decides the weights of {', '.join(singular)}"
        )


def _drifts(
    graph: Graph, original: Graph, before: Mapping[Node, Node], context: Context, weights: Sequence[Weight]
) -> dict[Value, tuple[Tensor, Tensor | None]]:
    """Of each weight, the moments of what it reads now, and the drift from what it read in the original."""
    seen = {weight.value: Drift(weight.tensor[0].numel(), inputs.rows(weight.sites[0])) for weight in weights}
    sites = [(site, seen[weight.value]) for weight in weights for site in weight.sites]
    batches = context.batches()
    marks = axes.masks(batches.inputs)
    for feeds in batches:
        now = graph.evaluate(feeds, [site.input for site, _ in sites])
        was = original.evaluate(feeds, [before[site].input for site, _ in sites])
        for (site, drift), x, old in zip(sites, now, was, strict=True):
            drift.compare(x, old, axes.real_positions(site.input.shape, x, marks, feeds))
    return {value: (drift.affine()[0], drift.drift()[0]) for value, drift in seen.items()}


def _solve(graph: Graph, reader: _Reader, moments: Tensor, drift: Tensor | None) -> list[str]:
    """Put the weights of one reader in place; its label where its inputs cannot be told apart."""
    weight = reader.weight
    biases = {site: None if site.bias is None else graph.constant(site.bias) for site in weight.sites}
    mean = moments[-1, :-1] if all(bias is not None for bias in biases.values()) else None
    keep = reader.keep.repeat_interleave(weight.tensor[0, 0].numel())
    found = refit(weight.tensor.flatten(1), moments[:-1, :-1], keep, mean=mean, drift=drift)
    stored = graph.add_constant(found.weight.reshape(weight.tensor.shape), weight.value.name)
    for site, bias in biases.items():
        added = site.bias
        if added is not None and bias is not None:
            added = graph.add_constant(bias + found.shift, added.name)
        graph.replace(site, graph.emit(site.kind, site.input, stored, added, at=site, **site.attributes))
    return [weight.sites[0].label] if found.singular else []


def _readers(graph: Graph, context: Context, cuts: Mapping[Group, Tensor]) -> Iterator[_Reader]:
    """The weights to solve again: linears and ungrouped convs that alone read a stored float weight."""
    normed = {site for group in cuts for site in group.consumers if group.norms}
    if normed:
        context.note(f"{len(normed)} consumers behind norms keep their weights: the norms change what they read")
    sites: dict[Value, list[Node]] = {}
    for site in dict.fromkeys(site for group in cuts for site in group.consumers):
        if site.kind in ("linear", "conv") and site not in normed and why_fixed(site) is None:
            sites.setdefault(site.required("weight"), []).append(site)
    keeps: dict[Value, Tensor] = {}
    for group, units in cuts.items():
        stays = torch.zeros(group.size + 1, dtype=torch.bool)
        stays[units] = stays[-1] = True
        for axis in group.axes:
            if axis.value in sites and axis.axis == 1:
                keeps[axis.value] = stays[axis.units] & keeps.get(axis.value, torch.tensor(True))
    tied = []
    for value, readers in sites.items():
        tensor = readers[0].weight
        if set(value.users) != set(readers):
            tied += readers
        elif tensor is not None and value in keeps:
            yield _Reader(Weight(value, tensor, readers), keeps[value])
    if tied:
        context.note(f"tied weights stay as they are: {', '.join(site.label for site in tied)}")
