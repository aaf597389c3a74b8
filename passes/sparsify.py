"""f(x, W, b)  ->  f(x, W · mask, b), with the share of W that is smallest in magnitude at zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.graph import Graph
from graphopt.numerics import prune
from graphopt.pipeline import Context, Pass, Selector, Stage, UsageError
from graphopt.weights import changeable

_PRUNED = ("linear", "conv")
"""Words whose weight multiplies; the few numbers of a norm scale whole channels, and are no use as zeros."""


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set the smallest weights to zero, where they stand (Han et al., 2015).

    Shapes and dtypes stay. Declined: any word but linear and conv, and a weight that the graph computes, that is
    quantized, or that a node outside the selection reads too.
    """

    name = "sparsify"
    stage = Stage.PRUNE

    amount: float = 0.5
    """Share of the weights that becomes zero, at least 0 and below 1."""

    scope: str = "local"
    """What a weight is ranked against: its own tensor (local), or all that are selected (global)."""

    targets: Selector = Selector(*_PRUNED)
    """Sites to consider: words, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not isinstance(self.amount, int | float) or not 0 <= self.amount < 1:
            raise UsageError(f"sparsify: amount is {self.amount!r}; give a number of at least 0 and below 1")
        if self.scope not in ("local", "global"):
            raise UsageError(f"sparsify: scope is {self.scope!r}; give local or global")

    def run(self, graph: Graph, context: Context) -> None:
        sites = []
        for site in context.sites(graph, self.targets, self.ignore):
            if site.kind in _PRUNED:
                sites.append(site)
            else:
                context.decline(site, f"{site.kind} is neither {' nor '.join(_PRUNED)}")
        weights = changeable(sites, context)
        tensors = [weight.tensor for weight in weights]
        if self.scope == "global":
            masks = prune.magnitude_masks_global(tensors, self.amount)
        else:
            masks = [prune.magnitude_mask(tensor, self.amount) for tensor in tensors]
        for weight, mask in zip(weights, masks, strict=True):
            pruned = torch.where(mask, weight.tensor, 0)
            going = f"{int((~mask).sum())} of {mask.numel()} weights"
            if torch.equal(pruned, weight.tensor):
                for site in weight.sites:
                    context.decline(site, f"{going} are to go" + ("" if mask.all() else ", and they are zero"))
                continue
            stored = graph.add_constant(pruned, weight.value.name)
            for site in weight.sites:
                operands = site.input, stored, site.bias
                graph.replace(site, graph.emit(site.kind, *operands, at=site, **site.attributes))
        context.note(
            "zeros inside a weight make its file smaller once compressed; they bring speed only where kernels skip "
            "zeros, and dense CPU kernels don't"
        )
