"""Compensation for units that are removed: the weights of their consumers are solved again, in their old shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis.groups import Group
from graphopt.ir.graph import Graph, Node, Value
from graphopt.numerics.compensate import refit
from graphopt.pipeline import inputs
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import Weight, why_fixed


@dataclass(frozen=True)
class _Reader:
    """A weight that reads units to be removed, and which positions of its input axis stay (bool)."""

    weight: Weight
    keep: Tensor


def compensate(graph: Graph, context: Context, cuts: Mapping[Group, Tensor]) -> None:
    """Solve the weights of consumers again on the calibration batches, with zeros in the columns that will be cut.

    cuts: the units that stay, by group. Afterwards the graph computes nearly what it did, and `shrink` does not change
    its outputs; its groups must be found again. Not solved, with a note: consumers in a group with norms, whose other
    inputs change, and weights that another node reads too. Raises UsageError without calibration.
    """
    readers = {reader.weight.value: reader for reader in _readers(graph, context, cuts)}
    solved: list[tuple[Weight, Tensor, dict[Node, Tensor | None]]] = []
    singular = []
    for weight, moments in inputs.affine(graph, context, [reader.weight for reader in readers.values()]):
        kernel = weight.tensor[0, 0].numel()
        keep = readers[weight.value].keep.repeat_interleave(kernel)
        matrix, mean = moments[0, :-1, :-1], moments[0, -1, :-1]
        biases = {site: None if site.bias is None else graph.constant(site.bias) for site in weight.sites}
        affine = all(bias is not None for bias in biases.values())
        found = refit(weight.tensor.flatten(1), matrix, keep, mean=mean if affine else None)
        if found.singular:
            singular.append(f"{weight.sites[0].label} ({found.damping:g})")
        shifted = {site: None if bias is None else bias + found.shift for site, bias in biases.items()}
        solved.append((weight, found.weight.reshape(weight.tensor.shape), shifted))
    for weight, tensor, shifted in solved:
        stored = graph.add_constant(tensor, weight.value.name)
        for site, bias in shifted.items():
            added = site.bias if bias is None or site.bias is None else graph.add_constant(bias, site.bias.name)
            graph.replace(site, graph.emit(site.kind, site.input, stored, added, at=site, **site.attributes))
    if singular:
        context.note(
            "the calibration does not tell all inputs apart (a singular covariance; more batches may): damping, as a "
            f"share of each variance, decides the weights of {', '.join(singular)}"
        )


def _readers(graph: Graph, context: Context, cuts: Mapping[Group, Tensor]) -> Iterator[_Reader]:
    """The weights to solve again: linears and ungrouped convs that alone read a stored float weight."""
    normed = {site for group in cuts for site in group.consumers if group.reductions}
    if normed:
        context.note(f"{len(normed)} consumers after norms keep their weights: the norms change what they read")
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
        if set(value.users) != set(readers):
            tied += readers
        elif value in keeps:
            yield _Reader(Weight(value, readers), keeps[value])
    if tied:
        context.note(f"tied weights stay as they are: {', '.join(site.label for site in tied)}")
