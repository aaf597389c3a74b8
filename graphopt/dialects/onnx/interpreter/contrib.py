"""Operators of ONNX Runtime (com.microsoft), and those that ONNX itself once tried and removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.onnx.interpreter import windows
from graphopt.dialects.onnx.interpreter.call import Call, Form


def _gelu(approximate: str) -> Form:
    def apply(call: Call) -> Tensor:
        bias = call.optional(1)
        return F.gelu(call[0] if bias is None else call[0] + bias, approximate=approximate)

    return Form(apply, weights={1: "bias"})


def _quick_gelu(call: Call) -> Tensor:
    return call[0] * torch.sigmoid(call[0] * call.attribute("alpha", 1.702))


def _matmul(call: Call) -> Tensor:
    a, b = call[0], call[1]
    a = a.transpose(-1, -2) if call.attribute("transA", 0) else a
    b = b.transpose(-1, -2) if call.attribute("transB", 0) else b
    alpha = call.attribute("alpha", 1.0)
    return a @ b if alpha == 1.0 else (a @ b) * alpha


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "LeakyRelu": F.leaky_relu,
    "Clip": torch.clamp,
    "HardSigmoid": lambda x, alpha, beta: (x * alpha + beta).clamp(0.0, 1.0),
}


def _conv(call: Call) -> Tensor:
    y, added = windows.FORMS["onnx.Conv"].apply(call), call.optional(3)
    assert isinstance(y, Tensor)
    function = _ACTIVATIONS[call.attribute("activation", "Relu")]
    parameters: tuple[float, ...] = call.attribute("activation_params", ())
    return function(y if added is None else y + added, *parameters)


def _skip_norm(call: Call) -> tuple[Tensor | None, ...]:
    """x + skip (+ bias), normalized; the sum is the fourth result."""
    x, weight, shift, bias = call[0] + call[1], call[2], call.optional(3), call.optional(4)
    x = x if bias is None else x + bias
    return F.layer_norm(x, weight.shape, weight, shift, call.attribute("epsilon", 1e-12)), None, None, x


def _skip_rms_norm(call: Call) -> tuple[Tensor | None, ...]:
    x, weight, bias = call[0] + call[1], call[2], call.optional(3)
    x = x if bias is None else x + bias
    return F.rms_norm(x, weight.shape, weight, call.attribute("epsilon", 1e-5)), None, None, x


def _image_scaler(call: Call) -> Tensor:
    bias = torch.tensor(call.attributes["bias"]).reshape(-1, 1, 1)
    return call[0] * call.attribute("scale", 1.0) + bias


def _crop(call: Call) -> Tensor:
    x, (left, top, right, bottom) = call[0], call.attributes["border"]
    scale: Any = call.attributes.get("scale")
    height, width = x.shape[2:]
    end = (height - bottom, width - right) if scale is None else (top + scale[0], left + scale[1])
    return x[:, :, top : end[0], left : end[1]]


def _affine(call: Call) -> Tensor:
    return call[0] * call.attribute("alpha", 1.0) + call.attribute("beta", 0.0)


FORMS: dict[str, Form] = {
    "com.microsoft.BiasGelu": _gelu("none"),
    "com.microsoft.FastGelu": _gelu("tanh"),
    "com.microsoft.FusedConv": Form(
        _conv, {"activation": tuple(_ACTIVATIONS), "auto_pad": ("NOTSET",)}, {1: "weight", 2: "bias"}
    ),
    "com.microsoft.FusedMatMul": Form(_matmul, {"transBatchA": (0,), "transBatchB": (0,)}),
    "com.microsoft.Gelu": _gelu("none"),
    "com.microsoft.QuickGelu": Form(_quick_gelu),
    "com.microsoft.SkipLayerNormalization": Form(_skip_norm, weights={2: "weight", 3: "bias", 4: "input_bias"}),
    "com.microsoft.SkipSimplifiedLayerNormalization": Form(_skip_rms_norm, weights={2: "weight", 3: "input_bias"}),
    "onnx.Affine": Form(_affine),
    "onnx.Crop": Form(_crop),
    "onnx.ImageScaler": Form(_image_scaler),
}
