"""Calls of aten's overloads, replaced by the functions that torch's own Python API binds: same kernels, less overhead.

A call of torch.ops.aten.add.Tensor parses its arguments by the schema, in 4 to 5 microseconds; torch.add does so in
less than one. Overloads without an entry here stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_nn: Any = torch._C._nn

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"aten.{name}.default": getattr(torch, name)
        for name in (
            "abs", "addmm", "bitwise_and", "bitwise_not", "bmm", "clamp", "conv1d", "conv2d", "conv3d", "cos",
            "embedding", "erf", "exp", "layer_norm", "logical_and", "logical_not", "matmul", "max_pool2d", "mm", "neg",
            "permute", "pow", "reciprocal", "relu", "reshape", "rsqrt", "sigmoid", "sin", "sqrt", "tanh", "unsqueeze",
        )
    },
    "aten.linear.default": _nn.linear,
    "aten.gelu.default": _nn.gelu,
    "aten.silu.default": _nn.silu,
    "aten.hardswish.default": _nn.hardswish,
    "aten.scaled_dot_product_attention.default": _nn.scaled_dot_product_attention,
    "aten.adaptive_avg_pool2d.default": _nn.adaptive_avg_pool2d,
    "aten.avg_pool2d.default": _nn.avg_pool2d,
    **{f"aten.{name}.Tensor": getattr(torch, name) for name in ("add", "sub", "mul", "div", "bitwise_and")},
    **{f"aten.{name}.Tensor": getattr(torch, name) for name in ("eq", "ne", "le", "lt", "ge", "gt")},
    **{f"aten.{name}.Scalar": getattr(torch, name) for name in ("eq", "ne", "le", "lt", "ge", "gt")},
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.pow.Tensor_Tensor": torch.pow,
    "aten.softmax.int": torch.softmax,
    "aten.where.self": torch.where,
    "aten.cat.default": torch.cat,
    "aten.transpose.int": torch.transpose,
    "aten.mean.dim": torch.mean,
    "aten.squeeze.dims": torch.squeeze,
    "aten.flatten.using_ints": torch.flatten,
    "aten.select.int": torch.select,
}
"""By overload, the function that takes the same arguments."""

METHODS = {
    "aten.view.default": "view",
    "aten.expand.default": "expand",
    "aten.sym_size.int": "size",
    "aten.contiguous.default": "contiguous",
    "aten.unflatten.int": "unflatten",
}
"""By overload, the method of a tensor that takes the same positional arguments."""

_LAST = 2**63 - 1


def bind(program: fx.Graph) -> None:
    """Replace every call that has an entry here."""
    for node in program.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        function = FUNCTIONS.get(name)
        if function is not None:
            node.target = function
        elif name in METHODS and not node.kwargs:
            node.op, node.target = "call_method", METHODS[name]
        elif name == "aten._to_copy.default" and set(node.kwargs) == {"dtype"}:
            node.op, node.target, node.args, node.kwargs = "call_method", "to", (node.args[0], node.kwargs["dtype"]), {}
        elif name == "aten.slice.Tensor":
            _bind_slice(node)


def _bind_slice(node: fx.Node) -> None:
    """A slice with constant bounds, of an axis of fixed size, becomes torch.narrow."""
    x, axis, start, end, step = (*node.args, *(0, 0, _LAST, 1)[len(node.args) - 1 :])[:5]
    if node.kwargs or not all(isinstance(bound, int) for bound in (start, end)) or step != 1:
        return
    length = node.meta["val"].shape[axis]
    if isinstance(length, int) and isinstance(start, int) and start >= 0:
        node.target, node.args = torch.narrow, (x, axis, start, length)
