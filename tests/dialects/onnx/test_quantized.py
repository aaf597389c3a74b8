"""Files that other tools quantized: read as ops, with the numbers they have, lowered to the kernels they had."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import graphopt
from graphopt.capture import capture
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.numerics import metrics
from graphopt.numerics.quantize import pack
from graphopt.result import Optimized
from tests.language import BITS, build, producer
from tests.models import model as from_text
from tests.models import plain_run

SOURCE = """
    a = relu(conv(x[2,3,8,8], U[8,3,3,3], A[8], padding=[1,1,1,1]))
    b = add(conv(a, V[8,8,3,3], B[8], padding=[1,1,1,1]), a)
    p = max_pool(b, kernel=[2,2], stride=[2,2])
    c = leaky_relu(conv(p, W[8,1,3,3], padding=[1,1,1,1], groups=8))
    d = concat(c, p, axis=1)
    e = mul(d, sigmoid(d))
    m = mean(average_pool(e, kernel=[2,2], stride=[2,2]), axes=[2,3])
    f = reshape(m, N[2]:int64:values(2,16))
    y = linear(relu(linear(f, P[16,16])), R[10,16])
"""
OPS = {"conv": 3, "linear": 2, "add": 1, "mul": 1, "concat": 1, "sigmoid": 1, "leaky_relu": 1, "average_pool": 1}
FLOAT_KERNELS = {"Conv", "FusedConv", "MatMul", "Gemm", "FusedGemm", "FusedMatMul", "Add", "Mul", "Concat", "Sigmoid"}


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in float, as another exporter would write it."""
    graph = build("onnx", SOURCE)
    assert isinstance(graph, OnnxGraph)
    path = tmp_path_factory.mktemp("source") / "float.onnx"
    ir.save(onnx_export.deployable(graph, 17), path)
    return path


def batch(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((2, 3, 8, 8)).astype(np.float32)


class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self) -> None:
        self.left = iter([{"x": batch(seed)} for seed in range(4)])

    def get_next(self) -> Any:
        return next(self.left, None)


def as_it_stands(model: Path | onnx.ModelProto, feeds: dict[str, np.ndarray[Any, Any]]) -> torch.Tensor:
    """What a file computes, without any of the engine's optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return torch.from_numpy(ort.InferenceSession(given, options).run(None, feeds)[0])


def captured(result: Optimized) -> Counter[str]:
    return Counter(node.kind for node in result.captured.nodes)


def assert_kept(
    result: Optimized, expected: torch.Tensor, feeds: dict[str, Any], step: float, whole: bool = True
) -> None:
    """The ops compute what the file did, exactly but for rounding, and the lowered graph within a step.

    whole: all of it is quantized, so that a further pass finds nothing.
    """
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    raised = result.captured.evaluate(tensors, result.captured.outputs)[0]
    assert metrics.max_error(expected, raised) <= 1e-5 * float(expected.abs().max()) + 1e-7
    lowered = next(iter(result(**tensors).values()))
    assert metrics.max_error(expected, lowered) <= step
    written = onnx_export.deployable(result.lowered)  # type: ignore[arg-type]
    ops = ",".join(sorted(captured(result).keys() & {"linear", "conv", "matmul", "embedding"}))
    pass_ = f"quantize{{scheme=dynamic targets=[{ops}]}}"
    again = graphopt.optimize(ir.to_proto(written), pass_, example_inputs=tensors)
    record = next(record for record in again.report.passes if record.name == "quantize")
    assert record.changed == 0 or not whole, record.eligible


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("weights", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("activations", ["QUInt8", pytest.param("QInt8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_static_files(
    source: Path, tmp_path: Path, form: str, activations: str, weights: str, per_channel: bool
) -> None:
    if (activations, weights) == ("QInt8", "QUInt8"):
        pytest.skip("onnxruntime's quantizer refuses unsigned weights for signed activations")
    quantization.quantize_static(
        str(source), str(path := tmp_path / "int8.onnx"), Batches(), per_channel=per_channel,
        quant_format=quantization.QuantFormat[form], activation_type=quantization.QuantType[activations],
        weight_type=quantization.QuantType[weights],
        reduce_range=form == "QOperator" and BITS < 8,  # what the file itself computes saturates
    )  # fmt: skip
    feeds = {"x": batch(9)}
    result = graphopt.optimize(path, example_inputs=feeds)
    assert {op: count for op, count in captured(result).items() if op in OPS} == OPS
    assert not any("." in kind for kind in captured(result)), captured(result)
    known = [note for note in result.report.notes if note.startswith("this file is quantized already (QDQ")]
    assert known and "3 conv, 1 leaky_relu, 2 linear" in known[0]
    kernels = result.report.kernels
    assert not FLOAT_KERNELS & set(kernels), kernels
    assert kernels["QLinearConv"] == 3 and kernels["MatMulIntegerToFloat"] == 2
    last = [node for node in onnx.load(path).graph.node if node.op_type == "DequantizeLinear"][-1]
    scale = next(t for t in onnx.load(path).graph.initializer if t.name == last.input[1])
    assert_kept(result, as_it_stands(path, feeds), feeds, step=2.01 * float(numpy_helper.to_array(scale)))


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("weights", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("convs", [True, False])
def test_dynamic_files(source: Path, tmp_path: Path, weights: str, per_channel: bool, convs: bool) -> None:
    kinds = ["MatMul", "Gemm", *["Conv"] * convs]
    quantization.quantize_dynamic(
        str(source), str(path := tmp_path / "int8.onnx"), op_types_to_quantize=kinds, per_channel=per_channel,
        weight_type=quantization.QuantType[weights],
    )  # fmt: skip
    feeds = {"x": batch(9)}
    result = graphopt.optimize(path, example_inputs=feeds)
    assert not any("Integer" in kind or "Quantize" in kind for kind in captured(result)), captured(result)
    ops = "3 conv, 2 linear" if convs else "2 linear"
    assert f"this file is quantized already (scales chosen at run time): {ops}" in result.report.notes
    kernels = result.report.kernels
    assert sum(kernels.get(kernel, 0) for kernel in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")) == 2, kernels
    assert "ConvInteger" not in kernels  # ten times slower than a float conv
    assert_kept(result, as_it_stands(path, feeds), feeds, step=1e-3, whole=convs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_weight_only_files(tmp_path: Path, bits: int, symmetric: bool, form: str) -> None:
    if (form, bits) == ("QDQ", 8):
        pytest.skip("onnxruntime's quantizer writes 8 bits as QOperator only")
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    nodes = [make_node("MatMul", ["x", "W"], ["h"]), make_node("Add", ["h", "B"], ["y"])]
    float_model = model(nodes, {"W": weight, "B": np.ones(24, np.float32)}, {"x": (3, 64)})
    quantizer = MatMulNBitsQuantizer(
        float_model, bits=bits, block_size=32, is_symmetric=symmetric, quant_format=quantization.QuantFormat[form],
    )  # fmt: skip
    quantizer.process()
    proto = quantizer.model.model
    onnx.save(proto, path := tmp_path / "nbits.onnx")
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)}
    result = graphopt.optimize(path, example_inputs=feeds)
    assert captured(result) == {"linear": 1, "dequantize": 1}
    weight_of = result.captured.sites("dequantize")[0]
    assert weight_of.attributes == {"axis": 1, "block": 32, "bits": bits}
    assert "this file is quantized already (weights alone): 1 linear" in result.report.notes
    assert result.report.kernels == {"MatMulNBits": 1}
    expected = as_it_stands(path, feeds)
    assert_kept(result, expected, feeds, step=0.02 * float(expected.abs().max()))  # the kernel rounds activations


def model(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], inputs: dict[str, Sequence[int]], opset: int = 21
) -> onnx.ModelProto:
    """A model of float inputs that returns y."""
    graph = make_graph(
        list(nodes), "graph",
        [make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [make_opsetid("", opset), make_opsetid("com.microsoft", 1)]
    return make_model(graph, opset_imports=opsets, ir_version=10)


def contrib(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return make_node(op_type, inputs, outputs, domain="com.microsoft", **attributes)


RNG = np.random.default_rng(3)
SCALES: dict[str, Any] = {"s": np.float32(0.02), "z": np.uint8(120), "t": np.float32(0.05), "u": np.uint8(128)}
KN: dict[str, Any] = {
    "W": RNG.integers(-90, 90, (16, 8)).astype(np.int8),
    "v": RNG.uniform(0.01, 0.02, 8).astype(np.float32),
}
ZEROS: dict[str, Any] = {"Z": np.zeros(8, np.int8), "b": np.arange(8, dtype=np.float32)}
STEPS = make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
BACK = make_node("DequantizeLinear", ["r", "t", "u"], ["y"])

BY_HAND: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str]] = {
    "QLinearMatMul": (
        [STEPS, make_node("QLinearMatMul", ["q", "s", "z", "W", "v", "Z", "t", "u"], ["r"]), BACK],
        SCALES | KN | ZEROS, "MatMulIntegerToFloat",
    ),
    "QGemm in floats": (
        [STEPS, contrib("QGemm", ["q", "s", "z", "W", "v", "Z", "c"], ["y"])],
        SCALES | KN | ZEROS | {"c": np.arange(-400, 400, 100, dtype=np.int32)}, "MatMulIntegerToFloat",
    ),
    "QGemm transposed": (
        [STEPS, contrib("QGemm", ["q", "s", "z", "N", "v", "Z", "", "t", "u"], ["r"], transB=1), BACK],
        SCALES | KN | ZEROS | {"N": KN["W"].T.copy()}, "MatMulIntegerToFloat",
    ),
    "MatMulIntegerToFloat": (
        [STEPS, contrib("MatMulIntegerToFloat", ["q", "W", "s", "v", "z", "", "b"], ["y"])],
        SCALES | KN | ZEROS, "MatMulIntegerToFloat",
    ),
    "zero points a column": (
        [STEPS, contrib("MatMulIntegerToFloat", ["q", "W", "s", "v", "z", "Z", "b"], ["y"])],
        SCALES | ZEROS | {
            "W": RNG.integers(0, 255, (16, 8)).astype(np.uint8), "v": KN["v"],
            "Z": np.arange(40, 48, dtype=np.uint8),
        }, "MatMulIntegerToFloat",
    ),
    "DynamicQuantizeMatMul": (
        [contrib("DynamicQuantizeMatMul", ["x", "W", "v", "", "b"], ["y"])], KN | ZEROS, "DynamicQuantizeMatMul",
    ),
    "s8 activations of two inputs": (
        [make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.INT8),
         make_node("DequantizeLinear", ["q", "s"], ["d"]), make_node("DequantizeLinear", ["W", "v"], ["e"], axis=1),
         make_node("MatMul", ["d", "e"], ["h"]), make_node("Add", ["h", "b"], ["y"])],
        SCALES | KN | ZEROS, "MatMulIntegerToFloat",
    ),
    "a transpose behind the weight": (
        [STEPS, make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
         make_node("DequantizeLinear", ["N", "v", "Z"], ["e"], axis=0),
         make_node("Transpose", ["e"], ["f"], perm=[1, 0]), make_node("MatMul", ["d", "f"], ["y"])],
        SCALES | KN | ZEROS | {"N": KN["W"].T.copy()}, "MatMulIntegerToFloat",
    ),
    "scales as vectors of one": (
        [make_node("QuantizeLinear", ["x", "S", "Y"], ["q"]), make_node("DequantizeLinear", ["q", "S", "Y"], ["d"]),
         make_node("DequantizeLinear", ["W", "V", "X"], ["e"]), make_node("DequantizeLinear", ["c", "C"], ["g"]),
         make_node("Gemm", ["d", "e", "g"], ["y"])],
        KN | {"S": np.full(1, 0.02, np.float32), "Y": np.full(1, 120, np.uint8), "V": np.full(1, 0.01, np.float32),
              "X": np.zeros(1, np.int8), "c": np.arange(-400, 400, 100, dtype=np.int32),
              "C": np.full(1, 0.0002, np.float32)}, "MatMulIntegerToFloat",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_forms_by_hand(name: str) -> None:
    nodes, weights, kernel = BY_HAND[name]
    used = {one for node in nodes for one in node.input}
    proto = model(nodes, {one: array for one, array in weights.items() if one in used}, {"x": (4, 16)})
    feeds = {"x": np.random.default_rng(5).standard_normal((4, 16)).astype(np.float32)}
    result = graphopt.optimize(proto, example_inputs=feeds)
    assert captured(result)["linear"] == 1 and not any("." in kind for kind in captured(result)), captured(result)
    assert result.report.kernels[kernel] == 1 and not FLOAT_KERNELS & set(result.report.kernels), result.report.kernels
    # one step of an output in integers, else the rounding of floats
    assert_kept(result, as_it_stands(proto, feeds), feeds, step=0.0501 if nodes[-1] is BACK else 1e-3)


def test_products_of_two_activations_are_matmul() -> None:
    both = [
        make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), make_node("QuantizeLinear", ["k", "s", "z"], ["w"]),
        make_node("QLinearMatMul", ["q", "s", "z", "w", "s", "z", "t", "u"], ["r"]), BACK,
    ]  # fmt: skip
    proto = model(both, SCALES, {"x": (2, 4, 16), "k": (2, 16, 4)})
    feeds = {name: np.random.default_rng(5).standard_normal(shape).astype(np.float32)
             for name, shape in {"x": (2, 4, 16), "k": (2, 16, 4)}.items()}  # fmt: skip
    result = graphopt.optimize(proto, example_inputs=feeds)
    assert captured(result)["matmul"] == 1 and "this file is quantized already (QDQ, QOperator): 1 matmul" in (
        result.report.notes
    )
    assert_kept(result, as_it_stands(proto, feeds), feeds, step=0.0501)


@pytest.mark.parametrize(
    ("opset", "axis", "kind"), [(12, 1, "com.microsoft.QLinearSoftmax"), (12, 2, "softmax"), (13, 1, "softmax")]
)
def test_a_softmax_over_several_axes_stays_as_it_is(opset: int, axis: int, kind: str) -> None:
    softmax = contrib("QLinearSoftmax", ["q", "s", "z", "t", "u"], ["r"], axis=axis, opset=opset)
    proto = model([STEPS, softmax, BACK], SCALES | {"t": np.float32(1 / 256), "u": np.uint8(0)}, {"x": (2, 3, 4)})
    feeds = {"x": np.random.default_rng(5).standard_normal((2, 3, 4)).astype(np.float32)}
    result = graphopt.optimize(proto, example_inputs=feeds, measure=False)
    assert captured(result)[kind] == 1
    found = next(iter(result(**feeds).values()))
    assert metrics.max_error(as_it_stands(proto, feeds), torch.as_tensor(found)) <= 1.001 / 256


def test_table_in_blocks_is_an_embedding() -> None:
    integers = torch.from_numpy(np.random.default_rng(0).integers(0, 16, (9, 32)).astype(np.uint8))
    weights = {"T": pack(integers, 4).numpy(), "s": RNG.uniform(0.1, 0.2, (9, 2)).astype(np.float32)}
    gather = contrib("GatherBlockQuantized", ["T", "ids", "s"], ["y"], block_size=16, bits=4, quantize_axis=1)
    proto = model([gather], weights, {})
    proto.graph.input.append(make_tensor_value_info("ids", TensorProto.INT64, (5,)))
    feeds = {"ids": np.arange(5)}
    result = graphopt.optimize(proto, example_inputs=feeds)
    assert captured(result) == {"embedding": 1, "dequantize": 1}
    assert result.report.kernels == {"GatherBlockQuantized": 1}
    assert_kept(result, as_it_stands(proto, feeds), feeds, step=1e-6)


def test_attention_in_integers_stays_as_it_is() -> None:
    integers = RNG.integers(-90, 90, (16, 48)).astype(np.int8)
    weights = {"W": integers, "v": np.float32(0.01), "b": np.zeros(48, np.float32), **{k: SCALES[k] for k in "sz"}}
    attention = contrib("QAttention", ["q", "W", "b", "s", "v", "", "z"], ["y"], num_heads=2)
    proto = model([STEPS, attention], weights, {"x": (1, 4, 16)})
    feeds = {"x": np.random.default_rng(5).standard_normal((1, 4, 16)).astype(np.float32)}
    result = graphopt.optimize(proto, example_inputs=feeds)
    assert captured(result) == {"quantize": 1, "com.microsoft.QAttention": 1}
    noted = "this file is quantized already (QDQ, QOperator): no op; left as they are: 1 QAttention"
    assert noted in result.report.notes and result.report.kernels["QAttention"] == 1


def _alpha(node: onnx.NodeProto) -> None:
    node.attribute.extend([onnx.helper.make_attribute("alpha", 0.5)])


def _computed_scale(node: onnx.NodeProto) -> None:
    node.input[4] = "k"


@pytest.mark.parametrize("change", [_alpha, _computed_scale])
def test_what_no_op_means_stays_as_it_is(change: Callable[[onnx.NodeProto], None]) -> None:
    gemm = contrib("QGemm", ["q", "s", "z", "W", "v", "Z"], ["y"])
    change(gemm)
    weights = {name: array for name, array in (SCALES | KN | ZEROS).items() if name in {*gemm.input, "s", "z"}}
    proto = model([STEPS, gemm], weights, {"x": (4, 16), "k": (8,)})
    graph = OnnxGraph.from_model(proto)
    assert "com.microsoft.QGemm" in [node.kind for node in graph.nodes]


def test_int8_activations_are_written_with_their_zero_point() -> None:
    """onnxruntime makes uint8 of them, and its own type inference then fails on an `output_dtype` of int8."""
    graph = build("onnx", "q = quantize(x[2,8], S[]:values(0.1))\nd = dequantize(q, S)\ny = linear(d, W[4,8])")
    assert isinstance(graph, OnnxGraph)
    model = onnx_export.deployable(graph)
    moves = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert [len(node.inputs) for node in moves] == [3, 3] and not any(node.attributes for node in moves)
    feeds = {"x": torch.randn(2, 8, generator=torch.Generator().manual_seed(0))}
    (found,) = onnx_run.run(onnx_run.session(model, level="all"), feeds)
    torch.testing.assert_close(found, graph.evaluate(feeds, graph.outputs)[0], rtol=1e-5, atol=1e-5)


def test_a_stored_weight_is_found_behind_a_transpose() -> None:
    """Portable files store it (out, in), and MatMulInteger reads (in, out)."""
    weight = torch.randint(-127, 127, (5, 4), dtype=torch.int8)
    proto = from_text(
        """g (float[n,4] x) => (float[n,5] y) {
            q, s, z = DynamicQuantizeLinear(x) t = Transpose<perm = [1,0]>(w) i = MatMulInteger(q, t, z)
            f = Cast<to = 1>(i) m = Mul(s, v) y = Mul(f, m)}""",
        {"w": weight, "v": torch.rand(5)},
    )  # fmt: skip
    graph = capture(proto, "onnx").graph
    (site,) = graph.sites("linear")
    stored = producer(site.required("weight")).required("x")
    assert torch.equal(torch.as_tensor(graph.constant(stored)), weight)


# --- cast and scaled -------------------------------------------------------------------------------------------------

SCALED = "f = Cast<to = 1>(Q) w = Mul(f, S)"
NO_WEIGHTS = {
    "a scale of more axes": (f"{SCALED} y = MatMul(x, w)", "float[n,16] x", (16, 6), (1, 1, 1)),
    "three axes": (f"{SCALED} y = MatMul(x, w)", "float[3,n,16] x", (3, 16, 6), (1, 1, 6)),
    "one axis": (f"{SCALED} y = MatMul(x, w)", "float[n,16] x", (16,), (16,)),
    "scales along both axes": (f"{SCALED} y = MatMul(x, w)", "float[n,16] x", (16, 6), (16, 6)),
    "a product of constants": (f"{SCALED} p = MatMul(V, w) y = Add(x, p)", "float[n,6] x", (16, 6), (1, 6)),
    "a weight and a bias": (f"{SCALED} y = Gemm(x, w, w)", "float[16,16] x", (16, 16), (1, 16)),
    "half of an integer": ("f = Cast<to = 1>(Q) s = Sub(f, H) w = Mul(s, S) y = MatMul(x, w)", "float[n,16] x",
                           (16, 6), (1, 6)),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_integers_in_floats_that_are_no_weight_of_a_linear_are_folded(what: str) -> None:
    body, given, shape, scales = NO_WEIGHTS[what]
    generator = torch.Generator().manual_seed(0)
    stored = {
        "Q": torch.randint(-100, 100, shape, generator=generator, dtype=torch.int8),
        "S": torch.rand(scales, generator=generator), "V": torch.rand(1, 16, generator=generator),
        "H": torch.tensor(0.5),
    }  # fmt: skip
    used = {name: tensor for name, tensor in stored.items() if f"{name})" in body or f"({name}," in body}
    proto = from_text(f"g ({given}) => (float[] y) {{ {body} }}", used)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    sizes = [int(size) if size.isdigit() else 5 for size in given.split("[")[1].split("]")[0].split(",")]
    x = torch.randn(sizes, generator=generator)
    captured = capture(proto, "onnx", example_inputs={"x": x})
    assert "dequantize" not in {node.kind for node in captured.graph.nodes}
    (found,) = captured.graph.evaluate({"x": x}, captured.graph.outputs)
    (expected,) = plain_run(proto, {"x": x})
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)
