"""Operators of ONNX that normalize, but for those that are ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.onnx.interpreter.call import Call, Form, Traced


def _instance_norm(call: Call) -> Tensor:
    return F.instance_norm(call[0], weight=call[1], bias=call[2], eps=call.attribute("epsilon", 1e-5))


def _group_norm(call: Call) -> Tensor:
    x, weight, bias, groups = call[0], call[1], call[2], call.attributes["num_groups"]
    if call.opset < 21:  # one for each group
        weight, bias = (part.repeat_interleave(x.shape[1] // groups) for part in (weight, bias))
    return F.group_norm(x, groups, weight, bias, call.attribute("epsilon", 1e-5))


def _layer_norm(call: Call) -> tuple[Traced, ...]:
    """Where the weight has another shape than what is normalized, or the statistics are read."""
    x, axis, eps = call[0], call.attribute("axis", -1) % call[0].dim(), call.attribute("epsilon", 1e-5)
    axes = list(range(axis, x.dim()))
    mean = x.mean(axes, True)
    deviation = torch.rsqrt((x - mean).square().mean(axes, True) + eps)
    y = (x - mean) * deviation * call[1]
    bias = call.optional(2)
    return y if bias is None else y + bias, mean, deviation


def _rms_norm(call: Call) -> Tensor:
    x, axis = call[0], call.attribute("axis", -1) % call[0].dim()
    square = x.square().mean(list(range(axis, x.dim())), True)
    return x * torch.rsqrt(square + call.attribute("epsilon", 1e-5)) * call[1]


def _local_response(call: Call) -> Tensor:
    x, size = call[0], call.attributes["size"]
    alpha, beta, k = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    if size % 2 == 0:
        raise call.refused(f"torch has another neighbourhood of {size} channels, which is even")
    return F.local_response_norm(x, size, alpha, beta, k)


def _lp(call: Call) -> Tensor:
    x = call[0]
    norm = x.norm(float(call.attribute("p", 2)), call.attribute("axis", -1), True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _mean_variance(call: Call) -> Tensor:
    x, axes = call[0], list(call.attribute("axes", (0, 2, 3)))
    centred = x - x.mean(axes, True)
    return centred / (centred.square().mean(axes, True).sqrt() + 1e-9)


_AFFINE = {1: "weight", 2: "bias"}

FORMS: dict[str, Form] = {
    "onnx.GroupNormalization": Form(_group_norm, weights=_AFFINE),
    "onnx.InstanceNormalization": Form(_instance_norm, weights=_AFFINE),
    "onnx.LayerNormalization": Form(_layer_norm, only={"stash_type": (1,)}, weights=_AFFINE),
    "onnx.LRN": Form(_local_response),
    "onnx.LpNormalization": Form(_lp),
    "onnx.MeanVarianceNormalization": Form(_mean_variance),
    "onnx.RMSNormalization": Form(_rms_norm, only={"stash_type": (1,)}, weights=_AFFINE),
    "onnx.SimplifiedLayerNormalization": Form(_rms_norm, weights=_AFFINE),
}
