"""f(x, W, b)  ->  f(dequantize(quantize(x, s, z), s, z), dequantize(Wq, ws), b), with integers of 8 bits or fewer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, every_node
from graphopt.numerics.observe import OBSERVERS
from graphopt.passes.quantize import schemes
from graphopt.passes.quantize.channel_scaling import smooth_channels
from graphopt.passes.quantize.emit import emit
from graphopt.passes.quantize.mixed import Goal, remember, sites_to_keep
from graphopt.passes.quantize.plan import Asked, QuantizationPlan, plan_of
from graphopt.passes.quantize.ranges import calibrate
from graphopt.passes.quantize.weights import solve
from graphopt.pipeline import lengths
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import Range
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import PerSite, Selector

Scheme = Literal["auto", "static", "dynamic", "weight-only"]

Bits = Literal[8, 7, 4, 2]

ActivationBits = Literal[8, 4]


_BY_SITE = ("scheme", "bits", "activation_bits")
"""The options that may have a value for each site."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Round weights, and activations to 8 or 4 bits: quantize and dequantize around float ops (Jacob et al., 2018).

    Weights are signed and symmetric, with one scale per output channel; weight-only they may have blocks and
    zero points. Activations are uint8, with one scale and zero point per value, for all sites that read it. The results
    of static convs are quantized too, after the following relu or clip, and so are ops that compute with or move
    them: a target then finds closed quantized regions. With calibration the default is all that is known to help
    without labels: channels are smoothed, weights are fitted to quantized inputs and rounded by GPTQ, and biases
    compensate mean errors. A recurrent layer has one scale for each row of its gates, which its directions share.
    Declined: a weight that is not stored in float32, what the target has no fast kernel for, and static sites in
    branches and loop bodies, which no calibration sees.
    """

    name = "quantize"
    stage = Stage.QUANTIZE
    changes_weights = True
    without_calibration = "scheme=dynamic"

    scheme: Scheme | Mapping[str, Scheme] = "auto"
    """Activations: with calibrated ranges (static), the range of each run (dynamic), or in float (weight-only); by site
    if wanted. Auto: static with calibration, where the target has it."""

    granularity: Literal["auto", "tensor", "row"] = "auto"
    """Of dynamic activations: one scale for all of a value (tensor), or one for each row along its last axis, such as a
    token (row), so that a row's result does not depend on what else is in the batch. Auto: as the target prefers. Row
    makes scheme=auto dynamic."""

    dtype: Literal["int8", "float8"] = "int8"
    """What is multiplied: int8, or float8 (e4m3: 3 bits of fraction) where the target has kernels for it."""

    bits: Bits | tuple[Bits, ...] | Mapping[str, Bits] | None = None
    """Of weights, by site if wanted: 8, 7 (none: where products may saturate), 4 or 2; dynamic sites have 8 or 7. Of
    several, a site takes the first that it may have. Of static sites, the first and the last layers keep 8 in place of
    4 and 2, unless they are given theirs by site."""

    activation_bits: ActivationBits | Mapping[str, ActivationBits] = 8
    """Of what static linears and convs read, by site if wanted (others: 8). No target has kernels for 4: linears take
    the 16 integers as 8 bits, convs as floats. First and last layers keep 8 unless they are given theirs by site."""

    block: Literal[16, 32, 64, 128, 256] | None = None
    """Of weight-only: weights along the input that share a scale; none: 32 or 16 below 8 bits, else all."""

    symmetric: bool = True
    """Of weight-only: whether 0 is in the middle of the integers, or zero points say where it is."""

    observer: Literal["mse", "percentile", "minmax", "entropy"] = "mse"
    """Range of an activation: least squared error (mse), percentile (all but 1e-5 at either end), minmax or entropy."""

    rounding: Literal["auto", "nearest", "gptq"] = "auto"
    """Weights to the nearest integer, or by GPTQ, for the least error of outputs (auto: gptq with calibration)."""

    clip: bool | None = None
    """Whether scales are searched for the least squared error of the weight (none: below 7 bits)."""

    bias_correction: bool | None = None
    """Whether biases compensate the mean error of outputs (none: with calibration)."""

    smooth: bool = True
    """Whether channels that static sites read are smoothed first, as `smooth` does, where there is calibration. Where
    others read a value too, or nothing absorbs the factors, a product is added for a quarter of the error or less."""

    sqnr: Annotated[float, Range()] | None = None
    """Least SQNR (dB) of the worst output over the calibration: the sites that hurt most stay float until it is met."""

    cosine: Annotated[float, Range(-1, 1)] | None = None
    """Least cosine of the worst output, in the same way."""

    max_drop: Annotated[float, Range(0)] | None = None
    """Most that `evaluate` (more is better) may fall, in the same way."""

    targets: Selector = Selector("linear", "conv", "embedding", "conv_transpose", "lstm", "gru", "rnn")
    """Sites to consider: ops (matmul too, and softmax between matmuls), module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave in float."""

    def __post_init__(self) -> None:
        rounding: str = self.rounding
        if rounding == "second-order":
            warnings.warn("quantize: rounding=second-order is called gptq now", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "rounding", "gptq")
        super().__post_init__()

    def contradiction(self) -> str | None:
        if self.bits == ():
            return "bits is empty; give 8, 7, 4 or 2, or several of them"
        known = set(self.scheme.values()) if isinstance(self.scheme, Mapping) else {self.scheme}
        if self.granularity == "row" and known <= {"static", "weight-only"}:
            return f"granularity=row is of scheme=dynamic, not of {' and '.join(sorted(known))}; leave out one of them"
        return None

    def alone(self) -> Self:
        """At one site: without smoothing, which changes the nodes before it too."""
        return replace(self, smooth=False)

    def within(self) -> Self:
        return replace(self, smooth=False, sqnr=None, cosine=None, max_drop=None)

    def run(self, graph: Graph, context: Context) -> None:
        schemes.require_type(self.dtype, context)
        asked = self._asked(graph, context)
        if self._static(asked, context):
            context = _calibrated_at_other_lengths(graph, context)
        if self.smooth and self.dtype == "int8" and context.calibration is not None:
            asked = self._smoothed(graph, context, asked)
        goal, kept = Goal(self.sqnr, self.cosine, self.max_drop), dict[Node, Decline]()
        if goal.asked:
            context = remember(context)
            kept = sites_to_keep(graph, self._trial(asked), goal, context)
        plan = plan_of(graph, asked, self, context, kept)
        self._report(plan, context)
        parameters = calibrate(graph, context, plan, OBSERVERS[self.observer])
        weights = solve(graph, context, plan, parameters)
        emit(graph, plan, parameters, weights)

    def require_effect(self, context: Context) -> None:
        """Raise UsageError where no site is quantized, and other options would have left one to quantize."""
        declined = context.record.declined
        wrong = [label for label, why in declined.items() if why.code in schemes.WRONG]
        kept = context.reverted or any(why.code == "kept_for_goal" for why in declined.values())
        if wrong and not context.record.changed and not kept:
            raise UsageError(f"quantize: nothing is left to quantize ({wrong[0]}: {declined[wrong[0]]})")

    def _asked(self, graph: Graph, context: Context) -> dict[Node, Asked | Decline]:
        """What the options say of each site. Raises UsageError where no node of the model is selected."""
        values = {
            option: context.per_site(graph, f"quantize: {option}", value, self.targets)
            if isinstance(value := getattr(self, option), PerSite) else dict.fromkeys(graph.nodes, value)
            for option in _BY_SITE
        }  # fmt: skip
        values["activation_bits"] = dict.fromkeys(graph.nodes, 8) | values["activation_bits"]
        if self.granularity == "row":
            dynamic = {node: "dynamic" for node, scheme in values["scheme"].items() if scheme == "auto"}
            values["scheme"] = values["scheme"] | dynamic
        asked: dict[Node, Asked | Decline] = {}
        sites = context.sites(graph, self.targets, self.ignore)
        if graph.whole is graph and not any(node in self.targets for node in every_node(graph)):
            raise UsageError(f"quantize: the model has no site in {self.targets}, and nothing else becomes integers")
        for site in sites:
            missing = next((option for option, by_site in values.items() if site not in by_site), None)
            by_option: dict[str, Any] = {option: by_site.get(site) for option, by_site in values.items()}
            asked[site] = Asked(**by_option) if missing is None else Decline("no_term_matches", option=missing)
            if graph.whole is not graph and by_option["scheme"] == "static":
                asked[site] = Decline("not_calibrated_in_body", op=site.kind)
        return asked

    def _static(self, asked: Mapping[Node, Asked | Decline], context: Context) -> list[Node]:
        """The sites that are to have calibrated ranges, as far as there is calibration."""
        return [
            site for site, form in asked.items() if isinstance(form, Asked) and context.calibration is not None
            and schemes.scheme_of(site.kind, form.scheme, context) == "static"
        ]  # fmt: skip

    def _smoothed(
        self, graph: Graph, context: Context, asked: Mapping[Node, Asked | Decline]
    ) -> dict[Node, Asked | Decline]:
        """Smooth the channels that static sites read; what was asked of the sites, by the nodes in their place."""
        static = [site for site in self._static(asked, context) if site.kind in ("linear", "conv")]
        replaced, _ = smooth_channels(graph, context, static, adds=True)
        context.labels |= {new: context.labels[old] for old, new in replaced.items() if old in asked}
        return {replaced.get(site, site): form for site, form in asked.items()}

    def _trial(self, asked: Mapping[Node, Asked | Decline]) -> Quantize:
        """The same without goals, on the nodes that stand in the graph after smoothing."""
        sites = {site: form for site, form in asked.items() if isinstance(form, Asked)}
        by_site: dict[str, Any] = {
            option: PerSite({Selector.of(site).terms[0]: getattr(form, option) for site, form in sites.items()})
            for option in _BY_SITE if isinstance(getattr(self, option), PerSite)
        }  # fmt: skip
        alone = self.alone()
        return replace(alone, sqnr=None, cosine=None, max_drop=None, targets=Selector.of(*sites), **by_site)

    def _report(self, plan: QuantizationPlan, context: Context) -> None:
        """Count what joins quantized regions as sites, say why others stay float, and note what the weights need."""
        context.consider([node for node in (*plan.regions.joined, *plan.declined) if node not in context.labels])
        for node, why in plan.declined.items():
            context.decline(node, why)
        if narrow := [site for site, one in plan.sites.items() if one.activation_bits < 8]:
            context.note(schemes.without_kernel([context.labels[site] for site in narrow], context))
        if plan.kept_at_8:
            kept = ", ".join(context.labels[site] for site in plan.kept_at_8)
            context.note(f"first and last layers keep 8 bits ({kept}); bits and activation_bits by site change that")
        products = [
            one.weight.bits for one in plan.sites.values()
            if one.weight and one.scheme != "weight-only" and one.activation_bits == 8
        ]  # fmt: skip
        if products and context.target.runs and self.dtype == "int8":
            context.note(schemes.safety(products))


def _calibrated_at_other_lengths(graph: Graph, context: Context) -> Context:
    """The same, calibrated on the texts of its batches at other lengths too, where the graph takes tokens.

    Batches of a generator, which gives them once, are left alone.
    """
    calibration = context.calibration
    if calibration is None or calibration.further or not lengths.takes_tokens(graph):
        return context
    if calibration.once:
        context.note("calibrated at the lengths of the batches alone: a generator gives them once")
        return context
    found = calibration.at_other_lengths(graph)
    if found is None:
        return context
    context.note(found.note)
    return replace(context, calibration=calibration.followed_by(found.batches))
