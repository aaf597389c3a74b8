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


STORED = {
    "rows": "dequantize({name}[{rows},32]:int8, {name}S[{rows}]:values(0.1), axis=0)",
    "rows with zero points": "dequantize({name}[{rows},32]:uint8, {name}S[{rows}]:values(0.1), {name}Z[{rows}]:uint8, "
    "axis=0)",
    "blocks": "dequantize({name}[{rows},32]:int8, {name}S[{rows},2]:values(0.1,0.2), axis=1, block=16)",
    "blocks of 4 bits": "dequantize({name}[{rows},32]:int8:values(-8,7,3), {name}S[{rows},2]:values(0.1,0.2), axis=1, "
    "block=16, bits=4)",
}


@pytest.mark.parametrize("kind", STORED)
def test_stored_weights_are_stacked_as_they_are_stored(kind: str, dialect: str) -> None:
    a, b = (STORED[kind].format(name=name, rows=rows) for name, rows in (("A", 4), ("B", 6)))
    graph = build(dialect, f"a = linear(x[2,32], {a})\nb = linear(x, {b}, C[6])\nreturn a, b")
    original, linears = graph.clone(), graph.sites("linear")
    assert merge_key(linears[0]) == merge_key(linears[1]) is not None
    for linear, part in zip(linears, merge(linears).values(), strict=True):
        graph.replace(linear, part)
    graph.sweep()
    (made,), (before, _) = graph.sites("dequantize"), original.sites("dequantize")
    assert made.attributes == before.attributes and made.result.shape == (10, 32)
    assert_outputs_equal(graph, original, rtol=1e-6)


def test_weights_in_other_blocks_are_not_stacked(dialect: str) -> None:
    wide = STORED["blocks"].replace("{rows},2]", "{rows},1]").replace("block=16", "block=32")
    a, b = STORED["blocks"].format(name="A", rows=4), wide.format(name="B", rows=4)
    graph = build(dialect, f"a = linear(x[2,32], {a})\nb = linear(x, {b})\nreturn a, b")
    first, second = map(merge_key, graph.sites("linear"))
    assert first != second
