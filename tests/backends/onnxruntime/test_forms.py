"""Forms of attention and of linears on onnxruntime: what runs is what was chosen, and computes the same."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from graphopt.backends.onnxruntime import (
    attention,
    linear,
    linear_int8,
    merged_linears,
    skip_layer_norm,
    weight_only,
)
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import Choice, rewrite
from graphopt.numerics.metrics import sqnr, within_tolerance
from tests.language import build

LEVELS = ("basic", "extended", "all")
BATCH, LENGTH, WIDTH = 2, 6, 16

MASKS = {"none": "", "boolean": ", mask[b,1,t,t]:bool", "floats": ", mask[b,1,t,t]"}
PROJECTED = """
    q = linear(x[b,t,24], W[16,24], B[16])
    k = linear(x, V[16,24])
    v = linear(x, U[16,24], C[16])
    y = attention(q, k, v{mask}, heads=4, kv_heads=4{options})"""
INTEGERS = """
    i = quantize(x[b,t,24], S[]:values(0.03), Z[]:uint8:values(128))
    q = linear_int8(i, S, Z, W[16,24]:int8, R[16]:values(0.01), B[16])
    k = linear_int8(i, S, Z, V[16,24]:int8, P[16]:values(0.02))
    v = linear_int8(i, S, Z, U[16,24]:int8, O[16]:values(0.01), C[16])
    y = attention(q, k, v{mask}, heads=4, kv_heads=4{options})"""


def attention_text(text: str, mask: str = "none", options: str = "") -> str:
    return text.format(mask=MASKS[mask], options=options)


def fed(graph: Graph) -> dict[str, Tensor]:
    """Noise of batch 2 and length 6; a boolean mask allows what is not far ahead, so that no row is empty."""
    generator, sizes = torch.Generator().manual_seed(0), {"b": BATCH, "t": LENGTH}
    shapes = {value.name: [sizes.get(str(size), size) for size in value.shape or ()] for value in graph.inputs}
    feeds = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}  # type: ignore[arg-type]
    if any(value.dtype is torch.bool for value in graph.inputs):
        feeds["mask"] = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril(1)
    return feeds


def formed(text: str, choice: Choice, form: str) -> OnnxGraph:
    """A graph with one form put in, lowered for the rest by the static order, and held to what the ops mean."""
    graph = build("onnx", text)
    assert isinstance(graph, OnnxGraph)
    feeds, made = fed(graph), graph.clone()
    if choice.forms[form] is not None:
        log = rewrite(made, [choice.only(form)])[choice.name]
        assert log.hits and not log.declined
        made.sweep()
    lowered, _ = OnnxRuntime().lower(made)
    assert isinstance(lowered, OnnxGraph)
    expected = graph.evaluate(feeds, graph.outputs)
    found = OnnxRuntime().compile(lowered)(feeds)
    for one, other in zip(expected, found, strict=True):
        assert within_tolerance(one, other) if "int8" not in text else sqnr(one, other) > 40
    return lowered


def kernels(graph: OnnxGraph, level: str, folder: Path) -> dict[str, int]:
    """What a session at a level makes of a graph, but for what only moves and makes masks."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnx_run.session(onnx_export.deployable(graph), level=level, options=options)
    found: dict[str, int] = {}
    for node in onnx.load(folder / "optimized.onnx").graph.node:
        if node.op_type not in ("Reshape", "Transpose", "Where", "Cast", "Squeeze", "Shape", "Concat", "Identity"):
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def declined(text: str, choice: Choice, form: str) -> list[str]:
    log = rewrite(build("onnx", text), [choice.only(form)])[choice.name]
    return [decline.code for decline in log.declined.values()]


FLOAT_FORMS = {
    "Attention": {"Attention": 1, "MatMul": 3, "Add": 2},
    "MultiHeadAttention": {"MultiHeadAttention": 1, "MatMul": 3, "Add": 2},
    "packed Attention": {"Attention": 1},
    "two products": {"FusedMatMul": 1, "Softmax": 1, "MatMul": 4, "Add": 2},
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FLOAT_FORMS)
def test_a_form_of_attention_runs_as_it_was_chosen(form: str, mask: str, level: str, tmp_path: Path) -> None:
    made = formed(attention_text(PROJECTED, mask), attention.FORMS, form)
    expected = dict(FLOAT_FORMS[form])
    if form == "two products" and mask != "none":
        expected["Add"] += 1
    assert kernels(made, level, tmp_path) == expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("mask", "options"), [("none", ""), ("boolean", ""), ("none", ", causal=True, scale=0.3")])
def test_attention_of_packed_integers(mask: str, options: str, level: str, tmp_path: Path) -> None:
    made = formed(attention_text(INTEGERS, mask, options), attention.FORMS, "QAttention")
    assert kernels(made, level, tmp_path) == {"QuantizeLinear": 1, "QAttention": 1}


@pytest.mark.parametrize("form", ["MultiHeadAttention", "packed Attention"])
def test_a_causal_form_with_a_scale_of_its_own(form: str, tmp_path: Path) -> None:
    text = attention_text(PROJECTED, "none", ", causal=True, scale=0.3")
    formed(text, attention.FORMS, form)


@pytest.mark.parametrize(
    ("reshape", "split", "joined"), [("reshape", "2,6,4,4", "2,6,16"), ("onnx.Reshape", "0,0,4,4", "0,0,16")]
)
def test_attention_splits_heads_itself(reshape: str, split: str, joined: str) -> None:
    """By sizes, or by zeros that copy them, as exporters of transformers write."""
    heads = "\n".join(
        f"{name} = transpose({reshape}({name}_in[2,6,16], {name.upper()}[4]:int64:values({split})), perm=[0,2,1,3])"
        for name in "qkv"
    )
    end = f"y = {reshape}(transpose(attention(q, k, v), perm=[0,2,1,3]), J[3]:int64:values({joined}))"
    graph = build("onnx", f"{heads}\n{end}")
    made = graph.clone()
    rewrite(made, attention.ATTENTION_3D)
    made.sweep()
    (whole,) = made.sites("attention")
    assert whole.attributes["heads"] == 4 and not made.sites("transpose", reshape)
    feeds = fed(graph)
    for one, other in zip(graph.evaluate(feeds, graph.outputs), made.evaluate(feeds, made.outputs), strict=True):
        assert within_tolerance(one, other)


APART = "y = attention(q[b,t,16], k[b,t,16], v[b,t,16], heads=4, kv_heads=4)"
GROUPED = "y = attention(q[b,t,16], k[b,t,8], v[b,t,8], heads=4, kv_heads=2)"
SPLIT = "y = attention(q[b,4,t,4], k[b,4,t,4], v[b,4,t,4])"
READ_ON = attention_text(PROJECTED) + "\n    return y, q"
WIDE = attention_text(PROJECTED).replace("U[16,24], C[16]", "U[32,24]")
HEADS = "heads_split_or_shared"


@pytest.mark.parametrize(
    ("text", "form", "code"),
    [
        (GROUPED, "MultiHeadAttention", HEADS),
        (GROUPED, "packed Attention", HEADS),
        (GROUPED, "QAttention", HEADS),
        (GROUPED, "two products", "key_heads_shared"),
        (SPLIT, "MultiHeadAttention", HEADS),
        (APART, "packed Attention", "projections_missing"),
        (APART, "QAttention", "projections_missing"),
        (READ_ON, "packed Attention", "projections_read_elsewhere"),
        (WIDE, "packed Attention", "projections_differ_in_width"),
        (attention_text(PROJECTED), "QAttention", "projections_of_other_kind"),
        (attention_text(INTEGERS), "packed Attention", "projections_of_other_kind"),
        (attention_text(INTEGERS, "floats"), "QAttention", "mask_unsupported"),
        (attention_text(PROJECTED, "none", ", causal=True"), "two products",
         "attention_causal"),
        (attention_text(PROJECTED).replace("k = linear(x,", "k = linear(z[b,t,24],"), "packed Attention",
         "projections_of_several_inputs"),
        (attention_text(PROJECTED).replace("B[16]", "c[16]"), "packed Attention",
         "projections_computed"),
        (APART.replace(", heads", ", mask[b,1,1,t], heads"), "MultiHeadAttention",
         "mask_unsupported"),
    ],
)  # fmt: skip
def test_a_form_of_attention_that_is_not_legal_says_why(text: str, form: str, code: str) -> None:
    assert declined(text, attention.FORMS, form) == [code]


@pytest.mark.parametrize("form", ["Attention", "two products"])
def test_heads_that_were_split_before(form: str) -> None:
    formed(SPLIT, attention.FORMS, form)


def test_layers_share_the_masks_that_their_forms_need(tmp_path: Path) -> None:
    """Two layers: one mask of floats, and one of integers."""
    text = attention_text(PROJECTED, "boolean").replace("y =", "a =") + "\n    y = attention(a, a, a, mask, heads=4)"
    graph = build("onnx", text)
    rewrite(graph, [attention.FORMS.only("MultiHeadAttention")])
    assert len(graph.sites("where")) == 1 and len(graph.sites("com.microsoft.MultiHeadAttention")) == 2


# --- linears -------------------------------------------------------------------------------------------------------

THREE = "q = linear(x[b,t,24], W[16,24], B[16])\nk = linear(x, V[8,24])\nv = linear(x, U[16,24], C[16])\nreturn q, k, v"
THREE_INTEGERS = """
    i = quantize(x[b,t,24], S[]:values(0.03), Z[]:uint8:values(128))
    q = linear_int8(i, S, Z, W[16,24]:int8, R[16]:values(0.01), B[16])
    k = linear_int8(i, S, Z, V[8,24]:int8, P[8]:values(0.02))
    return q, k"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("text", "choice", "expected"),
    [(THREE, merged_linears.FLOAT, {"MatMul": 1, "Add": 1, "Split": 1}),
     (THREE_INTEGERS, merged_linears.INT8, {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Split": 1})],
)  # fmt: skip
def test_linears_on_one_input_are_merged(
    text: str, choice: Choice, expected: dict[str, int], level: str, tmp_path: Path
) -> None:
    made = formed(text, choice, "merged")
    assert kernels(made, level, tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    ["y = linear(x[b,t,24], W[16,24])",
     "y = linear(x[b,t,24], W[16,24], b[16])\nz = linear(x, V[16,24], b)\nreturn y, z"],
)  # fmt: skip
def test_a_linear_alone_or_with_a_computed_bias_is_not_merged(text: str) -> None:
    assert merged_linears.FLOAT.matches(build("onnx", text)) == []


def test_merged_linears_keep_the_promise_of_their_kernels() -> None:
    graph = build("onnx", THREE_INTEGERS)
    made = graph.clone()
    rewrite(made, [merged_linears.INT8.only("merged")])
    made.sweep()
    target = OnnxRuntime()
    target.check(graph, target.compile(target.lower(made)[0]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("form", "expected"), [("MatMul", {"MatMul": 2, "Add": 1, "BiasGelu": 1}), ("Gemm", {"Gemm": 2, "Gelu": 1})]
)
def test_a_bias_is_inside_the_product_or_behind_it(
    form: str, expected: dict[str, int], level: str, tmp_path: Path
) -> None:
    text = "h = gelu(linear(x[b,t,24], W[24,24], B[24]))\ny = linear(h, V[24,24], C[24])"
    graph, choice = build("onnx", text), linear.BIAS
    made = graph.clone()
    rewrite(made, [choice.rule(lambda match: form)])
    assert isinstance(made, OnnxGraph)
    if level == "basic" and form == "MatMul":
        expected = {"MatMul": 2, "Add": 2, "Gelu": 1}
    assert kernels(made, level, tmp_path) == expected
    assert len(made.sites("onnx.Shape")) == (form == "Gemm")  # of both linears
    feeds = fed(graph)
    assert within_tolerance(graph.evaluate(feeds, graph.outputs)[0], OnnxRuntime().compile(made)(feeds)[0])


SIDES = """
    q = linear(x[b,t,24], Q[24,24], A[24])
    k = linear(x, K[24,24], A)
    v = linear(x, V[24,24], A)"""
SPLIT_SIDES = "q, k, v = onnx.Split(linear(x[b,t,24], Q[72,24], A[72]), S[3]:values(24):int64, axis=2, _outputs=3)"


@pytest.mark.parametrize("projections", [SIDES, SPLIT_SIDES], ids=["apart", "together"])
@pytest.mark.parametrize(("behind", "gemms"), [("Gemm", 1), ("MatMul", 0)])
def test_no_width_is_lost_to_a_split_or_attention_behind_a_bias(projections: str, behind: str, gemms: int) -> None:
    """The engine infers no width through a reshape to a computed shape, and refuses a MatMul behind such attention."""
    text = f"{projections}\ny = linear(attention(q, k, v, heads=4, kv_heads=4), W[24,24], B[24])"
    graph = build("onnx", text)
    made = graph.clone()
    first = made.inputs[0]
    choice = linear.BIAS
    logs = rewrite(made, [choice.rule(lambda match: "Gemm" if match.x == first else behind)])
    assert sum(node.kind == "onnx.Gemm" for node in made.nodes) == gemms, logs
    feeds = fed(graph)
    assert within_tolerance(graph.evaluate(feeds, graph.outputs)[0], OnnxRuntime().compile(made)(feeds)[0])


# --- tables --------------------------------------------------------------------------------------------------------

ROWS = "y = relu(embedding(dequantize(T[9,32]:int8, S[9]:values(0.01,0.02), axis=0), ids[b,t]:int64))"
ALIKE = "y = relu(embedding(dequantize(T[9,32]:int8, S[]:values(0.01)), ids[b,t]:int64))"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        (ROWS, "GatherBlockQuantized", {"GatherBlockQuantized": 1}),
        (ROWS, "Gather", {"Gather": 2, "Mul": 1}),
        (ALIKE, "Gather", {"Gather": 1, "DequantizeLinear": 1}),
    ],
)
def test_a_table_of_integers_is_gathered_as_it_was_chosen(
    text: str, form: str, expected: dict[str, int], level: str, tmp_path: Path
) -> None:
    graph, target = build("onnx", text), OnnxRuntime()
    made = graph.clone()
    log = rewrite(made, [weight_only.EMBEDDING.only(form)])["embedding-of-integers"]
    assert (log.hits, log.declined) == (1, {})
    made.sweep()
    assert isinstance(made, OnnxGraph)
    assert kernels(made, level, tmp_path) == expected | {"Relu": 1}
    runner, feeds = target.compile(made), {"ids": torch.tensor([[0, 8, 3], [1, 1, 2]])}
    target.check(graph, runner)
    torch.testing.assert_close(runner(feeds), graph.evaluate(feeds, graph.outputs), rtol=1e-6, atol=1e-6)


def test_a_table_of_less_than_a_byte_is_gathered_by_one_kernel_alone() -> None:
    text = "y = embedding(dequantize(T[9,32]:int8:ones, S[9]:values(0.01), axis=0, bits=4), ids[b,t]:int64)"
    assert declined(text, weight_only.EMBEDDING, "Gather") == ["rows_not_gathered"]


def closed(rows: str, between: str, zero: int, bias: str = "") -> str:
    """Two linears, with a quantize in front of the second."""
    product = f"linear_int8(i, S, Z, W[16,24]:int8, R[16]:values(0.1,0.05){bias})"
    return f"""
        i = quantize(x[{rows}24], S[]:values(0.03), Z[]:uint8:values(128))
        h = {between.format(product)}
        j = quantize(h, T[]:values(0.02), Y[]:uint8:values({zero}))
        y = linear_int8(j, T, Y, V[8,16]:int8, P[8]:values(0.01))
        return j, y"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", ["", ", B[16]"])
@pytest.mark.parametrize(("between", "zero"), [("relu({})", 0), ("{}", 100)], ids=["relu", "alone"])
@pytest.mark.parametrize("rows", ["b,", "b,t,", "2,t,", "2,6,"])
def test_a_linear_in_front_of_a_quantize_gives_floats_or_integers(
    rows: str, between: str, zero: int, bias: str, level: str, tmp_path: Path
) -> None:
    graph = build("onnx", closed(rows, between, zero, bias))
    choice, feeds = linear_int8.TO_INTEGERS, fed(graph)
    expected = graph.evaluate(feeds, graph.outputs)
    assert len(set(expected[0].flatten().tolist())) > 8
    relu = {"Relu": 1} if "relu" in between and level == "basic" else {}  # the engine drops what saturation does
    for form, products in {
        "MatMulIntegerToFloat": {"MatMulIntegerToFloat": 2, "QuantizeLinear": 2, **relu},
        "QGemm": {"QGemm": 1, "MatMulIntegerToFloat": 1, "QuantizeLinear": 1},
    }.items():
        made = graph.clone()
        rewrite(made, [choice.rule(lambda match, form=form: form)])  # type: ignore[misc]
        made.sweep()
        lowered, _ = OnnxRuntime().lower(made)
        assert isinstance(lowered, OnnxGraph)
        assert kernels(lowered, level, tmp_path) == products
        runner = OnnxRuntime().compile(lowered)
        OnnxRuntime().check(graph, runner)
        integers, floats = runner(feeds)
        assert (integers.int() - expected[0].int()).abs().max() <= 1
        assert sqnr(expected[1], floats) > 30


@pytest.mark.parametrize(
    ("between", "zero"),
    [("relu({})", 100), ("clip({}, low=0.0, high=1.0)", 0), ("tanh({})", 0), ("{}\n    z = tanh(h)", 0)],
    ids=["cut by more than integers", "cut above too", "another op between", "read in floats"],
)
def test_a_linear_whose_floats_are_needed_gives_no_integers(between: str, zero: int) -> None:
    text = closed("b,", between, zero)
    graph = build("onnx", text.replace("j, y", "j, y, z") if "z =" in text else text)
    assert not linear_int8.TO_INTEGERS.matches(graph)


def test_integers_that_a_product_of_activations_reads_are_made_of_floats() -> None:
    """It wants them 128 lower on its right, which a quantize gives and a linear does not."""
    product = "matmul(dequantize(p[b,t,t]:uint8, T, Y), dequantize(j, T, Y)) #"
    text = closed("b,t,", "{}", 100).replace("linear_int8(j, T, Y, V", product)
    assert not linear_int8.TO_INTEGERS.matches(build("onnx", text))


def test_a_bias_without_room_in_integers_is_added_in_floats() -> None:
    text = closed("b,", "{}", 100, ", B[16]").replace("R[16]:values(0.1,0.05)", "R[16]:values(0.000000000001)")
    assert declined(text, linear_int8.TO_INTEGERS, "QGemm") == ["bias_too_large"]


def test_rows_whose_width_has_a_name_are_made_flat() -> None:
    """As behind an operator whose result the engine's inference does not size."""
    graph = build("onnx", "y = linear(x[a,b,c], W[16,8], B[16])")
    made = graph.clone()
    (log,) = rewrite(made, [linear.BIAS.only("Gemm")]).values()
    assert (log.hits, log.declined) == (1, {})
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    (expected,) = graph.evaluate({"x": x}, graph.outputs)
    assert within_tolerance(expected, OnnxRuntime().compile(made)({"x": x})[0])


RESIDUAL = "s = add(x[b,t,16], r[b,t,16])\nn = rms_norm(s, G[16])\ny = add(mul(n, n), s)"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("form", "kernel"), [
    ("RMSNormalization", "RMSNormalization"),
    ("SkipSimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
])  # fmt: skip
def test_a_residual_and_its_rms_norm(form: str, kernel: str, level: str, tmp_path: Path) -> None:
    made = formed(RESIDUAL, skip_layer_norm.RMS_RESIDUAL, form)
    assert kernels(made, level, tmp_path)[kernel] == 1


def test_a_residual_of_other_shapes_is_normalized_apart() -> None:
    text = RESIDUAL.replace("r[b,t,16]", "r[16]")
    form = "SkipSimplifiedLayerNormalization"
    assert declined(text, skip_layer_norm.RMS_RESIDUAL, form) == ["residual_norm_unsupported"]


ROWS = "y = linear(x[b,t,96], dequantize(W[8,96]:int8:values(-7,5,2), S[8]:values(0.1,0.3), axis=0, bits={bits}))"
BLOCKS = (
    "y = linear(x[b,t,96], dequantize(W[8,96]:int8:values(-7,5,2), S[8,3]:values(0.1,0.3), axis=1, block=32, bits=8))"
)


@pytest.mark.parametrize(("bits", "form", "stored"), [
    (4, "MatMulNBits", (4, 128)), (4, "MatMulNBits in blocks of 32", (4, 32)), (4, "MatMulNBits in 8 bits", (8, 128)),
    (8, "MatMulNBits in blocks of 32", (8, 32)), (4, "MatMulNBits in float32", (4, 128)),
])  # fmt: skip
def test_a_stored_weight_takes_other_blocks_and_bits(bits: int, form: str, stored: tuple[int, int]) -> None:
    graph = build("onnx", ROWS.format(bits=bits))
    made = graph.clone()
    assert rewrite(made, [weight_only.LINEAR.only(form)])["matmul-nbits"].hits == 1
    (node,) = made.sites("com.microsoft.MatMulNBits")
    assert (node.attributes["bits"], node.attributes["block_size"]) == stored
    feeds = fed(graph)
    (found,), (expected,) = (one.evaluate(feeds, one.outputs) for one in (made, graph))
    assert sqnr(expected, found) > 35


def test_a_stored_weight_keeps_the_blocks_and_bits_that_it_has() -> None:
    assert declined(BLOCKS, weight_only.LINEAR, "MatMulNBits in blocks of 32") == ["stored_in_blocks"]
    assert declined(BLOCKS, weight_only.LINEAR, "MatMulNBits in 8 bits") == ["stored_in_as_many_bits"]


@pytest.mark.parametrize("split", [False, True], ids=["three", "and one that is split already"])
def test_stored_linears_on_one_input_become_one_kernel_for_all(split: bool) -> None:
    stored = "dequantize({name}[16,32]:int8:values(-7,5,2), {name}S[16,1]:values(0.1,0.3), axis=1, block=32, bits=4)"
    text = "\n".join(f"{name.lower()} = relu(linear(x[b,t,32], {stored.format(name=name)}))" for name in "QKV")
    parts = "l, r = onnx.Split(o, N[2]:int64:values(8,8), axis=-1, _outputs=2)"
    own = f"o = linear(relu(x), {stored.format(name='O')})\n{parts}"
    graph = build("onnx", f"{text}\n{own}\nreturn q, k, v, l, r" if split else f"{text}\nreturn q, k, v")
    assert isinstance(graph, OnnxGraph)
    made, feeds = graph.clone(), fed(graph)
    log = rewrite(made, [merged_linears.WEIGHT_ONLY.only("merged")])["weight-only-linears-on-one-input"]
    assert log.hits == 3
    lowered, _ = OnnxRuntime().lower(made)
    runner = OnnxRuntime().compile(lowered)
    assert runner.kernels()["MatMulNBits"] == 1 + split
    OnnxRuntime().check(graph, runner)
    for one, other in zip(runner(feeds), graph.evaluate(feeds, graph.outputs), strict=True):
        assert sqnr(other, one) > 30


def test_a_kernel_that_is_missing_is_missed_where_linears_are_merged() -> None:
    stored = "dequantize({name}[16,32]:int8, {name}S[16]:values(0.1), axis=0)"
    text = "\n".join(f"{name.lower()} = linear(x[b,t,32], {stored.format(name=name)})" for name in "QK")
    graph = build("onnx", f"{text}\nreturn q, k")
    floats = build("onnx", "q = linear(x[b,t,32], Q[16,32])\nk = linear(x, K[16,32])\nreturn q, k")
    with pytest.raises(LoweringError, match="2 weight-only linear were promised and onnxruntime built 0 kernels"):
        OnnxRuntime().check(graph, OnnxRuntime().compile(floats))
