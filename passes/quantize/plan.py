"""The plan of a quantization: how each site is quantized, or why not, and which activations between sites are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.passes.quantize import schemes
from graphopt.passes.quantize.regions import Regions, closed_regions, read_regions
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import PerSite

if TYPE_CHECKING:
    from graphopt.passes.quantize.quantize import Quantize


@dataclass(frozen=True)
class Asked:
    """What the options say of a site."""

    scheme: str
    """Auto, static, dynamic or weight-only."""
    bits: int | tuple[int, ...] | None
    """Of its weight; None for the default; several in the order of preference."""
    activation_bits: int = 8


@dataclass(frozen=True)
class WeightPlan:
    """How a weight is quantized. Sites that share a weight and its plan share the stored integers."""

    dtype: torch.dtype = torch.int8
    """Integers (in bits), or a float of 8 bits, which has no blocks and no GPTQ."""
    bits: int = 8
    block: int | None = None
    """How many weights along the input share one scale; None: all of an output."""
    symmetric: bool = True
    clip: bool = False
    """Whether scales are searched for the least squared error of the weight (by GPTQ, weighted by the mean squares of
    its inputs), or cover all of it."""
    gptq: bool = False
    """Whether the weights that are not rounded yet compensate the error of each rounded one; else: round to nearest."""
    bias_correction: bool = False
    """Whether the bias compensates the mean error of the outputs."""

    @property
    def needs_inputs(self) -> bool:
        return self.gptq or self.bias_correction


@dataclass(frozen=True)
class SitePlan:
    """How a site is quantized."""

    scheme: str
    """Of its activations: static, dynamic or weight-only."""
    weight: WeightPlan | None
    """None for a matmul, which multiplies two activations."""
    activation_bits: int = 8
    """Of what it reads. With fewer than 8 its result is in no quantized region."""


@dataclass(frozen=True)
class QuantizationPlan:
    """All that is decided before anything is calibrated or changed."""

    sites: Mapping[Node, SitePlan]
    """The ops with weights, and the matmuls, that are quantized, in the order of the graph."""
    regions: Regions
    declined: Mapping[Node, Decline]
    """Sites and other ops that stay float, and why."""
    static_dtype: torch.dtype = torch.uint8
    """Of statically quantized activations: uint8 with a zero point, or symmetric int8 or float8."""
    row_dtype: torch.dtype | None = None
    """Of dynamically quantized activations with one scale per row, symmetric about zero, or in uint8 about 128; None:
    uint8 with one scale and zero point for all of a value."""

    kept_at_8: tuple[Node, ...] = ()
    """First and last layers that keep 8 bits, while the others have fewer."""

    @property
    def narrow(self) -> dict[tuple[Value, int], None]:
        """What sites read in fewer than 8 bits, with the bits, in the order of the graph."""
        sites = ((site, one.activation_bits) for site, one in self.sites.items())
        return dict.fromkeys((site.input, bits) for site, bits in sites if bits < 8)

    def static(self, *kinds: str) -> Iterator[Node]:
        return (site for site, plan in self.sites.items() if plan.scheme == "static" and site.kind in kinds)


def plan_of(
    graph: Graph,
    asked: Mapping[Node, Asked | Decline],
    options: Quantize,
    context: Context,
    kept: Mapping[Node, Decline] = MappingProxyType({}),
) -> QuantizationPlan:
    """Decide how each site is quantized, and which ops join them in quantized regions. The graph does not change.

    asked: by site, in the order of the graph, the options for it, or why it has none. kept: sites that
    stay in higher precision, and why.
    """
    ends = _ends(graph)
    chosen, declined = _sites(asked, options, context, kept, ends)
    softmaxes = [site for site in chosen if site.kind == "softmax"]
    planned = {site: plan for site, plan in chosen.items() if site.kind != "softmax"}
    tied = _tied_tables(planned)
    for table, linear in tied.items():
        if linear in planned:
            planned[table] = SitePlan(planned[table].scheme, planned[linear].weight)
        else:
            del planned[table]
            declined[table] = Decline("table_tied", site=linear.label)

    def legal(op: str) -> bool:
        return "static" in schemes.legal(op, context)

    def stays(node: Node) -> Decline | None:
        return Decline("ignored") if node in options.ignore else context.reverted.get(node.label)

    by_site = {site: plan.scheme for site, plan in planned.items() if plan.activation_bits == 8}
    kept_at_8 = tuple(site for site in planned if site in ends and _is_narrow(asked[site], planned[site]))
    placement = context.target.placement
    if placement is None:
        regions = closed_regions(graph, by_site, legal, stays, softmaxes)
    else:
        regions = read_regions(graph, by_site, legal, stays, fuses_sum=placement.fuses_sum)
    signed = placement is not None and placement.signed
    activations = schemes.TYPES[options.dtype] if signed else torch.uint8
    by_row = schemes.granularity_of(options.granularity, context) == "row"
    return QuantizationPlan(
        planned, regions, {**declined, **regions.declined},
        static_dtype=activations, row_dtype=activations if by_row else None, kept_at_8=kept_at_8,
    )  # fmt: skip


def _ends(graph: Graph) -> set[Node]:
    """The first and the last layers: linears and convs with no other layer before them, or none after them."""
    layers = [node for node in graph.nodes if node.kind in ("linear", "conv")]
    behind: set[Value] = set()
    for node in graph.nodes:
        if node.kind in ("linear", "conv", "embedding") or not behind.isdisjoint(node.operands):
            behind.update(node.results)
    before: set[Value] = set()
    for node in reversed(graph.nodes):
        if node.kind in ("linear", "conv") or not before.isdisjoint(node.results):
            before.update(value for value in node.operands if value is not None)
    return {site for site in layers if site.input not in behind or before.isdisjoint(site.results)}


def _is_narrow(asked: Asked | Decline, planned: SitePlan) -> bool:
    """Whether fewer bits were asked for than are planned."""
    if isinstance(asked, Decline) or planned.weight is None:
        return False
    first = asked.bits[0] if isinstance(asked.bits, tuple) else asked.bits
    return asked.activation_bits < planned.activation_bits or (first or 8) < min(planned.weight.bits, 7)


def _sites(
    asked: Mapping[Node, Asked | Decline],
    options: Quantize,
    context: Context,
    kept: Mapping[Node, Decline],
    ends: set[Node],
) -> tuple[dict[Node, SitePlan], dict[Node, Decline]]:
    """The plan of each site by itself, and why the others stay float."""
    chosen: dict[Node, SitePlan] = {}
    declined: dict[Node, Decline] = {}
    for site, form in asked.items():
        found = kept.get(site) or schemes.why_not(site) or form
        planned = _first_possible(site, found, options, context, site in ends) if isinstance(found, Asked) else found
        if isinstance(planned, SitePlan):
            chosen[site] = planned
        else:
            declined[site] = planned
    return chosen, declined


def _first_possible(
    site: Node, asked: Asked, options: Quantize, context: Context, is_end: bool
) -> SitePlan | Decline:
    """The plan of a site with the first of the bits that were asked for which it may have, or why it has none.

    is_end: whether it is a first or last layer.
    """
    several = asked.bits if isinstance(asked.bits, tuple) else (asked.bits,)
    plans = [_site(site, asked, bits, options, context, is_end) for bits in several]
    return next((plan for plan in plans if isinstance(plan, SitePlan)), plans[-1])


def _site(
    site: Node, asked: Asked, bits: int | None, options: Quantize, context: Context, is_end: bool
) -> SitePlan | Decline:
    """The plan of a site with these bits, or why there is none."""
    scheme = schemes.scheme_of(site.kind, asked.scheme, context)
    activation_bits = asked.activation_bits if site.kind in ("linear", "conv") else 8
    if is_end and scheme == "static":
        bits, activation_bits = _at_8(bits, activation_bits, options)
    if why := (
        schemes.why_no_kernel(site, scheme, options.dtype, context)
        or schemes.why_wrong_granularity(site.kind, scheme, options.granularity, context)
    ):
        return why
    if site.kind in ("matmul", "softmax"):
        return SitePlan(scheme, None)
    bits = schemes.bits_of(site.kind, scheme, bits, context)
    block = schemes.block_of(site, scheme, bits, options.block)
    if why := (
        schemes.why_wrong_bits(site.kind, scheme, bits, context)
        or schemes.why_wrong_activation_bits(scheme, activation_bits, options.dtype, context)
        or schemes.why_no_block(site, block)
    ):
        return why
    clip = bits < 7 if options.clip is None else options.clip
    symmetric = options.symmetric or scheme != "weight-only"
    if site.kind == "embedding":
        return SitePlan(scheme, WeightPlan(bits=bits, block=block, symmetric=symmetric, clip=clip))
    calibrated = context.calibration is not None
    corrects = calibrated if options.bias_correction is None else options.bias_correction
    corrects = corrects and (site.bias is None or site.bias.is_constant)
    if options.dtype != "int8":
        return SitePlan(scheme, WeightPlan(schemes.TYPES[options.dtype], bias_correction=corrects))
    if site.kind not in ("linear", "conv"):  # whose inputs no moments describe
        return SitePlan(scheme, WeightPlan(bits=bits, symmetric=symmetric, clip=clip))
    gptq = calibrated if options.rounding == "auto" else options.rounding == "gptq"
    weight = WeightPlan(bits=bits, block=block, symmetric=symmetric, clip=clip, gptq=gptq, bias_correction=corrects)
    return SitePlan(scheme, weight, activation_bits)


def _at_8(bits: int | None, activation_bits: int, options: Quantize) -> tuple[int | None, int]:
    """The bits of a first or last layer: 8, in place of fewer that are asked of all sites alike."""
    return (
        bits if isinstance(options.bits, PerSite) or bits == 7 else None,
        activation_bits if isinstance(options.activation_bits, PerSite) else 8,
    )


def _tied_tables(planned: Mapping[Node, SitePlan]) -> dict[Node, Node]:
    """By embedding whose table linears read too, the linear that decides: one that stays float, else the first.

    A tied table is stored once, as for the linear; where the linear stays float, so does the table.
    """
    tied = {}
    for site in planned:
        if site.kind == "embedding":
            linears = [user for user in site.required("table").users if user.kind == "linear"]
            if linears:
                tied[site] = next((linear for linear in linears if linear not in planned), linears[0])
    return tied
