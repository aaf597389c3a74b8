"""The weights that passes change: which sites have one that can be changed, and which sites share one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from graphopt.errors import GraphError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value, dtype_name, every_node
from graphopt.numerics.finite import require_finite
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class Weight:
    """A stored float weight and the sites that read it, in the order of the graph."""

    value: Value
    sites: list[Node]

    @property
    def tensor(self) -> Tensor:
        """(out, in, ...), as its sites see it. Loaded at each access: a weight of a file is in memory only while a
        caller holds this."""
        tensor = self.sites[0].graph.constant(self.value)
        if tensor is None:
            raise GraphError(f"the weight of {self.sites[0].label} is not stored")
        return tensor


def why_fixed(site: Node) -> Decline | None:
    """Why the weight of a site cannot be changed, or None where it is a stored float tensor."""
    weight = site.weight
    if weight is not None:
        return None if weight.is_floating_point() else Decline("weight_not_float", dtype=dtype_name(weight.dtype))
    value = site.operand("weight") if site.op is not None and "weight" in site.op.operands else None
    if value is None:
        return Decline("no_weight", op=site.kind)
    if value.producer is not None and value.producer.kind == "dequantize":
        return Decline("already_quantized")
    return Decline("weight_computed")


def already_quantized(graph: Graph) -> str:
    """What to tell the user of a model without float weights if it is quantized; empty where it is not."""
    for node in every_node(graph):
        if any(mark in node.kind.lower() for mark in ("quantize", "int8", "qlinear", "integer")):
            return "; it is quantized already: change the float model, and quantize it after"
    return ""


def selected(graph: Graph, context: Context, targets: Selector, ignore: Selector) -> list[Node]:
    """`Context.sites`; where the model has none, in no body either, a note says so, and whether it is quantized
    already."""
    sites = context.sites(graph, targets, ignore)
    if graph.whole is graph and not any(node in targets and node not in ignore for node in every_node(graph)):
        left = " that ignore leaves" if ignore.terms else ""
        context.note(f"nothing to change: {targets} selects no site of the model{left}{already_quantized(graph)}")
    return sites


def changeable(sites: Iterable[Node], context: Context) -> list[Weight]:
    """The weights of `sites` that can be changed for all their readers together; the other sites are declined.

    A weight that a node outside `sites` reads too (a tied embedding) is declined: changing it for some of its readers
    would untie it and store it twice. Raises ValueError, naming the site, where a weight holds NaN or infinity.
    """
    readers: dict[Value, list[Node]] = {}
    for site in sites:
        if why := why_fixed(site):
            context.decline(site, why)
        else:
            readers.setdefault(site.required("weight"), []).append(site)
    weights = []
    for weight in (Weight(value, nodes) for value, nodes in readers.items()):
        other = next((user for user in weight.value.users if user not in weight.sites), None)
        if other is None:
            require_finite(weight.tensor, f"the weight of {weight.sites[0].label}")
            weights.append(weight)
            continue
        reader = other.kind if other.label == other.kind else f"{other.kind} {other.label}"
        for site in weight.sites:
            context.decline(site, Decline("weight_tied", reader=reader))
    return weights
