"""f(x, W, b)  ->  f(dequantize(quantize(x, s, z), s, z), dequantize(Wq, ws), b), with integers of 8 bits or fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Node
from graphopt.numerics.observe import OBSERVERS
from graphopt.numerics.quantize import BLOCKS
from graphopt.passes.quantize import schemes
from graphopt.passes.quantize.islands import account
from graphopt.passes.quantize.mixed import Goal, keep, remember
from graphopt.passes.quantize.placement import islands_on
from graphopt.passes.quantize.ranges import observe
from graphopt.passes.quantize.rounding import Recipe, Rounding
from graphopt.passes.quantize.smoothing import smooth_channels
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.spelling import value_text
from graphopt.pipeline.target import SCHEMES
from graphopt.report.declines import Reason


@dataclass(frozen=True)
class Quantize(Pass):
    """Round weights, and activations to 8 bits: quantize and dequantize around float ops (Jacob et al., 2018).

    Weights are signed, symmetric, one scale an output channel; weight-only they may have blocks and zero points.
    Activations are uint8, one scale and zero point a value, for all sites that read it. The results of static convs are
    quantized too, behind a relu or clip that follows, and so is what joins or moves them: a target then finds closed
    islands. With calibration the default is all that is known to help without labels: channels smoothed, weights
    fitted to inputs as they are in integers and rounded by GPTQ, and biases that answer for mean errors.
    Declined: a weight that is not stored in float32, and what the target has no fast kernel for.
    """

    name = "quantize"
    stage = Stage.QUANTIZE

    scheme: str | Mapping[str, str] = "auto"
    """Activations: by calibrated ranges (static), ranges of each run (dynamic), or float (weight-only); by site."""

    dtype: str = "int8"
    """What is multiplied: int8, or float8 (e4m3: 3 bits of fraction) where the target has kernels for it."""

    bits: int | Mapping[str, int] | None = None
    """Of weights, by site if wanted: 8, 7 (none: where products may saturate), or weight-only 8, 4, 2."""

    block: int | None = None
    """Of weight-only: weights along the input that share a scale, 16 to 256; none: 32 or 16 below 8 bits, else all."""

    symmetric: bool = True
    """Of weight-only: whether 0 is in the middle of the integers, or zero points say where it is."""

    observer: str = "mse"
    """Range of an activation: least squared error (mse), percentile (all but 1e-5 at either end), minmax or entropy."""

    rounding: str = "auto"
    """Weights to the nearest integer, or gptq: what outputs miss least (auto: that, with calibration)."""

    clip: bool | None = None
    """Whether scales are searched for the least squared error of the weight (none: below 7 bits)."""

    bias_correction: bool | None = None
    """Whether biases take over the mean error of outputs (none: with calibration)."""

    smooth: bool | None = None
    """Whether channels that static sites read are smoothed first, as `smooth` does (none: yes, but for node:...)."""

    sqnr: float | None = None
    """Least SQNR (dB) of the worst output over the calibration: the sites that hurt most stay float until it is met."""

    cosine: float | None = None
    """Least cosine of the worst output, in the same way."""

    max_drop: float | None = None
    """Most that `evaluate` (more is better) may fall, in the same way."""

    targets: Selector = Selector("linear", "conv", "embedding")
    """Sites to consider: ops (matmul too, and softmax between matmuls), module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave in float."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Goal(self.sqnr, self.cosine, self.max_drop)  # which refuses what no model can be
        choices = {
            "scheme": ("auto", *SCHEMES), "dtype": tuple(schemes.TYPES),
            "bits": (None, 8, 7, 4, 2), "block": (None, *BLOCKS),
            "symmetric": (True, False), "observer": tuple(OBSERVERS), "rounding": ("auto", "nearest", "gptq"),
            "clip": (None, True, False), "bias_correction": (None, True, False),
            "smooth": (None, True, False),
        }  # fmt: skip
        for option, allowed in choices.items():
            given = getattr(self, option)
            if isinstance(given, Mapping) and option in ("scheme", "bits"):
                object.__setattr__(self, option, PerSite(given))
            for value in given.values() if isinstance(getattr(self, option), PerSite) else [given]:
                if (type(value), value) not in [(type(one), one) for one in allowed]:
                    *first, last = map(value_text, allowed)
                    raise UsageError(f"quantize: {option} is {value!r}; give {', '.join(first)} or {last}")

    def run(self, graph: Graph, context: Context) -> None:
        schemes.require_type(self.dtype, context)
        named = schemes.names_nodes(self.targets.terms, self.ignore.terms, self.scheme, self.bits)
        if self.smooth is not False and self.dtype == "int8" and context.calibration is not None and not named:
            sites = (site for site in graph.sites("linear", "conv") if site in self.targets and site not in self.ignore)
            smooth_channels(graph, context, schemes.static(sites, self.scheme, context))
        goal = Goal(self.sqnr, self.cosine, self.max_drop)
        free = replace(self, sqnr=None, cosine=None, max_drop=None, smooth=False)
        context = remember(context) if goal.asked else context
        kept = keep(graph, free, goal, context) if goal.asked else {}
        islands, rounding = islands_on(graph, context, schemes.TYPES[self.dtype]), Rounding(graph)
        chosen = self._chosen(graph, context, kept)
        rounding.recipes = {site: recipe for site, (_, recipe) in chosen.items() if recipe is not None}
        rounding.share_tables(context)
        islands.schemes = {site: scheme for site, (scheme, _) in chosen.items()
                           if site.kind == "matmul" or site in rounding.recipes}  # fmt: skip

        def stays(node: Node) -> str | None:
            reverted = context.reverted.get(node.label)
            return "it is to stay float" if node in self.ignore else None if reverted is None else Reason.of(reverted)

        softmaxes = [site for site in chosen if site.kind == "softmax"]
        account(context, islands, islands.join(lambda op: "static" in schemes.legal(op, context), stays, softmaxes))
        products = [one.bits for site, one in rounding.recipes.items() if islands.schemes[site] != "weight-only"]
        if products and context.target.runs and self.dtype == "int8":
            context.note(schemes.safety(products))
        islands.measure(observe(graph, context, islands, OBSERVERS[self.observer]))
        islands.weights, rounding.grids = rounding, islands.grids()
        rounding.look(context)
        islands.emit()

    def _chosen(
        self, graph: Graph, context: Context, kept: Mapping[Node, str]
    ) -> dict[Node, tuple[str, Recipe | None]]:
        """The scheme and the recipe of each site that can be quantized; the others are declined, as what is kept is."""
        by_site = {
            option: context.per_site(graph, f"quantize: {option}", value, self.targets)
            for option in ("scheme", "bits") if isinstance(value := getattr(self, option), PerSite)
        }  # fmt: skip
        chosen: dict[Node, tuple[str, Recipe | None]] = {}
        refused: dict[str, str] = {}
        sites = context.sites(graph, self.targets, self.ignore)
        if not any(node in self.targets for node in graph.nodes):
            raise UsageError(f"quantize: the model has no site in {self.targets}, and nothing else becomes integers")
        for site in sites:
            missing = [option for option, found in by_site.items() if site not in found]
            asked: dict[str, Any] = {one: by_site[one].get(site) if one in by_site else getattr(self, one)
                                     for one in ("scheme", "bits")}  # fmt: skip
            unmatched = f"no term of {missing[0]} matches it" if missing else None
            reason = kept.get(site) or schemes.why_not(site) or unmatched
            if reason is None:
                scheme = schemes.scheme_of(site.kind, asked["scheme"], context)
                bits = schemes.bits_of(site.kind, scheme, asked["bits"], context)
                reason = schemes.why_no_kernel(site, scheme, self.dtype, context)
                if reason is None and site.kind in ("matmul", "softmax"):
                    chosen[site] = scheme, None
                    continue
                block = None if reason else schemes.block_of(site, scheme, bits, self.block)
                wrong = schemes.why_wrong_bits(site.kind, scheme, bits, context) or schemes.why_no_block(site, block)
                if reason is None and wrong:
                    refused[context.labels[site]] = reason = wrong
            if reason:
                context.decline(site, reason)
            else:
                chosen[site] = scheme, self._recipe(site, scheme, bits, block, context)
        if refused and not (chosen or kept or context.reverted):
            raise UsageError("quantize: nothing is left to quantize ({}: {})".format(*next(iter(refused.items()))))
        return chosen

    def _recipe(self, site: Node, scheme: str, bits: int, block: int | None, context: Context) -> Recipe:
        clip, symmetric = bits < 7 if self.clip is None else self.clip, self.symmetric or scheme != "weight-only"
        if site.kind == "embedding":
            return Recipe(bits=bits, block=block, symmetric=symmetric, clip=clip)
        calibrated = context.calibration is not None
        corrects = site.bias is None or site.bias.is_constant
        corrected = corrects and (calibrated if self.bias_correction is None else self.bias_correction)
        if self.dtype != "int8":
            return Recipe(schemes.TYPES[self.dtype], bias_correction=corrected)
        gptq = calibrated if self.rounding == "auto" else self.rounding == "gptq"
        return Recipe(bits=bits, block=block, symmetric=symmetric, clip=clip, gptq=gptq,
                      bias_correction=corrected)  # fmt: skip
