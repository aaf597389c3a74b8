"""f(x, W)  ->  cast(f(cast(x), W'), float32), in 16 bits wherever numbers fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.cost import LARGE, Cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value, dtype_name
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in 16 bits, but in float32 where numbers would not fit (Micikevicius et al., 2018, section 3).

    Weights are stored in 16 bits; inputs and outputs of the model keep their dtype. Ops that sum many numbers or take
    powers stay in float32. Declined: a site where a weight, or its input or result on the calibration batches (without
    any, on the example inputs), is larger than the largest number of the dtype; attention with a float mask in float16,
    as masks hold such numbers; and a site with a constant that the dtype rounds to 0 (the epsilon that keeps a division
    from 0 / 0) or cannot hold, with those behind it up to where the number is divided by, or bounded.
    """

    name = "cast"
    stage = Stage.QUANTIZE
    changes_weights = True

    dtype: Literal["float16", "bfloat16"] = "float16"
    """float16 (10 bits of fraction, up to 65504) or bfloat16 (7 bits, the range of float32)."""

    targets: Selector = Selector(
        "linear", "conv", "matmul", "attention", "embedding", "add", "sub", "mul", "gelu", "silu", "relu", "clip",
        "leaky_relu", "hard_sigmoid", "hard_swish", "sigmoid", "tanh", "max_pool", "concat", "pad", "reshape",
        "transpose", "slice", "squeeze", "unsqueeze", "conv_transpose",
    )  # fmt: skip
    """Sites to consider: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave in float32."""

    def within(self) -> Cast:
        return self

    def run(self, graph: Graph, context: Context) -> None:
        supported = context.target.floats
        if self.dtype not in supported:
            raise UsageError(
                f"cast: {context.target.name} has no kernels in {self.dtype}; there is {', '.join(supported)}"
            )
        sites = context.sites(graph, self.targets, self.ignore, where=_is_float32)
        max_abs = _max_abs(graph, context, sites)
        casts = _Casts(graph, _DTYPES[self.dtype])
        unfit = _unfit(graph, _DTYPES[self.dtype], max_abs)
        declines = {site: casts.why_not(site, max_abs) or unfit.get(site) for site in sites}
        for site, why in declines.items():
            if why is None:
                casts.recompute(site)
            else:
                context.decline(site, why)
        if context.calibration is None and self.dtype == "float16":
            seen = "of the example inputs alone is it" if max_abs else "it is not"
            context.note(f"no calibration: {seen} known whether activations fit float16")


def _is_float32(site: Node) -> bool:
    return site.result.dtype == torch.float32 and any(value.dtype == torch.float32 for value in _read(site))


def _read(site: Node) -> list[Value]:
    """The operands that are there."""
    return [value for value in site.operands if value is not None]


def _max_abs(graph: Graph, context: Context, sites: list[Node]) -> dict[Value, float]:
    """The largest magnitude of each activation that sites read or compute: on the calibration batches, or without any
    on the example inputs, where the model is small enough to be run on them."""
    batches = context.calibration
    if batches is None:
        if not context.feeds or Cost.of(graph).bytes > LARGE:
            return {}
        batches = Calibration(list(context.feeds), graph.inputs)
    values = dict.fromkeys(value for site in sites for value in (*_read(site), site.result)
                           if not value.is_constant and value.dtype == torch.float32)  # fmt: skip
    observers = batches.observe(graph, [(value, _MaxAbs()) for value in values])
    return {value: observer.number for value, observer in zip(values, observers, strict=True)}


@dataclass
class _MaxAbs:
    """The largest magnitude of a value over batches; infinity where one is infinite or NaN."""

    number: float = 0.0
    nbytes: int = 8

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        found = _largest(x if mask is None else x[mask])
        self.number = max(self.number, math.inf if math.isnan(found) else found)

    def merge(self, other: _MaxAbs) -> None:
        self.number = max(self.number, other.number)


# --- numbers that do not fit ---------------------------------------------------------------------------------------

_BOUNDED = ("softmax", "sigmoid", "tanh", "hard_sigmoid", "layer_norm", "rms_norm", "batch_norm")
_PRODUCTS = ("linear", "conv", "matmul", "attention", "embedding")
_RECIPROCALS = ("reciprocal", "rsqrt", "onnx.Reciprocal")


def _unfit(graph: Graph, dtype: torch.dtype, max_abs: dict[Value, float]) -> dict[Node, Decline]:
    """Why nodes must stay in float32: by a constant that the dtype does not hold, or as they read what comes of one.

    A number that is rounded to 0 matters where it is added to, or is the least of, a divisor: it is followed to the
    division, or to the product with its reciprocal. One that is too large is followed to where results are bounded. A
    value whose largest magnitude is known (max_abs) is not followed for being large.
    """
    small, inverse, large = set[Value](), set[Value](), set[Value]()
    found: dict[Node, Decline] = {}
    name, largest = dtype_name(dtype), torch.finfo(dtype).max
    for node in graph.nodes:
        given = [value for value in node.operands if value is not None and value.dtype == torch.float32]
        numbers = [tensor for value in given if (tensor := graph.constant(value)) is not None]
        numbers += [torch.tensor(bound) for bound in _least_magnitudes(node)]
        lost = next((one for one in numbers if _vanishes(one, dtype)), None)
        wide = next((one for one in numbers if _overflows(one, largest)), None)
        if lost is not None:
            found[node] = Decline("vanishes_in_dtype", number=_largest(lost), dtype=name)
        elif wide is not None:
            found[node] = Decline("beyond_dtype", value="constant", max_abs=_largest(wide), dtype=name, largest=largest)
        reads = [any(value in some for value in given) for some in (small, inverse, large)]
        if node not in found and any(reads[1:] if node.kind in (*_PRODUCTS, *_BOUNDED) else reads):
            found[node] = Decline("reads_unfit", dtype=name)
        states = _passed_on(node, reads, small, lost is not None, wide is not None)
        for some, holds in zip((small, inverse, large), states, strict=True):
            if holds:
                some.update(value for value in node.results if value.dtype == torch.float32)
        large -= {value for value in node.results if max_abs.get(value, math.inf) <= largest}
    return found


def _passed_on(node: Node, reads: list[bool], small: set[Value], lost: bool, wide: bool) -> tuple[bool, bool, bool]:
    """Whether the result of a node may be too small, a reciprocal of such a number, and too large."""
    reads_small, reads_inverse, reads_large = reads
    if node.kind in _BOUNDED:
        return False, False, False
    if node.kind in _PRODUCTS:
        return False, reads_inverse, reads_large or wide
    if node.kind == "clip" and None not in (node.attributes["low"], node.attributes["high"]):
        return reads_small or lost, False, wide
    if node.kind in _RECIPROCALS:
        return False, reads_small or lost, False
    if node.kind == "div":
        return node.required("a") in small, False, (reads_large or wide) and node.required("b") not in small
    if node.kind == "mul" and reads_inverse:
        return False, False, reads_large or wide
    return reads_small or lost, reads_inverse, reads_large or wide


def _least_magnitudes(node: Node) -> list[float]:
    """The bounds of a clip that keep its result from 0; the others only make it smaller."""
    if node.kind != "clip":
        return []
    low, high = node.attributes["low"], node.attributes["high"]
    return [bound for bound in (low if low is not None and low > 0 else None,
                                high if high is not None and high < 0 else None) if bound is not None]  # fmt: skip


def _vanishes(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor has numbers other than 0, and the dtype rounds all of them to 0."""
    largest = torch.tensor(_largest(tensor))
    return bool(largest > 0) and not bool(largest.to(dtype))


def _overflows(tensor: Tensor, largest: float) -> bool:
    """Whether a tensor has a finite number beyond the largest of a dtype; an infinity stays what it is."""
    found = _largest(tensor)
    return largest < (_largest(tensor[torch.isfinite(tensor)]) if math.isinf(found) else found)


@dataclass
class _Casts:
    """Rewrites sites of a graph to a dtype of 16 bits, with one cast for each value."""

    graph: Graph
    dtype: torch.dtype
    cast: dict[Value, Value] = field(default_factory=dict)
    """By float32 value, the same in 16 bits."""

    def why_not(self, site: Node, max_abs: dict[Value, float]) -> Decline | None:
        """Why a site stays in float32. max_abs: of activations, where it is known."""
        if site.kind == "attention" and self.dtype == torch.float16:
            mask = site.operand("mask")
            if mask is not None and mask.dtype == torch.float32:
                return Decline("float_mask")
        largest = torch.finfo(self.dtype).max
        for value in (*_read(site), site.result):
            weight = self.graph.constant(value) if value.dtype == torch.float32 else None
            found = max_abs.get(value, 0.0) if weight is None else _largest(weight)
            if found > largest:
                what = "result" if value == site.result else "input" if weight is None else "weight"
                dtype = dtype_name(self.dtype)
                return Decline("beyond_dtype", value=what, max_abs=found, dtype=dtype, largest=largest)
        return None

    def recompute(self, site: Node) -> None:
        """Compute a site in 16 bits in its place; who reads its result in float32 reads a cast of it."""
        operands = [None if value is None else self._in_16_bits(value, site) for value in site.operands]
        # a reshape keeps its known shape: from sizes that the graph computes, the axes would be unknown
        emit = partial(self.graph.emit_sized, sizes={}) if site.kind == "reshape" else self.graph.emit
        short = emit(site, *operands, at=site)
        long = self.graph.emit("cast", short, dtype=torch.float32, at=site)
        self.cast[long] = short
        self.graph.replace(site, long)

    def _in_16_bits(self, value: Value, site: Node) -> Value:
        if value.dtype != torch.float32:
            return value
        if value not in self.cast:
            tensor = self.graph.constant(value)
            if tensor is not None:
                self.cast[value] = self.graph.add_constant(tensor.to(self.dtype), value.name)
            else:
                self.cast[value] = self.graph.emit("cast", value, dtype=self.dtype, at=site)
        return self.cast[value]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
