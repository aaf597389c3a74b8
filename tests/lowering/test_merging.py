"""Linears that read one input: which can be merged, and what of the product each of them gets."""

from __future__ import annotations

import pytest

from graphopt.lowering.merging import has_stored_bias, merge, merge_key
from tests.language import assert_outputs_equal, build

INT8 = "linear_int8(i, S, Z, {weight}:int8, {scale})"
QUANTIZED = "i = quantize(x[2,8], S[]:values(0.03), Z[]:uint8:values(128))"


def test_linears_with_one_key_read_one_input_and_store_their_weights_alike(dialect: str) -> None:
    graph = build(dialect, """
        a = linear(x[2,8], A[4,8])
        b = linear(x, B[2,8], C[2])
        c = linear(z[2,8], A)
        d = linear(x, dequantize(D[4,8]:int8, E[4]:values(0.1), axis=0))
        e = linear(x, dequantize(F[2,8]:int8, G[2]:values(0.1), axis=0))
        f = linear(x, w[4,8])
        return a, b, c, d, e, f""")  # fmt: skip
    a, b, c, d, e, f = map(merge_key, graph.sites("linear"))
    assert a == b and d == e and len({a, c, d, f}) == 4 and f is None


def test_a_weight_with_one_scale_for_all_outputs_has_no_rows_to_stack(dialect: str) -> None:
    one, several = INT8.format(weight="W[4,8]", scale="R[]:values(0.1)"), INT8.format(weight="V[4,8]", scale="P[4]")
    graph = build(dialect, f"{QUANTIZED}\na = {one}\nb = {several}\nreturn a, b")
    first, second = graph.sites("linear_int8")
    assert merge_key(first) is None and merge_key(second) is not None


@pytest.mark.parametrize(("bias", "stored"), [("", True), (", B[4]", True), (", b[4]", False)])
def test_a_bias_that_the_graph_computes_is_not_stored(dialect: str, bias: str, stored: bool) -> None:
    (linear,) = build(dialect, f"y = linear(x[2,8], W[4,8]{bias})").sites("linear")
    assert has_stored_bias(linear) is stored


def test_each_linear_gets_its_own_part(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], A[4,8])\nb = linear(x, B[2,8], C[2])\nreturn a, b")
    original = graph.clone()
    linears = graph.sites("linear")
    parts = merge(linears)
    assert list(parts) == [linear.result for linear in linears]
    for linear, part in zip(linears, parts.values(), strict=True):
        graph.replace(linear, part)
    assert len(graph.sites("linear")) == 1 and len(graph.sites("slice")) == 2
    assert_outputs_equal(graph, original, rtol=1e-6)
