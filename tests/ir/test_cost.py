"""FLOPs, parameters and bytes, against products that are counted by hand."""

from __future__ import annotations

import pytest

from graphopt.ir.cost import Cost, flops
from tests.language import build

COUNTS = {
    "y = linear(x[2,5,8], A[6,8], B[6])": 2 * (2 * 5 * 6) * 8,
    "y = conv(x[2,4,6,6], A[8,2,3,3], groups=2)": 2 * (2 * 8 * 4 * 4) * (2 * 3 * 3),
    "y = matmul(a[2,3,4], b[2,4,5])": 2 * (2 * 3 * 5) * 4,
    "y = attention(q[2,4,3,8], k[2,4,5,8], v[2,4,5,8])": 2 * (2 * 4 * 3 * 5) * 8 * 2,
    "y = attention(q[2,4,3,8], k[2,4,5,8], v[2,4,5,6])": 2 * (2 * 4 * 3 * 5) * (8 + 6),
    "y = attention(q[2,3,24], k[2,5,12], v[2,5,12], heads=6, kv_heads=3)": 2 * (2 * 6 * 3 * 5) * 4 * 2,
    "y = linear_int8(x[2,8]:uint8, S[]:ones, Z[]:zeros:uint8, A[6,8]:int8, T[6]:ones)": 2 * (2 * 6) * 8,
    "y = layer_norm(gelu(x[2,8]), G[8])": 0,
    "y = embedding(T[9,8], ids[2,5]:int64)": 0,
}


@pytest.mark.parametrize("text", COUNTS)
def test_counts_products(text: str) -> None:
    assert Cost.of(build("onnx", text)).flops == COUNTS[text]


def test_named_axes_need_numbers(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch,seq,8], A[6,8])")
    assert Cost.of(graph).flops is None
    assert Cost.of(graph, {"batch": 2, "seq": 5}).flops == 2 * (2 * 5 * 6) * 8


def test_counts_a_node_as_if_its_values_had_other_shapes(dialect: str) -> None:
    (node,) = build(dialect, "y = linear(x[2,8], A[6,8])").nodes
    shapes = {node.result: (2, 3), node.required("weight"): (3, 8)}
    assert (flops(node, {}), flops(node, {}, shapes)) == (2 * 2 * 6 * 8, 2 * 2 * 3 * 8)


def test_opaque_nodes_are_not_counted() -> None:
    (node,) = build("onnx", "y = onnx.LpNormalization(x[2,8])").nodes
    assert flops(node, {}) == 0


def test_stored_numbers_and_their_bytes(dialect: str) -> None:
    text = "y = linear(x[2,8], dequantize(A[6,8]:int8, S[6]:ones, axis=0, bits=4), B[6])"
    graph = build(dialect, text)
    graph.sweep()
    cost = Cost.of(graph)
    assert (cost.parameters, cost.bytes) == (6 * 8 + 6 + 6, 6 * 8 // 2 + 4 * (6 + 6))
