"""The tensorrt target: which rules a file keeps, what it computes on the CPU, and which files are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import graphopt
from graphopt.backends import target
from graphopt.backends.tensorrt import faults
from graphopt.errors import LoweringError, UsageError
from graphopt.numerics.metrics import cosine, sqnr
from graphopt.result import Optimized
from tests.language import build
from tests.models import ConvNet, Encoder, images, model, padding, plain_run, seeded, tokens

ENCODED = {"ids": tokens(), "mask": padding()}


class Projecting(nn.Module):
    """A residual block whose other side is a conv too, and one whose other side is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.side = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.stem(x)
        y: Tensor = self.head(torch.relu(self.main(x) + self.side(x)))
        return y


def optimized(kind: type[nn.Module], **options: Any) -> Optimized:
    batches = [{"x": images(seed=seed)} for seed in range(4)]
    inputs, passes = {"x": images()}, "quantize{scheme=static}"
    if kind is Encoder:
        inputs, batches = ENCODED, [{"ids": tokens(seed=seed), "mask": padding()} for seed in range(4)]
    return graphopt.optimize(
        seeded(kind), passes, target="tensorrt", example_inputs=inputs, calibration=batches, **options
    )


@pytest.fixture(scope="module")
def results() -> dict[str, Optimized]:
    return {kind.__name__: optimized(kind) for kind in (ConvNet, Encoder, Projecting)}


KINDS = ["ConvNet", "Encoder", "Projecting"]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_keeps_the_rules(results: dict[str, Optimized], name: str, tmp_path: Path) -> None:
    """Read from the file alone, by other means than the emitter's own check."""
    proto = onnx.load(results[name].export(tmp_path / "out.onnx"))
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    made = {output: node for node in proto.graph.node for output in node.output}
    dequantized = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            is_weight = node.input[0] in stored
            assert stored[node.input[1]].shape == ((stored[node.input[0]].shape[_outputs(node, made, proto)],)
                                                   if is_weight else ())  # fmt: skip
            for zero_point in node.input[2:]:
                assert stored[zero_point].dtype == np.int8 and not stored[zero_point].any()
            assert is_weight or len(node.input) == 3
            assert not is_weight or stored[node.input[0]].dtype == np.int8
        if node.op_type == "Conv":
            assert {node.input[0], node.input[1]} <= dequantized
            assert stored[node.input[2]].dtype == np.float32
        if node.op_type in ("Relu", "LayerNormalization", "Gelu", "Softmax"):
            assert not set(node.input) & dequantized
    linears = [node for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in dequantized]
    assert len(linears) == {"ConvNet": 1, "Encoder": 12, "Projecting": 0}[name]
    assert all(node.input[0] in dequantized for node in linears)


def _outputs(dequantize: onnx.NodeProto, made: dict[str, onnx.NodeProto], proto: onnx.ModelProto) -> int:
    """The axis of outputs of the weight that a node dequantizes, which its `axis` must name."""
    (reader,) = [node for node in proto.graph.node if dequantize.output[0] in node.input]
    axis = {"Conv": 0, "MatMul": 1}[reader.op_type]
    assert onnx.helper.get_node_attr_value(dequantize, "axis") == axis
    return axis


@pytest.mark.parametrize(("name", "sides"), [
    ("ConvNet", [["Conv", "DequantizeLinear"]]),
    ("Projecting", [["Conv", "DequantizeLinear"], ["Conv", "DequantizeLinear"]]),
])  # fmt: skip
def test_a_residual_add_reads_one_conv_and_one_dequantize(
    results: dict[str, Optimized], name: str, sides: list[list[str]], tmp_path: Path
) -> None:
    nodes = onnx.load(results[name].export(tmp_path / "out.onnx")).graph.node
    made = {output: node.op_type for node in nodes for output in node.output}
    adds = [node for node in nodes if node.op_type == "Add" and all(value in made for value in node.input)]
    assert [sorted(made[value] for value in add.input) for add in adds] == sides


@pytest.mark.parametrize("name", KINDS)
def test_it_computes_what_the_ops_mean(results: dict[str, Optimized], name: str, tmp_path: Path) -> None:
    """The file in ONNX Runtime without optimizations, against the folded graph and the module."""
    result, kind = results[name], {"ConvNet": ConvNet, "Encoder": Encoder, "Projecting": Projecting}[name]
    path = result.export(tmp_path / "out.onnx")
    others = {"ids": tokens(3, 11, seed=5), "mask": padding(3, 11)} if name == "Encoder" else {"x": images(3, seed=9)}
    (ops,) = result.folded.evaluate(others, result.folded.outputs)
    (found,) = plain_run(str(path), others)
    assert sqnr(ops, found) > 60
    torch.testing.assert_close(result(**others), found, rtol=0, atol=0)
    assert cosine(seeded(kind)(**others), found) > 0.999


def test_the_report_says_that_tensorrt_never_ran(results: dict[str, Optimized]) -> None:
    report = results["ConvNet"].report
    assert "rules checked, never run by TensorRT" in str(report)
    assert report.kernels["Conv int8"] == 3 and report.kernels["MatMul int8"] == 1 and report.speed == []


def test_nothing_is_timed(results: dict[str, Optimized], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tensorrt does not run here"):
        results["ConvNet"].bench(images())
    graph = results["ConvNet"].folded
    with pytest.raises(UsageError, match="tensorrt does not run here"):
        target("tensorrt").ratios(graph, graph, [{"x": images()}])
    with pytest.raises(UsageError, match="tensorrt does not run here"):
        optimized(ConvNet, measure=True)
    monkeypatch.delenv("GRAPHOPT_MEASURE")
    assert optimized(ConvNet).report.speed == []


def test_dynamic_quantization_is_declined() -> None:
    inputs = {"x": images()}
    result = graphopt.optimize(seeded(ConvNet), "quantize{scheme=dynamic}", target="tensorrt", example_inputs=inputs)
    (record,) = [record for record in result.report.passes if record.name == "quantize"]
    reasons = {f"tensorrt has no fast dynamic {op}; static needs calibration" for op in ("conv", "linear")}
    assert set(record.declined.values()) == reasons
    assert "QuantizeLinear" not in result.report.kernels


def test_a_float_model_is_written_as_it_is() -> None:
    result = graphopt.optimize(seeded(Encoder), target="tensorrt", example_inputs=ENCODED)
    torch.testing.assert_close(result(**ENCODED), seeded(Encoder)(**ENCODED), rtol=0, atol=1e-5)
    assert "Attention" not in result.report.kernels and result.report.kernels["LayerNormalization"] == 4


def test_int8_ops_are_refused() -> None:
    graph = build("onnx", "y = linear_int8(x[2,8]:uint8, S[]:ones, Z[]:uint8, W[4,8]:int8, V[4]:ones)")
    with pytest.raises(LoweringError, match=r"is linear_int8, and tensorrt reads Q/DQ .*: leave out fold-int8"):
        target("tensorrt").lower(graph)


def test_through_graphsurgeon_and_back(results: dict[str, Optimized]) -> None:
    surgical = results["ConvNet"].graphsurgeon()
    assert isinstance(surgical, gs.Graph) and {"stem", "conv1", "head"} <= {
        node.name.rpartition("/")[0] for node in surgical.nodes
    }
    again = graphopt.optimize(surgical, target="tensorrt", example_inputs={"x": images()})
    assert again.report.kernels == results["ConvNet"].report.kernels
    (y,) = again(x=images()).values()
    torch.testing.assert_close(y, results["ConvNet"](images()), rtol=1e-5, atol=1e-6)


# --- rules ---------------------------------------------------------------------------------------------------------

CONV = "g (float[1,4,6,6] x) => (float[1,4,6,6] y) {"
PARAMETERS: dict[str, Any] = {
    "s": np.float32(0.1), "z": np.int8(0), "w": np.ones((4, 4, 1, 1), np.int8), "v": np.full(4, 0.1, np.float32),
    "f": np.ones((4, 4, 1, 1), np.float32), "b": np.zeros(4, np.float32),
}  # fmt: skip
QUANTIZED = """
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    k = DequantizeLinear <axis = 0> (w, v)
    """
CLEAN = QUANTIZED + "c = Conv(d, k, b)\n y = Relu(c) }"


def surgical(body: str, changed: dict[str, Any]) -> gs.Graph:
    arrays = {name: np.asarray(array) for name, array in (PARAMETERS | changed).items()}
    used = {name: array for name, array in arrays.items() if f" {name}," in body or f"({name}," in body
            or f" {name})" in body}  # fmt: skip
    graph = gs.import_onnx(model(CONV + body, used, opset=20))
    for node in graph.nodes:
        node.name = node.outputs[0].name
    return graph


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero point": (CLEAN, {"z": np.int8(3)}, r"q \(QuantizeLinear\) has a zero point of 3 in int8; it is 0 in int8"),
    "unsigned": (CLEAN, {"z": np.uint8(0)}, r"q \(QuantizeLinear\) has a zero point of 0 in uint8; it is 0 in int8"),
    "no zero point": (
        CLEAN.replace("(x, s, z)", "(x, s)").replace("(q, s, z)", "(q, s)"), {},
        r"q \(QuantizeLinear\) makes uint8, as it has no zero point",
    ),
    "scale": (CLEAN, {"s": np.float32(0)}, r"q \(QuantizeLinear\) has a scale of 0; scales are above 0"),
    "computed scale": (
        CLEAN.replace("(x, s, z)", "(x, t, z)").replace("q =", "t = ReduceMax <keepdims = 0> (x)\n q ="), {},
        r"q \(QuantizeLinear\) has parameters that are computed at run time; quantize with scheme=static",
    ),
    "activation per channel": (
        CLEAN, {"s": np.full(4, 0.1, np.float32), "z": np.zeros(4, np.int8)},
        r"q \(QuantizeLinear\) has 4 scales for an activation; it has one",
    ),
    "weight axis": (
        CLEAN.replace("axis = 0", "axis = 1"), {},
        r"c \(Conv\) has a weight with scales along axis 1; they are along its outputs, axis 0",
    ),
    "weight type": (CLEAN, {"w": np.ones((4, 4, 1, 1), np.uint8)}, r"k \(DequantizeLinear\) reads weights in uint8"),
    "float weight": (
        QUANTIZED + "c = Conv(d, f, b)\n y = Relu(c) }", {},
        r"c \(Conv\) multiplies integers with f, which is float; quantize both or none",
    ),
    "float input": (
        QUANTIZED + "c = Conv(x, k, b)\n e = Add(c, d)\n y = Relu(e) }", {},
        r"c \(Conv\) multiplies integers with x, which is float; quantize both or none",
    ),
    "between conv and relu": (
        QUANTIZED + "c = Conv(d, k, b)\n p = QuantizeLinear(c, s, z)\n e = DequantizeLinear(p, s, z)\n y = Relu(e) }",
        {}, r"y \(Relu\) is fused with c, but Q/DQ stand between them; take them out",
    ),
    "between conv and add": (
        QUANTIZED + "c = Conv(d, k, b)\n p = QuantizeLinear(c, s, z)\n e = DequantizeLinear(p, s, z)\n y = Add(e, d) }",
        {}, r"y \(Add\) is fused with c, but Q/DQ stand between them; take them out",
    ),
    "float residual": (
        QUANTIZED + "c = Conv(d, k, b)\n y = Add(x, c) }", {},
        r"y \(Add\) is fused with c, and its other side x is float; take it out of ignore",
    ),
    "dynamic": (
        "q, t, u = DynamicQuantizeLinear(x)\n y = DequantizeLinear(q, t, u) }", {},
        r"q \(DynamicQuantizeLinear\) is no operator of its explicit quantization",
    ),
}  # fmt: skip


def test_a_file_by_the_rules_has_no_fault() -> None:
    assert list(faults(surgical(CLEAN, {}))) == []
    assert list(faults(surgical(QUANTIZED + "c = Conv(d, k, b)\n y = Add(d, c) }", {}))) == []


@pytest.mark.parametrize("rule", REFUSED)
def test_what_breaks_a_rule_is_named(rule: str) -> None:
    body, changed, expected = REFUSED[rule]
    assert re.match(expected, next(faults(surgical(body, changed)), "no fault"))


def test_a_file_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    """As onnxruntime's uint8 would be."""
    batches = [{"x": images(seed=seed)} for seed in range(2)]
    made = graphopt.optimize(seeded(ConvNet), "quantize", example_inputs={"x": images()}, calibration=batches)
    path = made.export(tmp_path / "u8.onnx", portable=True)
    with pytest.raises(LoweringError, match=r"stem.* has a zero point of \d+ in uint8; it is 0 in int8"):
        graphopt.optimize(path, target="tensorrt", example_inputs={"x": images()})


def test_a_bias_in_integers_becomes_float() -> None:
    body = QUANTIZED + "i = DequantizeLinear <axis = 0> (j, m)\n c = Conv(d, k, i)\n y = Relu(c) }"
    steps, scale = np.array([100, -50, 3, 0], np.int32), np.full(4, 0.01, np.float32)
    proto = model(CONV + body, {name: np.asarray(PARAMETERS[name]) for name in "szwv"} | {"j": steps, "m": scale},
                  opset=20)  # fmt: skip
    feeds = {"x": torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))}
    result = graphopt.optimize(proto, target="tensorrt", example_inputs=feeds)
    (conv,) = [node for node in result.graphsurgeon().nodes if node.op == "Conv"]
    np.testing.assert_allclose(conv.inputs[2].values, steps * scale, rtol=1e-6)
    (expected,) = plain_run(proto, feeds)
    torch.testing.assert_close(result(**feeds)["y"], expected, rtol=1e-6, atol=1e-6)
