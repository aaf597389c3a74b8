"""The importance of the units of groups: the criteria of `prune`, by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from graphopt.analysis.groups import Axis, Group
from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.numerics import importance
from graphopt.numerics.finite import require_finite
from graphopt.pipeline import inputs
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import Weight, why_fixed
from graphopt.report.declines import Reason

Scores = dict[Group, Tensor]
"""The importance of each unit, at least 0: float64 (size,). Without groups that the criterion cannot weigh."""

_STATISTICS = ("mean", "var", "scale", "zero_point", "condition", "mask")
"""Operands that are no weights: running statistics of a batch norm, quantization parameters, masks."""

_UNWEIGHED = {
    "activation": "not_weighed_unread",
    "taylor": "not_weighed_without_weight",
    "movement": "not_weighed_by_zeros",
    "l1": "not_weighed_without_weight",
    "l2": "not_weighed_without_weight",
}
"""The code for a group that a criterion cannot weigh."""


def weigh(graph: Graph, context: Context, groups: Sequence[Group], criterion: str, seed: int) -> Scores:
    """The importance of the units of groups: by a criterion, or by auto, activation with calibration, else l2.

    A group that the criterion cannot weigh is declined; under auto it goes by l2, which is noted. Raises ValueError,
    naming the site, where a weight of a group holds NaN or infinity.
    """
    for group in groups:
        for axis, tensor in _constants(graph, group):
            site = axis.value.users[0]
            require_finite(tensor, f"the {_operand(site, axis.value)} of {site.label}")
    auto = criterion == "auto"
    name = criterion if not auto else "activation" if context.calibration is not None else "l2"
    found = CRITERIA[name](graph, context, groups, seed)
    if auto and name == "activation" and len(found) < len(groups):
        others = l2(graph, context, [group for group in groups if group not in found], seed)
        if others:
            names = ", ".join(group.name for group in others)
            context.note(f"weighed by l2, as no linear or conv with a stored float weight reads them: {names}")
        found, name = found | others, "l2"
    if groups and not found:
        why = Reason.of(Decline(_UNWEIGHED[name], criterion=name))
        raise UsageError(f"{context.record.name}: no group can be weighed ({groups[0].name}: {why})")
    for group in groups:
        if group not in found:
            context.record.decline(group.name, Decline(_UNWEIGHED[name], criterion=name))
    return {group: found[group] for group in groups if group in found}


def l1(graph: Graph, context: Context, groups: Sequence[Group], seed: int) -> Scores:
    """The sum of the magnitudes of a unit's weights (Li et al. 2017), in producers, consumers and what is between.

    Biases and norms count; running statistics, masks and quantization parameters do not.
    """
    return _norms(graph, groups, 1)


def l2(graph: Graph, context: Context, groups: Sequence[Group], seed: int) -> Scores:
    """The root of the sum of their squares."""
    return _norms(graph, groups, 2)


def random(graph: Graph, context: Context, groups: Sequence[Group], seed: int) -> Scores:
    """At random, by the seed and the group's name, so that no group's draw depends on the others."""
    draws = {group: zlib.crc32(f"{seed} {group.name}".encode()) for group in groups}
    return {
        group: torch.rand(group.size, generator=torch.Generator().manual_seed(drawn), dtype=torch.float64)
        for group, drawn in draws.items()
    }


def activation(graph: Graph, context: Context, groups: Sequence[Group], seed: int) -> Scores:
    """What a unit adds to the outputs of its consumers: (‖x_j‖ · ‖W_:j‖)² (WANDA, Sun et al. 2024, squared).

    The sum over consumers, each as a share of what all its inputs add. Consumers are linears and convs with a stored
    float weight; a group without any is not weighed.
    """
    wanted: dict[Value, list[Node]] = {}
    for site in dict.fromkeys(site for group in groups for site in group.consumers):
        if site.kind in ("linear", "conv") and why_fixed(site) is None:
            wanted.setdefault(site.required("weight"), []).append(site)
    weights = [Weight(value, sites) for value, sites in wanted.items()]
    energies: dict[Value, Tensor] = {}
    for weight, norm in inputs.norms(graph, context, weights):
        energy = importance.output_energy(weight.tensor, norm[0].square())
        energies[weight.value] = energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    found = {}
    for group in groups:
        parts = [(energies[axis.value], 0, axis.units) for axis in group.axes
                 if axis.axis == 1 and axis.value in energies]  # fmt: skip
        if parts:
            found[group] = importance.per_unit(parts, group.size)
    return found


def movement(graph: Graph, context: Context, groups: Sequence[Group], seed: int) -> Scores:
    """All the same: the training behind the pass learns them (Sanh et al. 2020).

    It leaves units out by zeros in the weights that read them. A group is not weighed where that is not what removing
    them does: where a norm or a product of two computed values reads them too, or no stored float weight does.
    """
    return {
        group: torch.ones(group.size, dtype=torch.float64)
        for group in groups
        if group.consumers and not group.reductions and all(_reads(group, site) for site in group.consumers)
    }


def _reads(group: Group, site: Node) -> bool:
    """Whether a site is a product with a stored float weight whose input axis is in the group."""
    stored = site.kind in ("linear", "conv") and why_fixed(site) is None
    return stored and any(axis.value == site.required("weight") and axis.axis == 1 for axis in group.axes)


def taylor(graph: Graph, context: Context, groups: Sequence[Group], seed: int) -> Scores:
    """The change of the loss without the unit, to first order: |Σ w · dL/dw| (Molchanov et al. 2017), the batches' sum.

    Holds the gradients of all weights at once.
    """
    axes = {group: weights for group in groups if (weights := _constants(graph, group))}
    values = list(dict.fromkeys(axis.value for several in axes.values() for axis, _ in several))
    found = {group: torch.zeros(group.size, dtype=torch.float64) for group in axes}
    for gradients in context.gradients(graph, values):
        slopes = dict(zip(values, gradients, strict=True))
        for group, several in axes.items():
            parts = ((tensor, slopes[axis.value], axis.axis, axis.units) for axis, tensor in several)
            found[group] += importance.taylor(parts, group.size)
    return found


CRITERIA: Mapping[str, Callable[[Graph, Context, Sequence[Group], int], Scores]] = MappingProxyType(
    {one.__name__: one for one in (l1, l2, activation, taylor, movement, random)}
)
"""Each weighs all units of the groups; none changes the graph."""


def _norms(graph: Graph, groups: Sequence[Group], order: int) -> Scores:
    slices = {group: [(tensor, axis.axis, axis.units) for axis, tensor in _constants(graph, group)] for group in groups}
    return {group: importance.norms(parts, group.size, order=order) for group, parts in slices.items() if parts}


def _constants(graph: Graph, group: Group) -> list[tuple[Axis, Tensor]]:
    """The stored float tensors of a group that weigh something, by each axis of theirs that shrinks."""
    found = []
    for axis in group.axes:
        tensor = graph.constant(axis.value) if axis.value.is_constant else None
        statistic = all(_operand(user, axis.value) in _STATISTICS for user in axis.value.users)
        if tensor is not None and tensor.is_floating_point() and not statistic:
            found.append((axis, tensor))
    return found


def _operand(node: Node, value: Value) -> str:
    """What a node calls a value that it reads."""
    if node.op is None:
        return "constant"
    names = node.op.names(len(node.operands))
    return next((name for name, one in zip(names, node.operands, strict=False) if one == value), "constant")
