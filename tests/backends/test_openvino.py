"""The openvino target: which kernels it runs in int8, and what they compute. Real runs need the package openvino."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import target
from graphopt.backends.openvino import ISAS, Layer, OpenVino, OpenVinoRunner, layers
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError, UsageError
from graphopt.numerics.metrics import cosine, sqnr
from graphopt.passes import Quantize
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.result import Optimized
from tests.language import build, feeds
from tests.models import ConvNet, Decoder, Encoder, images, model, padding, plain_run, seeded, tokens

ENCODED = {"ids": tokens(), "mask": padding()}
OTHERS = {
    ConvNet: {"x": images(3, seed=9)},
    Encoder: {"ids": tokens(3, 11, seed=5), "mask": padding(3, 11)},
    Decoder: {"ids": tokens(3, 11, seed=5)},
}
INT8 = {ConvNet: {"Convolution u8": 3, "FullyConnected u8": 1}, Encoder: {"FullyConnected u8": 12},
        Decoder: {"FullyConnected u8": 8}}  # fmt: skip


class Swish(nn.Module):
    """Convs with SiLU behind them, which has no form in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.silu(self.second(nn.functional.silu(self.first(x))))
        return y


def by_precision(small: Optimized) -> dict[str, int]:
    """The kernels whatever the instructions of this CPU are."""
    found: Counter[str] = Counter()
    for name, count in small.report.kernels.items():
        found[" ".join(word for word in name.split() if word not in ISAS)] += count
    return dict(found)


def optimized(kind: type[nn.Module], passes: str | None = "quantize{scheme=static}", **options: Any) -> Optimized:
    pytest.importorskip("openvino")
    example: dict[type[nn.Module], dict[str, Tensor]] = {Encoder: ENCODED, Decoder: {"ids": tokens()}}
    inputs = example.get(kind, {"x": images()})
    draw: dict[str, Callable[..., Tensor]] = {"x": images, "ids": tokens, "mask": lambda seed: padding()}
    batches = [{name: draw[name](seed=seed) for name in inputs} for seed in range(4)]
    return graphopt.optimize(
        seeded(kind), passes, target="openvino", example_inputs=inputs, calibration=batches, threads=1, **options
    )


# --- without the package -------------------------------------------------------------------------------------------


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'graphopt\[openvino\]'"):
        graphopt.optimize(seeded(ConvNet), target="openvino", example_inputs=images())
    assert target("openvino").summary.startswith("OpenVINO on CPU")


def test_int8_ops_are_refused() -> None:
    graph = build("onnx", "y = linear_int8(x[2,8]:uint8, S[]:ones, Z[]:uint8, W[4,8]:int8, V[4]:ones)")
    with pytest.raises(LoweringError, match=r"is linear_int8, and openvino reads Q/DQ .*: leave out fold-int8"):
        target("openvino").lower(graph)


def test_activations_are_uint8_where_they_are_read_and_weights_int8(tmp_path: Path) -> None:
    graph = build("onnx", """
        h = silu(conv(x[1,4,6,6], V[4,4,3,3], B[4], padding=[1,1,1,1]))
        y = conv(h, U[2,4,1,1])""")  # fmt: skip
    batches = Calibration([feeds(graph, seed) for seed in range(2)], graph.inputs)
    run_pass(Quantize(), graph, Context(target=OpenVino(), calibration=batches))
    path = tmp_path / "out.onnx"
    OpenVino().export(OpenVino().lower(graph)[0], path, metadata={})
    proto = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    made = {output: node.op_type for node in proto.graph.node for output in node.output}
    quantizes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert [types[node.input[2]] for node in quantizes] == [onnx.TensorProto.UINT8] * 2
    weights = [node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in types]
    assert [types[node.input[0]] for node in weights] == [onnx.TensorProto.INT8] * 2
    read = [made[node.input[0]] for node in quantizes if node.input[0] in made]
    assert read == ["Mul"]  # of the SiLU: nothing parts it from the conv


def test_fewer_kernels_than_promised_is_an_error_that_names_them() -> None:
    graph = build("onnx", """
        d = dequantize(quantize(x[n,16], S[]:values(0.1), Z[]:uint8), S, Z)
        y = linear(d, dequantize(W[8,16]:int8, V[8]:ones, axis=0))""")  # fmt: skip
    assert isinstance(graph, OnnxGraph)

    class Float(OpenVinoRunner):
        def __init__(self) -> None:
            pass

        layers = [Layer("FullyConnected", "up/MatMul", "f32", False)]  # noqa: RUF012

    expected = r"1 static linear were promised and openvino runs 0 in int8; in floats it runs up/MatMul \(f32\)"
    with pytest.raises(LoweringError, match=expected):
        OpenVino().check(graph, Float())


# --- with it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INT8)
def test_every_linear_and_conv_runs_in_int8(kind: type[nn.Module]) -> None:
    kernels = by_precision(optimized(kind))
    layers = {name: count for name, count in kernels.items() if name.split()[0] in ("Convolution", "FullyConnected")}
    assert layers == INT8[kind]


@pytest.mark.parametrize("kind", INT8)
@pytest.mark.parametrize("passes", [None, "quantize{scheme=static}"])
def test_the_engine_computes_what_the_ops_mean(kind: type[nn.Module], passes: str | None) -> None:
    """Against the exported file in ONNX Runtime without optimizations, at other shapes."""
    result = optimized(kind, passes)
    found, expected = result(**OTHERS[kind]), seeded(kind)(**OTHERS[kind])
    (ops,) = result.folded.evaluate(OTHERS[kind], result.folded.outputs)
    if passes is None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert sqnr(ops, found) > 35 and cosine(expected, found) > 0.999


def test_an_activation_stays_fused_into_its_conv() -> None:
    """Both SiLUs, and the quantize between them, are part of the convs."""
    kernels = by_precision(optimized(Swish))
    assert kernels["Convolution u8"] == 2
    assert not [name for name in kernels if name.split()[0] in ("Eltwise", "Convert", "Math")]


@pytest.mark.parametrize("passes", ["quantize{scheme=weight-only}", "quantize{scheme=weight-only bits=4}"])
def test_weights_alone_stay_in_integers(passes: str) -> None:
    result = optimized(Encoder, passes)
    name = "i4" if "bits=4" in passes else "i8"
    assert by_precision(result)[f"FullyConnected {name}"] == 12
    assert isinstance(result.runner, OpenVinoRunner)
    assert not any(layer.is_int8 for layer in result.runner.layers if layer.kind == "FullyConnected")
    (ops,) = result.folded.evaluate(OTHERS[Encoder], result.folded.outputs)
    assert cosine(ops, result(**OTHERS[Encoder])) > 0.999


def test_the_exported_file_is_what_runs(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    result = optimized(ConvNet)
    path = result.export(tmp_path / "out.onnx")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (found,) = compiled({"x": images().numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(found), result(images()), rtol=0, atol=0)
    assert sqnr(plain_run(str(path), {"x": images()})[0], torch.from_numpy(found)) > 35


def test_threads_are_the_engines() -> None:
    runner = optimized(ConvNet, None).runner
    assert isinstance(runner, OpenVinoRunner)
    assert runner.compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_profile_has_each_kernel_by_its_path() -> None:
    """Which is how what loses time is found among the sites."""
    profile = optimized(Encoder).runner.profile(ENCODED)
    paths = {name.rpartition("/")[0] for name in profile}
    assert {"layers.0.attention.query", "layers.1.down", "layers.1.up"} <= paths
    assert all(seconds >= 0 for seconds in profile.values())


def test_what_it_cannot_load_is_an_error() -> None:
    pytest.importorskip("openvino")
    proto = model("g (float[2,3,3] x) => (float[2,3,3] y) { y = com.microsoft.Inverse(x) }", domains=["com.microsoft"])
    with pytest.raises(LoweringError, match=r"openvino cannot load the model: .*Inverse"):
        graphopt.optimize(proto, target="openvino", example_inputs={"x": torch.eye(3).repeat(2, 1, 1)})


@pytest.mark.parametrize(
    ("primitive", "isa", "is_int8"),
    [("brgemm_avx512_amx_I8", "amx", True), ("jit_avx512_I8", "avx512", True), ("jit_avx2_FP32", "avx2", False),
     ("ref_any_FP32", "", False)],
)  # fmt: skip
def test_a_kernel_says_its_instructions(primitive: str, isa: str, is_int8: bool) -> None:
    facts = {"layerType": "FullyConnected", "runtimePrecision": "u8", "originalLayersNames": "up",
             "primitiveType": primitive}  # fmt: skip
    node = SimpleNamespace(get_rt_info=lambda: {name: SimpleNamespace(astype=lambda kind, text=text: text)
                                                for name, text in facts.items()})  # fmt: skip
    compiled = SimpleNamespace(get_runtime_model=lambda: SimpleNamespace(get_ordered_ops=lambda: [node]))
    assert layers(compiled) == [Layer("FullyConnected", "up", "u8", is_int8, isa)]
