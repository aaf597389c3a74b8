"""Stored weights -> integers, scales and corrected biases: one at a time, by the inputs they meet where those count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.numerics import quantize
from graphopt.numerics.finite import require_finite
from graphopt.numerics.reconstruct import bias_shift, fitted, reconstruct, refine
from graphopt.pipeline import inputs
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import Weight
from torch import Tensor

_ROOM = 2.0**30
"""Steps that a bias may take: engines add it to sums in int32, which need half of that."""

_ROUNDING = 1e-6
"""Share of its mean square below which the variance of an input is rounding: products are summed in float32."""


@dataclass(frozen=True)
class Recipe:
    """How a weight becomes integers."""

    dtype: torch.dtype = torch.int8
    """Integers (in bits), or a float of 8 bits, of which there are no blocks and no GPTQ."""
    bits: int = 8
    block: int | None = None
    """Weights along the input that share a scale; None for all of an output."""
    symmetric: bool = True
    clip: bool = False
    """Whether scales are searched for the least squared error of the weight (by GPTQ, as its inputs' mean
    squares count it), or cover all of it."""
    gptq: bool = False
    """Whether the error of each weight is made up for by those not yet rounded, or each goes to its nearest."""
    bias_correction: bool = False
    """Whether the bias takes over what rounding shifts the outputs by, on average."""

    @property
    def needs_inputs(self) -> bool:
        return self.gptq or self.bias_correction


@dataclass(frozen=True)
class Stored:
    """A weight in integers, stored in the graph."""

    steps: Value
    scale: Value
    zero_point: Value | None
    attributes: Mapping[str, int]
    """Of the dequantize that gives the weight."""


@dataclass
class Rounding:
    """The weights of sites, in integers. Those that need their inputs are made first (`look`), others when emitted."""

    graph: Graph
    recipes: dict[Node, Recipe] = field(default_factory=dict)
    grids: Mapping[Node, quantize.Grid] = field(default_factory=dict)
    """The integers of what static sites read."""
    stored: dict[tuple[Value, Recipe], Stored] = field(default_factory=dict)
    shifts: dict[Node, Tensor] = field(default_factory=dict)
    """What the bias of a site has to gain."""
    emitted: dict[tuple[Value, Recipe], Value] = field(default_factory=dict)
    """The dequantized form of each."""

    def share_tables(self, context: Context) -> None:
        """Let a table that a linear reads too be stored once, as for the linear; where that stays float, so it does."""
        for site in [site for site in self.recipes if site.kind == "embedding"]:
            tied = [user for user in site.required("table").users if user.kind == "linear"]
            float_ = next((user for user in tied if user not in self.recipes), None)
            if float_ is not None:
                del self.recipes[site]
                context.decline(site, f"table is tied with linear {float_.label}, which stays float")
            elif tied:
                self.recipes[site] = self.recipes[tied[0]]

    def look(self, context: Context) -> None:
        """Round the weights that need to know what they multiply. The graph must not have changed."""
        for recipe in dict.fromkeys(recipe for recipe in self.recipes.values() if recipe.needs_inputs):
            sites = [site for site, chosen in self.recipes.items() if chosen == recipe and site.kind != "embedding"]
            static, others = list[Weight](), list[Weight]()
            for weight in _weights(sites):
                known = recipe.gptq and all(site in self.grids for site in weight.sites)
                (static if known else others).append(weight)
            grids = {site.input: self.grids[site] for weight in static for site in weight.sites}
            if static:
                for weight, moments in inputs.met(self.graph, context, static, grids):
                    self._fit(weight, recipe, *moments.unbind())
            if others and recipe.gptq:
                for weight, moments in inputs.affine(self.graph, context, others):
                    self._fit(weight, recipe, moments, moments)
            elif others:
                for weight, mean in inputs.means(self.graph, context, others):
                    values = self._round(weight.value, weight.tensor, recipe, weight.sites[0], None)
                    self.shifts |= dict.fromkeys(weight.sites, bias_shift(weight.tensor - values, mean))

    def _fit(self, weight: Weight, recipe: Recipe, met: Tensor, cross: Tensor) -> None:
        """Round a weight for the inputs r that it meets in place of x; met, cross: as of `moments.Met.affine`."""
        exact, mean, mean_met = cross is met, cross[:, :-1, -1], met[:, :-1, -1]
        met, cross = met[:, :-1, :-1], cross[:, :-1, :-1]
        if recipe.bias_correction:  # which answers for the means, and leaves to the weight what varies about them
            floor = torch.diag_embed(_ROUNDING * met.diagonal(dim1=1, dim2=2))
            met = met + floor - mean_met.unsqueeze(2) * mean_met.unsqueeze(1)
            cross = cross + floor - mean.unsqueeze(2) * mean_met.unsqueeze(1)
        wanted = weight.tensor if exact else fitted(weight.tensor, met, cross)
        values = self._round(weight.value, wanted, recipe, weight.sites[0], met)
        if recipe.bias_correction:
            shift = bias_shift(weight.tensor - values, mean) + bias_shift(values, mean - mean_met)
            self.shifts |= dict.fromkeys(weight.sites, shift)

    def emit(self, site: Node) -> tuple[Value, Value | None]:
        """The weight of a site, dequantized, and its bias."""
        value, recipe = site.required("table" if site.kind == "embedding" else "weight"), self.recipes[site]
        if (value, recipe) not in self.stored:
            tensor = self.graph.constant(value)
            assert tensor is not None  # others are declined
            self._round(value, tensor, recipe, site, None)
        if (value, recipe) not in self.emitted:
            stored = self.stored[value, recipe]
            operands = stored.steps, stored.scale, stored.zero_point
            self.emitted[value, recipe] = self.graph.emit("dequantize", *operands, at=site, **stored.attributes)
        return self.emitted[value, recipe], self._bias(site)

    def _round(self, value: Value, tensor: Tensor, recipe: Recipe, site: Node, covariance: Tensor | None) -> Tensor:
        """Store a weight in 8 bits or fewer; the floats that these stand for."""
        if recipe.dtype.is_floating_point:
            return self._round_floats(value, tensor, recipe, site)
        squares = None if covariance is None else covariance.diagonal(dim1=1, dim2=2)
        try:
            grid = quantize.fit(
                tensor, bits=recipe.bits, block=recipe.block, symmetric=recipe.symmetric, search=recipe.clip,
                importance=None if squares is None else _of_each(squares, tensor),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{site.label}: {error}") from error
        grid = self._with_room(grid, value, recipe)
        steps = grid.round(tensor) if covariance is None else reconstruct(tensor, covariance, grid)
        if covariance is not None and recipe.clip:
            grid, steps = refine(tensor, covariance, grid, steps)
        form = {"axis": 0} if recipe.block is None else {"axis": 1, "block": recipe.block}
        self.stored[value, recipe] = Stored(
            self.graph.add_constant(steps, value.name),
            self.graph.add_constant(grid.scale, f"{value.name}_scale"),
            None if grid.zero_point is None else self.graph.add_constant(grid.zero_point, f"{value.name}_zero_point"),
            form | ({"bits": recipe.bits} if recipe.bits < 7 else {}),
        )
        return grid.values(steps)

    def _round_floats(self, value: Value, tensor: Tensor, recipe: Recipe, site: Node) -> Tensor:
        try:
            steps, scale = quantize.float8_weight(tensor, recipe.dtype)
        except ValueError as error:
            raise ValueError(f"{site.label}: {error}") from error
        operands = self.graph.add_constant(steps, value.name), self.graph.add_constant(scale, f"{value.name}_scale")
        self.stored[value, recipe] = Stored(*operands, None, {"axis": 0})
        floats: Tensor = OPS["dequantize"].reference(steps, scale, axis=0)
        return floats

    def _with_room(self, grid: quantize.Grid, value: Value, recipe: Recipe) -> quantize.Grid:
        """A grid whose scales are no smaller than the bias of each output allows, in int32 steps of scale · scale.

        Weights that are nearly 0 beside a bias, as of a channel that batch norm turned off, would make it overflow.
        """
        for site in value.users:
            if site in self.grids and self.recipes.get(site) == recipe and site.bias is not None:
                bias = self.graph.constant(site.bias)
                if bias is not None:
                    least = (bias.double().abs() / (float(self.grids[site].scale) * _ROOM)).float().flatten()
                    grid = replace(grid, scale=torch.maximum(grid.scale, least))
        return grid

    def _bias(self, site: Node) -> Value | None:
        bias = None if site.kind == "embedding" else site.bias
        if site not in self.shifts:
            return bias
        held = torch.zeros(()) if bias is None else self.graph.constant(bias)
        assert held is not None  # such sites are not corrected
        return self.graph.add_constant(held + self.shifts[site], "bias" if bias is None else bias.name)


def _of_each(squares: Tensor, weight: Tensor) -> Tensor:
    """Mean squares of inputs (groups, features), at each weight (out, ...) that multiplies them."""
    return squares.repeat_interleave(len(weight) // len(squares), 0).reshape(weight.shape)


def _weights(sites: Iterable[Node]) -> Iterable[Weight]:
    readers: dict[Value, list[Node]] = {}
    for site in sites:
        readers.setdefault(site.required("weight"), []).append(site)
    for value, same in readers.items():
        tensor = same[0].weight
        assert tensor is not None  # others are declined
        require_finite(tensor, f"the weight of {same[0].label}")
        yield Weight(value, same)
