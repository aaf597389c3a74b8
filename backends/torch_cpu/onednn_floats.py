"""Float linears on oneDNN: weights reordered once, and an activation that follows computed inside the kernel.

aten's own linear calls another library in float32; which one is faster depends on the shape. The operator
`graphopt_onednn::linear_float` takes the weight as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.torch_cpu.packing import Pack, Packing
from graphopt.backends.torch_cpu.schemas import like_linear
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Replace, Rule

_mkldnn = torch.ops.mkldnn
KERNEL = _mkldnn._linear_pointwise.default

POSTS = {"relu": "relu", "gelu": "gelu", "silu": "swish", "tanh": "tanh"}
"""What oneDNN calls the ops that it computes on a result."""


def post_op(node: Node | None) -> tuple[str, str]:
    """oneDNN's name of an activation, and its variant."""
    if node is None:
        return "none", ""
    return POSTS[node.kind], node.attributes["approximate"] if node.kind == "gelu" else ""


# --- forms ---------------------------------------------------------------------------------------------------------


def _pattern(*kinds: str) -> Callable[..., Pattern]:
    def pattern(op: Recorder, x: str, weight: str, bias: str | None = None) -> Pattern:
        made = op.linear(x, weight, bias, bind="linear")
        for kind in kinds:
            made = getattr(op, kind)(made, bind="post")
        return made

    return pattern


def _is_stored(dtype: torch.dtype, m: Match) -> bool:
    operands = (m.x, m.weight, m.bias)
    return bool(m.weight.is_constant) and all(value is None or value.dtype is dtype for value in operands)


def _packed(op: Builder, m: Match) -> Value:
    if m.bias is not None and not m.bias.is_constant:
        raise Declined("linear_bias_computed")
    post, algorithm = post_op(m.bound.get("post"))
    return op("graphopt_onednn.linear_float.default", m.x, m.weight, m.bias, post=post, algorithm=algorithm)


def stages() -> Sequence[Sequence[Rule | Choice]]:
    """Choices for float32 linears, those followed by an activation first.

    Linears in bfloat16 are left to aten: this kernel rounds at other places.
    """
    return [_choice(post) for post in POSTS], [_choice()]


def _choice(*ops: str) -> Choice:
    forms: dict[str, Replace | None] = {"aten": None, "onednn": _packed}
    name = "-".join(["linear", "float32", *ops])
    return Choice(name, _pattern(*ops), forms, check=partial(_is_stored, torch.float32))


# --- the operator --------------------------------------------------------------------------------------------------


def _unpacked(x: Tensor, weight: Tensor, bias: Tensor | None, *, post: str, algorithm: str) -> Tensor:
    y: Tensor = KERNEL(x, _mkldnn._reorder_linear_weight(weight.contiguous(), None), bias, post, [], algorithm)
    return y


torch.library.define(
    "graphopt_onednn::linear_float", "(Tensor x, Tensor weight, Tensor? bias, *, str post, str algorithm) -> Tensor"
)
torch.library.impl("graphopt_onednn::linear_float", "CPU", _unpacked)
torch.library.register_fake(
    "graphopt_onednn::linear_float", lambda x, weight, bias, *, post, algorithm: like_linear(x, weight, x.dtype)
)


def _pack(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    weight, bias = packing.constant(given["weight"]), packing.tensor(given["bias"])
    packed = packing.keep(node, _mkldnn._reorder_linear_weight(weight.contiguous(), None))
    kept = None if bias is None else packing.keep(node, bias.contiguous())
    return packing.call(node, KERNEL, given["x"], packed, kept, given["post"], [], given["algorithm"])


OPERATORS: dict[str, Pack] = {"graphopt_onednn.linear_float.default": _pack}
