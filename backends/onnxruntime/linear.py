"""Float linears on onnxruntime: the bias inside the product (Gemm), or added after it (MatMul)."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.backends.onnxruntime.rows import from_rows, open_axes, to_rows
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder


def linear(op: Recorder, x: str, weight: str, bias: str | None = None) -> Pattern:
    return op.linear(x, weight, bias)


def stored_tensor(node: Node, value: Value | None) -> Tensor:
    """The tensor of an operand that is known to be constant."""
    tensor = None if value is None else node.graph.constant(value)
    assert tensor is not None  # as stored
    return tensor


def _has_bias_and_many_axes(m: Match) -> bool:
    """Whether a stored linear with a bias reads more than two axes: of two, the engine itself makes a Gemm."""
    stored = all(value is not None and value.is_constant and value.rank for value in (m.weight, m.bias))
    return stored and m.x.dtype is torch.float32 and (m.x.rank or 0) > 2


def _gemm(op: Builder, m: Match) -> Value:
    """The kernel starts its sums at the bias, where MatMul is followed by an Add that reads and writes all results."""
    readers = {user.kind for user in m.root.result.users}
    if open_axes(m.x) > 1 and any(kind == "onnx.Split" or "attention" in kind.lower() for kind in readers):
        raise Declined("width_lost")
    weight = stored_tensor(m.root, m.weight).t().contiguous()
    into, out = weight.shape
    product = op("onnx.Gemm", to_rows(op, m.x, into), op.constant(weight), m.bias)
    return from_rows(op, product, m.x, out)


BIAS = Choice("linear-bias", linear, {"MatMul": None, "Gemm": _gemm}, check=_has_bias_and_many_axes)
