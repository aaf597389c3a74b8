"""f(x, W)  ->  cast(f(cast(x), W'), float32), in 16 bits wherever numbers fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.numerics.observe import MinMax
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.selectors import Selector
from torch import Tensor

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in 16 bits, with islands in float32 where numbers would not fit (Micikevicius et al., 2018, section 3).

    Weights are stored in 16 bits, inputs and outputs of the model stay as they are. What sums many numbers or takes
    powers stays in float32. Declined: a site that a number beyond the type's largest flows into or out of, on the
    calibration batches or as a weight, and attention with a float mask in float16, whose masked places are such.
    """

    name = "cast"
    stage = Stage.QUANTIZE

    dtype: str = "float16"
    """float16 (10 bits of fraction, up to 65504) or bfloat16 (7 bits, the range of float32)."""

    targets: Selector = Selector(
        "linear", "conv", "matmul", "attention", "embedding", "add", "sub", "mul", "gelu", "silu", "relu", "clip",
        "leaky_relu", "hard_sigmoid", "hard_swish", "sigmoid", "tanh", "max_pool", "concat", "pad", "reshape",
        "transpose", "slice", "squeeze", "unsqueeze",
    )  # fmt: skip
    """Sites to consider: ops, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in _TYPES:
            raise UsageError(f"cast: dtype is {self.dtype!r}; give {' or '.join(_TYPES)}")

    def run(self, graph: Graph, context: Context) -> None:
        known = context.target.floats
        if self.dtype not in known:
            raise UsageError(f"cast: {context.target.name} has no kernels in {self.dtype}; there is {', '.join(known)}")
        narrow = _Narrow(graph, _TYPES[self.dtype])
        sites = [site for site in context.sites(graph, self.targets, self.ignore) if _in_floats(site)]
        context.record.eligible[:] = [context.labels[site] for site in sites]
        reach = _reach(graph, context, sites)
        reasons = {site: narrow.why_not(site, reach) for site in sites}
        for site, reason in reasons.items():
            if reason:
                context.decline(site, reason)
            else:
                narrow.compute(site)
        if context.calibration is None and narrow.dtype == torch.float16:
            context.note("no calibration: whether activations stay within float16 was not looked at")


def _in_floats(site: Node) -> bool:
    return site.result.dtype == torch.float32 and any(value.dtype == torch.float32 for value in _given(site))


def _given(site: Node) -> list[Value]:
    return [value for value in site.operands if value is not None]


def _reach(graph: Graph, context: Context, sites: list[Node]) -> dict[Value, float]:
    """The largest magnitude of each value that sites read or compute, on the calibration batches."""
    if context.calibration is None:
        return {}
    values = dict.fromkeys(value for site in sites for value in (*_given(site), site.result)
                           if not value.is_constant and value.dtype == torch.float32)  # fmt: skip
    seen = context.statistics(graph, [(value, MinMax()) for value in values])
    ends = {value: one.range() for value, one in zip(values, seen, strict=True) if one.count}
    return {value: max(-low, high) for value, (low, high) in ends.items()}


@dataclass
class _Narrow:
    """Values in 16 bits, by those that they stand for."""

    graph: Graph
    dtype: torch.dtype
    made: dict[Value, Value] = field(default_factory=dict)

    def why_not(self, site: Node, reach: dict[Value, float]) -> str | None:
        most, name = torch.finfo(self.dtype).max, str(self.dtype).removeprefix("torch.")
        if site.kind == "attention" and self.dtype == torch.float16:
            mask = site.operand("mask")
            if mask is not None and mask.dtype == torch.float32:
                return "its mask is float, and what stands for minus infinity may be beyond float16"
        for value in (*_given(site), site.result):
            stored = self.graph.constant(value) if value.is_constant and value.dtype == torch.float32 else None
            largest = _largest(stored) if stored is not None else reach.get(value, 0.0)
            if largest > most:
                what = "a weight" if stored is not None else "its result" if value == site.result else "its input"
                return f"{what} reaches {largest:.3g}, and {name} {most:.3g}"
        return None

    def compute(self, site: Node) -> None:
        """Put a site in 16 bits in place; whoever reads its result in float32 reads a cast of it."""
        operands = [None if value is None else self._of(value, site) for value in site.operands]
        # what is told its shape keeps it: sizes that the graph computes would leave the axes unknown
        again = partial(self.graph.emit_sized, sizes={}) if site.kind == "reshape" else self.graph.emit
        short = again(site, *operands, at=site)
        long = self.graph.emit("cast", short, dtype=torch.float32, at=site)
        self.made[long] = short
        self.graph.replace(site, long)

    def _of(self, value: Value, site: Node) -> Value:
        if value.dtype != torch.float32:
            return value
        if value not in self.made:
            tensor = self.graph.constant(value)
            if tensor is not None:
                self.made[value] = self.graph.add_constant(tensor.to(self.dtype), value.name)
            else:
                self.made[value] = self.graph.emit("cast", value, dtype=self.dtype, at=site)
        return self.made[value]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
