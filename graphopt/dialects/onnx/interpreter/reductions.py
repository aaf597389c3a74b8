"""Operators of ONNX along axes: reductions, places of extremes, running sums, products of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.onnx.interpreter.call import Call, Form


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Form:
    """Along the axes that are an attribute or input 1; along all where there are none, unless the node says none."""

    def apply(call: Call) -> Tensor:
        x, axes = call[0], call.listed("axes", 1)
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return function(x.unsqueeze(-1), [x.dim()], False).to(x.dtype)
        return function(x, axes or list(range(x.dim())), bool(call.attribute("keepdims", 1))).to(x.dtype)

    return Form(apply)


def _prod(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim)
    return x


def _place(function: Callable[[Tensor, int, bool], Tensor]) -> Form:
    """The first place of the extreme, or the last."""

    def apply(call: Call) -> Tensor:
        x, axis = call[0], call.attribute("axis", 0)
        keepdim = bool(call.attribute("keepdims", 1))
        if not call.attribute("select_last_index", 0):
            return function(x, axis, keepdim)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim)

    return Form(apply)


def _top(call: Call) -> tuple[Tensor, Tensor]:
    count = call.attributes["k"] if "k" in call.attributes else call.required_numbers(1)[0]
    largest, in_order = bool(call.attribute("largest", 1)), bool(call.attribute("sorted", 1))
    values, indices = torch.topk(call[0], count, call.attribute("axis", -1), largest, in_order)
    return values, indices


def _running_sum(call: Call) -> Tensor:
    x, axis = call[0], call.required_numbers(1)[0]
    if call.attribute("reverse", 0):
        x = x.flip(axis)
    total = x.cumsum(axis).to(x.dtype)
    if call.attribute("exclusive", 0):
        total = total - x
    return total.flip(axis) if call.attribute("reverse", 0) else total


def _einsum(call: Call) -> Tensor:
    return torch.einsum(call.attributes["equation"], *call.tensors())


def _gemm(call: Call) -> Tensor:
    """What is no linear: with factors, or with a transposed first operand."""
    a = call[0].t() if call.attribute("transA", 0) else call[0]
    b = call[1].t() if call.attribute("transB", 0) else call[1]
    alpha, beta, c = call.attribute("alpha", 1.0), call.attribute("beta", 1.0), call.optional(2)
    y = a @ b if alpha == 1.0 else (a @ b) * alpha
    if c is None:
        return y
    return y + (c if beta == 1.0 else c * beta)


def _over_axis(function: Callable[[Tensor, int], Tensor]) -> Form:
    """Before opset 13 over all axes from `axis` on, flattened to one."""

    def apply(call: Call) -> Tensor:
        x = call[0]
        if call.opset >= 13:
            return function(x, call.attribute("axis", -1))
        first = call.attribute("axis", 1) % max(x.dim(), 1)
        return function(x.flatten(first), first).reshape(x.shape)

    return Form(apply)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    places = torch.arange(x.shape[axis]).reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
    return (places == x.argmax(axis, keepdim=True)).to(x.dtype)


FORMS: dict[str, Form] = {
    "onnx.ReduceL1": _reduced(lambda x, axes, keepdim: x.abs().sum(axes, keepdim)),
    "onnx.ReduceL2": _reduced(lambda x, axes, keepdim: x.square().sum(axes, keepdim).sqrt()),
    "onnx.ReduceLogSum": _reduced(lambda x, axes, keepdim: x.sum(axes, keepdim).log()),
    "onnx.ReduceLogSumExp": _reduced(torch.logsumexp),
    "onnx.ReduceMax": _reduced(torch.amax),
    "onnx.ReduceMean": _reduced(lambda x, axes, keepdim: x.mean(axes, keepdim)),
    "onnx.ReduceMin": _reduced(torch.amin),
    "onnx.ReduceProd": _reduced(_prod),
    "onnx.ReduceSum": _reduced(lambda x, axes, keepdim: x.sum(axes, keepdim)),
    "onnx.ReduceSumSquare": _reduced(lambda x, axes, keepdim: x.square().sum(axes, keepdim)),
    "onnx.ArgMax": _place(torch.argmax),
    "onnx.ArgMin": _place(torch.argmin),
    "onnx.TopK": Form(_top),
    "onnx.CumSum": Form(_running_sum),
    "onnx.Einsum": Form(_einsum),
    "onnx.Gemm": Form(_gemm, weights={1: "weight", 2: "bias"}),
    "onnx.Softmax": _over_axis(F.softmax),
    "onnx.LogSoftmax": _over_axis(F.log_softmax),
    "onnx.Hardmax": _over_axis(_hardmax),
}
