"""fold-int8: dequantize, float op and quantize -> int8 ops."""

import pytest
import torch

from graphopt.passes import FoldInt8, Quantize
from tests.language import (
    BITS,
    assert_outputs_equal,
    assert_unchanged,
    build,
    declined,
    feeds,
    listing,
    producer,
    run,
)

X = "dequantize(x[1,4,6,6]:uint8, S[]:values(0.1), Z[]:uint8:values(128))"
W = "dequantize(W[4,4,1,1]:int8:values(1,-2,3), T[4]:values(0.1), axis=0)"
STEP = 1 / 255
"""What outputs may differ by, of their maximum: where the last bit of a float decides, rounding goes one step on."""


def test_static_linear(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8], B[4])")
    run(Quantize(), graph, calibration=[feeds(graph)])
    original = graph.clone()
    context = run(FoldInt8(), graph)
    assert listing(graph) == [
        "%0 = quantize(x[2,8], [], []:uint8)",
        "%1 = linear_int8(%0[2,8]:uint8, [], []:uint8, [4,8]:int8, [4], [4])",
        "return %1[2,4]",
    ]
    assert context.record.changed == 1
    assert_outputs_equal(graph, original, rtol=1e-5)
    assert_unchanged(FoldInt8(), graph)


def test_dynamic_linears_share_their_parameters(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[4,8])\nb = linear(x, V[4,8])\nreturn a, b")
    run(Quantize(scheme="dynamic", bits=BITS), graph)
    original = graph.clone()
    run(FoldInt8(), graph)
    assert [node.kind for node in graph.nodes] == ["choose_qparams", "quantize", "linear_int8", "linear_int8"]
    assert_outputs_equal(graph, original, rtol=1e-5)


def test_convs_and_the_add_between_them(dialect: str) -> None:
    graph = build(
        dialect,
        """
        c = conv(x[1,4,6,6], V[4,4,3,3], B[4], padding=[1,1,1,1])
        r = relu(c)
        d = conv(r, W[4,2,3,3], padding=[1,1,1,1], groups=2)
        s = add(d, r)
        y = relu(s)
        """,
    )
    run(Quantize(bias_correction=False), graph, calibration=[feeds(graph)])
    original = graph.clone()
    run(FoldInt8(), graph)
    assert listing(graph)[:-2] == [
        "%0 = quantize(x[1,4,6,6], [], []:uint8)",
        "%1 = conv_int8(%0[1,4,6,6]:uint8, [], []:uint8, [4,4,3,3]:int8, [4], [], []:uint8, [4], "
        "stride=[1,1], padding=[1,1,1,1], dilation=[1,1])",
        "%2 = conv_int8(%1[1,4,6,6]:uint8, [], []:uint8, [4,2,3,3]:int8, [4], [], []:uint8, "
        "stride=[1,1], padding=[1,1,1,1], dilation=[1,1], groups=2)",
        "%3 = add_int8(%2[1,4,6,6]:uint8, [], []:uint8, %1[1,4,6,6]:uint8, [], []:uint8, [], []:uint8)",
    ]
    assert producer(graph.outputs[0]).kind == "dequantize"
    assert_outputs_equal(graph, original, rtol=STEP)
    assert_unchanged(FoldInt8(), graph)


SHIFTED = "dequantize(W[4,4,1,1]:values(0,255):uint8, T[4]:values(0.1), P[4]:values(100):uint8, axis=0)"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"y = quantize(conv({X}, {SHIFTED}), S, Z)", "weight_zero_points"),
        (f"y = conv({X}, {W})", "read_in_float"),
        (f"y = gelu(conv({X}, {W}))", "read_in_float"),
        (f"c = conv({X}, {W})\nq = quantize(c, S, Z)\nreturn c, q", "read_in_float"),
        (f"y = quantize(relu(conv({X}, {W})), S, Z)", "bound_within_integers"),
        (f"y = quantize(conv({X}, {W}), S, P[]:int8:values(1))", "output_not_uint8"),
        (f"y = quantize(conv({X}, V[4,4,1,1]), S, Z)", "weight_not_int8"),
        (f"y = quantize(conv(f[1,4,6,6], {W}), U[]:ones, P[]:uint8:zeros)", "input_not_uint8"),
        (f"y = quantize(add({X}, f[1,4,6,6]), S, Z)", "side_not_uint8"),
        (f"y = add({X}, {X.replace('x[', 'z[')})", "read_in_float"),
    ],
)
def test_declines(dialect: str, text: str, code: str) -> None:
    graph = build(dialect, text)
    context = run(FoldInt8(), graph)
    assert declined(context) == [code] and context.record.changes == 0


def test_declines_a_dynamic_conv(dialect: str) -> None:
    graph = build(dialect, "c = conv(x[1,4,6,6], V[4,4,1,1])\ny = quantize(c, S[]:ones, Z[]:uint8:ones)")
    run(Quantize(scheme="dynamic"), graph)
    assert declined(run(FoldInt8(), graph)) == ["conv_scale_at_run_time"]


def test_declines_blocks_along_outputs() -> None:
    weight = "dequantize(W[32,8]:int8, T[2,8]:ones, axis=0, block=16)"
    graph = build("onnx", f"y = linear(dequantize(x[4,8]:uint8, S[]:ones, Z[]:uint8:ones), {weight})")
    context = run(FoldInt8(), graph)
    assert declined(context) == ["weight_not_int8"]
    assert context.record.changes == 0


def test_declines_a_computed_conv_bias(dialect: str) -> None:
    graph = build(dialect, f"y = quantize(conv({X}, {W}, b[4]), S, Z)")
    original = graph.clone()
    assert declined(run(FoldInt8(), graph)) == ["conv_bias_computed"]
    assert_outputs_equal(graph, original, rtol=0)


def test_a_conv_bias_in_integers_becomes_float(dialect: str) -> None:
    stored = "dequantize(I[4]:int32:values(90,-40,7), R[4]:values(0.01), axis=0)"
    graph = build(dialect, f"y = quantize(conv({X}, {W}, {stored}), S, Z)")
    original = graph.clone()
    context = run(FoldInt8(), graph)
    assert context.record.changed == 1 and [node.kind for node in graph.nodes] == ["conv_int8"]
    (site,) = graph.nodes
    bias = graph.constant(site.bias) if site.bias is not None else None
    assert bias is not None
    assert torch.equal(bias, torch.tensor([90, -40, 7, 90]) * torch.tensor(0.01))
    assert_outputs_equal(graph, original, rtol=STEP)


def test_float_sites_are_not_eligible(dialect: str) -> None:
    context = run(FoldInt8(), build(dialect, "h = linear(x[2,8], W[8,8])\ny = add(h, x)"))
    assert context.record.eligible == []
