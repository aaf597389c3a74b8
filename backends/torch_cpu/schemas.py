"""What the operators `graphopt_fbgemm::*` and `graphopt_onednn::*` share: parts of their schemas, and fake results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

X, WEIGHT, SETTINGS = (
    "Tensor x, Tensor scale, Tensor zero_point",
    "Tensor weight, Tensor weight_scale",
    "int[] stride, int[] padding, int[] dilation, int groups",
)
Y = "Tensor y_scale, Tensor y_zero_point"


def like_linear(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fake result of a linear: x (..., in) and weight (out, in) -> (..., out) of a dtype."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def like_conv(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """Fake result of a conv in uint8: x (batch, in, *size), weight (out, in / groups, *kernel) -> (batch, out, ...)."""
    floats = x.new_empty(x.shape, dtype=torch.float32), weight.new_empty(weight.shape, dtype=torch.float32)
    convs = torch.conv1d, torch.conv2d, torch.conv3d
    return convs[weight.dim() - 3](*floats, None, stride, padding, dilation, groups).to(torch.uint8)
