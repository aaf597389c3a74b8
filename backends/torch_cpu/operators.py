"""What the operators of torch's engines have in common: their schemas, and the shapes of what they give."""

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
    """What a linear of x and weight (out, in) gives, for shapes alone."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def like_conv(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """What a conv of x and weight gives in uint8, for shapes alone."""
    floats = x.new_empty(x.shape, dtype=torch.float32), weight.new_empty(weight.shape, dtype=torch.float32)
    convs = torch.conv1d, torch.conv2d, torch.conv3d
    return convs[weight.dim() - 3](*floats, None, stride, padding, dilation, groups).to(torch.uint8)
