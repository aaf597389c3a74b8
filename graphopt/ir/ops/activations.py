"""Activation functions, entry by entry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import elementwise
from graphopt.ir.ops.declaration import op


@op(flops=0, axes=elementwise)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """approximate is "none" (erf) or "tanh" (Hendrycks & Gimpel, 2016)."""
    return F.gelu(x, approximate=approximate)


@op(flops=0, axes=elementwise)
def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return F.silu(x)


@op(flops=0, axes=elementwise)
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


@op(flops=0, axes=elementwise)
def clip(x: Tensor, *, low: float | None = None, high: float | None = None) -> Tensor:
    """min(max(x, low), high), None being no bound (ReLU6, hardtanh)."""
    return x if low is None and high is None else x.clamp(_as_type(low, x.dtype), _as_type(high, x.dtype))


def _as_type(bound: float | None, dtype: torch.dtype) -> float | None:
    """A bound as a number that leaves integers integers."""
    return bound if bound is None or dtype.is_floating_point else int(bound)


@op(flops=0, axes=elementwise)
def leaky_relu(x: Tensor, *, slope: float = 0.01) -> Tensor:
    """x where it is positive, else slope · x."""
    return F.leaky_relu(x, slope)


@op(flops=0, axes=elementwise)
def hard_sigmoid(x: Tensor) -> Tensor:
    """min(max(x + 3, 0), 6) / 6 (torch's; Howard et al., 2019)."""
    return F.hardsigmoid(x)


@op(flops=0, axes=elementwise)
def hard_swish(x: Tensor) -> Tensor:
    """x · hard_sigmoid(x) (Howard et al., 2019)."""
    return F.hardswish(x)
