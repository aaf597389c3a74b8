"""Int8 convolutions on onnxruntime: forms that its fastest kernel takes.

That kernel reads windows in place and rounds as it goes, but takes channels in multiples of 4 only. An image network's
first convolution, with 3, falls to one that gathers its windows a pixel at a time, at a fifth of the speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.backends import onnxruntime_weights
from graphopt.graph import Value
from graphopt.rewrite import Builder, Choice, Declined, Match, Pattern, Recorder, Rule, scalar

CHANNELS = 4
"""The kernel takes input and output channels in multiples of this, and FEWEST outputs at least."""

FEWEST = 16


def _conv(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, y_scale: str,
          y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
    return op.conv_int8(x, scale, zero_point, weight, weight_scale, y_scale, y_zero_point, bias)


def _qlinear_conv(op: Builder, m: Match) -> Value:
    _, _, bias = _stored(op, m)
    return _emit(op, m, "onnx.QLinearConv", m.x, m.weight, m.weight_scale, bias, m.root.attributes)


def _stored(op: Builder, m: Match) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, its scales, and the bias in int32 steps of scale · weight_scale (ONNX QLinearConv)."""
    weight, scale, weight_scale = (op.graph.constant(one) for one in (m.weight, m.scale, m.weight_scale))
    if weight is None or scale is None or weight_scale is None:
        raise Declined("its scales are not constant")
    bias = op.graph.constant(m.bias) if m.bias is not None else None
    if m.bias is not None and bias is None:
        raise Declined("its bias is computed by the graph")
    return weight, weight_scale, None if bias is None else onnxruntime_weights.bias_steps(bias, scale, weight_scale)


def _emit(
    op: Builder, m: Match, kind: str, x: Value, weight: Value, weight_scale: Value, bias: Tensor | None,
    site: Mapping[str, Any], **attributes: Any,
) -> Value:  # fmt: skip
    scales = op.graph.constant(weight_scale)
    assert scales is not None  # as stored
    zero = op.constant(torch.zeros_like(scales, dtype=torch.int8))
    return op(
        kind, x, m.scale, m.zero_point, weight, weight_scale, zero, m.y_scale, m.y_zero_point,
        None if bias is None else op.constant(bias),
        strides=site["stride"], pads=site["padding"], dilations=site["dilation"], group=site["groups"], **attributes,
    )  # fmt: skip


# --- few channels --------------------------------------------------------------------------------------------------


def _is_shallow(m: Match) -> bool:
    """Whether a convolution has too few channels for the kernel, and its columns can make up for that."""
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
    """Columns to take as channels: enough for the kernel, and whole steps of the stride."""
    return math.lcm(stride, CHANNELS // math.gcd(CHANNELS, channels))


def _columns_as_channels(op: Builder, m: Match) -> Value:
    """Channels last, neighbouring columns lie side by side: each few are read as one of many channels, and written so.

    The same sums: zeros fill the windows up. For 3 channels and a 7x7 window at stride 2, 1.7 times the multiplications
    take half the time.
    """
    weight, weight_scale, bias = _stored(op, m)
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
    x = op.transpose(m.x, perm=(0, *range(2, rank), 1))
    x = _reshape(op, x, rows, width // together, together * weight.shape[1])
    bias = bias if bias is None else bias.repeat(times)
    stored = op.constant(several), op.constant(weight_scale.repeat(times))
    y = _emit(op, m, "com.microsoft.QLinearConv", x, *stored, bias, site, channels_last=1)
    y = _reshape(op, y, result[2:-1], width // stride, weight.shape[0])
    return op.transpose(y, perm=(0, rank - 1, *range(1, rank - 1)))


def _reshape(op: Builder, x: Value, rows: tuple[int | str, ...], *last: int) -> Value:
    """To (batch, *rows, *last): batch and rows stay, whatever they are, which 0 says in ONNX."""
    sizes = [0] * (1 + len(rows)) + list(last)
    return op("onnx.Reshape", x, op.constant(torch.tensor(sizes)))


def columns_as_channels(weight: Tensor, stride: int, before: int, together: int) -> tuple[Tensor, int, int]:
    """The weight of the same convolution, where `together` columns are read as channels, and together / stride written.

    weight: (out, in, *rows, columns), whose first column lies `before` columns in front of the first output's place.
    Returns (together / stride · out, together · in, *rows, columns of the new kind), and how many of those lie before
    and behind the output's place; channels and outputs of one column stay side by side.
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


# --- padding -------------------------------------------------------------------------------------------------------


def _padded(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, y_scale: str,
            y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
    padded = op.pad(x, bind="pad")
    return op.conv_int8(padded, scale, zero_point, weight, weight_scale, y_scale, y_zero_point, bias)


def _pads_with_zero_point(m: Match) -> bool:
    before, attributes = m.pad.attributes["padding"], m.pad.attributes
    rank = len(before) // 2
    outside = (*before[:2], *before[rank : rank + 2])
    return scalar(m.root.graph, m.zero_point) == attributes["value"] and not any(outside) and min(before) >= 0


def _pad_inside(op: Builder, m: Match) -> Value:
    """The kernel pads by itself, without a copy of its input."""
    before, given = m.pad.attributes["padding"], dict(m.root.attributes)
    rank = len(before) // 2
    around = (*before[2:rank], *before[rank + 2 :])
    own = given["padding"] or (0,) * len(around)
    given["padding"] = tuple(one + other for one, other in zip(around, own, strict=True))
    return op.conv_int8(m.x, *m.root.operands[1:], **given)


SHALLOW = Choice(
    "shallow-conv",
    _conv,
    {"columns as channels": _columns_as_channels, "QLinearConv": _qlinear_conv},
    check=_is_shallow,
)
STAGES = (
    (Rule("pad-into-conv", _padded, _pad_inside, check=_pads_with_zero_point),),
    (SHALLOW,),
    (Rule("qlinear-conv", _conv, _qlinear_conv),),
)
