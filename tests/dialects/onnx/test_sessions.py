"""Sessions that read their weights from a file, and weights that are transposed when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from graphopt.dialects.onnx import export, functions, run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError
from graphopt.lowering.saturation import SAFE, max_abs
from graphopt.measure.machine import cpu_saturates
from tests.language import build, feeds

TEXT = "y = linear(relu(linear(x[2,32], V[64,32], A[64])), W[16,64], B[16])"


@pytest.mark.parametrize("level", ["disable", "all"])
def test_weights_from_a_file_are_the_same(level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = build("onnx", TEXT)
    assert isinstance(graph, OnnxGraph)
    given = feeds(graph)
    (expected,) = run.run(run.session(export.deployable(graph), level=level), given)
    monkeypatch.setattr(run, "_IN_FILE", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = run.session(export.deployable(graph), level=level)
    torch.testing.assert_close(run.run(session, given)[0], expected, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []  # the file is gone once the session has it


def test_a_transposed_weight_is_made_when_it_is_read() -> None:
    graph = build("onnx", TEXT)
    assert isinstance(graph, OnnxGraph)
    weight = graph.sites("linear")[0].required("weight")
    plain = graph.constant(weight)
    found = graph.add_transposed(weight, "other")  # type: ignore[arg-type]  # of this dialect
    again = graph.constant(found)
    assert plain is not None and again is not None and found.shape == (32, 64)
    assert torch.equal(again, plain.t()) and again.is_contiguous()
    held = found.native.const_value
    assert held is not None and held.numpy() is not held.numpy()
    np.testing.assert_array_equal(np.frombuffer(held.tobytes(), np.float32).reshape(32, 64), plain.t())
    with pytest.raises(GraphError, match="no constant matrix"):
        graph.add_transposed(graph.inputs[0], "third")  # type: ignore[arg-type]  # of this dialect


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("opset", [11, 21])
@pytest.mark.parametrize(("kn", "dtype"), [(False, "uint8"), (True, "uint8"), (False, "int8")])
def test_sums_of_integers_are_exact_on_every_cpu(
    saturates: bool, opset: int, kn: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and activations at the ends of what the integers hold, where two products do not fit in 16 bits."""
    weight = np.where(np.random.default_rng(0).random((16, 32)) < 0.5, -128, 127)
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    x = np.where(np.random.default_rng(1).random((5, 32)) < 0.2, low, high)
    body = functions.function(f"linear_int8{'__kn' if kn else ''}", opset)
    text = f"""g ({dtype}[5, 32] x, float s, {dtype} z, int8[{"32, 16" if kn else "16, 32"}] w, float[16] v)
        => (float[5, 16] y) {{ y = graphopt.{body.name}(x, s, z, w, v) }}"""
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("graphopt", 1)]
    proto = onnx.helper.make_model(
        onnx.parser.parse_graph(text), functions=[ir.to_proto(body)], opset_imports=opsets, ir_version=10
    )
    monkeypatch.setattr(run, "cpu_saturates", lambda flags: saturates or cpu_saturates(flags))
    session = run.session(ir.from_proto(proto))
    (found,) = run.run(session, {
        "x": torch.tensor(x, dtype=getattr(torch, dtype)), "s": torch.tensor(1.0), "v": torch.ones(16),
        "z": torch.tensor(3, dtype=getattr(torch, dtype)),
        "w": torch.tensor(weight.T.copy() if kn else weight, dtype=torch.int8),
    })  # fmt: skip
    np.testing.assert_array_equal(found, (x - 3) @ weight.T)


def test_halves_of_weights_never_saturate() -> None:
    """Whichever CPU this runs on: of all int8 numbers."""
    body = functions.function("linear_int8__kn", 21, in_halves=True)
    inputs = [onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.INT8, [256])]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, [256]) for name in ("w1", "w2")]
    nodes = [node for node in ir.to_proto(body).node if {*node.output} & {"two", "wi", "half", "rest", "w1", "w2"}]
    graph = onnx.helper.make_graph(nodes, "halves", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", 21)]
    weight = torch.arange(-128, 128, dtype=torch.int8)
    session = run.session(ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)))
    first, second = run.run(session, {"weight": weight})
    assert torch.equal(first + second, weight) and max(max_abs(first), max_abs(second)) <= SAFE
