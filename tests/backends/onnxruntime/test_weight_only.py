"""Weights alone in integers on onnxruntime: which kernels are built, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch

from graphopt.backends.onnxruntime import linear_int8
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.errors import LoweringError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import rewrite
from graphopt.lowering.backend import Runner
from graphopt.numerics import metrics, quantize
from tests.language import build, feeds, outputs

BACKEND = OnnxRuntime()


def lowered(graph: Graph) -> tuple[dict[str, int], list[torch.Tensor]]:
    """The kernels that the engine builds of a graph, and what they compute; checked as the pipeline does."""
    runner = BACKEND.compile(BACKEND.lower(graph)[0], threads=1)
    BACKEND.check(graph, runner)
    return runner.kernels(), runner(feeds(graph))


def stored_fused(graph: Graph, path: Path) -> list[str]:
    """The DequantizeLinear nodes that the engine still runs on initializers, at its EXTENDED level."""
    BACKEND.export(BACKEND.lower(graph)[0], path, metadata={})
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized := path.with_name("optimized.onnx"))
    ort.InferenceSession(str(path), options)
    model = onnx.load(optimized).graph
    constants = {tensor.name for tensor in model.initializer}
    return [node.name for node in model.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]


def put(graph: Graph, grid: quantize.Grid, weight: torch.Tensor, bits: int, block: int | None) -> object:
    """The dequantize of a rounded weight, emitted."""
    q, scale = graph.add_constant(grid.round(weight)), graph.add_constant(grid.scale)
    zero_point = None if grid.zero_point is None else graph.add_constant(grid.zero_point)
    axis = None if grid.scale.dim() == 0 else 1 if block else 0
    return graph.emit("dequantize", q, scale, zero_point, axis=axis, block=block or 0, bits=bits)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


FORMS = [
    *((bits, axis, None) for bits in (8, 4, 3, 2) for axis in (0, None)),
    *((bits, 0, block) for bits in (8, 4, 2) for block in (16, 32)),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "axis", "block"), FORMS)
@pytest.mark.parametrize("width", [96, 160])
def test_linear_is_one_kernel_whatever_the_form(
    bits: int, axis: int | None, block: int | None, symmetric: bool, width: int, tmp_path: Path
) -> None:
    graph = build("onnx", f"y = relu(x[batch,7,{width}])")
    weight, bias = normal(12, width), graph.add_constant(normal(12))
    grid = quantize.fit(weight, bits=bits, axis=axis, block=block, symmetric=symmetric)
    y = graph.emit("linear", graph.inputs[0], put(graph, grid, weight, bits, block), bias)  # type: ignore[arg-type]
    graph.set_outputs({"y": y})  # type: ignore[attr-defined]
    graph.sweep()
    kernels, (found,) = lowered(graph)
    assert kernels == {"MatMulNBits": 1}
    assert stored_fused(graph, tmp_path / "model.onnx") == []
    expected = torch.nn.functional.linear(feeds(graph)["x"], grid.values(grid.round(weight)), normal(12))
    assert metrics.sqnr(expected, found) > 40  # activations are rounded to int8 in blocks


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "axis", "block"), [form for form in FORMS if form[0] != 2 or form[2] is None])
@pytest.mark.parametrize("width", [32, 96, 160])
def test_table_is_gathered_in_integers(
    bits: int, axis: int | None, block: int | None, symmetric: bool, width: int, tmp_path: Path
) -> None:
    graph = build("onnx", "y = identity(ids[batch,5]:int64)")
    table = normal(9, width)
    grid = quantize.fit(table, bits=bits, axis=axis, block=block, symmetric=symmetric)
    rows = put(graph, grid, table, bits, block)
    graph.set_outputs({"y": graph.emit("embedding", rows, graph.inputs[0])})  # type: ignore[arg-type,attr-defined]
    graph.sweep()
    kernels, (found,) = lowered(graph)
    assert kernels == {"GatherBlockQuantized": 1}
    assert stored_fused(graph, tmp_path / "model.onnx") == []
    expected = grid.values(grid.round(table))[feeds(graph)["ids"]]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_tied_table_serves_rows_and_products() -> None:
    graph = build("onnx", "y = identity(ids[batch,5]:int64)")
    table = normal(9, 32)
    grid = quantize.fit(table, bits=4, block=16)
    rows = put(graph, grid, table, 4, 16)
    x = graph.emit("embedding", rows, graph.inputs[0])  # type: ignore[arg-type]
    graph.set_outputs({"y": graph.emit("linear", x, rows)})  # type: ignore[arg-type,attr-defined]
    graph.sweep()
    assert lowered(graph)[0] == {"GatherBlockQuantized": 1, "MatMulNBits": 1}


def test_conv_weight_becomes_float_as_nothing_reads_it_in_integers(tmp_path: Path) -> None:
    graph = build("onnx", "y = conv(x[1,4,8,8], dequantize(W[8,4,3,3]:int8:seed1, S[8]:values(0.5,0.25), axis=0))")
    assert lowered(graph)[0].keys() & {"DequantizeLinear", "Conv"} == {"Conv"}
    assert stored_fused(graph, tmp_path / "model.onnx") == []
    torch.testing.assert_close(lowered(graph)[1][0], outputs(graph)[0], rtol=1e-5, atol=1e-5)


def test_scale_for_each_input_has_no_kernel_and_none_is_promised() -> None:
    graph = build("onnx", "y = linear(x[2,8], dequantize(W[4,8]:int8:seed1, S[8]:values(0.5,0.25), axis=1))")
    _, logs = BACKEND.lower(graph)
    assert list(logs["matmul-nbits"].declined.values()) == [Decline("scale_per_input")]
    assert "MatMulNBits" not in lowered(graph)[0]
    torch.testing.assert_close(lowered(graph)[1][0], outputs(graph)[0], rtol=1e-5, atol=1e-5)


def test_check_names_the_linear_that_no_kernel_reads_in_integers() -> None:
    class Without(Runner):
        def __call__(self, feeds: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            return []

        def kernels(self) -> dict[str, int]:
            return {"MatMul": 1}

    graph = build("onnx", "y = linear(x[2,16], dequantize(W[4,16]:int8, S[4]:ones, axis=0))")
    with pytest.raises(LoweringError, match=r"1 weight-only linear were promised and onnxruntime built 0 .* linear"):
        BACKEND.check(graph, Without())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("axis", "block"), [(0, None), (None, None), (0, 16)])
def test_portable_file_gathers_bytes(axis: int | None, block: int | None, symmetric: bool, tmp_path: Path) -> None:
    graph = build("onnx", "y = identity(ids[batch,5]:int64)")
    table = normal(9, 64)
    grid = quantize.fit(table, axis=axis, block=block, symmetric=symmetric)
    rows = put(graph, grid, table, 8, block)
    graph.set_outputs({"y": graph.emit("embedding", rows, graph.inputs[0])})  # type: ignore[arg-type,attr-defined]
    graph.sweep()
    BACKEND.export(graph, tmp_path / "model.onnx", metadata={})
    model = onnx.load(tmp_path / "model.onnx").graph
    integers = next(tensor.name for tensor in model.initializer if tensor.dims == [9, 64])
    assert [node.op_type for node in model.node if integers in node.input] == ["Gather"]
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {"ids": feeds(graph)["ids"].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), outputs(graph)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, None), (4, 32)])
def test_portable_file_holds_packed_weights_in_standard_operators(
    bits: int, block: int | None, symmetric: bool, tmp_path: Path
) -> None:
    graph = build("onnx", "y = relu(x[2,64])")
    weight = normal(12, 64)
    grid = quantize.fit(weight, bits=bits, axis=0, block=block, symmetric=symmetric)
    y = graph.emit("linear", graph.inputs[0], put(graph, grid, weight, bits, block))  # type: ignore[arg-type]
    graph.set_outputs({"y": y})  # type: ignore[attr-defined]
    graph.sweep()
    BACKEND.export(graph, tmp_path / "model.onnx", metadata={}, opset=21)
    model = onnx.load(tmp_path / "model.onnx")
    scaled = ["Cast", *([] if symmetric else ["Sub"]), "Mul", "Transpose"]
    written = {8: scaled, 4: ["DequantizeLinear"]}[bits]  # the engine rounds activations behind the latter
    assert [node.op_type for node in model.graph.node] == [*written, "MatMul"]
    names = {8: ("INT8", "UINT8"), 4: ("INT4", "UINT4")}[bits]
    weights = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and 64 in tensor.dims)
    assert onnx.TensorProto.DataType.Name(weights.data_type) == names[0 if symmetric else 1]
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {"x": feeds(graph)["x"].numpy()})[0]
    expected = feeds(graph)["x"] @ grid.values(grid.round(weight)).T
    assert metrics.sqnr(expected, torch.from_numpy(found)) > (30 if bits == 4 else 100)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_rows_one_at_a_time_may_be_rounded_inside_the_kernel(scheme: str) -> None:
    """MatMulNBits is a form of an int8 linear: the same weights, activations rounded by block."""
    choice, ranges, read = {
        "dynamic": (linear_int8.DYNAMIC, "s, z = choose_qparams(x[n,72])\nq = quantize(x, s, z)", "s, z"),
        "static": (linear_int8.STATIC, "q = quantize(x[n,72], S[]:values(0.02), Z[]:uint8)", "S, Z"),
    }[scheme]
    graph = build("onnx", f"{ranges}\ny = linear_int8(q, {read}, W[16,72]:int8, V[16]:values(0.01,0.02), B[16])")
    taken = graph.clone()
    (log,) = rewrite(taken, [choice.only("MatMulNBits")]).values()
    taken.sweep()
    range_ = ["clip"] if scheme == "static" else []  # what the quantize cuts off
    assert log.hits == 1 and [node.kind for node in taken.nodes] == [*range_, "com.microsoft.MatMulNBits"]
    rows = {"x": torch.rand(3, 72, generator=torch.Generator().manual_seed(0)) * 4}
    expected, found = (BACKEND.compile(BACKEND.lower(one)[0], threads=1)(rows)[0] for one in (graph, taken))
    assert metrics.sqnr(expected, found) > 30
