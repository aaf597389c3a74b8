"""The largest entry and the mean of windows along space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import over_space
from graphopt.ir.ops.declaration import op
from graphopt.ir.ops.movement import pad


@op(flops=0, axes=over_space)
def max_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    ceil: bool = False,
) -> Tensor:
    """The largest entry of each window of x (N, C, *space); padding is never the largest.

    stride, padding and dilation are as in conv. ceil keeps a last window that reaches beyond the end, if it starts
    before the end's padding.
    """
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    stride, dilation = stride or (1,) * len(kernel), dilation or (1,) * len(kernel)
    beyond = _beyond(x, kernel, stride, padding, dilation, ceil)
    x = F.pad(pad(x, padding=padding, value=lowest), beyond, value=lowest)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1](x, kernel, stride, 0, dilation)


@op(flops=0, axes=over_space)
def average_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    ceil: bool = False,
    include_pad: bool = False,
) -> Tensor:
    """The mean of each window of x (N, C, *space), zeros of the padding included or not.

    stride and padding are as in conv, ceil as in max_pool; what reaches beyond the end never counts.
    """
    stride = stride or (1,) * len(kernel)
    beyond = _beyond(x, kernel, stride, padding, (1,) * len(kernel), ceil)
    mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    counted = pad(torch.ones_like(x), padding=padding, value=float(include_pad))
    return mean(F.pad(pad(x, padding=padding), beyond), kernel, stride) / mean(F.pad(counted, beyond), kernel, stride)


def _beyond(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil: bool,
) -> list[int]:
    """How far the last window reaches beyond the padding, in the form that F.pad takes; negative where it ends before.

    The number of windows is that of torch, and of ONNX since opset 22.
    """
    rank = len(kernel)
    beyond: list[int] = []
    for axis in reversed(range(rank if ceil else 0)):
        size = x.shape[x.dim() - rank + axis] + (padding[axis] if padding else 0)
        width, step = dilation[axis] * (kernel[axis] - 1) + 1, stride[axis]
        whole = size + (padding[rank + axis] if padding else 0)
        start = -((width - whole) // step) * step  # of the last window
        beyond += [0, (start if start < size else start - step) + width - whole]
    return beyond
