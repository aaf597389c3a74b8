"""Norms, and softmax."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import NodeAxes, elementwise, per_channel
from graphopt.ir.ops.declaration import op


def norm_axes(node: NodeAxes, trailing: int) -> None:
    """Normalized over so many trailing axes."""
    elementwise(node)
    for axis in range(1, trailing + 1):
        node.reduces(node.x, -axis, "norm")


def _norm_axes(node: NodeAxes) -> None:
    norm_axes(node, node.rank(node.given[1]))


@op(flops=0, axes=_norm_axes)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalize over the trailing axes that weight spans."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@op(flops=0, axes=_norm_axes)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the trailing axes that weight spans (Zhang & Sennrich, 2019)."""
    return F.rms_norm(x, weight.shape, weight, eps)


@op(flops=0, axes=per_channel)
def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Inference form, over axis 1, with the running mean and variance."""
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def softmax_axes(node: NodeAxes, axis: int) -> None:
    node.broadcast(node.x, node.y)
    node.lock(node.x, axis, "axis_normalized")


def _softmax_axes(node: NodeAxes) -> None:
    softmax_axes(node, node.attributes["axis"])


@op(flops=0, axes=_softmax_axes)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """exp(x) normalized to sum 1 along axis."""
    return F.softmax(x, axis)
