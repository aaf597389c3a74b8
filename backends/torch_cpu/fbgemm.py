"""PyTorch eager on x86 CPUs with fbgemm's kernels: linears, convs and adds of uint8 and int8, all else as in aten.

A lowered graph holds operators `graphopt_fbgemm::*`, which take integers and scales as they are stored: they trace,
export and save, and pack the weight at each call. `compile` packs each weight once and calls fbgemm directly. Weights
use all 8 bits where the CPU has VNNI: before Cascade Lake fbgemm's sums of products may saturate, and such weights are
multiplied in floats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.backends.torch_cpu import add_int8, int8
from graphopt.backends.torch_cpu.base import EagerTarget
from graphopt.backends.torch_cpu.int8 import Engine, Linear, Tail
from graphopt.backends.torch_cpu.packing import Pack, Packing, from_integers, integers, pack_numbers
from graphopt.backends.torch_cpu.schemas import SETTINGS, WEIGHT, X, Y, like_conv, like_linear
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Match
from graphopt.lowering.saturation import max_abs

_quantized = torch.ops.quantized

DYNAMIC = _quantized.linear_dynamic.default, _quantized.linear_relu_dynamic.default
STATIC = (
    _quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default,
    _quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32.default,
)
U8 = _quantized.linear.default, _quantized.linear_relu.default
CONVS = _quantized.conv1d.default, _quantized.conv2d.new, _quantized.conv3d.new
"""Kernels without and with a following relu, by rank."""

_DEPTHWISE_SAFE = 63
"""Largest magnitude of weights of a depthwise conv: fbgemm adds two products with uint8 in 16 bits, VNNI or not."""

PREPACKS = _quantized.conv1d_prepack, _quantized.conv2d_prepack, _quantized.conv3d_prepack


# --- forms ---------------------------------------------------------------------------------------------------------


def _linear(op: Builder, linear: Linear, tail: Tail) -> Value:
    """fbgemm quantizes inside the kernel, so several linears may read one quantize and none of them needs it."""
    weights, relu = (linear.weight, linear.weight_scale, linear.bias), tail.post is not None
    if not (linear.is_static or linear.is_dynamic):
        raise Declined("input_range_from_elsewhere")
    if tail.y is not None:
        if not linear.is_static:
            raise Declined("int8_result_needs_static_range")
        numbers = linear.x, linear.scale, linear.zero_point
        return op("graphopt_fbgemm.linear_u8.default", *numbers, *weights, *tail.y, relu=relu)
    x = linear.float_input(op)
    if x.dtype != torch.float32:
        raise Declined("input_dtype", dtype=str(x.dtype), kernel="fbgemm")
    if linear.is_dynamic:
        return op("graphopt_fbgemm.linear_dynamic.default", x, *weights, relu=relu)
    return op("graphopt_fbgemm.linear_static.default", x, linear.scale, linear.zero_point, *weights, relu=relu)


def _conv(op: Builder, m: Match) -> Value:
    x, settings, groups = int8.convolution(op, m)
    weight = op.graph.constant(m.weight)
    assert weight is not None  # as checked
    if groups > 1 and weight.shape[1] == 1 and (largest := max_abs(weight)) > _DEPTHWISE_SAFE:
        raise Declined("depthwise_saturates", max_abs=largest, safe=_DEPTHWISE_SAFE)
    operands = (x, m.scale, m.zero_point, m.weight, m.weight_scale, m.y_scale, m.y_zero_point, m.bias)
    return op("graphopt_fbgemm.conv.default", *operands, **settings, groups=groups)


ENGINE = Engine("fbgemm", _linear, _conv, add_int8.add, lambda what: what in ("relu", "quantize"))


# --- operators -----------------------------------------------------------------------------------------------------


def pack(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """fbgemm's packed form of an int8 weight (out, in) with a scale per row, and a float32 bias (out,)."""
    with _fbgemm():
        return _quantized.linear_prepack(_per_channel(weight, scale), bias)


def pack_conv(
    weight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Any:  # fmt: skip
    """fbgemm's packed form of an int8 weight (out, in / groups, *kernel) with a scale per output channel."""
    prepack = PREPACKS[weight.dim() - 3]
    with _fbgemm():
        return prepack(_per_channel(weight, scale), bias, stride, padding, dilation, groups)


@contextmanager
def _fbgemm() -> Iterator[None]:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():  # torch deprecates quantized tensors, and has no other way into its prepacks
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = engine


def _per_channel(weight: Tensor, scale: Tensor) -> Tensor:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zeros, 0)


def _number(tensor: Tensor) -> Any:
    return tensor.item()


def _as_quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return from_integers(x, _number(scale), _number(zero_point))


def _linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, relu: bool = False
) -> Tensor:  # fmt: skip
    y: Tensor = DYNAMIC[relu](x, pack(weight, weight_scale, bias), False)
    return y


def _linear_static(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *,
    relu: bool = False,
) -> Tensor:  # fmt: skip
    y: Tensor = STATIC[relu](x, _number(scale), _number(zero_point), pack(weight, weight_scale, bias))
    return y


def _linear_u8(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    y_scale: Tensor, y_zero_point: Tensor, *, relu: bool = False,
) -> Tensor:  # fmt: skip
    packed, numbers = pack(weight, weight_scale, bias), (_number(y_scale), _number(y_zero_point))
    return integers(U8[relu](_as_quantized(x, scale, zero_point), packed, *numbers))


def _conv_u8(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, y_scale: Tensor,
    y_zero_point: Tensor, bias: Tensor | None, *, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    packed = pack_conv(weight, weight_scale, bias, stride, padding, dilation, groups)
    conv = CONVS[weight.dim() - 3]
    return integers(conv(_as_quantized(x, scale, zero_point), packed, _number(y_scale), _number(y_zero_point)))


for _name, _operands, _kernel, _like in (
    ("linear_dynamic", f"Tensor x, {WEIGHT}, Tensor? bias, *, bool relu=False", _linear_dynamic,
     lambda x, weight, *_, relu=False: like_linear(x, weight)),
    ("linear_static", f"{X}, {WEIGHT}, Tensor? bias, *, bool relu=False", _linear_static,
     lambda x, scale, zero_point, weight, *_, relu=False: like_linear(x, weight)),
    ("linear_u8", f"{X}, {WEIGHT}, Tensor? bias, {Y}, *, bool relu=False", _linear_u8,
     lambda x, scale, zero_point, weight, *_, relu=False: like_linear(x, weight, torch.uint8)),
    ("conv", f"{X}, {WEIGHT}, {Y}, Tensor? bias, *, {SETTINGS}", _conv_u8,
     lambda x, scale, zero_point, weight, *_, **settings: like_conv(x, weight, **settings)),
):  # fmt: skip
    torch.library.define(f"graphopt_fbgemm::{_name}", f"({_operands}) -> Tensor")
    torch.library.impl(f"graphopt_fbgemm::{_name}", "CPU", _kernel)
    torch.library.register_fake(f"graphopt_fbgemm::{_name}", _like)


# --- packing -------------------------------------------------------------------------------------------------------


def _packed(packing: Packing, node: fx.Node, given: Mapping[str, Any]) -> fx.Node:
    weight, scale = (packing.constant(given[name]) for name in ("weight", "weight_scale"))
    return packing.keep(node, pack(weight, scale, packing.tensor(given["bias"])))


def _pack_dynamic(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    return packing.call(node, DYNAMIC[given["relu"]], given["x"], _packed(packing, node, given), False)


def _pack_static(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    numbers = pack_numbers(packing, node, given)
    return packing.call(node, STATIC[given["relu"]], given["x"], *numbers, _packed(packing, node, given))


def _pack_u8(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    x = packing.quantized(node, given["x"], *pack_numbers(packing, node, given))
    numbers = pack_numbers(packing, node, given, "y_")
    made = packing.call(node, U8[given["relu"]], x, _packed(packing, node, given), *numbers)
    return packing.integers(node, made, *numbers)


def _pack_conv(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    x = packing.quantized(node, given["x"], *pack_numbers(packing, node, given))
    weight, scale = (packing.constant(given[name]) for name in ("weight", "weight_scale"))
    settings = [given[name] for name in ("stride", "padding", "dilation", "groups")]
    packed = packing.keep(node, pack_conv(weight, scale, packing.tensor(given["bias"]), *settings))
    numbers = pack_numbers(packing, node, given, "y_")
    made = packing.call(node, CONVS[weight.dim() - 3], x, packed, *numbers)
    return packing.integers(node, made, *numbers)


OPERATORS: dict[str, Pack] = {
    "graphopt_fbgemm.linear_dynamic.default": _pack_dynamic,
    "graphopt_fbgemm.linear_static.default": _pack_static,
    "graphopt_fbgemm.linear_u8.default": _pack_u8,
    "graphopt_fbgemm.conv.default": _pack_conv,
    **add_int8.OPERATORS,
}
INT8_KERNELS = tuple(map(str, (*DYNAMIC, *STATIC, *U8, *CONVS, add_int8.KERNEL)))


class Fbgemm(EagerTarget):
    """fbgemm, called from a graph that runs eagerly."""

    name: ClassVar[str] = "fbgemm"
    summary: ClassVar[str] = "PyTorch eager on x86 CPUs, int8 linears and convs by fbgemm"
    engines: ClassVar[Sequence[str]] = ("fbgemm",)
    operators: ClassVar[Mapping[str, Pack]] = OPERATORS
    int8_kernels: ClassVar[Sequence[str]] = INT8_KERNELS
    forms: ClassVar[Sequence[Engine]] = (ENGINE,)
