"""Floats of a graph in bfloat16, where a pass rounds anyway: products, results of int8 linears, and what follows them.

Products take less time, each value has half the bytes, and attention has kernels for it. Sums inside a kernel are in
float32.
"""

from __future__ import annotations

import torch

from graphopt.analysis.narrowing import Narrowed, read, unfit
from graphopt.ir.graph import Graph, Node, Value

FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Of CPUs with products in bfloat16: without one of them they are slower than in float32."""

OPS = (
    "linear", "matmul", "attention", "embedding", "add", "sub", "mul", "gelu", "silu", "relu", "hard_swish", "tanh",
    "layer_norm", "rms_norm", "rotary", "concat", "reshape", "transpose", "slice", "squeeze", "unsqueeze",
)  # fmt: skip
"""Ops whose kernels in aten take bfloat16 and sum in float32."""

PRODUCTS = ("linear", "matmul", "attention")
"""Ops that are worth a cast of what they read."""

_LINEAR = "graphopt_onednn.linear.default"


def narrow(graph: Graph) -> None:
    """Compute in bfloat16 in place, between casts to it and from it; inputs and outputs keep their dtypes.

    What reads or holds a number that bfloat16 does not hold stays in float32, and so do ops in front of the first
    product or int8 linear. A graph that writes to its values stays as it is: a cast would hold what one was before.
    """
    if graph.stateful:
        return
    _bound_masks(graph)
    narrowed, wide = Narrowed(graph, torch.bfloat16), unfit(graph, torch.bfloat16, {})
    for node in list(graph.nodes):
        if not node.results or node.result.dtype != torch.float32 or node in wide:
            continue
        if node.kind == _LINEAR:
            _narrow_linear(node, narrowed)
        elif _gains(node, narrowed) and narrowed.why_not(node, {}) is None:
            narrowed.recompute(node)
    graph.sweep()


def _gains(node: Node, narrowed: Narrowed) -> bool:
    """Whether it is a product, or reads what is in bfloat16 already."""
    return node.kind in PRODUCTS or (node.kind in OPS and bool(narrowed.casts.keys() & set(read(node))))


def _bound_masks(graph: Graph) -> None:
    """Keep masks of attention within the numbers of bfloat16: the least of float32 would be infinite there, and a row
    that is masked whole NaN."""
    most, bounded = torch.finfo(torch.bfloat16).max, dict[Value, Value]()
    for site in graph.sites("attention"):
        mask = site.operand("mask")
        if mask is None or mask.dtype != torch.float32:
            continue
        if mask not in bounded:
            bounded[mask] = graph.emit("clip", mask, low=-most, high=most, at=site)
        operands = [bounded[mask] if value == mask else value for value in site.operands]
        graph.replace(site, graph.emit(site, *operands, at=site))


def _narrow_linear(node: Node, narrowed: Narrowed) -> None:
    """Scales and bias stay in float32, as its kernel takes them; a residual, of the shape of the result, follows it."""
    operands = [
        narrowed.in_16_bits(value, node)
        if value is not None and not value.is_constant and value.shape == node.result.shape else value
        for value in node.operands
    ]  # fmt: skip
    narrowed.replace(node, node.graph.emit(node, *operands, at=node, dtype=torch.bfloat16))
