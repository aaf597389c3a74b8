"""What onnxruntime's own optimizer would break computes the same at every level, and what is lossless stays so."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt
from graphopt.backends.onnxruntime import linear_int8, weight_only
from graphopt.backends.onnxruntime.guards import guarded
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.rewrite import Choice
from tests.language import build
from tests.models import model, plain_run

IMAGE, ROW = "float[n,2,6,6] x", "float[n,8] x"
SCALES = {
    "S": torch.tensor(0.05), "T": torch.tensor(0.02), "Z": torch.tensor(128, dtype=torch.uint8),
    "H": torch.tensor(100, dtype=torch.uint8), "I": torch.tensor(3, dtype=torch.int8),
    "N": torch.tensor(0, dtype=torch.int8), "P": torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]),
    "W": torch.randint(-127, 127, (4, 2, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int8),
    "R": torch.tensor([0.01, 0.02, 1e-12, 0.01]), "B": torch.tensor([0.5, -1.0, 2.0, 0.1]),
    "F": torch.randn(8, 4, generator=torch.Generator().manual_seed(2)),
}  # fmt: skip
CASES = {
    "a pad before a max pool": (20, IMAGE, "a = Neg(x) p = Pad(a, P) y = MaxPool<kernel_shape = [3,3]>(p)"),
    "a pad before an average pool": (20, IMAGE, "p = Pad(x, P) y = AveragePool<kernel_shape = [2,2]>(p)"),
    "a pad as wide as the pool": (20, IMAGE, "p = Pad(x, P) y = AveragePool<kernel_shape = [1,1]>(p)"),
    "a pad as wide as the max pool": (20, IMAGE, "a = Relu(x) p = Pad(a, P) y = MaxPool<kernel_shape = [1,3]>(p)"),
    "a pad before a pool that pads": (
        20, IMAGE, "p = Pad(x, P) y = AveragePool<kernel_shape = [2,2], pads = [1,1,1,1]>(p)"),
    "quantized twice": (16, ROW, """q = QuantizeLinear(x, S, N) d = DequantizeLinear(q, S, N)
                                    r = QuantizeLinear(d, T, H) y = DequantizeLinear(r, T, H)"""),
    "quantized twice to uint8": (21, ROW, """q = QuantizeLinear(x, S, Z) d = DequantizeLinear(q, S, Z)
                                             r = QuantizeLinear(d, T, H) y = DequantizeLinear(r, T, H)"""),
    "int8 that is returned and moved": (22, "float[n,4,4] x", """
        q = QuantizeLinear(x, S, I) d = DequantizeLinear(q, S, I) y = MaxPool<kernel_shape = [2]>(d)"""),
    "a product by floats between integers": (16, ROW, """
        q = QuantizeLinear(x, S, Z) d = DequantizeLinear(q, S, Z) m = MatMul(d, F)
        r = QuantizeLinear(m, S, Z) y = DequantizeLinear(r, S, Z)"""),
    "a product and a sum between integers": (21, ROW, """
        q = QuantizeLinear(x, S, Z) d = DequantizeLinear(q, S, Z) m = MatMul(d, F) a = Add(m, B)
        r = QuantizeLinear(a, S, Z) y = DequantizeLinear(r, S, Z)"""),
    "a Gemm by floats between integers": (20, ROW, """
        q = QuantizeLinear(x, S, Z) d = DequantizeLinear(q, S, Z) a = Gemm(d, F, B)
        r = QuantizeLinear(a, S, Z) y = DequantizeLinear(r, S, Z)"""),
    "a bias that int32 does not hold": (14, IMAGE, """
        q = QuantizeLinear(x, T, Z) d = DequantizeLinear(q, T, Z) w = DequantizeLinear<axis = 0>(W, R)
        c = Conv(d, w, B) r = QuantizeLinear(c, S, Z) y = DequantizeLinear(r, S, Z)"""),
}  # fmt: skip


def file(what: str) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    opset, inputs, body = CASES[what]
    used = {name: tensor for name, tensor in SCALES.items()
            if any(f" {name}{end}" in body or f"({name}{end}" in body for end in (",", ")"))}  # fmt: skip
    outputs = "float y, int8 q" if "returned" in what else "float y"
    proto = model(f"g ({inputs}) => ({outputs}) {{ {' '.join(body.split())} }}", used, opset=opset)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    sizes = [int(size) if size.isdigit() else 3 for size in inputs.split("[")[1].split("]")[0].split(",")]
    return proto, {"x": torch.randn(sizes, generator=torch.Generator().manual_seed(1))}


def run_at(path: Path, level: ort.GraphOptimizationLevel, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {name: x.numpy() for name, x in feeds.items()})]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("what", CASES)
def test_the_file_computes_the_same_at_every_level(what: str, portable: bool, tmp_path: Path) -> None:
    proto, feeds = file(what)
    expected = plain_run(proto, feeds)
    small = graphopt.optimize(proto, "simplify", example_inputs=feeds)
    path = small.export(tmp_path / "out.onnx", portable=portable)
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        for found, wanted in zip(run_at(path, level, feeds), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(
    st.lists(st.integers(-1, 3), min_size=4, max_size=4), st.lists(st.integers(1, 3), min_size=2, max_size=2),
    st.lists(st.integers(0, 2), min_size=4, max_size=4), st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_pads_of_any_width_before_pools_that_pad(
    widths: list[int], kernel: list[int], own: list[int], ceil: bool
) -> None:
    own = [min(width, size - 1) for width, size in zip(own, kernel * 2, strict=True)]
    proto = model(
        f"g (float[1,2,6,6] x) => (float[1,2,a,b] y) {{ r = Relu(x) p = Pad(r, P) y = MaxPool<kernel_shape = {kernel}, "
        f"pads = {own}, ceil_mode = {int(ceil)}>(p) }}",
        {"P": torch.tensor([0, 0, *widths[:2], 0, 0, *widths[2:]])}, opset=20,
    )  # fmt: skip
    feeds = {"x": torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1))}
    with tempfile.TemporaryDirectory() as folder:
        path = graphopt.optimize(proto, "simplify", example_inputs=feeds).export(Path(folder) / "out.onnx")
        (found,) = run_at(path, ort.GraphOptimizationLevel.ORT_ENABLE_ALL, feeds)
    torch.testing.assert_close(found, plain_run(proto, feeds)[0])


@pytest.mark.parametrize("text", [
    "y = max_pool(pad(relu(x[1,2,6,6]), padding=[0,0,1,1,0,0,1,1]), kernel=[3,3])",
    "y = conv(pad(x[1,2,6,6], padding=[0,0,1,1,0,0,1,1]), W[4,2,3,3])",
    "y = dequantize(quantize(x[2,4], S[]:values(0.5), Z[]:uint8), S, Z)",
])  # fmt: skip
def test_what_is_merged_rightly_is_left_alone(text: str) -> None:
    graph = build("onnx", text)
    assert isinstance(graph, OnnxGraph)
    assert guarded(graph).text() == graph.text()


def test_a_bias_that_does_not_fit_int32_is_declined_by_name() -> None:
    proto, feeds = file("a bias that int32 does not hold")
    small = graphopt.optimize(proto, "simplify", example_inputs=feeds)
    (fold,) = [one for one in small.report.passes if one.name == "fold-int8"]
    assert [one.code for one in fold.declined.values()] == ["bias_too_large"]
    assert "QLinearConv" not in small.report.kernels


# --- forms that round ----------------------------------------------------------------------------------------------

STATIC = "y = linear_int8(quantize(x[2,8], S[]:values(0.02), Z[]:uint8), S, Z, W[4,8]:int8:seed1, V[4]:values(0.01))"


@pytest.mark.parametrize("choice", [linear_int8.STATIC, linear_int8.DYNAMIC, weight_only.LINEAR])
def test_a_lossless_lowering_has_no_form_that_rounds(choice: Choice) -> None:
    assert "MatMulNBits" in choice.forms and "MatMulNBits" not in choice.exact().forms
    assert choice.exact().forms


def test_weights_alone_stay_exact_unless_a_lossy_pass_is_asked_for(tmp_path: Path) -> None:
    """MatMulNBits at accuracy_level 4 rounds its input: a file that has plain floats there never said so."""
    weight = torch.randint(-127, 127, (64, 4), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    body = "w = DequantizeLinear<axis = 1>(Q, R) y = MatMul(x, w)"
    proto = model(f"g (float[n,64] x) => (float[n,4] y) {{ {body} }}",
                  {"Q": weight, "R": torch.full((4,), 0.01)}, opset=21)  # fmt: skip
    feeds = {"x": torch.randn(5, 64, generator=torch.Generator().manual_seed(3))}
    path = graphopt.optimize(proto, example_inputs=feeds).export(tmp_path / "out.onnx")
    torch.testing.assert_close(plain_run(str(path), feeds)[0], plain_run(proto, feeds)[0], rtol=1e-5, atol=1e-5)
    asked = graphopt.optimize(proto, "quantize{scheme=weight-only}", example_inputs=feeds)
    levels = [node.attributes["accuracy_level"] for node in asked.lowered.nodes if "MatMulNBits" in node.kind]
    assert levels == [4]


def chain(depth: int, seed: int = 0) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """Products one after the other, and inputs with two large channels, which coarsen the steps of their blocks."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"W{place}": torch.randn(64, 64, generator=generator) / 8 for place in range(depth)}
    names = ["x", *(f"h{place}" for place in range(1, depth)), "y"]
    body = " ".join(f"{names[place + 1]} = MatMul({names[place]}, W{place})" for place in range(depth))
    spread = torch.ones(64).index_fill(0, torch.tensor([0, 32]), 50.0)
    feeds = {"x": torch.randn(5, 64, generator=generator) * spread}
    return model(f"g (float[n,64] x) => (float[n,64] y) {{ {body} }}", weights, opset=21), feeds


@pytest.mark.parametrize("bits", [4, 8])
def test_a_portable_file_of_weights_in_integers_keeps_activations_in_floats(bits: int, tmp_path: Path) -> None:
    """The engine's optimizer reads its products as MatMulNBits, which rounds activations unless it is told not to."""
    proto, feeds = chain(1)
    small = graphopt.optimize(proto, f"quantize{{scheme=weight-only bits={bits} block=32}}", example_inputs=feeds,
                              measure=False)  # fmt: skip
    path = small.export(tmp_path / "portable.onnx", portable=True)
    expected = small.folded.evaluate(feeds, small.folded.outputs)[0]
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": feeds["x"].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=8)
@given(
    axis=st.sampled_from([None, 0, 1]), dtype=st.sampled_from([torch.int8, torch.uint8]), shifted=st.booleans(),
    opset=st.integers(13, 23),
)  # fmt: skip
def test_a_weight_of_8_bits_multiplies_floats_at_every_level_and_is_read_again_in_integers(
    axis: int | None, dtype: torch.dtype, shifted: bool, opset: int
) -> None:
    """onnxruntime rounds the floats where it reads a DequantizeLinear before a product."""
    generator = torch.Generator().manual_seed(opset)
    count = () if axis is None else (16, 6)[axis : axis + 1]
    limits = torch.iinfo(dtype)
    stored = {
        "Q": torch.randint(limits.min, limits.max, (16, 6), dtype=dtype, generator=generator),
        "R": torch.rand(count, generator=generator) / 64,
        "Z": torch.randint(1, 9, count, dtype=dtype, generator=generator),
    }
    along = "" if axis is None else f"<axis = {axis}>"
    body = f"w = DequantizeLinear{along}(Q, R{', Z' if shifted else ''}) y = MatMul(x, w)"
    used = stored if shifted else {name: stored[name] for name in "QR"}
    proto = model(f"g (float[n,16] x) => (float[n,6] y) {{ {body} }}", used, opset=opset)
    feeds = {"x": torch.randn(5, 16, generator=generator)}
    with tempfile.TemporaryDirectory() as folder:
        small = graphopt.optimize(proto, "simplify", example_inputs=feeds)
        path = small.export(Path(folder) / "out.onnx", portable=True)
        (found,) = run_at(path, ort.GraphOptimizationLevel.ORT_ENABLE_ALL, feeds)
        torch.testing.assert_close(found, plain_run(proto, feeds)[0], rtol=1e-4, atol=1e-5)
        again = graphopt.optimize(path, "simplify", example_inputs=feeds)
    assert again.report.cost_after.bytes < small.report.cost_after.bytes + 17  # uint8 gets zero points


def test_a_weight_that_an_embedding_reads_too_multiplies_floats(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        "Q": torch.randint(-127, 127, (32, 16), dtype=torch.int8, generator=generator),
        "R": torch.rand(32, generator=generator) / 64,
    }
    body = "w = DequantizeLinear<axis = 0>(Q, R) t = Transpose<perm = [1,0]>(w) y = MatMul(x, t) e = Gather(w, ids)"
    proto = model(f"g (float[n,16] x, int64[n] ids) => (float[n,32] y, float[n,16] e) {{ {body} }}", stored, opset=21)
    feeds = {"x": torch.randn(5, 16, generator=generator), "ids": torch.arange(5)}
    small = graphopt.optimize(proto, "simplify", example_inputs=feeds)
    path = small.export(tmp_path / "out.onnx", portable=True)
    for found, wanted in zip(run_at(path, ort.GraphOptimizationLevel.ORT_ENABLE_ALL, feeds),
                             plain_run(proto, feeds), strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.sampled_from(["4", "8", "[4,8]"]), st.sampled_from(["none", "32"]), st.integers(0, 99))
def test_whatever_weights_are_stored_in_integers_for_has_a_portable_file(
    depth: int, bits: str, block: str, seed: int
) -> None:
    proto, feeds = chain(depth, seed)
    small = graphopt.optimize(proto, f"quantize{{scheme=weight-only bits={bits} block={block}}}", example_inputs=feeds,
                              measure=False)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = small.export(Path(folder) / "portable.onnx", portable=True)
        expected = small.folded.evaluate(feeds, small.folded.outputs)[0]
        torch.testing.assert_close(plain_run(str(path), feeds)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_form_that_reads_floats_keeps_the_range_of_the_quantize() -> None:
    graph = build("onnx", STATIC)
    made = OnnxRuntime()
    lowered = graph.clone()
    made._apply(lowered, [[linear_int8.STATIC.only("MatMulNBits")], *made.rules(lowered)])
    x = torch.linspace(-3, 9, 16).reshape(2, 8)  # uint8 at zero point 0 and scale 0.02 ends at 0 and at 5.1
    expected = graph.evaluate({"x": x}, graph.outputs)[0]
    found = lowered.evaluate({"x": x}, lowered.outputs)[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert [node.kind for node in lowered.nodes].count("clip") == 1
