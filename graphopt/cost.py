"""What a graph costs: FLOPs, parameters and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graphopt.graph import Graph, Node


@dataclass(frozen=True)
class Cost:
    """flops: 2 x multiply-adds of linear, conv, matmul and attention, or None where shapes are not known as numbers;
    parameters: stored numbers; bytes: what they occupy."""

    flops: int | None = None
    parameters: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, graph: Graph, sizes: Mapping[str, int] | None = None) -> Cost:
        """The cost of a graph; `sizes` gives numbers for named axes (without it, a dynamic graph has no FLOPs)."""
        tensors = [tensor for _, tensor in graph.constants()]
        flops = [_flops(node, sizes or {}) for node in graph.nodes]
        return cls(
            flops=None if None in flops else sum(n for n in flops if n is not None),
            parameters=sum(tensor.numel() for tensor in tensors),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        )


def sizes(graph: Graph, feeds: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers for the named axes of a graph, from what one example feeds it."""
    return {
        size: number
        for value in graph.inputs
        for size, number in zip(value.shape or (), feeds[value.name].shape, strict=False)
        if isinstance(size, str)
    }


def _flops(node: Node, sizes: Mapping[str, int]) -> int | None:
    """FLOPs of one node, 0 for what is not counted, None where a size is unknown."""
    if node.kind not in ("linear", "linear_int8", "conv", "conv_int8", "matmul", "attention"):
        return 0
    out = _numbers(node.result.shape, sizes)
    if out is None:
        return None
    if node.kind.startswith(("linear", "conv")):
        weight = _numbers(node.required("weight").shape, sizes)
        return None if weight is None else 2 * math.prod(out) * math.prod(weight[1:])
    if node.kind == "matmul":
        a = _numbers(node.required("a").shape, sizes)
        return None if a is None else 2 * math.prod(out) * a[-1]
    query, key = _numbers(node.required("query").shape, sizes), _numbers(node.required("key").shape, sizes)
    if query is None or key is None:
        return None
    # Two products, each batch x length x keys x width (heads included in the width).
    width = query[-1] if len(query) == 3 else query[1] * query[-1]
    return 4 * query[0] * query[-2] * key[-2] * width


def _numbers(shape: tuple[int | str, ...] | None, sizes: Mapping[str, int]) -> list[int] | None:
    if shape is None:
        return None
    numbers = [size if isinstance(size, int) else sizes.get(size) for size in shape]
    return None if None in numbers else [n for n in numbers if n is not None]
