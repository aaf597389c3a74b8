"""Quantized regions: the ops that compute in integers what they read in integers, and the values that are integers."""

from __future__ import annotations

from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops.recurrent import RECURRENT

JOINED = ("add", "mul", "concat", "average_pool", "mean", "sigmoid", "leaky_relu", "softmax")
"""Ops that compute in integers what they get in integers, with a scale of their own for the result.

A softmax is one of them only where it is asked for by name: its kernel in integers may be several times slower than the
one in floats.
"""

MOVES = ("max_pool", "pad", "reshape", "transpose", "slice", "squeeze", "unsqueeze")
"""Ops whose result holds the numbers of the input, and zeros at most besides: it keeps the scale of the input."""

STORED = (*RECURRENT, "conv_transpose")
"""Ops whose weights may be stored in 8 bits without a kernel that multiplies them."""


def is_global(mean: Node) -> bool:
    """Whether a mean is over all axes after batch and channels, kept with size 1."""
    rank = mean.input.rank
    if rank is None or rank < 3 or not mean.attributes["keepdim"]:
        return False
    return sorted(axis % rank for axis in mean.attributes["axes"]) == list(range(2, rank))


def label_of(value: Value) -> str:
    """How reports call a value: by the label of the node that computes it, or by its own name."""
    return value.producer.label if value.producer is not None else value.name


def is_dequantized(value: Value) -> bool:
    """Whether a dequantize computes a value."""
    return value.producer is not None and value.producer.kind == "dequantize"


def end_of(node: Node) -> Node:
    """The relu, or clip of a range that holds 0, that alone reads a conv or an add; else the node itself.

    The saturation of integers does the same, as their range lies within what calibration saw after the relu or clip.
    """
    user = node.result.only_user
    if node.kind not in ("conv", "add") or user is None:
        return node
    if user.kind == "clip":
        low, high = user.attributes["low"], user.attributes["high"]
        return user if (low is None or low <= 0) and (high is None or high >= 0) else node
    return user if user.kind == "relu" else node


def has_row_scale(node: Node) -> bool:
    """Whether a quantize or dequantize has a scale for each row of what it reads, (..., 1), and at most one zero
    point."""
    scale, zero_point = node.required("scale"), node.operand("zero_point")
    if node.attributes["axis"] is not None or scale.rank is None or scale.rank < 1 or scale.shape is None:
        return False
    one_zero = zero_point is None or zero_point.rank == 0
    return scale.rank == node.required("x").rank and scale.shape[-1] == 1 and one_zero


def reads_integers(site: Node) -> bool:
    """Whether all that a linear, conv or matmul multiplies is dequantized, activations from integers of 8 bits."""
    makers = [value.producer for value in site.operands[:2] if value is not None]
    return all(
        maker is not None
        and maker.kind == "dequantize"
        and (maker.attributes["bits"] == 8 or maker.required("x").is_constant)
        for maker in makers
    )


def require_no_int8_ops(folded: Graph, target: str) -> None:
    """Raise LoweringError where a graph holds int8 ops, which a target that reads Q/DQ has no use for."""
    for site in folded.sites("linear_int8", "conv_int8", "add_int8"):
        raise LoweringError(f"{site.label} is {site.kind}, and {target} reads Q/DQ around floats: leave out fold-int8")
