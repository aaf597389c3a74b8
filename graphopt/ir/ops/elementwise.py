"""Arithmetic entry by entry; also what the decomposed forms of norms and activations are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.axes import elementwise
from graphopt.ir.ops.declaration import op


@op(flops=0, axes=elementwise, commutative=True)
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b with broadcasting."""
    return a + b


@op(flops=0, axes=elementwise)
def sub(a: Tensor, b: Tensor) -> Tensor:
    """a - b with broadcasting."""
    return a - b


@op(flops=0, axes=elementwise, commutative=True)
def mul(a: Tensor, b: Tensor) -> Tensor:
    """a · b with broadcasting."""
    return a * b


@op(flops=0, axes=elementwise)
def div(a: Tensor, b: Tensor) -> Tensor:
    """a / b with broadcasting."""
    return a / b


@op(flops=0, axes=elementwise)
def pow_(a: Tensor, b: Tensor) -> Tensor:
    """a to the power b, with broadcasting."""
    return a**b


@op(flops=0, axes=elementwise)
def sqrt(x: Tensor) -> Tensor:
    """The square root."""
    return torch.sqrt(x)


@op(flops=0, axes=elementwise)
def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x)."""
    return torch.rsqrt(x)


@op(flops=0, axes=elementwise)
def reciprocal(x: Tensor) -> Tensor:
    """1 / x."""
    return 1 / x


@op(flops=0, axes=elementwise)
def exp(x: Tensor) -> Tensor:
    """e to the power x."""
    return torch.exp(x)


@op(flops=0, axes=elementwise)
def erf(x: Tensor) -> Tensor:
    """The error function, 2/sqrt(π) ∫ exp(-t²) dt from 0 to x."""
    return torch.erf(x)


@op(flops=0, axes=elementwise)
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


@op(flops=0, axes=elementwise)
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


@op(flops=0, axes=elementwise)
def isnan(x: Tensor) -> Tensor:
    """Boolean: whether an entry is NaN."""
    return torch.isnan(x)


@op(flops=0, axes=elementwise)
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where condition holds, else b, with broadcasting."""
    return torch.where(condition, a, b)
