"""f(x, W)  ->  cast(f(cast(x), W'), float32), in 16 bits wherever numbers fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value, dtype_name
from graphopt.numerics.observe import MinMax
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in 16 bits, but in float32 where numbers would not fit (Micikevicius et al., 2018, section 3).

    Weights are stored in 16 bits; inputs and outputs of the model keep their dtype. Ops that sum many numbers or take
    powers stay in float32. Declined: a site where a weight, or its input or result on the calibration batches, is
    larger than the largest number of the dtype, and attention with a float mask in float16, as masks hold such numbers.
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

    def run(self, graph: Graph, context: Context) -> None:
        supported = context.target.floats
        if self.dtype not in supported:
            raise UsageError(
                f"cast: {context.target.name} has no kernels in {self.dtype}; there is {', '.join(supported)}"
            )
        sites = context.sites(graph, self.targets, self.ignore, where=_is_float32)
        max_abs = _max_abs(graph, context, sites)
        casts = _Casts(graph, _DTYPES[self.dtype])
        declines = {site: casts.why_not(site, max_abs) for site in sites}
        for site, why in declines.items():
            if why is None:
                casts.recompute(site)
            else:
                context.decline(site, why)
        if context.calibration is None and self.dtype == "float16":
            context.note("no calibration: it is not known whether activations fit float16")


def _is_float32(site: Node) -> bool:
    return site.result.dtype == torch.float32 and any(value.dtype == torch.float32 for value in _read(site))


def _read(site: Node) -> list[Value]:
    """The operands that are there."""
    return [value for value in site.operands if value is not None]


def _max_abs(graph: Graph, context: Context, sites: list[Node]) -> dict[Value, float]:
    """The largest magnitude of each activation that sites read or compute, on the calibration batches."""
    if context.calibration is None:
        return {}
    values = dict.fromkeys(value for site in sites for value in (*_read(site), site.result)
                           if not value.is_constant and value.dtype == torch.float32)  # fmt: skip
    observers = context.statistics(graph, [(value, MinMax()) for value in values])
    ranges = {value: observer.range() for value, observer in zip(values, observers, strict=True) if observer.count}
    return {value: max(-low, high) for value, (low, high) in ranges.items()}


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
