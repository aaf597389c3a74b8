"""What a graph costs with some units cut: FLOPs and parameters counted without cutting it, latency measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graphopt.analysis.groups import groups
from graphopt.analysis.shrink import shrink
from graphopt.ir.cost import flops
from graphopt.ir.graph import Graph, Shape, Value
from graphopt.passes.prune.budget import Candidate, Sizes
from graphopt.pipeline.target import Target

ROUNDS = 9
"""Paired rounds of one measurement: a bisection makes about seven, and the last of them are close to each other."""


class CostModel:
    """What a graph costs with some units cut, counted without cutting it."""

    def __init__(self, graph: Graph, candidates: Sequence[Candidate], axes: Mapping[str, int]) -> None:
        """axes: sizes of named axes. `flops` is None where a size is still unknown, at the nodes `uncounted`."""
        self.axes = axes
        values = {axis.value for one in candidates for axis in one.group.axes}
        self._constants = [value for value in values if value.is_constant]
        self._touched = [node for node in graph.nodes if not values.isdisjoint((*node.operands, *node.results))]
        counted = [flops(node, axes) for node in graph.nodes]
        self.uncounted = [node for node, count in zip(graph.nodes, counted, strict=True) if count is None]
        self.flops = None if self.uncounted else sum(n for n in counted if n is not None)
        self.parameters = sum(tensor.numel() for _, tensor in graph.constants())

    def unit_cost(self, of: str) -> Callable[[Candidate], float]:
        """From a group to the FLOPs ("flops") or parameters ("params") of one of its units, with all others there."""
        saved = self._saved(of)
        known: dict[Candidate, float] = {}

        def cost(candidate: Candidate) -> float:
            if candidate not in known:
                fewer = candidate.sizes[1]
                known[candidate] = saved({candidate: fewer}) / (candidate.group.size - fewer)
            return known[candidate]

        return cost

    def share_left(self, of: str) -> Callable[[Sizes], float]:
        """From sizes to the share of the FLOPs or parameters that stays. Raises ValueError where it is not known."""
        whole = self.flops if of == "flops" else self.parameters
        if not whole:
            raise ValueError(f"the {of} of the model are not known")
        saved = self._saved(of)
        return lambda sizes: 1 - saved(sizes) / whole

    def _saved(self, of: str) -> Callable[[Sizes], int]:
        return self.flops_saved if of == "flops" else self.parameters_saved

    def flops_saved(self, sizes: Sizes) -> int:
        """FLOPs of the units that these sizes leave out."""
        shapes = self._shapes(sizes)
        nodes = [node for node in self._touched if not shapes.keys().isdisjoint((*node.operands, *node.results))]
        return sum((flops(node, self.axes) or 0) - (flops(node, self.axes, shapes) or 0) for node in nodes)

    def parameters_saved(self, sizes: Sizes) -> int:
        """Parameters of the units that these sizes leave out."""
        shapes = self._shapes(sizes)
        return sum(_numel(value.shape) - _numel(shapes.get(value, value.shape)) for value in self._constants)

    def _shapes(self, sizes: Sizes) -> dict[Value, Shape]:
        """The new shape of each value that shrinks."""
        removed: dict[Value, Counter[int]] = {}
        for candidate, size in sizes.items():
            if size < candidate.group.size:
                is_cut = torch.ones(candidate.group.size + 1, dtype=torch.bool)
                is_cut[candidate.units(size)] = is_cut[-1] = False  # at -1: positions that belong to no unit
                for axis in candidate.group.axes:
                    removed.setdefault(axis.value, Counter())[axis.axis] += int(is_cut[axis.units].sum())
        return {
            value: tuple(
                size - by_axis[index] if isinstance(size, int) else size for index, size in enumerate(value.shape or ())
            )
            for value, by_axis in removed.items()
        }


def _numel(shape: Shape | None) -> int:
    return torch.Size([size for size in shape or () if isinstance(size, int)]).numel()


def latency_left(
    graph: Graph, target: Target, feeds: Sequence[Mapping[str, Tensor]], threads: int | None
) -> Callable[[Sizes], float]:
    """From sizes to the latency that they leave on a target, as a share of the latency of the graph as it is.

    The geometric mean over feeds. Each measurement cuts a clone, lowers, compiles and times it; results are kept.
    """
    known: dict[tuple[tuple[str, int], ...], float] = {}
    names = [group.name for group in groups(graph)]

    def cost(sizes: Sizes) -> float:
        key = tuple((one.group.name, size) for one, size in sizes.items())
        if key not in known:
            small = graph.clone()
            cut(small, sizes, names)
            ratios = target.ratios(small, graph, feeds, threads=threads, rounds=ROUNDS)
            known[key] = math.exp(-math.fsum(math.log(ratio.median) for ratio in ratios) / len(ratios))
        return known[key]

    return cost


def cut(graph: Graph, sizes: Sizes, names: Sequence[str]) -> None:
    """Shrink groups of a graph to sizes that were chosen for one of the same structure: its original, or the same graph
    with other weights.

    names: of all groups, in order, in that other graph; here a node that was emitted again and has no module path may
    have another name. Raises ValueError where the graph has another number of groups.
    """
    there = groups(graph)
    if len(there) != len(names):
        raise ValueError(f"sizes were chosen for {len(names)} groups, and the graph now has {len(there)}")
    units = {one.group.name: one.units(size) for one, size in sizes.items() if size < one.group.size}
    shrink(graph, {group: units[name] for name, group in zip(names, there, strict=True) if name in units})
