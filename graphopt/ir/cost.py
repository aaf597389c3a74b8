"""What a graph costs: FLOPs, parameters and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from graphopt.ir.graph import Graph, Node, Shape, Value

LARGE = 2 * 2**30
"""Bytes of weights above which a model is not run for a check unless asked, nor held in memory if it lies in a file."""


@dataclass(frozen=True)
class Cost:
    """flops: 2 x multiply-adds of linear, conv, matmul and attention, or None where shapes are not known as numbers;
    parameters: stored numbers; bytes: what they occupy, packed where they have less than 8 bits."""

    flops: int | None = None
    parameters: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, graph: Graph, sizes: Mapping[str, int] | None = None) -> Cost:
        """The cost of a graph; `sizes` gives numbers for named axes (without it, a dynamic graph has no FLOPs)."""
        # One at a time: each may be a mapping of its own.
        bits = _bits(graph)
        stored = [
            (tensor.numel(), -(-tensor.numel() * bits.get(name, 8 * tensor.element_size()) // 8))
            for name, tensor in graph.constants()
        ]
        counted = [flops(node, sizes or {}) for node in graph.nodes]
        return cls(
            flops=None if None in counted else sum(n for n in counted if n is not None),
            parameters=sum(count for count, _ in stored),
            bytes=sum(size for _, size in stored),
        )


def _bits(graph: Graph) -> dict[str, int]:
    """By name, the constants that hold integers of less than a byte, as a dequantize says."""
    return {
        value.name: node.attributes["bits"]
        for node in graph.sites("dequantize") if node.attributes["bits"] < 8
        for value in (node.operand("x"), node.operand("zero_point")) if value is not None
    }  # fmt: skip


def sizes(graph: Graph, feeds: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers for the named axes of a graph, from what one example feeds it."""
    return {
        size: number
        for value in graph.inputs if value.name in feeds
        for size, number in zip(value.shape or (), feeds[value.name].shape, strict=False)
        if isinstance(size, str)
    }


def flops(node: Node, sizes: Mapping[str, int], shapes: Mapping[Value, Shape] = MappingProxyType({})) -> int | None:
    """FLOPs of one node, 0 for what is not counted, None where a size is unknown.

    sizes: numbers for named axes; shapes: for values that are to be of other shapes than they have.
    """
    if node.kind not in ("linear", "linear_int8", "conv", "conv_int8", "matmul", "attention"):
        return 0

    def numbers(value: Value) -> list[int] | None:
        return numbers_of(shapes.get(value, value.shape), sizes)

    out = numbers(node.result)
    if out is None:
        return None
    if node.kind.startswith(("linear", "conv")):
        weight = numbers(node.required("weight"))
        return None if weight is None else 2 * math.prod(out) * math.prod(weight[1:])
    if node.kind == "matmul":
        a = numbers(node.required("a"))
        return None if a is None else 2 * math.prod(out) * a[-1]
    query, key = numbers(node.required("query")), numbers(node.required("key"))
    if query is None or key is None:
        return None
    # Two products, each batch x length x keys x width (heads included in the width).
    width = query[-1] if len(query) == 3 else query[1] * query[-1]
    return 4 * query[0] * query[-2] * key[-2] * width


def nbytes(value: Value, sizes: Mapping[str, int]) -> int:
    """What a value occupies; 0 where its shape or dtype is not known."""
    shape = numbers_of(value.shape, sizes)
    return 0 if shape is None or value.dtype is None else math.prod(shape) * value.dtype.itemsize


def numbers_of(shape: Shape | None, sizes: Mapping[str, int]) -> list[int] | None:
    """A shape in numbers; None where one is not known."""
    if shape is None:
        return None
    numbers = [size if isinstance(size, int) else _number(size, sizes) for size in shape]
    return None if None in numbers else [n for n in numbers if n is not None]


def _number(size: str, sizes: Mapping[str, int]) -> int | None:
    """The number of a named axis, or of several that were flattened into one: batch*seq."""
    if size in sizes:
        return sizes[size]
    factors = [int(factor) if factor.isdigit() else sizes.get(factor) for factor in size.split("*")]
    return None if None in factors else math.prod(factor for factor in factors if factor is not None)
