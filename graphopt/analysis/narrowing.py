"""Floats of a graph in 16 bits: which nodes cannot be computed so, and how the others are.

A number that the dtype does not hold matters only where it reaches a division or a bound (Micikevicius et al., 2018,
section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value, dtype_name

_BOUNDED = ("softmax", "sigmoid", "tanh", "hard_sigmoid", "layer_norm", "rms_norm", "batch_norm")
_PRODUCTS = ("linear", "conv", "matmul", "attention", "embedding")
_RECIPROCALS = ("reciprocal", "rsqrt", "onnx.Reciprocal")


@dataclass
class Narrowed:
    """Sites of a graph that are rewritten to a dtype of 16 bits, with one cast for each value."""

    graph: Graph
    dtype: torch.dtype
    casts: dict[Value, Value] = field(default_factory=dict)
    """By float32 value, the same in 16 bits."""

    def why_not(self, site: Node, max_abs: Mapping[Value, float]) -> Decline | None:
        """Why a site stays in float32. max_abs: of activations, where it is known."""
        if site.kind == "attention" and self.dtype == torch.float16:
            mask = site.operand("mask")
            if mask is not None and mask.dtype == torch.float32:
                return Decline("float_mask")
        largest = torch.finfo(self.dtype).max
        for value in (*read(site), site.result):
            weight = self.graph.constant(value) if value.dtype == torch.float32 else None
            found = max_abs.get(value, 0.0) if weight is None else largest_of(weight)
            if found > largest:
                what = "result" if value == site.result else "input" if weight is None else "weight"
                dtype = dtype_name(self.dtype)
                return Decline("beyond_dtype", value=what, max_abs=found, dtype=dtype, largest=largest)
        return None

    def recompute(self, site: Node) -> None:
        """Compute a site in 16 bits in its place; who reads its result in float32 reads a cast of it."""
        operands = [None if value is None else self.in_16_bits(value, site) for value in site.operands]
        # a reshape keeps its known shape: from sizes that the graph computes, the axes would be unknown
        emit = partial(self.graph.emit_sized, sizes={}) if site.kind == "reshape" else self.graph.emit
        self.replace(site, emit(site, *operands, at=site))

    def replace(self, site: Node, short: Value) -> None:
        """Let a value in 16 bits take the place of a site's result: in float32 it is read through a cast."""
        long = self.graph.emit("cast", short, dtype=torch.float32, at=site)
        self.casts[long] = short
        self.graph.replace(site, long)

    def in_16_bits(self, value: Value, site: Node) -> Value:
        """A value for a site that reads it in 16 bits: as it is, where it is no float32."""
        if value.dtype != torch.float32:
            return value
        if value not in self.casts:
            tensor = self.graph.constant(value)
            if tensor is not None:
                self.casts[value] = self.graph.add_constant(tensor.to(self.dtype), value.name)
            else:
                self.casts[value] = self.graph.emit("cast", value, dtype=self.dtype, at=site)
        return self.casts[value]


def unfit(graph: Graph, dtype: torch.dtype, max_abs: Mapping[Value, float]) -> dict[Node, Decline]:
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
            found[node] = Decline("vanishes_in_dtype", number=largest_of(lost), dtype=name)
        elif wide is not None:
            most = largest_of(wide)
            found[node] = Decline("beyond_dtype", value="constant", max_abs=most, dtype=name, largest=largest)
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
    largest = torch.tensor(largest_of(tensor))
    return bool(largest > 0) and not bool(largest.to(dtype))


def _overflows(tensor: Tensor, largest: float) -> bool:
    """Whether a tensor has a finite number beyond the largest of a dtype; an infinity stays what it is."""
    found = largest_of(tensor)
    return largest < (largest_of(tensor[torch.isfinite(tensor)]) if math.isinf(found) else found)


def is_float32(site: Node) -> bool:
    """Whether a node computes float32 from float32."""
    return site.result.dtype == torch.float32 and any(value.dtype == torch.float32 for value in read(site))


def read(site: Node) -> list[Value]:
    """The operands that are there."""
    return [value for value in site.operands if value is not None]


def largest_of(tensor: Tensor) -> float:
    """The largest magnitude of a tensor; 0 of an empty one."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
