"""f(x, W)  ->  cast(f(cast(x), W'), float32), in 16 bits wherever numbers fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphopt.analysis.narrowing import Narrowed, is_float32, largest_of, read, unfit
from graphopt.errors import UsageError
from graphopt.ir.cost import LARGE, Cost
from graphopt.ir.graph import Graph, Node, Value
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
        sites = context.sites(graph, self.targets, self.ignore, where=is_float32)
        max_abs = _max_abs(graph, context, sites)
        narrowed = Narrowed(graph, _DTYPES[self.dtype])
        too_wide = unfit(graph, _DTYPES[self.dtype], max_abs)
        declines = {site: narrowed.why_not(site, max_abs) or too_wide.get(site) for site in sites}
        for site, why in declines.items():
            if why is None:
                narrowed.recompute(site)
            else:
                context.decline(site, why)
        if context.calibration is None and self.dtype == "float16":
            seen = "of the example inputs alone is it" if max_abs else "it is not"
            context.note(f"no calibration: {seen} known whether activations fit float16")


def _max_abs(graph: Graph, context: Context, sites: list[Node]) -> dict[Value, float]:
    """The largest magnitude of each activation that sites read or compute: on the calibration batches, or without any
    on the example inputs, where the model is small enough to be run on them."""
    batches = context.calibration
    if batches is None:
        if not context.feeds or Cost.of(graph).bytes > LARGE:
            return {}
        batches = Calibration(list(context.feeds), graph.inputs)
    values = dict.fromkeys(value for site in sites for value in (*read(site), site.result)
                           if not value.is_constant and value.dtype == torch.float32)  # fmt: skip
    observers = batches.observe(graph, [(value, _MaxAbs()) for value in values])
    return {value: observer.number for value, observer in zip(values, observers, strict=True)}


@dataclass
class _MaxAbs:
    """The largest magnitude of a value over batches; infinity where one is infinite or NaN."""

    number: float = 0.0
    nbytes: int = 8

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        found = largest_of(x if mask is None else x[mask])
        self.number = max(self.number, math.inf if math.isnan(found) else found)

    def merge(self, other: _MaxAbs) -> None:
        self.number = max(self.number, other.number)
