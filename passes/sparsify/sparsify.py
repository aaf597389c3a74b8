"""f(x, W, b)  ->  f(x, W', b), with W' the weight with zeros where it matters least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Value
from graphopt.numerics.sparsity import Pattern
from graphopt.passes.sparsify.amounts import by_sensitivity
from graphopt.passes.sparsify.criteria import CALIBRATED, CRITERIA, Request
from graphopt.passes.sparsify.zeros import Zeros
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.weights import Weight, changeable, selected

_PRUNED = ("linear", "conv")
"""Ops whose weight multiplies; the few numbers of a norm scale whole channels, and are no use as zeros."""


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights to zero where they stand: the smallest (Han et al., 2015), or those that calibration finds idle.

    Shapes and dtypes stay. gradient goes by |w · dL/dw|, the mean over batches (Molchanov et al., 2017); wanda by
    |w| · ‖x‖ within each output (Sun et al., 2024); sparsegpt by the error of the layer's output, and updates the
    weights that stay (Frantar & Alistarh, 2023). Along the input of a conv means from channel to channel, at one
    position of the kernel. Declined: any op but linear and conv, a weight that the graph computes, that is quantized,
    or that a node outside the selection reads too, and one that the pattern does not divide.
    """

    name = "sparsify"
    stage = Stage.PRUNE

    amount: float | Mapping[str, float] | None = None
    """Share of zeros in [0, 1), by site if wanted; none: 0.5, or as the pattern says. Threshold: of the largest."""

    criterion: str = "magnitude"
    """What goes first: magnitude, threshold (below a share of the largest), random, gradient, wanda or sparsegpt."""

    pattern: str = "unstructured"
    """Where zeros lie: unstructured, N:M (2:4; N of M along the input stay), or blocks of outputs x inputs (4x1)."""

    scope: str = "local"
    """What a weight is ranked against: its own tensor (local), or all that are selected (global)."""

    allocate: str = "evenly"
    """Who gets how much of one amount: each the same (evenly), or more where outputs suffer less (sensitivity)."""

    seed: int = 0
    """Of random."""

    damping: float = 0.01
    """Of sparsegpt: what is added to the covariance of the inputs, as a share of its mean diagonal."""

    targets: Selector = Selector(*_PRUNED)
    """Sites to consider: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.amount, Mapping):
            object.__setattr__(self, "amount", PerSite(self.amount))
        choices_of = {"criterion": tuple(CRITERIA), "scope": ("local", "global"), "allocate": ("evenly", "sensitivity")}
        for option, choices in choices_of.items():
            if getattr(self, option) not in choices:
                raise UsageError(f"sparsify: {option} is {getattr(self, option)!r}; give {_either(choices)}")
        try:
            pattern = Pattern.parse(self.pattern)
        except (TypeError, ValueError) as error:
            raise UsageError(f"sparsify: {error}") from error
        if reason := self._wrong_number() or self._contradiction(pattern):
            raise UsageError(f"sparsify: {reason}")

    def _wrong_number(self) -> str | None:
        amounts: Any = self.amount.values() if isinstance(self.amount, PerSite) else [self.amount]
        for amount in amounts if self.amount is not None else ():
            if not _is_number(amount) or not 0 <= amount < 1:
                return f"amount is {amount!r}; give a number of at least 0 and below 1"
        if not amounts:
            return "amount is empty; give a share for at least one site"
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            return f"seed is {self.seed!r}; give a whole number"
        if not _is_number(self.damping) or not 0 < self.damping <= 1:
            return f"damping is {self.damping!r}; give a share above 0, up to 1"
        return None

    def _contradiction(self, pattern: Pattern) -> str | None:
        """Options that do not go together, each reason with the way out."""
        chosen, by_site = self.criterion, isinstance(self.amount, PerSite)
        fixed = pattern.amount
        if fixed is not None and (by_site or self.amount not in (None, fixed)):
            return f"pattern {self.pattern} makes {fixed:.6g} of the weights zero; leave amount out, which differs"
        if chosen == "threshold" and self.amount is None:
            return "threshold needs amount: the share of the largest weight below which a weight goes"
        if chosen == "threshold" and self.pattern != "unstructured":
            return f"a threshold takes weights one by one, and pattern is {self.pattern}; use criterion=magnitude"
        if chosen == "sparsegpt" and fixed is None and self.pattern != "unstructured":
            return f"sparsegpt has no blocks, and pattern is {self.pattern}; use unstructured, N:M or criterion=wanda"
        if self.scope == "global":
            if fixed is not None or by_site:
                return "scope=global decides how much goes where, and so does " + ("amount" if by_site else "pattern")
            if chosen in ("threshold", "wanda", "sparsegpt"):
                return f"{chosen} looks at one weight tensor at a time; use scope=local, or criterion=magnitude"
        if self.allocate == "sensitivity" and (
            fixed is not None or by_site or self.scope == "global" or chosen == "threshold" or self.amount == 0
        ):
            return "allocate=sensitivity spreads one share of zeros; leave out N:M, a threshold, global, 0 and {...}"
        for option, only in (("seed", "random"), ("damping", "sparsegpt")):
            if getattr(self, option) != getattr(Sparsify, option) and chosen != only:
                return f"{option} is for criterion={only}, and criterion is {chosen}"
        return None

    def run(self, graph: Graph, context: Context) -> None:
        if self.criterion in CALIBRATED:
            context.batches()  # without any, an error before the work, and where there is none
        request = self._request(graph, context)
        if self.allocate == "sensitivity" and request.weights:
            request = by_sensitivity(replace(self, allocate="evenly"), graph, context, request)
        stored, zeros = [], Zeros()
        for sparse in CRITERIA[self.criterion](graph, context, request) if request.weights else ():
            weight = sparse.weight
            zeros.add(weight.tensor, sparse.tensor)
            if torch.equal(sparse.tensor, weight.tensor):
                going = f"{int((~sparse.mask).sum())} of {sparse.mask.numel()} weights are to go"
                _decline(context, weight, going + ("" if sparse.mask.all() else ", and they are zero"))
            else:
                stored.append((weight, graph.add_constant(sparse.tensor, weight.value.name)))
        for weight, value in stored:
            for site in weight.sites:
                graph.replace(site, graph.emit(site.kind, site.input, value, site.bias, at=site, **site.attributes))
        for note in zeros.notes(context.target, self.pattern):
            context.note(note)

    def _request(self, graph: Graph, context: Context) -> Request:
        """The weights that can be pruned, each with its amount."""
        amount, by_site = 0.5 if self.amount is None else self.amount, None
        if isinstance(amount, PerSite):
            by_site = context.per_site(graph, "sparsify: amount", amount, self.targets)
        sites = []
        for site in selected(graph, context, self.targets, self.ignore):
            if site.kind not in _PRUNED:
                context.decline(site, f"{site.kind} is neither {' nor '.join(_PRUNED)}")
            elif by_site is not None and site not in by_site:
                context.decline(site, "no term of amount matches it")
            else:
                sites.append(site)
        weights = changeable(sites, context)
        pattern = Pattern.parse(self.pattern)
        kept, shares, reasons = list[Weight](), dict[Value, float](), list[str]()
        for weight in weights:
            asked: list[Any] = [by_site[site] for site in weight.sites] if by_site else [amount]
            if reason := pattern.why_not(weight.tensor.shape):
                _decline(context, weight, reason)
                reasons.append(f"{weight.sites[0].label}: {reason}")
            elif len(set(asked)) > 1:
                _decline(context, weight, f"its readers ask for amounts of {_either(asked)}")
            else:
                kept.append(weight)
                shares[weight.value] = asked[0]
        if reasons and not kept:
            raise UsageError(f"sparsify: pattern {self.pattern} divides no weight ({'; '.join(reasons)})")
        return Request(kept, shares, pattern, self.scope == "global", self.seed, self.damping)


def _decline(context: Context, weight: Weight, reason: str) -> None:
    for site in weight.sites:
        context.decline(site, reason)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _either(items: Sequence[Any]) -> str:
    return f"{', '.join(map(str, items[:-1]))} or {items[-1]}"
