"""Operators of ONNX over windows and grids: convs and pools that pad by the input's size, resizing, sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.onnx.interpreter.call import Call, Form, Size
from graphopt.ir.ops.movement import pad
from graphopt.ir.ops.pooling import average_pool, max_pool

_larger: Callable[[Size, Size], Size] = torch.sym_max

_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def _padding(call: Call, x: Tensor, kernel: Sequence[int]) -> tuple[Size, ...]:
    """The begin of each axis, then the end of each, so that SAME gives ceil(size / stride) windows."""
    rank, how = len(kernel), call.attribute("auto_pad", "NOTSET")
    if how == "VALID":
        return (0,) * (2 * rank)
    if how == "NOTSET":
        return call.attribute("pads", (0,) * (2 * rank))
    strides, dilations = call.attribute("strides", (1,) * rank), call.attribute("dilations", (1,) * rank)
    begins, ends = [], []
    for size, width, stride, dilation in zip(x.shape[-rank:], kernel, strides, dilations, strict=True):
        total = _larger((-(-size // stride) - 1) * stride + dilation * (width - 1) + 1 - size, 0)
        small = total // 2
        begins.append(small if how == "SAME_UPPER" else total - small)
        ends.append(total - small if how == "SAME_UPPER" else small)
    return (*begins, *ends)


def _conv(call: Call) -> Tensor:
    x, weight, bias = call[0], call[1], call.optional(2)
    kernel = call.attribute("kernel_shape", tuple(weight.shape[2:]))
    rank = len(kernel)
    if rank not in (1, 2, 3):
        raise call.refused(f"torch convolves 1 to 3 axes, not {rank}")
    padding = _padding(call, x, kernel)
    if padding[:rank] != padding[rank:]:
        x, padding = pad(x, padding=padding), (0,) * rank
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    strides, dilations = call.attribute("strides", (1,) * rank), call.attribute("dilations", (1,) * rank)
    return function(x, weight, bias, strides, padding[:rank], dilations, call.attribute("group", 1))


def _conv_transpose(call: Call) -> Tensor:
    x, weight, bias = call[0], call[1], call.optional(2)
    rank = weight.dim() - 2
    if rank not in (1, 2, 3):
        raise call.refused(f"torch convolves 1 to 3 axes, not {rank}")
    ones, zeros = (1,) * rank, (0,) * rank
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    further, group = call.attribute("output_padding", zeros), call.attribute("group", 1)
    whole = [stride * (size - 1) + more + dilation * (width - 1) + 1 for size, stride, more, dilation, width
             in zip(x.shape[2:], strides, further, dilations, weight.shape[2:], strict=True)]  # fmt: skip
    padding = _cropped(call, x, whole, strides)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    if padding[:rank] == padding[rank:] and all(isinstance(side, int) and side >= 0 for side in padding):
        return function(x, weight, bias, strides, padding[:rank], further, group, dilations)
    y = function(x, weight, bias, strides, zeros, further, group, dilations)
    return pad(y, padding=tuple(-side for side in padding))


def _cropped(call: Call, x: Tensor, whole: list[Size], strides: Sequence[int]) -> tuple[Size, ...]:
    """How much is cut off, the begin of each axis, then the end of each."""
    rank, how = len(strides), call.attribute("auto_pad", "NOTSET")
    wanted: Sequence[Size] | None = call.attributes.get("output_shape")
    if wanted is None and how.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        return call.attribute("pads", (0,) * (2 * rank)) if how == "NOTSET" else (0,) * (2 * rank)
    totals = [all_ - size for all_, size in zip(whole, wanted[-rank:], strict=True)]
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    return (*small, *large) if how == "SAME_UPPER" else (*large, *small)


# --- pools ---------------------------------------------------------------------------------------------------------


def _window(call: Call) -> dict[str, Any]:
    kernel = call.attributes["kernel_shape"]
    if len(kernel) not in (1, 2, 3):
        raise call.refused(f"torch pools 1 to 3 axes, not {len(kernel)}")
    padding = _padding(call, call[0], kernel)
    return {"kernel": kernel, "stride": call.attribute("strides", ()), "padding": padding}


def _max_pool(call: Call) -> Tensor:
    if call.results > 1:
        raise call.refused("the indices of the largest entries are read")
    return max_pool(call[0], dilation=call.attribute("dilations", ()), ceil=_ceil(call), **_window(call))


def _average_pool(call: Call) -> Tensor:
    if set(call.attribute("dilations", ())) - {1}:
        raise call.refused("torch averages without dilation")
    counted = bool(call.attribute("count_include_pad", 0))
    return average_pool(call[0], ceil=_ceil(call), include_pad=counted, **_window(call))


def _ceil(call: Call) -> bool:
    return bool(call.attribute("ceil_mode", 0)) and call.attribute("auto_pad", "NOTSET") == "NOTSET"


def _lp_pool(call: Call) -> Tensor:
    p, window = float(call.attribute("p", 2)), _window(call)
    mean = average_pool(torch.pow(call[0].abs(), p), ceil=_ceil(call), include_pad=True, **window)
    return torch.pow(mean * math.prod(window["kernel"]), 1 / p)


def _global(function: Callable[[Tensor, list[int]], Tensor]) -> Form:
    return Form(lambda call: function(call[0], list(range(2, call[0].dim()))))


def _global_lp(call: Call) -> Tensor:
    p = float(call.attribute("p", 2))
    total = torch.pow(call[0].abs(), p).sum(list(range(2, call[0].dim())), True)
    return torch.pow(total, 1 / p)


# --- resizing ------------------------------------------------------------------------------------------------------


def _resize(call: Call) -> Tensor:
    """Opset 10 and Upsample read only scales, and count them from the first entry of an axis (asymmetric)."""
    x, old = call[0], call.opset < 11
    mode = call.attribute("mode", "nearest").replace("bilinear", "linear")
    how = "asymmetric" if old else call.attribute("coordinate_transformation_mode", "half_pixel")
    nearest = "floor" if old else call.attribute("nearest_mode", "round_prefer_floor")
    scales = call.listed("scales", 1 if old else 2) or None
    scales = scales and [float(scale) if isinstance(scale, int) else scale for scale in scales]
    sizes = None if old else call.numbers(3)
    axes = [axis % x.dim() for axis in call.attribute("axes", tuple(range(x.dim())))]
    if sizes is None:
        if scales is None:
            raise call.refused("it has neither scales nor sizes")
        sizes = [_scaled(x.shape[axis], scale) for axis, scale in zip(axes, scales, strict=True)]
    elif scales is None:
        scales = [size / x.shape[axis] for axis, size in zip(axes, sizes, strict=True)]
    resized = {axis: (size, scale) for axis, size, scale in zip(axes, sizes, scales, strict=True)
               if not (isinstance(scale, float) and scale == 1.0)}  # fmt: skip
    dtype = x.dtype
    if mode != "nearest" and resized and not dtype.is_floating_point:
        x = x.float()  # ONNX Runtime interpolates in float32 too, and cuts the fractions off
    by_torch = _interpolated(x, resized, mode, how, nearest)
    if by_torch is not None:
        return by_torch.to(dtype)
    if mode == "cubic":
        raise call.refused(f"torch interpolates cubically over two axes, and not by {how}")
    for axis, (size, scale) in resized.items():
        x = _along(x, axis, size, _places(how, size, x.shape[axis], scale), None if mode == "linear" else nearest)
    return x.to(dtype)


def _scaled(size: Size, scale: Any) -> Size:
    return size * int(scale) if isinstance(scale, float) and scale.is_integer() else math.floor(size * scale)


def _interpolated(
    x: Tensor, resized: dict[int, tuple[Size, Any]], mode: str, how: str, nearest: str
) -> Tensor | None:
    """By torch's own function, where that picks the same entries; else None."""
    axes = list(range(2, x.dim()))
    if not resized or min(resized) < 2 or x.dim() not in (3, 4, 5):
        return None
    whole = [resized.get(axis, (x.shape[axis], 1.0)) for axis in axes]
    sizes = [size for size, _ in whole]
    exact = all(isinstance(scale, float) and scale.is_integer() for _, scale in whole)
    if mode == "nearest":
        by_floor = how == "asymmetric" and nearest == "floor"
        centred = how in ("half_pixel", "pytorch_half_pixel") and nearest in ("round_prefer_floor", "round_prefer_ceil")
        known = exact and (by_floor or centred) and x.dtype.is_floating_point
        return F.interpolate(x, sizes, mode="nearest") if known else None
    name = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
    torch_mode = name.get((mode, x.dim()))
    if torch_mode is None or how not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    if how != "align_corners" and not all(_is_ratio(size, x.shape[axis], scale)
                                          for axis, (size, scale) in zip(axes, whole, strict=True)):  # fmt: skip
        return None
    return F.interpolate(x, sizes, mode=torch_mode, align_corners=how == "align_corners")


def _is_ratio(size: Size, before: Size, scale: Any) -> bool:
    """Whether a scale is that of the sizes, which torch computes with: it may be given, and the size rounded."""
    if not isinstance(size, int) or not isinstance(before, int):
        return not isinstance(scale, float) or scale.is_integer()
    return bool(abs(size / before - scale) < 1e-6 * scale)


def _places(how: str, size: Size, before: Size, scale: Any) -> Tensor:
    """Where each entry of the result lies on the axis before."""
    places = torch.arange(size, dtype=torch.float32)
    if how == "asymmetric":
        return torch.div(places, scale)
    if how == "align_corners":
        return torch.mul(places, (before - 1) / _larger(size - 1, 1))
    if how == "pytorch_half_pixel" and isinstance(size, int) and size == 1:
        return torch.zeros_like(places)
    centred = torch.div(places + 0.5, scale) - 0.5
    if how == "half_pixel_symmetric":
        return torch.add(centred, (before / 2) * (1 - size / (scale * before)))
    return centred


_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda places: torch.ceil(places - 0.5),
    "round_prefer_ceil": lambda places: torch.floor(places + 0.5),
}


def _along(x: Tensor, axis: int, size: Size, places: Tensor, nearest: str | None) -> Tensor:
    """Entries of x at these places along an axis, the nearest ones or (None) interpolated linearly."""
    last = x.shape[axis] - 1
    if nearest is not None:
        return x.index_select(axis, _NEAREST[nearest](places).long().clamp(min=0).clamp(max=last))
    places = places.clamp(min=0).clamp(max=last)
    low = places.floor().long()
    share = (places - low).to(x.dtype).reshape([-1 if i == axis else 1 for i in range(x.dim())])
    before, after = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=last))
    return before + (after - before) * share


def _sample(call: Call) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(found := call.attribute("mode", "linear"), found)
    padding, corners = call.attribute("padding_mode", "zeros"), bool(call.attribute("align_corners", 0))
    return F.grid_sample(call[0], call[1], mode, padding, corners)


_ONLY = {"auto_pad": _PADS}
_RESIZE = {
    "mode": ("nearest", "linear", "bilinear", "cubic"), "antialias": (0,), "exclude_outside": (0,),
    "cubic_coeff_a": (-0.75,), "keep_aspect_ratio_policy": ("stretch",),
    "coordinate_transformation_mode": (
        "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric",
    ),
}  # fmt: skip

FORMS: dict[str, Form] = {
    "onnx.AveragePool": Form(_average_pool, _ONLY),
    "onnx.Conv": Form(_conv, _ONLY, {1: "weight", 2: "bias"}),
    "onnx.ConvTranspose": Form(_conv_transpose, _ONLY, {1: "weight", 2: "bias"}),
    "onnx.GlobalAveragePool": _global(lambda x, axes: x.mean(axes, True)),
    "onnx.GlobalLpPool": Form(_global_lp),
    "onnx.GlobalMaxPool": _global(lambda x, axes: x.amax(axes, True)),
    "onnx.GridSample": Form(_sample),
    "onnx.LpPool": Form(_lp_pool, {**_ONLY, "dilations": ((1,), (1, 1), (1, 1, 1))}),
    "onnx.MaxPool": Form(_max_pool, _ONLY),
    "onnx.Resize": Form(_resize, _RESIZE),
    "onnx.Upsample": Form(_resize, _RESIZE),
}
