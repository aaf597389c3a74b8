"""Int8 convolutions of few channels on onnxruntime: in a form that its fastest kernel takes.

That kernel reads windows in place and rounds as it goes, but takes channels in multiples of 4 only. The first
convolution of an image network has 3, and runs in another kernel, which copies its windows a pixel at a time first:
it reaches a fifth of the speed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.backends.onnxruntime import conv_int8
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Choice, Match

CHANNELS = 4
"""The kernel takes input and output channels in multiples of this, and FEWEST outputs at least."""

FEWEST = 16


def _has_few_channels(m: Match) -> bool:
    """Whether the channels are no multiple of CHANNELS, and channels of several columns together are one."""
    weight, x, y = m.weight.shape, m.x.shape, m.root.result.shape
    site = m.root.attributes
    if weight is None or x is None or y is None or len(weight) < 3 or site["groups"] != 1 or m.weight_scale.rank != 1:
        return False
    if weight[1] % CHANNELS == 0 or set(site["dilation"]) != {1}:
        return False
    width, stride, together = x[-1], site["stride"][-1], _together(weight[1], site["stride"][-1])
    outputs = weight[0] * together // stride
    if not isinstance(width, int) or width % together or y[-1] != width // stride:
        return False
    return bool(outputs >= FEWEST and outputs % CHANNELS == 0)


def _together(channels: int, stride: int) -> int:
    """How many neighbouring columns become channels: enough for the kernel, and whole steps of the stride."""
    return math.lcm(stride, CHANNELS // math.gcd(CHANNELS, channels))


def _columns_as_channels(op: Builder, m: Match) -> Value:
    """With channels last, neighbouring columns lie side by side in memory: several are read as one with more channels.

    The sums stay the same: zeros fill the windows up. For 3 channels and a 7x7 window at stride 2, 1.7 times the
    multiplications take half the time.
    """
    weight, weight_scale, bias = conv_int8.stored_parameters(op, m)
    site, rank = dict(m.root.attributes), weight.dim()
    together, stride = _together(weight.shape[1], site["stride"][-1]), site["stride"][-1]
    several, before, after = columns_as_channels(weight, stride, site["padding"][rank - 3], together)
    padding = list(site["padding"])
    padding[rank - 3], padding[-1] = before, after
    site |= {"stride": (*site["stride"][:-1], 1), "padding": padding}
    times = together // stride

    shape, result = m.x.shape, m.root.result.shape
    assert shape is not None and result is not None  # as checked
    rows, width = shape[2:-1], shape[-1]
    x = conv_int8.channels_last(op, m.x, rank)
    x = _reshape(op, x, rows, width // together, together * weight.shape[1])
    bias = bias if bias is None else bias.repeat(times)
    stored = op.constant(several), op.constant(weight_scale.repeat(times))
    y = conv_int8.emit(op, m, "com.microsoft.QLinearConv", x, *stored, bias, site, channels_last=1)
    y = _reshape(op, y, result[2:-1], width // stride, weight.shape[0])
    return conv_int8.channels_first(op, y, rank)


def _reshape(op: Builder, x: Value, rows: tuple[int | str, ...], *last: int) -> Value:
    """To (batch, *rows, *last): batch and rows stay, whatever they are, which 0 says in ONNX."""
    sizes = [0] * (1 + len(rows)) + list(last)
    return op("onnx.Reshape", x, op.constant(torch.tensor(sizes)))


def columns_as_channels(weight: Tensor, stride: int, before: int, together: int) -> tuple[Tensor, int, int]:
    """The weight of the same convolution, where `together` columns are read as channels, and together / stride written.

    weight: (out, in, *rows, columns); `before` is its padding on the left. Returns a weight of the same dtype,
    (together / stride * out, together * in, *rows, wide columns), and its padding on the left and on the right, in
    wide columns; channels and outputs of one column stay side by side.
    """
    columns, each = weight.shape[-1], together // stride
    first = -(-before // together)
    last = max(0, ((each - 1) * stride + columns - 1 - before) // together)
    spread = weight.new_zeros(each, *weight.shape[:-1], (first + last + 1) * together)
    for index in range(each):
        start = first * together + index * stride - before
        spread[index, ..., start : start + columns] = weight
    split = spread.reshape(*spread.shape[:-1], -1, together).movedim(-1, 2)
    return split.flatten(2, 3).flatten(0, 1).contiguous(), first, last


FEW_CHANNELS = Choice(
    "conv-of-few-channels",
    conv_int8.pattern,
    {"columns as channels": _columns_as_channels, "QLinearConv": conv_int8.qlinear_conv},
    check=_has_few_channels,
)
