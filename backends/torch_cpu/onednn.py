"""PyTorch eager on CPUs with oneDNN's int8 kernels, which fuse an activation, a residual and a quantize into a linear.

A lowered graph holds operators `graphopt_onednn::*`, which take integers and scales as they are stored: they trace,
export and save, and pack the weight at each call. `compile` packs each weight once and calls oneDNN directly. Weights
are symmetric: oneDNN reads their zero points and ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.backends.torch_cpu import add_int8, bfloat16, int8, onednn_floats
from graphopt.backends.torch_cpu.base import EagerTarget
from graphopt.backends.torch_cpu.int8 import Engine, Linear, Tail
from graphopt.backends.torch_cpu.packing import Pack, Packing, pack_numbers
from graphopt.backends.torch_cpu.schemas import SETTINGS, WEIGHT, X, Y, like_conv, like_linear
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Rule, RuleLog
from graphopt.lowering.backend import Chooser
from graphopt.measure.machine import environment

_onednn = torch.ops.onednn
LINEAR, LINEAR_ADD = _onednn.qlinear_pointwise.default, _onednn.qlinear_pointwise.binary
CONV = _onednn.qconv_pointwise.default

POSTS = {"relu": "relu", "gelu": "gelu", "silu": "swish", "hard_swish": "hardswish", "tanh": "tanh"}
"""What oneDNN calls the ops that it computes on a result."""


# --- forms ---------------------------------------------------------------------------------------------------------


def _linear(op: Builder, linear: Linear, tail: Tail) -> Value:
    """Several linears may read one quantize, also where its range is chosen at run time."""
    if tail.residual is not None and tail.residual.dtype != torch.float32:
        raise Declined("residual_not_float32", dtype=str(tail.residual.dtype))
    post, algorithm = post_op(tail.post)
    operands = (linear.x, linear.scale, linear.zero_point, linear.weight, linear.weight_scale, linear.bias)
    return op("graphopt_onednn.linear.default", *operands, tail.residual, *(tail.y or (None, None)), post=post,
              algorithm=algorithm)  # fmt: skip


def post_op(node: Node | None) -> tuple[str, str]:
    """oneDNN's name of an activation, and its variant."""
    if node is None:
        return "none", "none"
    return POSTS[node.kind], node.attributes["approximate"] if node.kind == "gelu" else "none"


def _conv(op: Builder, m: Match) -> Value:
    x, settings, groups = int8.convolution(op, m)
    operands = (x, m.scale, m.zero_point, m.weight, m.weight_scale, m.y_scale, m.y_zero_point, m.bias)
    return op("graphopt_onednn.conv.default", *operands, **settings, groups=groups)


ENGINE = Engine("onednn", _linear, _conv, add_int8.add, lambda what: what in (*POSTS, "residual", "quantize"))


# --- operators -----------------------------------------------------------------------------------------------------


def _linear_unpacked(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, y_scale: Tensor | None, y_zero_point: Tensor | None, *, post: str, algorithm: str,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    packed = _onednn.qlinear_prepack(weight.contiguous(), None)
    first = x, scale.item(), int(zero_point.item()), packed, weight_scale.float(), None
    y = (None, None) if y_scale is None or y_zero_point is None else (y_scale.item(), int(y_zero_point.item()))
    made: Tensor
    if residual is None:
        made = LINEAR(*first, bias, *_result(dtype, *y), post, [], algorithm)
    else:
        made = LINEAR_ADD(*first, residual, bias, *_result(dtype, *y), *_ADDED, post, [], algorithm)
    return made


_ADDED = 1.0, 0, "add", 1.0
"""How a float residual is fused: its scale, its zero point, the operation, its factor."""


def _result(dtype: torch.dtype | None, y_scale: Any, y_zero_point: Any) -> tuple[Any, Any, torch.dtype]:
    """Scale, zero point and dtype of a result, as oneDNN is told them. dtype: of floats; None is float32."""
    return (1.0, 0, dtype or torch.float32) if y_scale is None else (y_scale, y_zero_point, torch.uint8)


def _conv_unpacked(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, y_scale: Tensor,
    y_zero_point: Tensor, bias: Tensor | None, *, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    numbers, settings = (scale.item(), int(zero_point.item())), (stride, padding, dilation, groups)
    packed = _onednn.qconv_prepack(weight.contiguous(), weight_scale, *numbers, *settings, None)
    y: Tensor = CONV(x, *numbers, packed, weight_scale, None, bias, *settings, y_scale.item(),
                     int(y_zero_point.item()), torch.uint8, "none", [], "")  # fmt: skip
    return y


def _like_linear(x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Any,
                 residual: Any, y_scale: Any, y_zero_point: Any, *, post: str, algorithm: str,
                 dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    return like_linear(x, weight, dtype or torch.float32 if y_scale is None else torch.uint8)


_LINEAR = f"{X}, {WEIGHT}, Tensor? bias, Tensor? residual, Tensor? y_scale, Tensor? y_zero_point"
for _name, _operands, _kernel, _like in (
    ("linear", f"{_LINEAR}, *, str post, str algorithm, ScalarType? dtype=None", _linear_unpacked, _like_linear),
    ("conv", f"{X}, {WEIGHT}, {Y}, Tensor? bias, *, {SETTINGS}", _conv_unpacked,
     lambda x, scale, zero_point, weight, *_, **settings: like_conv(x, weight, **settings)),
):  # fmt: skip
    torch.library.define(f"graphopt_onednn::{_name}", f"({_operands}) -> Tensor")
    torch.library.impl(f"graphopt_onednn::{_name}", "CPU", _kernel)
    torch.library.register_fake(f"graphopt_onednn::{_name}", _like)


# --- packing -------------------------------------------------------------------------------------------------------


def _bias(packing: Packing, node: fx.Node, given: Mapping[str, Any]) -> fx.Node | None:
    bias = packing.tensor(given["bias"])
    return None if bias is None else packing.keep(node, bias.contiguous())


def _pack_linear(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    weight, scale = (packing.constant(given[name]) for name in ("weight", "weight_scale"))
    packed = packing.keep(node, _onednn.qlinear_prepack(weight.contiguous(), None))
    scales = packing.keep(node, scale.float().contiguous())
    first = given["x"], *pack_numbers(packing, node, given), packed, scales, None
    bias, residual = _bias(packing, node, given), given["residual"]
    y = pack_numbers(packing, node, given, "y_") if given["y_scale"] is not None else (None, None)
    post: tuple[Any, ...] = given["post"], [], given["algorithm"]
    made = _result(given["dtype"], *y)
    if residual is None:
        return packing.call(node, LINEAR, *first, bias, *made, *post)
    return packing.call(node, LINEAR_ADD, *first, residual, bias, *made, *_ADDED, *post)


def _pack_conv(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    weight, scale = (packing.constant(given[name]) for name in ("weight", "weight_scale"))
    numbers = pack_numbers(packing, node, given)
    settings = [given[name] for name in ("stride", "padding", "dilation", "groups")]
    packed = _onednn.qconv_prepack(weight.contiguous(), scale.float(), *numbers, *settings, None)
    kept = packing.keep(node, packed), packing.keep(node, scale.float().contiguous())
    return packing.call(node, CONV, given["x"], *numbers, *kept, None, _bias(packing, node, given), *settings,
                        *pack_numbers(packing, node, given, "y_"), torch.uint8, "none", [], "")  # fmt: skip


OPERATORS: dict[str, Pack] = {
    "graphopt_onednn.linear.default": _pack_linear,
    "graphopt_onednn.conv.default": _pack_conv,
    **add_int8.OPERATORS,
    **onednn_floats.OPERATORS,
}
INT8_KERNELS = tuple(map(str, (LINEAR, LINEAR_ADD, CONV, add_int8.KERNEL)))


class OneDnn(EagerTarget):
    """oneDNN, called from a graph that runs eagerly."""

    name: ClassVar[str] = "onednn"
    summary: ClassVar[str] = "PyTorch eager on CPUs, int8 linears and convs by oneDNN"
    engines: ClassVar[Sequence[str]] = ("onednn",)
    operators: ClassVar[Mapping[str, Pack]] = OPERATORS
    int8_kernels: ClassVar[Sequence[str]] = INT8_KERNELS
    forms: ClassVar[Sequence[Engine]] = (ENGINE,)

    @property
    def precisions(self) -> tuple[str, ...]:
        is_here = self.cpu is None and not bfloat16.FLAGS.isdisjoint(environment()["flags"].split())
        return ("float32", "bfloat16") if is_here else ("float32",)

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        return *super().rules(graph), *onednn_floats.stages()

    def lower(
        self, graph: Graph, chooser: Chooser | None = None, *, lossless: bool = False
    ) -> tuple[Graph, dict[str, RuleLog]]:
        lowered, logs = super().lower(graph, chooser, lossless=lossless)
        return self.in_precision(lowered), logs

    def in_precision(self, graph: Graph) -> Graph:
        if self.precision == "bfloat16":
            graph = graph.clone()
            bfloat16.narrow(graph)
            graph.verify()
        return graph
