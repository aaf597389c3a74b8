"""Integers in the form that kernels take, without a change of any number."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.qdq.integer_forms import normalize, unfold
from graphopt.passes import FoldInt8, Quantize
from tests.language import assert_outputs_equal, build, feeds, run, stored

SIGNED = "q = quantize(x[1,2,4,4], S[]:values(0.02), Z[]:values(-3):int8)\n"


def test_activations_move_up_with_all_that_reads_them(dialect: str) -> None:
    text = SIGNED + """
        m = max_pool(q, kernel=[2,2], stride=[2,2])
        y = dequantize(m, S, Z)
        w = dequantize(q, S, Z)
        return y, w"""
    graph = build(dialect, text)
    normalize(graph)
    graph.sweep()
    (quantize,) = graph.sites("quantize")
    assert quantize.result.dtype == torch.uint8 and int(stored(quantize, "zero_point")) == 125
    assert [int(stored(node, "zero_point")) for node in graph.sites("dequantize")] == [125, 125]
    assert_outputs_equal(graph, build(dialect, text), rtol=0, atol=0)


@pytest.mark.parametrize("end", ["y = cast(q, dtype=float32)", "y = identity(q)", "y = dequantize(add(q, q), S, Z)"])
def test_activations_that_something_else_reads_stay(dialect: str, end: str) -> None:
    graph = build(dialect, SIGNED + end)
    before = graph.text()
    normalize(graph)
    assert graph.text() == before


@pytest.mark.parametrize(
    ("factor", "scale"),
    [("mul(x[2,3,8], C[]:values(0.5))", 0.04), ("mul(C[]:values(0.25), x[2,3,8])", 0.08),
     ("div(x[2,3,8], C[1]:values(4))", 0.08), ("transpose(mul(x[2,3,8], C[]:values(0.5)), perm=[0,2,1])", 0.04)],
)  # fmt: skip
def test_one_factor_goes_into_the_scale_of_a_quantize(dialect: str, factor: str, scale: float) -> None:
    text = f"q = quantize({factor}, S[]:values(0.02), Z[]:values(120):uint8)\ny = dequantize(q, S, Z)"
    graph = build(dialect, text)
    normalize(graph)
    graph.sweep()
    graph.verify()
    (quantize,) = graph.sites("quantize")
    assert not graph.sites("mul", "div") and float(stored(quantize, "scale")) == pytest.approx(scale)
    assert float(stored(graph.sites("dequantize")[0], "scale")) == pytest.approx(0.02)
    assert_outputs_equal(graph, build(dialect, text), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "factor",
    ["mul(x[2,4], C[4]:values(0.5,1,2,4))", "mul(x[2,4], C[]:values(-0.5))", "mul(x[2,4], C[]:values(0))",
     "div(C[]:values(2), x[2,4])", "mul(x[2,4], w[])", "mul(x[4], C[1,1]:values(0.5))"],
)  # fmt: skip
def test_other_factors_stay(dialect: str, factor: str) -> None:
    graph = build(dialect, f"y = dequantize(quantize({factor}, S[]:values(0.02), Z[]:values(120):uint8), S, Z)")
    before = graph.text()
    normalize(graph)
    assert graph.text() == before


def test_a_factor_that_others_read_stays(dialect: str) -> None:
    graph = build(dialect, """
        m = mul(x[2,4], C[]:values(0.5))
        y = dequantize(quantize(m, S[]:values(0.02), Z[]:values(120):uint8), S, Z)
        return y, m""")  # fmt: skip
    before = graph.text()
    normalize(graph)
    assert graph.text() == before


@pytest.mark.parametrize(
    ("weight", "zero_point"),
    [("W[4,8]:int8:seed1, S[]:values(0.5)", 0),
     ("W[4,8]:values(3,130,255,128):uint8, S[]:values(0.5), Z[]:values(128):uint8", 128),
     ("W[4,8]:values(3,60,90):uint8, S[4]:values(0.5,0.25), Z[4]:values(40,50):uint8, axis=0", None)],
)  # fmt: skip
def test_weights_become_int8_with_a_scale_an_output(dialect: str, weight: str, zero_point: int | None) -> None:
    text = f"y = linear(x[2,8], dequantize({weight}))"
    graph = build(dialect, text)
    normalize(graph)
    graph.sweep()
    (node,) = graph.sites("dequantize")
    assert node.required("x").dtype == torch.int8 and node.operand("zero_point") is None
    assert node.attributes["axis"] == 0 and node.required("scale").shape == (4,)
    assert_outputs_equal(graph, build(dialect, text))


def test_weights_too_far_from_their_zero_point_stay(dialect: str) -> None:
    weight = "dequantize(W[4,8]:values(0,255):uint8, S[]:ones, Z[]:values(100):uint8)"
    graph = build(dialect, f"y = linear(x[2,8], {weight})")
    before = graph.text()
    normalize(graph)
    assert graph.text() == before


@pytest.mark.parametrize(
    "text",
    [
        "y = linear(x[2,8], W[4,8], B[4])",
        "a = linear(x[2,8], W[4,8])\nb = linear(x, V[4,8])\nreturn a, b",
        """
        c = conv(x[1,4,6,6], V[4,4,3,3], B[4], padding=[1,1,1,1])
        d = conv(c, W[4,2,3,3], padding=[1,1,1,1], groups=2)
        y = add(d, c)
        """,
    ],
)
def test_int8_ops_are_opened_again(dialect: str, text: str) -> None:
    graph = build(dialect, text)
    run(Quantize(bias_correction=False), graph, calibration=[feeds(graph)])
    run(FoldInt8(), graph)
    folded = graph.clone()
    unfold(graph)
    graph.verify()
    assert not graph.sites("linear_int8", "conv_int8", "add_int8")
    assert_outputs_equal(graph, folded, rtol=1 / 255)  # the last bit of a float decides on a step
    run(FoldInt8(), graph)
    assert graph.text() == folded.text()
