"""Layers cut over processes, as a pass over the graph: linear -> its part of the heads or neurons.

The groups of axes that shrink together, which `prune` removes units from, say what can be cut: a linear that produces
the units is cut along its outputs (column-wise), one that reads them along its inputs (row-wise), and what lies between
computes its own units alone (Shoeybi et al. 2019, section 3). With grouped queries a unit is a key head and the query
heads that read it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from graphopt.analysis.groups import Group, groups
from graphopt.analysis.shrink import shrink
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.pairs import layout
from graphopt.dialects.fx.parts import COPY, SUM
from graphopt.dialects.fx.rounded import Rounded
from graphopt.dialects.fx.views import FxValue, raw_of
from graphopt.errors import UsageError
from graphopt.ir.graph import Node, Value
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.skeleton import Divided, Skeleton, given_by
from graphopt.training.rules import FixedZeros, MovingPattern, WeightRule

_KINDS = ("heads", "neurons")


@dataclass
class Parts:
    """What is cut of a graph, by the names that the parameters of its whole module have."""

    graph: FxGraph
    """This process's part."""
    cuts: dict[str, tuple[int, list[Tensor]]] = field(default_factory=dict)
    """The axis along which a parameter is cut, and the positions (int64) that each process has."""
    first: set[str] = field(default_factory=set)
    """Biases of what is summed over processes: the first alone has them, so that they are added once."""
    inside: set[str] = field(default_factory=set)
    """What every process has, and reads between cut values: each computes a part of its gradient."""
    groups: list[str] = field(default_factory=list)
    """The names of the groups that are cut."""


def chosen(found: Sequence[Group], count: int) -> list[Group]:
    """The groups that are cut into `count` parts: heads first, then the largest.

    None of the sites of one may take part in another. Raises UsageError where heads are no multiple of the parts.
    """
    taken: set[Node] = set()
    several = []
    for group in sorted(found, key=lambda group: (group.kind != "heads", -group.size)):
        sites = [*group.producers, *group.consumers]
        norms = any(user.kind == "batch_norm" for axis in group.axes for user in axis.value.users)
        fits = group.locked is None and not group.reductions and group.kind in _KINDS and group.consumers and not norms
        if not fits or any(site.kind != "linear" for site in sites) or not taken.isdisjoint(sites):
            continue
        if group.size % count:
            if group.kind == "heads":
                raise UsageError(
                    f"tp={count} does not divide the {group.size} heads of {group.name} (with grouped queries, key "
                    "heads count): give tp a divisor of it, or prune to a multiple"
                )
            continue
        taken.update(sites)
        several.append(group)
    return several


def parts(graph: FxGraph, module: nn.Module, also: Sequence[Value], count: int, index: int, group: str) -> Parts:
    """Cut a graph into parts, and put f and g around what is cut.

    module: of the whole graph. also: values that are read besides the outputs. count: of parts; index: which of them
    this process has. group: the name of their process group. Raises UsageError where nothing can be cut.
    """
    base = _returning(graph, also)
    found = groups(base)
    picked = chosen(found, count)
    if not picked:
        raise UsageError(
            f"tp={count} cuts heads and neurons between linears, and the model has none whose number is a multiple of "
            f"{count}: use dp or fsdp"
        )
    own = base.clone()
    made = Parts(own, groups=[one.name for one in picked])
    again = groups(own)
    units = {one: torch.arange(one.size).chunk(count) for one in picked}
    shrink(own, {again[found.index(one)]: units[one][index].clone() for one in picked})
    _name_cuts(made, base, module, units)
    _connect(made, base, module, picked, group, index)
    return made


def _returning(graph: FxGraph, also: Sequence[Value]) -> FxGraph:
    """A clone that returns some further values."""
    clone = graph.clone()
    if also:
        counterparts = dict(zip(graph.native.graph.nodes, clone.native.graph.nodes, strict=True))
        further = [FxValue(clone, counterparts[cast(fx.Node, raw_of(value))]) for value in also]
        outputs = [*clone.outputs, *further]
        clone.set_outputs({f"output {place}": value for place, value in enumerate(outputs)})
    return clone


def _name_cuts(
    made: Parts, base: FxGraph, module: nn.Module, units: Mapping[Group, Sequence[Tensor]]
) -> None:
    """Which parameters are cut, where, and which are read whole between cut values."""
    touched: set[Value] = set()
    for group, several in units.items():
        for axis in group.axes:
            if not axis.value.is_constant:
                touched.add(axis.value)
                continue
            raw = raw_of(axis.value)
            name = base.parameter(module, axis.value) if isinstance(raw, fx.Node) else None
            touched.add(axis.value)
            if name is not None and isinstance(raw, fx.Node):
                _, permutation = layout(raw)
                places = [torch.nonzero((axis.units < 0) | torch.isin(axis.units, one)).flatten() for one in several]
                made.cuts[name] = permutation[axis.axis], places
    biases = {site.bias for group in units for site in group.consumers}
    for node in base.nodes:
        if touched.isdisjoint([*(one for one in node.operands if one is not None), *node.results]):
            continue
        for value in node.operands:
            if value is not None and value.is_constant and value not in biases:
                name = base.parameter(module, value)
                if name is not None and name not in made.cuts:
                    made.inside.add(name)


def _connect(
    made: Parts, base: FxGraph, module: nn.Module, picked: Sequence[Group], group: str, index: int
) -> None:
    """Put f in front of the linears that produce units, and g behind those that read them."""
    own = made.graph
    before, after = base.sites("linear"), own.sites("linear")
    place = {site: number for number, site in enumerate(before)}
    handed: dict[Value, Value] = {}
    producers = sorted({place[site] for one in picked for site in one.producers})
    consumers = sorted({place[site] for one in picked for site in one.consumers})
    for number in producers:
        site = after[number]
        if site.input not in handed:
            handed[site.input] = own.emit(COPY, site.input, at=site, group=group)
        own.replace(site, own.emit("linear", handed[site.input], site.required("weight"), site.bias, at=site))
    for number in consumers:
        site, bias = after[number], before[number].bias
        if bias is not None and (name := base.parameter(module, bias)) is not None:
            made.first.add(name)
        partial = own.emit("linear", site.input, site.required("weight"), site.bias if index == 0 else None, at=site)
        own.replace(site, own.emit(SUM, partial, at=site, group=group))
    own.sweep()


class TensorParallel(Divided):
    """Each process has its part of the heads and neurons, and the same batches as the others; with dp, its own."""

    def __init__(
        self, graph: FxGraph, module: nn.Module, also: Sequence[Value], trained: Collection[str], mesh: Mesh,
        *, learn_scales: bool,
    ) -> None:  # fmt: skip
        """Raises UsageError where nothing can be cut, or heads are no multiple of the parts."""
        self.mesh: Mesh = mesh
        self._count, self._index = mesh.sizes.tp, mesh.place["tp"]
        self._group = mesh.group("tp")
        made = parts(graph, module, also, self._count, self._index, self._group.group_name)
        outputs = len(graph.outputs)

        def rebuild(results: list[Any]) -> Any:
            return (tuple(results[:outputs]), results[outputs:]) if also else tuple(results)

        local = made.graph.module(rebuild, learn_scales=learn_scales)
        local.to(mesh.device)
        self._scale_rounding(cast(fx.GraphModule, module), local)
        self.module, self.made = local, made
        self._own = _names(made, graph, module, local)
        """By the name of a parameter in the whole module, that in the part."""
        known = dict(local.named_parameters())
        self.parameters = {name: known[self._own[name]] for name in trained if name in self._own}
        for name, own in self._own.items():
            known[own].requires_grad_(name in self.parameters)
        self._own |= {name: name for name in local.state_dict() if name.rpartition(".")[2] in _STATISTICS}
        self._skeleton = Skeleton(module)

    def _scale_rounding(self, whole: fx.GraphModule, own: fx.GraphModule) -> None:
        """Let what rounds a part know of the whole: how many elements share a learned scale, and a dynamic range."""
        sizes = {str(node.target): _size(node) for node in whole.graph.find_nodes(op="call_module")}
        for node in own.graph.find_nodes(op="call_module"):
            rounded, name = own.get_submodule(str(node.target)), str(node.target)
            if not isinstance(rounded, Rounded) or name not in sizes:
                continue
            other = cast(Rounded, whole.get_submodule(name))
            cut = sizes[name] // _size(node)
            scales = 1 if rounded.scale is None or other.scale is None else other.scale.numel() // rounded.scale.numel()
            rounded.parts = max(1, cut // scales)
            if rounded.scale is None and cut > 1:
                rounded.over = self._extremes if rounded.rows is None else self._largest

    def _extremes(self, x: Tensor) -> Tensor:
        """The least and the largest element of a cut activation, over all parts."""
        ends = torch.stack([-x.amin(), x.amax()])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        return torch.stack([-ends[0], ends[1]])

    def _largest(self, x: Tensor) -> Tensor:
        """The largest magnitude of each row of a cut activation, over all parts: (..., 1)."""
        largest = x.abs().amax(-1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return largest

    # --- tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        known: dict[str, Tensor] = self.module.state_dict()
        return {name: known[own] for name, own in self._own.items()}

    def stored(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.wholes(parts)

    def loaded(self, name: str, blank: Tensor) -> Tensor | None:
        return self.part(name, blank)

    def part(self, name: str, whole: Tensor) -> Tensor | None:
        if name in self.made.first and self._index:
            return None
        if name not in self.made.cuts or not whole.dim():
            return whole
        axis, places = self.made.cuts[name]
        return whole.index_select(axis, places[self._index].to(whole.device))

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        told: list[Any] = [None] * self._count
        own = [(name, one.shape, one.dtype) for name, one in parts.items()]
        dist.all_gather_object(told, own, group=self._group)
        found: dict[str, Tensor] = {}
        for name, shape, dtype in told[0]:  # the first has all
            if name not in self.made.cuts or len(shape) == 0:
                is_of_first = name in self.made.first
                found[name] = self._given_by(0, parts.get(name), shape, dtype) if is_of_first else parts[name]
                continue
            axis, places = self.made.cuts[name]
            whole = torch.empty(self._skeleton.shapes[name], dtype=dtype, device=self.mesh.device)
            for rank, place in enumerate(places):
                own_shape = [*shape[:axis], len(place), *shape[axis + 1 :]]
                part = self._given_by(rank, parts.get(name), own_shape, dtype)
                whole.index_copy_(axis, place.to(whole.device), part)
            found[name] = whole
        return found

    def _given_by(self, rank: int, one: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return given_by(rank, one, shape, dtype, self._group, self.mesh.device)

    def rules(self, rules: Mapping[str, WeightRule]) -> dict[str, WeightRule]:
        found: dict[str, WeightRule] = {}
        for name, rule in rules.items():
            if isinstance(rule, MovingPattern) and self._keeps_runs(name, rule):
                found[name] = rule
            elif isinstance(rule, FixedZeros):
                mask = self.part(name, rule.mask)
                assert mask is not None  # zeros are in weights, which all parts have
                found[name] = FixedZeros(mask)
            else:
                raise UsageError(
                    f"what is removed of {name} as it is trained is decided over the whole weight, and tp cuts it: use "
                    "dp, or zeros that stay"
                )
        return found

    def _keeps_runs(self, name: str, rule: MovingPattern) -> bool:
        """Whether each part has whole runs of an N:M pattern."""
        if name not in self.made.cuts:
            return True
        axis, places = self.made.cuts[name]
        along_input = axis == (0 if rule.transposed else 1)
        runs = rule.pattern.columns
        return not along_input or all(len(place) % runs == 0 and int(place[0]) % runs == 0 for place in places)

    def copies(self, name: str) -> int:
        return self.mesh.world // (self._count if name in self.made.cuts or name in self.made.first else 1)

    # --- a step

    def reduce(self, others: Sequence[nn.Parameter]) -> None:
        inside = [one for name, one in self.parameters.items() if name in self.made.inside]
        self._sum(inside, self._group)
        super().reduce(others)


def _names(made: Parts, graph: FxGraph, module: nn.Module, local: nn.Module) -> dict[str, str]:
    """The name of each parameter of a whole module in the module of a part, by the nodes that read them: nodes with
    parameters are the same in both, in one order."""
    own = made.graph

    def read(one: FxGraph, of: nn.Module) -> list[list[str | None]]:
        names = [[None if value is None else one.parameter(of, value) for value in node.operands] for node in one.nodes]
        return [several for several in names if any(several)]

    found: dict[str, str] = {}
    for theirs, ours in zip(read(graph, module), read(own, local), strict=True):
        found |= {name: own for name, own in zip(theirs, ours, strict=False) if name is not None and own is not None}
    return found


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a batch norm updates: none is cut."""


def _size(node: fx.Node) -> int:
    """The product of the sizes that are known of what a node computes."""
    return math.prod(size for size in node.meta["val"].shape if isinstance(size, int))
