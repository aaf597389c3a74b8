"""The weights that passes change: which sites have one that can be changed, and which sites share one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value
from graphopt.numerics.finite import require_finite
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import Selector


@dataclass(frozen=True)
class Weight:
    """A stored float weight, as its sites see it, and the sites that read it, in order."""

    value: Value
    sites: list[Node]

    @property
    def tensor(self) -> Tensor:
        """Read anew each time: a weight that lies in a file is in memory as long as somebody holds this."""
        tensor = self.sites[0].graph.constant(self.value)
        assert tensor is not None  # `why_fixed`
        return tensor


def why_fixed(site: Node) -> str | None:
    """Why the weight of a site cannot be changed, or None where it is a stored float tensor."""
    weight = site.weight
    if weight is not None:
        kind = str(weight.dtype).removeprefix("torch.")
        return None if weight.is_floating_point() else f"weight is {kind}, not float"
    value = site.operand("weight") if site.op is not None and "weight" in site.op.operands else None
    if value is None:
        return f"{site.kind} has no weight"
    if value.producer is not None and value.producer.kind == "dequantize":
        return "already quantized"
    return "weight is computed by the graph"


def already_quantized(graph: Graph) -> str:
    """What to add where a model has nothing to change, as its weights are integers; empty where they are not."""
    for node in graph.nodes:
        if any(mark in node.kind.lower() for mark in ("quantize", "int8", "qlinear", "integer")):
            return "; it is quantized already: change the float model, and quantize it after"
    return ""


def selected(graph: Graph, context: Context, targets: Selector, ignore: Selector) -> list[Node]:
    """`Context.sites`, with a note where there is none, and on whether the model is quantized already."""
    sites = context.sites(graph, targets, ignore)
    if not sites:
        left = " that ignore leaves" if ignore.terms else ""
        context.note(f"nothing to change: {targets} selects no site of the model{left}{already_quantized(graph)}")
    return sites


def changeable(sites: Iterable[Node], context: Context) -> list[Weight]:
    """The weights of `sites` that can be changed for all of their readers at once; the other sites are declined.

    A weight that a node outside `sites` reads too (a tied embedding) is left as it is: to change it for some readers
    would untie it, and store it twice. Raises ValueError, naming the site, where a weight holds NaN or infinity.
    """
    found: dict[Value, list[Node]] = {}
    for site in sites:
        reason = why_fixed(site)
        if reason is not None:
            context.decline(site, reason)
        else:
            found.setdefault(site.required("weight"), []).append(site)
    kept = []
    for value, readers in found.items():
        others = [user for user in value.users if user not in readers]
        for site in readers if others else ():
            other = others[0]
            called = other.kind if other.label == other.kind else f"{other.kind} {other.label}"
            context.decline(site, f"weight is tied with {called}")
        tensor = readers[0].weight
        if tensor is not None and not others:
            require_finite(tensor, f"the weight of {readers[0].label}")
            kept.append(Weight(value, readers))
    return kept
