"""Int8 convolutions on onnxruntime: one image after the other, several images as one, or a product of matrices.

The kernel computes a few pixels at a time, and reads the whole weight for them: 4 or 6 pixels of a small image, more
only where an image has more than 5 times as many for each thread. On a CPU that multiplies fast, a small image takes
as long as the weight takes to be read. And the kernel multiplies with AVX512-VNNI at most, where products of matrices
use AMX. For large images a product is slower all the same, as QGemm rounds its results slowly: with 784 to 3136 pixels
on two cores with AMX it had 0.3 to 0.85 times the speed of the plain form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.onnxruntime.linear_int8 import bias_steps, quantized_gemm
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule, scalar

SMALL_IMAGE = 256
"""Pixels of a result up to which other forms than the plain one are tried."""

LARGEST_WINDOW = 27
"""Pixels of a window up to which windows are copied to the rows of a matrix."""


def pattern(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, y_scale: str,
            y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
    return op.conv_int8(x, scale, zero_point, weight, weight_scale, y_scale, y_zero_point, bias)


def stored_parameters(op: Builder, m: Match) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight (int8), its scales (float32), and the bias in `bias_steps`. Raises Declined where one is computed."""
    weight, scale, weight_scale = (op.graph.constant(one) for one in (m.weight, m.scale, m.weight_scale))
    if weight is None or scale is None or weight_scale is None:
        raise Declined("scales_computed")
    bias = op.graph.constant(m.bias) if m.bias is not None else None
    if m.bias is not None and bias is None:
        raise Declined("bias_computed")
    return weight, weight_scale, None if bias is None else bias_steps(bias, scale, weight_scale)


def emit(
    op: Builder, m: Match, kind: str, x: Value, weight: Value, weight_scale: Value, bias: Tensor | None,
    site: Mapping[str, Any], **attributes: Any,
) -> Value:  # fmt: skip
    """A QLinearConv with the scales and zero points of a match. site: attributes as a conv_int8 has them.

    kind: onnx.QLinearConv, or com.microsoft.QLinearConv, which takes channels_last.
    """
    scales = op.graph.constant(weight_scale)
    assert scales is not None  # as stored
    zero = op.constant(torch.zeros_like(scales, dtype=torch.int8))
    return op(
        kind, x, m.scale, m.zero_point, weight, weight_scale, zero, m.y_scale, m.y_zero_point,
        None if bias is None else op.constant(bias),
        strides=site["stride"], pads=site["padding"], dilations=site["dilation"], group=site["groups"], **attributes,
    )  # fmt: skip


def qlinear_conv(op: Builder, m: Match) -> Value:
    """The plain form."""
    _, _, bias = stored_parameters(op, m)
    return emit(op, m, "onnx.QLinearConv", m.x, m.weight, m.weight_scale, bias, m.root.attributes)


def channels_last(op: Builder, x: Value, rank: int) -> Value:
    return op.transpose(x, perm=(0, *range(2, rank), 1))


def channels_first(op: Builder, y: Value, rank: int) -> Value:
    return op.transpose(y, perm=(0, rank - 1, *range(1, rank - 1)))


# --- small images --------------------------------------------------------------------------------------------------


def _is_small(m: Match) -> bool:
    """Whether images are small and of known size: other forms may be faster."""
    x, y = m.x.shape, m.root.result.shape
    if x is None or y is None or len(x) < 3 or not isinstance(x[2], int) or m.root.attributes["groups"] != 1:
        return False  # a weight in groups is small
    sizes = [size for size in y[2:] if isinstance(size, int)]
    return len(sizes) == len(y) - 2 and math.prod(sizes) <= SMALL_IMAGE


def _result_shape(m: Match) -> tuple[int, ...]:
    """Known, as `_is_small` has checked; only the batch may have a name."""
    return tuple(m.root.result.shape or ())  # type: ignore[arg-type]


def _one_tall_image(op: Builder, m: Match) -> Value:
    """Several images below each other as one, so that more pixels are computed for one reading of the weight.

    Between two images is a gap: rows of the zero point, which are the padding of both. A gap is as high as the padding
    at least, and makes the height of an image with its gap a multiple of the stride. Rows that are computed at gaps are
    cut off. Rows are the first spatial axis.
    """
    if m.x.shape[0] == 1:
        raise Declined("one_image")
    weight, _, bias = stored_parameters(op, m)
    site, rank, rows, (_, _, result_rows, *_) = m.root.attributes, weight.dim(), m.x.shape[2], _result_shape(m)
    stride, window = site["stride"][0], (weight.shape[2] - 1) * site["dilation"][0]
    padding = list(site["padding"])
    top, bottom = padding[0], padding[rank - 2]
    gap = max(top, bottom)
    gap += -(rows + gap) % stride
    if top > window:
        raise Declined("padding_beyond_window", padding=top, window=window)
    padding[rank - 2] = max(0, window + 1 - stride - top)
    each = (rows + gap) // stride

    x = channels_last(op, m.x, rank)
    if gap:
        around = [0] * 2 * rank
        around[rank + 1] = gap
        x = op.pad(x, padding=tuple(around), value=scalar(op.graph, m.zero_point))
    rest = [0] * (rank - 2)  # a 0 tells Reshape to keep an axis
    x = op("onnx.Reshape", x, op.constant(torch.tensor([1, -1, *rest])))
    y = emit(op, m, "com.microsoft.QLinearConv", x, m.weight, m.weight_scale, bias,
             {**site, "padding": tuple(padding)}, channels_last=1)  # fmt: skip
    y = op("onnx.Reshape", y, op.constant(torch.tensor([-1, each, *rest])))
    if each > result_rows:
        y = op.slice(y, axis=1, start=0, end=result_rows)
    return channels_first(op, y, rank)


def _product(op: Builder, m: Match) -> Value:
    """Each pixel of the result is a row of a matrix: QGemm divides the outputs among threads, and reads each weight
    once."""
    if math.prod(m.weight.shape[2:]) > LARGEST_WINDOW:
        raise Declined("large_window", pixels=math.prod(m.weight.shape[2:]), most=LARGEST_WINDOW)
    weight, weight_scale, bias = stored_parameters(op, m)
    outputs, matrix = weight.shape[0], weight.movedim(1, -1).flatten(1)
    rows = op("onnx.Reshape", _windows(op, m), op.constant(torch.tensor([-1, matrix.shape[1]])))
    y = quantized_gemm(op, (rows, m.scale, m.zero_point), matrix, weight_scale, bias, (m.y_scale, m.y_zero_point))
    y = op("onnx.Reshape", y, op.constant(torch.tensor([-1, *_result_shape(m)[2:], outputs])))
    return channels_first(op, y, weight.dim())


def _windows(op: Builder, m: Match) -> Value:
    """The input with channels last; for each pixel of the result, those of its window follow each other (im2col;
    Chellapilla et al. 2006)."""
    site, kernel, rank, result = m.root.attributes, m.weight.shape[2:], m.weight.rank, _result_shape(m)
    x, padding = channels_last(op, m.x, rank), site["padding"]
    if any(padding):
        around = (0, *padding[: rank - 2], 0, 0, *padding[rank - 2 :], 0)
        x = op.pad(x, padding=around, value=scalar(op.graph, m.zero_point))
    if {*kernel, *site["stride"]} == {1}:
        return x
    stride, reach = torch.tensor(site["stride"]), torch.tensor([size - 1 for size in result[2:]])
    axes, steps = op.constant(torch.arange(1, rank - 1)), op.constant(stride)
    parts = []
    for place in itertools.product(*map(range, kernel)):
        start = torch.tensor(place) * torch.tensor(site["dilation"])
        end = start + reach * stride + 1
        parts.append(op("onnx.Slice", x, op.constant(start), op.constant(end), axes, steps))
    return parts[0] if len(parts) == 1 else op.concat(*parts, axis=rank - 1)


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


PADDING = Rule("pad-into-conv", _padded, _pad_inside, check=_pads_with_zero_point)
SMALL = Choice(
    "small-conv",
    pattern,
    {"QLinearConv": qlinear_conv, "one tall image": _one_tall_image, "QGemm": _product},
    check=_is_small,
)
PLAIN = Rule("qlinear-conv", pattern, qlinear_conv)
