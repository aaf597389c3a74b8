"""f(x, W, b)  ->  f(x, W', b), with W' the weight with zeros where it matters least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Value
from graphopt.numerics.sparsity import Pattern, cubic
from graphopt.passes.sparsify.amounts import by_sensitivity
from graphopt.passes.sparsify.criteria import CALIBRATED, CRITERIA, Request
from graphopt.passes.sparsify.zeros import Zeros
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import Range
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.weights import Weight, changeable, selected
from graphopt.pipeline.zeros import KeptZeros, MarkedZeros
from graphopt.report.declines import Reason

Share = Annotated[float, Range(0, 1, open_high=True)]

_OPS = ("linear", "conv")
"""Ops whose weight is worth zeros: that of a norm has few numbers, each of which scales a whole channel."""


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set single weights to zero: the smallest (Han et al., 2015), or those that matter least on calibration data.

    Shapes and dtypes stay. gradient ranks by |w · dL/dw|, the mean over batches (Molchanov et al., 2017); wanda by
    |w| · ‖x‖ within each output (Sun et al., 2024); sparsegpt by the error of the layer's output, and updates the
    weights that stay (Frantar & Alistarh, 2023). movement changes nothing: the `distill` or `finetune` behind it learns
    which weights go, those that training moves towards 0 (Sanh et al., 2020). The input axis of a conv runs over
    channels, at one position of the kernel. Declined: any op but linear and conv, a weight that the graph computes,
    that is quantized, or that a node outside the selection reads too, and one that the pattern does not divide.
    """

    name = "sparsify"
    stage = Stage.PRUNE
    changes_weights = True

    amount: Share | Mapping[str, Share] | None = None
    """Share of zeros in [0, 1), of all sites or by site; none: 0.5, or as the pattern says. With criterion=threshold:
    share of the largest weight below which weights become zero."""

    criterion: Literal["magnitude", "movement", "threshold", "random", "gradient", "wanda", "sparsegpt"] = "magnitude"
    """How weights are ranked: magnitude, movement (by the training behind it), threshold (below a share of the
    largest), random, gradient, wanda or sparsegpt."""

    pattern: str = "unstructured"
    """Where zeros lie: unstructured, N:M (2:4; N of M along the input stay), or blocks of outputs x inputs (4x1)."""

    scope: Literal["local", "global"] = "local"
    """What a weight is ranked against: its own tensor (local), or all selected tensors (global)."""

    allocate: Literal["evenly", "sensitivity"] = "evenly"
    """How one amount is spread over sites: the same for each (evenly), or more where the model's outputs suffer less
    (sensitivity)."""

    schedule: Literal["none", "cubic"] = "none"
    """Inside `repeat`: whether the amount grows over the rounds to the one asked for (cubic: fast at first, Zhu &
    Gupta, 2017)."""

    seed: int = 0
    """Of criterion=random."""

    damping: Annotated[float, Range(0, 1, open_low=True)] = 0.01
    """Of criterion=sparsegpt: what is added to the covariance of the inputs, as a share of its mean diagonal."""

    targets: Selector = Selector(*_OPS)
    """Sites to consider: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    @property
    def needs_torch(self) -> bool:
        return self.criterion == "gradient"

    def contradiction(self) -> str | None:
        try:
            pattern = Pattern.parse(self.pattern)
        except ValueError as error:
            return str(error)
        by_site, fixed = isinstance(self.amount, Mapping), pattern.amount
        if by_site and not self.amount:
            return "amount is empty; give a share for at least one site"
        if fixed is not None and (by_site or self.amount not in (None, fixed)):
            return f"pattern {self.pattern} makes {fixed:.6g} of the weights zero; leave amount out, which differs"
        if self.criterion == "threshold" and self.amount is None:
            return "threshold needs amount: the share of the largest weight below which weights become zero"
        if self.criterion == "threshold" and self.pattern != "unstructured":
            return f"a threshold takes weights one by one, and pattern is {self.pattern}; use criterion=magnitude"
        if self.criterion == "sparsegpt" and fixed is None and self.pattern != "unstructured":
            return f"sparsegpt has no blocks, and pattern is {self.pattern}; use unstructured, N:M or criterion=wanda"
        if self.scope == "global" and (fixed is not None or by_site):
            return f"scope=global decides the amount of each weight, and so does {'amount' if by_site else 'pattern'}"
        if self.scope == "global" and self.criterion in ("threshold", "movement", "wanda", "sparsegpt"):
            return f"{self.criterion} ranks each weight by itself; use scope=local, or criterion=magnitude"
        if self.allocate == "sensitivity" and (
            fixed is not None or by_site or self.scope == "global" or self.criterion == "threshold" or self.amount == 0
        ):
            return "allocate=sensitivity spreads one share of zeros; leave out N:M, a threshold, global, 0 and {...}"
        if self.allocate == "sensitivity" and self.criterion == "movement":
            return "allocate=sensitivity tries weights one by one, and movement leaves them to training; leave it out"
        if self.schedule != "none" and (fixed is not None or self.criterion == "threshold"):
            return "schedule lets a share of zeros grow; leave it out with N:M and a threshold"
        for option, criterion in (("seed", "random"), ("damping", "sparsegpt")):
            if option in self.given() and self.criterion != criterion:
                return f"{option} is for criterion={criterion}, and criterion is {self.criterion}"
        return None

    @property
    def marks(self) -> bool:
        return self.criterion == "movement"

    def within(self) -> Sparsify | None:
        alone = self.criterion not in (*CALIBRATED, "gradient", "movement")
        return self if alone and self.scope == "local" and self.allocate == "evenly" else None

    def run(self, graph: Graph, context: Context) -> None:
        if self.criterion in CALIBRATED:
            context.batches()  # raises before the work where there are none, also if no site is selected
        request = self._request(graph, context)
        if self.allocate == "sensitivity" and request.weights:
            request = by_sensitivity(replace(self, allocate="evenly"), graph, context, request)
        stored, zeros = [], Zeros()
        for sparse in CRITERIA[self.criterion](graph, context, request) if request.weights else ():
            weight, is_there = sparse.weight, torch.equal(sparse.tensor, sparse.weight.tensor)
            if self.marks and not is_there:
                asked = MarkedZeros(self.pattern, request.shares[weight.value])
                context.marks.zeros |= {site.label: asked for site in weight.sites}
                continue
            zeros.add(weight.tensor, sparse.tensor)
            kept = KeptZeros(self.pattern, None if context.training is None else sparse.tensor != 0)
            if not is_there:
                stored.append((weight, graph.add_constant(sparse.tensor, weight.value.name), kept))
                continue
            code = "nothing_to_zero" if sparse.mask.all() else "zero_already"
            count, total = int((~sparse.mask).sum()), sparse.mask.numel()
            _decline(context, weight, Decline(code, count=count, total=total))
            if count:
                context.sparse = {site.label: kept for site in weight.sites} | context.sparse
        for weight, value, kept in stored:
            for site in weight.sites:
                new = graph.emit(site.kind, site.input, value, site.bias, at=site, **site.attributes)
                graph.replace(site, new)
                if new.producer is not None:  # without a module path, its label is another than that of the site
                    context.sparse[new.producer.label] = kept
        if self.marks and context.marks.zeros:
            context.note("nothing is zero yet: the training behind it learns which weights go")
        for note in zeros.notes(context.target, self.pattern):
            context.note(note)

    def _request(self, graph: Graph, context: Context) -> Request:
        """The weights that can be pruned, each with its amount."""
        amount, by_site = 0.5 if self.amount is None else self.amount, None
        if isinstance(amount, PerSite):
            by_site = context.per_site(graph, "sparsify: amount", amount, self.targets)
        sites = []
        for site in selected(graph, context, self.targets, self.ignore):
            if site.kind not in _OPS:
                context.decline(site, Decline("not_linear_or_conv", op=site.kind))
            elif by_site is not None and site not in by_site:
                context.decline(site, Decline("no_amount"))
            else:
                sites.append(site)
        pattern = Pattern.parse(self.pattern)
        weights, shares, undivided = list[Weight](), dict[Value, float](), list[str]()
        for weight in changeable(sites, context):
            asked: list[Any] = [by_site[site] for site in weight.sites] if by_site else [amount]
            if axis := pattern.undivided_axis(weight.tensor.shape):
                name, size, multiple = axis
                why = Decline("not_divided", axis=name, size=size, multiple=multiple)
                _decline(context, weight, why)
                undivided.append(f"{weight.sites[0].label}: {Reason.of(why)}")
            elif len(set(asked)) > 1:
                _decline(context, weight, Decline("amounts_differ", amounts=_either(asked)))
            else:
                weights.append(weight)
                shares[weight.value] = asked[0] * self._reached(context)
        if undivided and not weights:
            raise UsageError(f"sparsify: pattern {self.pattern} divides no weight ({'; '.join(undivided)})")
        return Request(weights, shares, pattern, self.scope == "global", self.seed, self.damping)

    def _reached(self, context: Context) -> float:
        """The share of the amount that this round of a `repeat` is to reach."""
        number, rounds = context.round
        return 1.0 if self.schedule == "none" else cubic(number / rounds)


def _decline(context: Context, weight: Weight, why: Decline) -> None:
    for site in weight.sites:
        context.decline(site, why)


def _either(items: Sequence[Any]) -> str:
    return f"{', '.join(map(str, items[:-1]))} or {items[-1]}"
