"""quantize: ops that join or move integers stay in integers, and the target's kernels compute them."""

import pytest
import torch

from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.passes import FoldInt8, Quantize
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from tests.language import (
    FakeTarget,
    assert_outputs_equal,
    build,
    declined,
    declines,
    feeds,
    listing,
    outputs,
    producer,
    run,
    stored,
)

POOLS = """
    c = conv(x[1,4,8,8], V[4,4,3,3], B[4], padding=[1,1,1,1])
    m = max_pool(relu(c), kernel=[2,2], stride=[2,2])
    d = conv(m, W[8,4,1,1])
    a = average_pool(clip(d, low=0.0, high=6.0), kernel=[2,2], stride=[1,1])
    e = conv(a, U[8,8,1,1])
    f = reshape(mean(e, axes=[2,3]), S[2]:int64:values(1,8))
    y = linear(f, T[5,8])
    """
JOINS = """
    l = leaky_relu(conv(x[1,4,8,8], V[4,4,1,1], B[4]), slope=0.2)
    d = conv(l, W[4,4,1,1])
    m = mul(d, sigmoid(d))
    p = pad(concat(m, l, axis=1), padding=[0,0,1,1,0,0,1,1])
    y = conv(p, U[4,8,3,3])
    """
STEP = 1 / 255
"""What outputs may differ by, of their maximum: where the last bit of a float decides, rounding goes one step on."""

KERNELS = {
    POOLS: {"QLinearConv": 3, "MaxPool": 1, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1, "Reshape": 1,
            "MatMulIntegerToFloat": 1, "QuantizeLinear": 1},
    JOINS: {"QLinearConv": 3, "QLinearLeakyRelu": 1, "QLinearSigmoid": 1, "QLinearMul": 1, "QLinearConcat": 1,
            "QuantizeLinear": 1, "DequantizeLinear": 1},
}  # fmt: skip


@pytest.mark.parametrize("text", KERNELS, ids=["pools", "joins"])
def test_regions_are_closed(dialect: str, text: str) -> None:
    graph = build(dialect, text)
    original = graph.clone()
    context = run(Quantize(observer="minmax"), graph, calibration=[feeds(graph, seed) for seed in range(4)])
    assert declined(context) == [] and context.record.changed == len(context.record.eligible)
    assert_outputs_equal(graph, original, rtol=0.05)
    folded = graph.clone()
    run(FoldInt8(), graph)
    assert_outputs_equal(graph, folded, rtol=STEP)
    floats = [node for node in graph.nodes if node.kind in ("max_pool", "pad", "reshape")]
    assert floats and {node.result.dtype for node in floats} == {torch.uint8}


@pytest.mark.parametrize(("text", "kernels"), KERNELS.items(), ids=["pools", "joins"])
def test_every_member_is_an_int8_kernel(text: str, kernels: dict[str, int]) -> None:
    graph = build("onnx", text)
    run(Quantize(), graph, target=None, calibration=[feeds(graph, seed) for seed in range(4)])
    folded = graph.clone()
    run(FoldInt8(), graph)
    target = OnnxRuntime()
    runner = target.compile(target.lower(graph)[0], threads=1)
    target.check(graph, runner)
    assert runner.kernels() == kernels
    for found, expected in zip(runner(feeds(graph)), outputs(folded), strict=True):
        assert (found - expected).abs().max() <= STEP * expected.abs().max()


def test_a_bias_beside_weights_of_nearly_zero_keeps_its_value() -> None:
    graph = build("onnx", "y = conv(x[1,2,4,4], V[2,2,1,1]:values(1e-9,2e-9,0.5,0.25), B[2]:values(3.0,1.0))")
    (expected,) = outputs(graph)
    run(Quantize(observer="minmax"), graph, calibration=[feeds(graph, seed) for seed in range(4)])
    (folded,) = outputs(graph)
    run(FoldInt8(), graph)
    target = OnnxRuntime()
    (found,) = target.compile(target.lower(graph)[0], threads=1)(feeds(graph))
    for one in (folded, found):
        assert (one - expected).abs().max() <= 4 * STEP * expected.abs().max()


def test_the_range_of_what_moves_is_that_of_what_it_moves(dialect: str) -> None:
    graph = build(dialect, "m = max_pool(conv(x[1,4,4,4], V[4,4,1,1]), kernel=[2,2])\ny = conv(m, W[4,4,1,1])")
    run(Quantize(), graph, calibration=[feeds(graph)])
    pool = graph.sites("max_pool")[0]
    before, (after,) = producer(pool.input), pool.result.users
    assert after.kind == "quantize" and after.operand("scale") == before.operand("scale")


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("c = conv(x[1,4,4,4], V[4,4,1,1])\ny = sigmoid(c)", ["read_in_float"]),
        ("c = conv(x[1,4,4,4], V[4,4,1,1])\nm = mean(c, axes=[1])\ny = conv(m, W[4,1,1,1])",
         ["mean_not_global"]),
        ("c = conv(x[1,4,4,4], V[4,4,1,1])\nk = concat(c, z[1,4,4,4], axis=1)\ny = conv(k, W[4,8,1,1])",
         ["side_in_float"]),
        # The sigmoid joins for the sake of the mul alone, and that has a float side.
        ("c = conv(x[1,4,4,4], V[4,4,1,1])\nm = mul(sigmoid(c), z[1,4,4,4])\ny = conv(m, W[4,4,1,1])",
         ["read_in_float", "side_in_float"]),
    ],
)  # fmt: skip
def test_what_does_not_join_says_why(dialect: str, text: str, codes: list[str]) -> None:
    graph = build(dialect, text)
    assert sorted(declined(run(Quantize(), graph, calibration=[feeds(graph)]))) == codes


def test_padding_with_another_number_stays_float(dialect: str) -> None:
    graph = build(
        dialect,
        """
        c = conv(x[1,4,4,4], V[4,4,1,1])
        p = pad(c, padding=[0,0,1,1,0,0,1,1], value=1.0)
        y = conv(p, W[4,4,3,3])
        """,
    )
    run(Quantize(), graph, calibration=[feeds(graph)])
    run(FoldInt8(), graph)
    assert graph.sites("pad")[0].result.dtype == torch.float32


def test_ignored_members_and_those_without_a_kernel_stay_float(dialect: str) -> None:
    graph = build(dialect, POOLS)
    target = FakeTarget(schemes=dict.fromkeys(("conv", "linear", "mean"), ("static",)))
    run_ = run(Quantize(ignore=Selector("mean")), graph, target=target, calibration=[feeds(graph)])
    assert sorted(declined(run_)) == ["ignored", "no_static_kernel"]
    assert producer(graph.sites("mean")[0].input).kind == "dequantize"


def test_a_clip_that_cuts_off_more_than_the_integers_is_not_folded(dialect: str) -> None:
    graph = build(
        dialect,
        """
        c = conv(dequantize(x[1,4,2,2]:uint8, S[]:values(0.1), Z[]:uint8:values(128)),
                 dequantize(W[4,4,1,1]:int8:values(1,-2,3), T[4]:values(0.1), axis=0))
        y = quantize(clip(c, low=-1.0, high=1.0), S, Z)
        """.replace(",\n                 ", ", "),
    )
    assert declines(run(FoldInt8(), graph)) == [Decline("bound_within_integers", op="clip")]


def test_calibrated_sites_on_a_moved_value_share_its_integers(dialect: str) -> None:
    graph = build(dialect, POOLS)
    run(Quantize(), graph, calibration=[feeds(graph)])
    run(FoldInt8(), graph)
    assert [line.split(" = ")[1].split("(")[0] for line in listing(graph)[:-1]].count("quantize") == 3


# --- products of activations -----------------------------------------------------------------------------------------

ATTENTION = """
    s = matmul(q[2,4,8,16], k[2,4,16,8])
    c = matmul(softmax(s), v[2,4,8,16])
    y = linear(reshape(transpose(c, perm=[0,2,1,3]), S[3]:int64:values(2,8,64)), W[32,64])
    """
MASKED = """
    s = matmul(q[2,4,8,16], k[2,4,16,8])
    y = matmul(softmax(add(s, m[2,1,1,8])), v[2,4,8,16])
    """
CHAIN = "y = matmul(a[2,3,4], matmul(b[2,4,5], c[2,5,4]))"
ACROSS = "p = softmax(transpose(matmul(a[2,3,4], b[2,4,3]), perm=[0,2,1]), axis=1)\ny = matmul(p, a)"

PRODUCTS = {
    ATTENTION: {"QLinearMatMul": 2, "QLinearSoftmax": 1, "MatMulIntegerToFloat": 1, "Transpose": 1, "Reshape": 1,
                "QuantizeLinear": 3},
    MASKED: {"MatMulIntegerToFloat": 2, "Add": 1, "Softmax": 1, "QuantizeLinear": 4},
    CHAIN: {"QLinearMatMul": 1, "MatMulIntegerToFloat": 1, "QuantizeLinear": 3},
    ACROSS: {"QLinearMatMul": 1, "QLinearSoftmax": 1, "MatMulIntegerToFloat": 1, "Transpose": 1, "QuantizeLinear": 3},
}  # fmt: skip


def quantized(dialect: str, text: str, *ops: str) -> Graph:
    graph = build(dialect, text)
    targets = Selector(*sorted({node.kind for node in graph.nodes} & set(ops or ("linear", "matmul", "softmax"))))
    calibration = [feeds(graph, seed) for seed in range(4)]
    run(Quantize(targets=targets, bias_correction=False), graph, calibration=calibration)
    return graph


def test_products_and_the_softmax_between_them_are_closed(dialect: str) -> None:
    graph = quantized(dialect, ATTENTION)
    assert_outputs_equal(graph, build(dialect, ATTENTION), rtol=0.1)
    (softmax,) = graph.sites("softmax")
    (rounded,) = softmax.result.users
    assert producer(softmax.input).kind == "dequantize" and rounded.kind == "quantize"
    assert (float(stored(rounded, "scale")), int(stored(rounded, "zero_point"))) == (1 / 256, 0)
    folded = graph.clone()
    run(FoldInt8(), graph)
    assert_outputs_equal(graph, folded, rtol=STEP)
    moved = graph.sites("transpose", "reshape")
    assert {node.result.dtype for node in moved} == {torch.uint8} and len(graph.sites("linear_int8")) == 1


@pytest.mark.parametrize(("text", "kernels"), PRODUCTS.items(), ids=["attention", "masked", "chain", "across"])
def test_every_product_is_an_int8_kernel(text: str, kernels: dict[str, int]) -> None:
    folded = quantized("onnx", text)
    assert isinstance(folded, OnnxGraph)
    graph = folded.clone()
    run(FoldInt8(), graph)
    target = OnnxRuntime()
    runner = target.compile(target.lower(graph)[0], threads=1)
    target.check(graph, runner)
    for seed in range(3):
        inputs = feeds(folded, seed + 9)
        (expected,) = onnx_run.run(onnx_run.session(folded.model, level="disable"), inputs)
        assert (runner(inputs)[0] - expected).abs().max() <= STEP * expected.abs().max()
    signed = OnnxRuntime(cpu="avx512_vnni")
    assert signed.compile(signed.lower(graph)[0], threads=1).kernels() == kernels
    unsigned = OnnxRuntime(cpu="avx2")
    once = {ACROSS: {"QuantizeLinear": 2}}.get(text, {})  # `a` is read on both sides, and on the right not 128 lower
    assert unsigned.compile(unsigned.lower(graph)[0], threads=1).kernels() == kernels | once


@pytest.mark.parametrize(("cpu", "right"), [("avx512_vnni", torch.int8), ("avx2", torch.uint8)])
def test_the_right_side_of_a_product_is_int8_where_a_quantize_makes_it(cpu: str, right: torch.dtype) -> None:
    """And where its products with uint8 do not saturate."""
    lowered, _ = OnnxRuntime(cpu=cpu).lower(quantized("onnx", CHAIN))
    inner, outer = lowered.sites("onnx.QLinearMatMul", "com.microsoft.MatMulIntegerToFloat")
    sides = [inner.operands[index] for index in (0, 3)], [outer.operands[index] for index in (0, 1)]
    types = [[value.dtype for value in pair if value is not None] for pair in sides]
    assert types == [[torch.uint8, right], [torch.uint8, torch.uint8]]


def test_a_product_that_is_read_in_float_stays_float(dialect: str) -> None:
    graph = quantized(dialect, MASKED)
    scores, _ = graph.sites("matmul")
    assert [user.kind for user in scores.result.users] == ["add"]


def test_a_softmax_stays_float_unless_it_is_asked_for(dialect: str) -> None:
    graph = quantized(dialect, ATTENTION, "linear", "matmul")
    scores, _ = graph.sites("matmul")
    assert [user.kind for user in scores.result.users] == ["softmax"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("p = matmul(a[2,3,4], b[2,4,3])\ns = softmax(x[2,8])\nreturn p, s", "input_in_float"),
        ("y = softmax(matmul(a[2,3,4], b[2,4,3]))", "read_in_float"),
        ("y = matmul(softmax(gelu(matmul(a[2,3,4], b[2,4,3]))), a)", "input_in_float"),
    ],
)
def test_a_softmax_that_no_product_gives_integers_says_why(dialect: str, text: str, code: str) -> None:
    graph = build(dialect, text)
    context = run(Quantize(targets=Selector("matmul", "softmax")), graph, calibration=[feeds(graph)])
    assert declined(context) == [code]
    assert len(context.record.eligible) == len(graph.sites("matmul", "softmax"))


def test_a_softmax_between_convs_is_no_site(dialect: str) -> None:
    graph = build(dialect, "y = conv(softmax(conv(x[1,4,4,4], V[4,4,1,1]), axis=1), W[4,4,1,1])")
    context = run(Quantize(), graph, calibration=[feeds(graph)])
    assert len(context.record.eligible) == 2 and producer(graph.sites("softmax")[0].input).kind == "dequantize"
    assert [user.kind for user in graph.sites("softmax")[0].result.users] == ["quantize"]


SLOWER = Decline("slower", before=1.0, after=2.0)


def test_what_made_the_model_slower_stays_float(dialect: str) -> None:
    text = "c = conv(x[1,4,4,4], V[4,4,1,1])\nd = conv(c, W[4,4,1,1])\ny = add(c, d)"
    graph = build(dialect, text)
    (add,) = graph.sites("add")
    context = Context(calibration=Calibration([feeds(graph)], graph.inputs), reverted={add.label: SLOWER})
    run_pass(Quantize(), graph, context)
    assert declines(context) == [SLOWER] and list(context.record.declined) == [add.label]
    assert context.record.changed == 2
    assert graph.sites("add")[0].result.is_output


def test_attention_as_a_whole_has_no_form_in_integers(dialect: str) -> None:
    graph = build(dialect, "y = attention(q[2,4,8,16], k[2,4,8,16], v[2,4,8,16])")
    context = run(Quantize(targets=Selector("attention")), graph, calibration=[feeds(graph)])
    assert declined(context) == ["no_integer_form"]


def test_an_op_between_a_float_and_a_quantize_is_no_region() -> None:
    graph = build("onnx", "y = quantize(sigmoid(add(a[2,3], b[2,3])), S[]:values(0.01), Z[]:uint8:zeros)")
    lowered, _ = OnnxRuntime().lower(graph)
    assert [node.kind for node in lowered.nodes] == ["add", "sigmoid", "quantize"]
