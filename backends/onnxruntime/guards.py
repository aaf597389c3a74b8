"""Keeps onnxruntime's own optimizer off what it breaks: another spelling stands where it would merge two nodes.

In front of most it is a Sum of one value: that computes nothing, and no optimization knows it. Each pattern comes out
wrong, or does not load, in onnxruntime 1.31 with its optimizations, and is right without:

- a pad with zeros is merged into the pool behind it, where a max pool pads with minus infinity, and no pool takes
  padding as wide as its kernel;
- a quantize of what was dequantized by another scale is merged with the first quantize;
- the weight and the bias of a conv on integers are rounded to integers, also where the bias does not fit, and those of
  a linear on integers whose result is quantized;
- a quantize is put behind what moves int8 activations, and from opset 21 on its type is then wrong;
- a product of floats with a dequantized weight becomes MatMulNBits, which rounds the floats to int8: a weight of 8 bits
  is cast and scaled, where it has no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.backends.onnxruntime import weight_only
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.graph import Node
from graphopt.ir.qdq.numbers import fits_integers, stored
from graphopt.ir.rewrite import rewrite, scalar

_POOLS = ("max_pool", "average_pool", "onnx.MaxPool", "onnx.AveragePool", "onnx.LpPool")
_MOVES = ("max_pool", "reshape", "transpose", "slice", "squeeze", "unsqueeze", "identity", "onnx.MaxPool",
          "onnx.Reshape", "onnx.Flatten", "onnx.Gather", "onnx.Slice", "onnx.Expand")  # fmt: skip
_NOT_NEGATIVE = ("relu", "sigmoid", "hard_sigmoid", "softmax", "exp")


def guarded(graph: OnnxGraph) -> OnnxGraph:
    """A clone in which no node would be merged wrongly with the one that it reads."""
    made = graph.clone()
    for part in (*made.bodies, made):
        rewrite(part, [weight_only.SCALED])
    for node in made.nodes:
        x = node.operands[0] if node.operands else None
        if x is not None and x.producer is not None and _is_merged_wrongly(made, node, x.producer):
            alone = made.emit("onnx.Sum", x, at=node)
            made.replace(node, *made.emit_all(node, alone, *node.operands[1:], at=node))
    made.sweep()
    return made


def _is_merged_wrongly(graph: OnnxGraph, node: Node, before: Node) -> bool:
    if before.kind in ("pad", "onnx.Pad"):
        return node.kind in _POOLS and not _may_pad(node, before)
    if before.kind != "dequantize" or before.required("x").is_constant:
        return False
    return (
        (node.kind == "quantize" and _is_quantized_again(node, before))
        or (node.kind == "conv" and _is_rounded_by_engine(node, before))
        or (node.kind == "linear" and _is_between_integers(node))
        or (node.kind in _MOVES and graph.opset >= 21 and before.required("x").dtype is torch.int8)
    )


def _may_pad(pool: Node, pad: Node) -> bool:
    """Whether a pool that pads by itself computes the same: zeros never win a max of what is never negative."""
    x = pad.input.producer if pad.kind == "pad" else None
    if pool.kind != "max_pool" or pool.attributes["ceil"] or x is None or x.kind not in _NOT_NEGATIVE:
        return False
    return _is_narrower(pad.attributes["padding"], pool)


def _is_narrower(padding: Sequence[int], pool: Node) -> bool:
    """Whether a pool may have so much more padding around its trailing axes: its kernel reaches over all of it."""
    kernel, own, axes = pool.attributes["kernel"], pool.attributes["padding"], len(padding) // 2
    own = own or (0,) * 2 * len(kernel)
    ours = own[: len(kernel)], own[len(kernel) :]
    theirs = padding[:axes], padding[axes:]
    return all(
        width >= 0 and width + more < size
        for sides, others in zip(theirs, ours, strict=True)
        for width, more, size in zip(reversed(sides), reversed(others), reversed(kernel), strict=False)
    )


def _is_quantized_again(node: Node, before: Node) -> bool:
    """Whether the two have other scales or zero points: they would become one quantize of what the first one reads."""
    ours, theirs = ([_number(one, name) for name in ("scale", "zero_point")] for one in (node, before))
    return None in ours or ours != theirs


def _is_rounded_by_engine(conv: Node, before: Node) -> bool:
    """Whether a conv on integers has a weight in floats, or a bias for which int32 has no room."""
    weight, bias = conv.required("weight"), stored(conv.graph, conv.bias)
    if weight.is_constant or bias is None or weight.producer is None or weight.producer.kind != "dequantize":
        return weight.is_constant
    scale, weight_scale = (conv.graph.constant(one.required("scale")) for one in (before, weight.producer))
    return scale is not None and weight_scale is not None and not fits_integers(bias, scale, weight_scale)


def _is_between_integers(linear: Node) -> bool:
    """Whether a linear on integers whose result is quantized has a weight in floats, and a bias."""
    has_floats = linear.required("weight").is_constant and linear.operand("bias") is not None
    return has_floats and any(user.kind == "quantize" for user in linear.result.users)


def _number(node: Node, name: str) -> float | None:
    value = node.operand(name)
    return 0.0 if value is None else scalar(node.graph, value)
