"""Stored weights -> integers and scales, one weight at a time; biases that compensate the mean rounding error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.numerics import quantize
from graphopt.numerics.finite import require_finite
from graphopt.numerics.reconstruct import bias_shift, fitted, reconstruct, refine
from graphopt.passes.quantize.plan import QuantizationPlan, WeightPlan
from graphopt.passes.quantize.ranges import Activation, Parameters
from graphopt.passes.quantize.schemes import rows_of, weights_of
from graphopt.pipeline import inputs
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import Weight

_ROOM = 2.0**30
"""Largest |bias|, in units of input scale x weight scale: it is added to int32 sums, which need the other half of the
range."""

_ROUNDING = 1e-6
"""Variance below this fraction of the mean square is float32 summation noise; used as a floor."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A quantized weight among the constants of the graph. Sites that share it share one object."""

    integers: Value
    """Int8 or uint8, or a float of 8 bits; the shape of the weight."""
    scale: Value
    """Float32: (out,), or (out, in / block)."""
    zero_point: Value | None
    """Uint8, the shape of scale."""
    attributes: Mapping[str, int]
    """Of the dequantize that gives the weight."""


@dataclass(frozen=True)
class Weights:
    """What `solve` found."""

    stored: Mapping[Node, Mapping[str, Stored]]
    """Of each site, its weights (or its table), by operand."""
    biases: Mapping[Node, Tensor]
    """The corrected bias (out,) of each site that has one."""


def solve(
    graph: Graph, context: Context, plan: QuantizationPlan, parameters: Mapping[Activation, Parameters]
) -> Weights:
    """Round the weights of the plan to integers, and correct biases.

    Integers are added to the constants of the graph as they are found, so that they need not fit memory together; no
    node changes. A weight that GPTQ rounds, or whose bias is corrected, needs its calibration inputs; for static sites
    these are the quantized inputs. Raises ValueError, naming the site, where a weight holds NaN or infinity.
    """
    plans = {site: one.weight for site, one in plan.sites.items() if one.weight is not None}
    read = {site: (site.input, plan.sites[site].activation_bits) for site in plan.static("linear", "conv")}
    grids = {site: grid for site, activation in read.items()
             if activation in parameters and (grid := parameters[activation].grid) is not None}  # fmt: skip
    stored: dict[tuple[Value, WeightPlan], Stored] = {}
    shifts: dict[Node, Tensor] = {}
    for how in dict.fromkeys(how for how in plans.values() if how.needs_inputs):
        sites = [site for site, one in plans.items() if one == how and site.kind in ("linear", "conv")]
        for goal in _goals(graph, context, how, list(_weights(sites)), grids):
            weight = goal.weight
            least = _least_scales(graph, weight.value, how, plans, grids)
            rounded = _rounded(goal.wanted, how, least, goal.covariance, weight.sites[0])
            stored[weight.value, how] = _stored(graph, weight.value, how, rounded, 0)
            if how.bias_correction:
                shifts |= dict.fromkeys(weight.sites, goal.shift(rounded.values()))
    for site, how in plans.items():
        axis = rows_of(site.kind)
        for value in _values(site).values():
            if (value, how) not in stored:
                tensor = graph.constant(value)
                assert tensor is not None  # others are declined
                least = _least_scales(graph, value, how, plans, grids)
                rounded = _rounded(tensor.movedim(axis, 0).contiguous(), how, least, None, site)
                stored[value, how] = _stored(graph, value, how, rounded, axis)
    biases = {site: _bias(graph, site) + shift for site, shift in shifts.items()}
    found = {site: {name: stored[value, how] for name, value in _values(site).items()} for site, how in plans.items()}
    return Weights(found, biases)


def _values(site: Node) -> dict[str, Value]:
    """The weights of a site, by operand."""
    return {name: site.required(name) for name in weights_of(site.kind)}


def _bias(graph: Graph, site: Node) -> Tensor:
    bias = torch.zeros(()) if site.bias is None else graph.constant(site.bias)
    assert bias is not None  # the bias of other sites is not corrected
    return bias


def _weights(sites: Iterable[Node]) -> Iterator[Weight]:
    readers: dict[Value, list[Node]] = {}
    for site in sites:
        readers.setdefault(site.required("weight"), []).append(site)
    for value, same in readers.items():
        tensor = same[0].weight
        assert tensor is not None  # others are declined
        require_finite(tensor, f"the weight of {same[0].label}")
        yield Weight(value, same)


# --- rounding targets -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Goal:
    """Rounding target: the rounded weight on quantized inputs r should reproduce W x on float inputs x."""

    weight: Weight
    wanted: Tensor
    """The weight to round: W, or the weight whose outputs on r are nearest to those of W on x."""
    covariance: Tensor | None
    """The mean of r rᵀ, float64 (groups, features, features); None: round to nearest."""
    mean: Tensor
    """Of x, float64 (groups, features)."""
    mean_rounded: Tensor
    """Of r, the same shape."""

    def shift(self, values: Tensor) -> Tensor:
        """Correction (out,) to add to the bias when W is replaced by `values`."""
        by_weight = bias_shift(self.weight.tensor - values, self.mean)
        return by_weight + bias_shift(values, self.mean - self.mean_rounded)


def _goals(
    graph: Graph, context: Context, how: WeightPlan, weights: Sequence[Weight], grids: Mapping[Node, quantize.Grid]
) -> Iterator[_Goal]:
    """The goal of each weight, from its calibration inputs; not in the given order."""
    if not how.gptq:
        for weight, mean in inputs.means(graph, context, weights):
            yield _Goal(weight, weight.tensor, None, mean, mean)
        return
    static, others = dict[float, list[Weight]](), list[Weight]()
    for weight in weights:
        known = {grids[site].high if site in grids else None for site in weight.sites}
        high = known.pop() if len(known) == 1 else None
        (others if high is None else static.setdefault(high, [])).append(weight)
    for same in static.values():  # an input may be read in several numbers of bits
        rounded = {site.input: grids[site] for weight in same for site in weight.sites}
        for weight, moments in inputs.quantized_moments(graph, context, same, rounded):
            yield _goal(weight, how, *moments.unbind())
    for weight, moments in inputs.affine(graph, context, others) if others else ():
        yield _goal(weight, how, moments, moments)


def _goal(weight: Weight, how: WeightPlan, second: Tensor, cross: Tensor) -> _Goal:
    """The goal of GPTQ. second, cross: the moments r rᵀ and x rᵀ of `QuantizedMoments.affine`, one object if r is x."""
    exact, mean, mean_rounded = cross is second, cross[:, :-1, -1], second[:, :-1, -1]
    second, cross = second[:, :-1, :-1], cross[:, :-1, :-1]
    if how.bias_correction:  # the bias corrects the means, so the weight is fitted to centred moments
        floor = torch.diag_embed(_ROUNDING * second.diagonal(dim1=1, dim2=2))
        second = second + floor - mean_rounded.unsqueeze(2) * mean_rounded.unsqueeze(1)
        cross = cross + floor - mean.unsqueeze(2) * mean_rounded.unsqueeze(1)
    wanted = weight.tensor if exact else fitted(weight.tensor, second, cross)
    return _Goal(weight, wanted, second, mean, mean_rounded)


def _least_scales(
    graph: Graph, value: Value, how: WeightPlan, plans: Mapping[Node, WeightPlan], grids: Mapping[Node, quantize.Grid]
) -> Tensor | None:
    """The least scale of each output (out,) that keeps its bias within _ROOM; None: any scale does.

    Weights near 0 with a bias, such as a channel that batch norm turned off, would make the int32 bias overflow.
    """
    least: Tensor | None = None
    for site in value.users:
        bias = graph.constant(site.bias) if site in grids and plans[site] == how and site.bias is not None else None
        if bias is not None:
            needed = (bias.double().abs() / (float(grids[site].scale) * _ROOM)).float().flatten()
            least = needed if least is None else torch.maximum(least, needed)
    return least


# --- rounding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rounded:
    """A weight in 8 bits or fewer."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: quantize.Grid | None
    """None for float8, whose steps are not equal."""

    def values(self) -> Tensor:
        """The dequantized weight."""
        if self.grid is not None:
            return self.grid.values(self.integers)
        floats: Tensor = OPS["dequantize"].reference(self.integers, self.scale, axis=0)
        return floats


def _rounded(weight: Tensor, how: WeightPlan, least: Tensor | None, covariance: Tensor | None, site: Node) -> _Rounded:
    """Round a weight. least: lower bounds of its scales. Raises ValueError, naming the site, where it is not finite."""
    squares = None if covariance is None else covariance.diagonal(dim1=1, dim2=2)
    try:
        if how.dtype.is_floating_point:
            return _Rounded(*quantize.float8_weight(weight, how.dtype), zero_point=None, grid=None)
        grid = quantize.fit(
            weight, bits=how.bits, block=how.block, symmetric=how.symmetric, search=how.clip,
            importance=None if squares is None else _of_each(squares, weight),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{site.label}: {error}") from error
    if least is not None:
        grid = replace(grid, scale=torch.maximum(grid.scale, least))
    integers = grid.round(weight) if covariance is None else reconstruct(weight, covariance, grid)
    if covariance is not None and how.clip:
        grid, integers = refine(weight, covariance, grid, integers)
    return _Rounded(integers, grid.scale, grid.zero_point, grid)


def _of_each(squares: Tensor, weight: Tensor) -> Tensor:
    """Mean squares of inputs (groups, features), at each weight (out, ...) that multiplies them."""
    return squares.repeat_interleave(len(weight) // len(squares), 0).reshape(weight.shape)


def _stored(graph: Graph, value: Value, how: WeightPlan, rounded: _Rounded, axis: int) -> Stored:
    """Add a rounded weight to the constants of the graph. value: the weight, whose name they take; axis: of its
    outputs, which was moved to the front to round it."""
    form = {"axis": axis} if how.block is None else {"axis": 1, "block": how.block}
    zero_point = rounded.zero_point
    return Stored(
        graph.add_constant(rounded.integers.movedim(0, axis).contiguous(), value.name),
        graph.add_constant(rounded.scale, f"{value.name}_scale"),
        None if zero_point is None else graph.add_constant(zero_point, f"{value.name}_zero_point"),
        form | ({"bits": how.bits} if how.bits < 7 else {}),
    )
