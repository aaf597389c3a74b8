"""Operators of ONNX entry by entry: activations, arithmetic, comparisons and logic."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.onnx.interpreter.call import Call, Form


def _each(function: Callable[[Tensor], Tensor]) -> Form:
    return Form(lambda call: function(call[0]))


def _both(function: Callable[..., Tensor]) -> Form:
    return Form(lambda call: function(call[0], call[1]))


def _joined(function: Callable[[Tensor, Tensor], Tensor]) -> Form:
    """Of any number of inputs."""
    return Form(lambda call: reduce(function, call.tensors()))


def _with(function: Callable[..., Tensor], **defaults: Any) -> Form:
    """With these attributes, in the order of the function's further parameters."""
    return Form(lambda call: function(call[0], *(call.attribute(name, value) for name, value in defaults.items())))


def _selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    return gamma * F.elu(x, alpha)


def _shrink(x: Tensor, bias: float, threshold: float) -> Tensor:
    return torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, torch.zeros_like(x)))


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _is_inf(x: Tensor, negative: int, positive: int) -> Tensor:
    return ((x == -torch.inf) & bool(negative)) | ((x == torch.inf) & bool(positive))


def _clip(call: Call) -> Tensor:
    """With computed bounds; stored ones make the op clip."""
    return torch.clamp(call[0], call.optional(1), call.optional(2))


def _mod(call: Call) -> Tensor:
    return (torch.fmod if call.attribute("fmod", 0) else torch.remainder)(call[0], call[1])


def _shift(call: Call) -> Tensor:
    left = call.attributes["direction"] == "LEFT"
    return (torch.bitwise_left_shift if left else torch.bitwise_right_shift)(call[0], call[1])


def _mean(call: Call) -> Tensor:
    parts = call.tensors()
    return reduce(torch.add, parts) / len(parts)


def _cast_like(call: Call) -> Tensor:
    return call[0].to(call[1].dtype)


FORMS: dict[str, Form] = {
    "onnx.Abs": _each(torch.abs),
    "onnx.Acos": _each(torch.acos),
    "onnx.Acosh": _each(torch.acosh),
    "onnx.Asin": _each(torch.asin),
    "onnx.Asinh": _each(torch.asinh),
    "onnx.Atan": _each(torch.atan),
    "onnx.Atanh": _each(torch.atanh),
    "onnx.BitwiseNot": _each(torch.bitwise_not),
    "onnx.Ceil": _each(torch.ceil),
    "onnx.Cos": _each(torch.cos),
    "onnx.Cosh": _each(torch.cosh),
    "onnx.Floor": _each(torch.floor),
    "onnx.Log": _each(torch.log),
    "onnx.Mish": _each(F.mish),
    "onnx.Neg": _each(torch.neg),
    "onnx.Not": _each(torch.logical_not),
    "onnx.Round": _each(torch.round),
    "onnx.Sign": _each(torch.sign),
    "onnx.Sin": _each(torch.sin),
    "onnx.Sinh": _each(torch.sinh),
    "onnx.Softplus": _each(F.softplus),
    "onnx.Softsign": _each(F.softsign),
    "onnx.Tan": _each(torch.tan),
    "onnx.Celu": _with(F.celu, alpha=1.0),
    "onnx.Elu": _with(F.elu, alpha=1.0),
    "onnx.HardSigmoid": _with(lambda x, alpha, beta: (x * alpha + beta).clamp(0.0, 1.0), alpha=0.2, beta=0.5),
    "onnx.IsInf": _with(_is_inf, detect_negative=1, detect_positive=1),
    "onnx.PRelu": Form(lambda call: _prelu(call[0], call[1]), weights={1: "weight"}),
    "onnx.Selu": _with(_selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "onnx.Shrink": _with(_shrink, bias=0.0, lambd=0.5),
    "onnx.Swish": _with(lambda x, alpha: x * torch.sigmoid(x * alpha), alpha=1.0),
    "onnx.ThresholdedRelu": _with(lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), alpha=1.0),
    "onnx.Clip": Form(_clip),
    "onnx.CastLike": Form(_cast_like),
    "onnx.And": _both(torch.logical_and),
    "onnx.BitShift": Form(_shift),
    "onnx.BitwiseAnd": _both(torch.bitwise_and),
    "onnx.BitwiseOr": _both(torch.bitwise_or),
    "onnx.BitwiseXor": _both(torch.bitwise_xor),
    "onnx.Equal": _both(torch.eq),
    "onnx.Greater": _both(torch.gt),
    "onnx.GreaterOrEqual": _both(torch.ge),
    "onnx.Less": _both(torch.lt),
    "onnx.LessOrEqual": _both(torch.le),
    "onnx.Mod": Form(_mod),
    "onnx.Or": _both(torch.logical_or),
    "onnx.Xor": _both(torch.logical_xor),
    "onnx.Max": _joined(torch.maximum),
    "onnx.Mean": Form(_mean),
    "onnx.Min": _joined(torch.minimum),
    "onnx.Sum": _joined(torch.add),
}
