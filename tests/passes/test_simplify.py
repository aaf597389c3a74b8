"""simplify: the same function with fewer nodes."""

import pytest
import torch

from graphopt.passes import Simplify
from tests.language import assert_outputs_equal, assert_unchanged, build, listing, run

NORM = "G[4]:values(1,2,0.5), B[4], M[4], V[4]:values(1,2,3)"


def simplified(dialect: str, text: str, *, rtol: float = 1e-6) -> list[str]:
    """The listing after simplify, which must keep the outputs and find nothing more to do."""
    graph = build(dialect, text)
    original = graph.clone()
    run(Simplify(), graph)
    assert_outputs_equal(graph, original, rtol=rtol)
    assert_unchanged(Simplify(), graph)
    return listing(graph)


def test_folds_what_reads_only_constants(dialect: str) -> None:
    assert simplified(dialect, "h = sqrt(add(A[2,8]:ones, B[8]:ones))\ny = mul(x[2,8], h)") == [
        "%0 = mul(x[2,8], [2,8])",
        "return %0[2,8]",
    ]


def test_folds_an_operation_with_several_readers_once(dialect: str) -> None:
    text = "h = exp(A[8])\ny = mul(x[2,8], h)\nz = add(x, h)\nreturn y, z"
    assert simplified(dialect, text) == [
        "%0 = mul(x[2,8], [8])",
        "%1 = add(x[2,8], [8])",
        "return %0[2,8], %1[2,8]",
    ]


def test_keeps_the_dequantize_of_a_weight(dialect: str) -> None:
    text = "w = dequantize(W[4,8]:int8:values(1,2,3), S[4]:ones, axis=0)\ny = linear(x[2,8], w)"
    assert simplified(dialect, text) == [
        "%0 = dequantize([4,8]:int8, [4], axis=0)",
        "%1 = linear(x[2,8], %0[4,8])",
        "return %1[2,4]",
    ]


def test_keeps_the_dequantize_of_a_weight_with_zero_points(dialect: str) -> None:
    """In fx it reads them through a cast to wider integers."""
    text = "w = dequantize(W[4,8]:uint8:values(1,2), S[4]:ones, Z[4]:uint8:values(1,2), axis=0)\ny = linear(x[2,8], w)"
    kinds = [line.split(" = ")[-1].split("(")[0] for line in simplified(dialect, text)]
    assert [kind for kind in kinds if kind != "cast"][:2] == ["dequantize", "linear"]


@pytest.mark.parametrize(("rows", "folds"), [(200, True), (800, False)])
def test_folds_no_large_result_of_small_operands(dialect: str, rows: int, folds: bool) -> None:
    lines = simplified(dialect, f"h = mul(A[{rows},1], B[1,400])\ny = add(x[1,400], h)")
    assert len(lines) == (2 if folds else 3)


def test_folds_a_large_result_of_operands_as_large(dialect: str) -> None:
    assert len(simplified(dialect, "h = relu(A[800,400])\ny = add(x[1,400], h)")) == 2


def test_returns_constants_and_inputs_as_they_are(dialect: str) -> None:
    graph = build(dialect, "i = identity(x[2,8])\nc = relu(A[4])\ny = identity(relu(x))\nreturn i, c, y")
    original = graph.clone()
    run(Simplify(), graph)
    assert [node.kind for node in graph.nodes] == ["identity", "relu", "relu"]
    assert_outputs_equal(graph, original, rtol=0)


def test_drops_dead_code(dialect: str) -> None:
    assert simplified(dialect, "a = exp(x[2,8])\nb = sqrt(a)\ny = relu(x)\nreturn y") == [
        "%0 = relu(x[2,8])",
        "return %0[2,8]",
    ]


@pytest.mark.parametrize(
    "nothing",
    [
        "identity(x[2,8])",
        "add(x[2,8], Z[1]:zeros)",
        "add(Z[1]:zeros, x[2,8])",
        "sub(x[2,8], Z[]:zeros)",
        "mul(x[2,8], A[1,1]:ones)",
        "div(x[2,8], A[]:ones)",
        "cast(x[2,8], dtype=float32)",
        "transpose(x[2,8], perm=[0,1])",
        "reshape(x[2,8], S[2]:int64:values(2,8))",
        "reshape(reshape(x[2,8], S[1]:int64:values(16)), T[2]:int64:values(2,8))",
        "transpose(transpose(x[2,8], perm=[1,0]), perm=[1,0])",
        "cast(cast(x[2,8], dtype=float64), dtype=float32)",
    ],
)
def test_drops_what_changes_nothing(dialect: str, nothing: str) -> None:
    assert simplified(dialect, f"h = {nothing}\ny = relu(h)") == ["%0 = relu(x[2,8])", "return %0[2,8]"]


@pytest.mark.parametrize(
    "something",
    [
        "add(x[2,8], Z[1]:values(1e-12))",
        "mul(x[2,8], A[1]:values(1.0000001))",
        "mul(x[2,8], A[1,1,1]:ones)",
        "add(x[2,8], Z[8]:zeros)",
        "sub(Z[]:zeros, x[2,8])",
        "div(A[]:ones, x[2,8])",
        "cast(cast(x[2,8], dtype=int32), dtype=float32)",
        "cast(cast(x[2,8], dtype=float16), dtype=float32)",
        "reshape(x[2,8], S[2]:int64:values(8,2))",
        "transpose(x[2,8], perm=[1,0])",
    ],
)
def test_keeps_what_changes_something(dialect: str, something: str) -> None:
    graph = build(dialect, f"h = {something}\ny = relu(h)")
    run(Simplify(), graph)
    assert graph.version == 0


def test_shortens_chains(dialect: str) -> None:
    assert simplified(dialect, "h = transpose(x[2,3,4], perm=[1,2,0])\ny = transpose(h, perm=[2,1,0])") == [
        "%0 = transpose(x[2,3,4], perm=[0,2,1])",
        "return %0[2,4,3]",
    ]
    text = "h = reshape(x[2,12], S[3]:int64:values(2,3,4))\ny = reshape(h, T[2]:int64:values(4,6))"
    assert simplified(dialect, text) == ["%0 = reshape(x[2,12], [2]:int64)", "return %0[4,6]"]
    assert simplified(dialect, "h = cast(x[2]:uint8, dtype=int32)\ny = cast(h, dtype=float32)") == [
        "%0 = cast(x[2]:uint8)",
        "return %0[2]",
    ]


def test_a_chain_of_many_becomes_one(dialect: str) -> None:
    lines = "\n".join(f"x{n} = identity(transpose(x{n - 1}, perm=[1,0]))" for n in range(1, 42))
    assert simplified(dialect, f"x0 = identity(x[2,8])\n{lines}") == [
        "%0 = transpose(x[2,8], perm=[1,0])",
        "return %0[8,2]",
    ]


def test_computes_equal_things_once(dialect: str) -> None:
    text = """
        a = gelu(add(x[2,8], A[]:values(2)))
        b = gelu(add(x, B[]:values(2)))
        y = mul(a, b)
        """
    assert simplified(dialect, text) == [
        "%0 = add(x[2,8], [])",
        "%1 = gelu(%0[2,8])",
        "%2 = mul(%1[2,8], %1[2,8])",
        "return %2[2,8]",
    ]


def test_attributes_and_constants_tell_nodes_apart(dialect: str) -> None:
    text = """
        a = softmax(x[2,8], axis=0)
        b = softmax(x, axis=1)
        c = add(x, A[]:values(2))
        d = add(x, B[]:values(2.5))
        return a, b, c, d
        """
    assert len(simplified(dialect, text)) == 5


def test_two_outputs_stay_two(dialect: str) -> None:
    assert len(simplified(dialect, "a = gelu(x[2,8])\nb = gelu(x)\nreturn a, b")) == 3


def test_drops_a_bias_of_zeros_from_a_conv(dialect: str) -> None:
    graph = build(dialect, "y = conv(x[2,4,6,6], W[8,2,3,3], Z[8]:zeros, groups=2)")
    original = graph.clone()
    run(Simplify(), graph)
    assert graph.nodes[0].bias is None and graph.nodes[0].attributes == original.nodes[0].attributes
    assert_outputs_equal(graph, original, rtol=0)


@pytest.mark.parametrize("bias", ["", ", C[4]"])
def test_folds_batch_norm_into_conv(dialect: str, bias: str) -> None:
    text = f"c = conv(x[2,3,8,8], W[4,3,3,3]{bias}, stride=[2,2], padding=[1,1,1,1])\ny = relu(batch_norm(c, {NORM}))"
    assert simplified(dialect, text, rtol=1e-5) == [
        "%0 = conv(x[2,3,8,8], [4,3,3,3], [4], stride=[2,2], padding=[1,1,1,1], dilation=[1,1])",
        "%1 = relu(%0[2,4,4,4])",
        "return %1[2,4,4,4]",
    ]


def test_folds_batch_norm_into_linear(dialect: str) -> None:
    text = f"y = batch_norm(linear(x[2,8], W[4,8]), {NORM}, eps=0.001)"
    assert simplified(dialect, text, rtol=1e-5) == ["%0 = linear(x[2,8], [4,8], [4])", "return %0[2,4]"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"y = batch_norm(linear(x[2,4,8], W[4,8]), {NORM})", "norm_not_on_outputs"),
        (f"y = batch_norm(linear(x[2,8], w[4,8]), {NORM})", "pair_computed"),
        (
            f"y = batch_norm(linear(x[2,8], W[4,8]), {NORM})\nz = linear(x, W, B)\nreturn y, z",
            "weight_read_twice",
        ),
    ],
)
def test_keeps_a_batch_norm_and_says_why(dialect: str, text: str, code: str) -> None:
    graph = build(dialect, text)
    context = run(Simplify(), graph)
    assert graph.version == 0
    assert [why.code for log in context.record.rules.values() for why in log.declined.values()] == [code]


def test_the_log_of_a_rule_is_of_all_rounds(dialect: str) -> None:
    context = run(Simplify(), build(dialect, f"y = batch_norm(linear(x[2,8], W[4,8]), {NORM})"))
    assert context.record.rules["fold-batch-norm-into-linear"].hits == 1


def test_keeps_a_batch_norm_behind_a_conv_that_others_read(dialect: str) -> None:
    text = f"c = conv(x[2,3,8,8], W[4,3,3,3])\ny = batch_norm(c, {NORM})\nreturn c, y"
    graph = build(dialect, text)
    run(Simplify(), graph)
    assert graph.version == 0


@pytest.mark.parametrize(("dialect", "random"), [("fx", "aten.rand_like.default"), ("onnx", "onnx.RandomNormalLike")])
def test_random_nodes_are_neither_folded_nor_shared(dialect: str, random: str) -> None:
    graph = build(dialect, f"a = {random}(C[2,8])\nb = {random}(C)\ny = add(add(x[2,8], a), b)")
    run(Simplify(), graph)
    assert [node.kind for node in graph.nodes] == [random, random, "add", "add"]


def test_folds_the_shape_of_a_static_value() -> None:
    assert simplified("onnx", "s = onnx.Shape(x[2,8])\ny = mul(z[2]:int64, s)") == [
        "%0 = mul(z[2]:int64, [2]:int64)",
        "return %0[2]:int64",
    ]


def test_folds_a_bias_that_takes_its_dtype_from_the_input() -> None:
    text = "b = onnx.Expand(onnx.CastLike(Z[]:values(2), x[2,8]), S[1]:int64:values(4))\ny = linear(x, W[4,8], b)"
    assert simplified("onnx", text) == ["%0 = linear(x[2,8], [4,8], [4])", "return %0[2,4]"]


def test_keeps_the_shape_of_a_dynamic_value() -> None:
    assert len(simplified("onnx", "s = onnx.Shape(x[batch,8])\ny = mul(s, s)")) == 3


def test_folds_a_static_part_of_a_dynamic_shape() -> None:
    assert simplified("onnx", "s = onnx.Shape(x[batch,8], start=1)\ny = mul(z[1]:int64, s)") == [
        "%0 = mul(z[1]:int64, [1]:int64)",
        "return %0[1]:int64",
    ]


def test_a_gather_from_a_uniform_constant_spreads_its_number() -> None:
    graph = build("onnx", "y = onnx.GatherElements(Z[1,8]:int64:zeros, x[1,4]:int64, axis=1)")
    before = graph.clone()
    run(Simplify(), graph)
    assert "onnx.GatherElements" not in graph.text() and "onnx.Expand" in graph.text()
    feeds = {"x": torch.tensor([[3, 1, 0, 7]])}
    assert torch.equal(graph.evaluate(feeds, graph.outputs)[0], before.evaluate(feeds, before.outputs)[0])


def test_a_gather_from_other_constants_stays() -> None:
    graph = build("onnx", "y = onnx.GatherElements(Z[1,3]:int64:values(0,0,1), x[1,4]:int64, axis=1)")
    run(Simplify(), graph)
    assert "onnx.GatherElements" in graph.text()
