"""What a graph costs: FLOPs, parameters and bytes."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from graphopt.ir.graph import Graph, Node, Shape, Value
from graphopt.ir.ops.declaration import shapes_read

LARGE = 2 * 2**30
"""Bytes of weights above which a model is run for a check only when asked, and its file is not read into memory."""


@dataclass(frozen=True)
class Cost:
    """What one run computes, and what the file holds."""

    flops: int | None = None
    """2 for each multiply-add of linears, convs, products, attention and recurrent layers; None where a shape is not
    known in numbers."""
    parameters: int = 0
    """How many numbers are stored."""
    bytes: int = 0
    """What they occupy; integers of less than 8 bits count as packed."""

    @classmethod
    def of(cls, graph: Graph, sizes: Mapping[str, int] | None = None) -> Cost:
        """The cost of a graph; `sizes` gives numbers for named axes (without it, a dynamic graph has no FLOPs)."""
        # One tensor at a time: each may be mapped from its file.
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
    """Bits of the constants whose integers use less than a byte, by name, as their dequantize says."""
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
    """FLOPs of one node as its op declares them, 0 for what is not counted, None where a size is unknown.

    sizes: numbers for named axes; shapes: for values that are to be of other shapes than they have.
    """
    op = node.op
    count = op.flops if op is not None else 0
    if op is None or isinstance(count, int):
        return 0
    read: dict[str, list[int]] = {}
    for name in shapes_read(count):
        value = node.results[op.results.index(name)] if name in op.results else node.required(name)
        numbers = numbers_of(shapes.get(value, value.shape), sizes)
        if numbers is None:
            return None
        read[name] = numbers
    return count(**read)


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
    """The number of a named axis, or of an expression of several: batch*seq, past_sequence + seq."""
    if size in sizes:
        return sizes[size]
    names = sorted(sizes, key=len, reverse=True)
    known = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.])" for name in names) or "(?!)")
    try:
        return _evaluated(ast.parse(known.sub(lambda found: str(sizes[found[0]]), size), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):  # names need not be expressions
        return None


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def _evaluated(expression: ast.expr) -> int | None:
    """The number of sums, differences, products and whole quotients of numbers; None for anything else."""
    match expression:
        case ast.Constant(value=int() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            first, second = _evaluated(left), _evaluated(right)
            return None if first is None or second is None else _OPERATORS[type(op)](first, second)
    return None
