"""Files with custom operators: what defines them is registered, or nothing is run and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset
from typer.testing import CliRunner

import graphopt
from graphopt.cli.app import app
from graphopt.dialects.onnx import custom_operators
from graphopt.errors import GraphError, LoweringError, PassError, UsageError
from tests.language import build
from tests.models import model

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
OWN = Opset("own.ops", 1)


@script(OWN)
def Twice(x: Any) -> Any:
    return op.Add(x, x)


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_operators, "_functions", {})
    monkeypatch.setattr(custom_operators, "_libraries", {})


def custom() -> onnx.ModelProto:
    text = "g (float[n,64] x) => (float[n,64] y) { a = MatMul(x, W)  b = own.ops.Twice(a)  y = MatMul(b, V) }"
    draw = torch.Generator().manual_seed(1)
    proto = model(text, {name: torch.randn(64, 64, generator=draw) / 8 for name in "WV"}, opset=21)
    proto.opset_import.append(onnx.helper.make_opsetid("own.ops", 1))
    return proto


def test_a_function_of_onnxscript_makes_it_a_graph_of_ops() -> None:
    small = graphopt.optimize(custom(), "quantize{scheme=dynamic}", example_inputs=X, custom_ops=[Twice], measure=False)
    assert [record.changed for record in small.report.passes if record.name == "quantize"] == [2]
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in custom().graph.initializer}
    wanted = (X.numpy() @ weights["W"] * 2) @ weights["V"]
    assert np.abs(small(X)["y"].numpy() - wanted).max() < 0.03 * np.abs(wanted).max()
    assert {node.kind for node in small.transformed.nodes}.isdisjoint({"own.ops.Twice"})


@pytest.mark.parametrize(
    "passes",
    [None, "quantize{scheme=weight-only}", "quantize{scheme=dynamic}", "sparsify{amount=0.5}", "low-rank{rank=8}"],
)
def test_without_a_definition_what_needs_no_run_works(passes: str | None, tmp_path: Path) -> None:
    small = graphopt.optimize(custom(), passes, example_inputs=X)
    (note,) = [note for note in small.report.notes if "own.ops.Twice" in note]
    assert "only the shapes of outputs are checked" in note
    assert small.report.agreement == [] and small.report.kernels == {}
    asked = [record for record in small.report.passes if passes and record.name == passes.partition("{")[0]]
    assert all(record.changed == 2 for record in asked)
    written = onnx.load(small.export(tmp_path / "small.onnx"))
    assert [node.domain for node in written.graph.node if node.op_type == "Twice"] == ["own.ops"]
    with pytest.raises(LoweringError, match=r"onnxruntime does not know own\.ops\.Twice: .*custom_ops="):
        small(X)


def test_what_needs_a_run_says_what_is_missing() -> None:
    with pytest.raises(PassError, match=r"onnxruntime does not know own\.ops\.Twice: .*custom_ops="):
        graphopt.optimize(custom(), "quantize{scheme=static}", calibration=[X])


def test_a_pass_may_not_change_what_an_output_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes import Simplify

    def narrow(self: Simplify, graph: Any, context: Any) -> None:
        (site,) = graph.sites("relu")
        whole = graph.emit(site, *site.operands, at=site)
        graph.replace(site, graph.emit("slice", whole, axis=1, start=0, end=2, at=site))

    monkeypatch.setattr(Simplify, "run", narrow)
    proto = custom()
    proto.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["z"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", 64]))
    with pytest.raises(LoweringError, match="output 'z' went from"):
        graphopt.optimize(proto, None)


def test_every_session_knows_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(custom_operators, "_libraries", {"one.so": None, "two.so": None})
    monkeypatch.setattr(
        ort.SessionOptions, "register_custom_ops_library", lambda self, path: told.append(path), raising=False
    )
    graph = build("onnx", "y = relu(x[2,4])")
    graph.evaluate({"x": torch.ones(2, 4)}, graph.outputs)
    assert told == ["one.so", "two.so"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.so", "there is no file nowhere.so"),
        (__file__, "does not load"),
        (3, "3 is of type int; give the path of a library"),
    ],
)
def test_what_defines_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graphopt.optimize(custom(), None, custom_ops=[given])
    with pytest.raises(UsageError, match=message):
        graphopt.compare(build("onnx", "y = relu(x[2,4])"), build("onnx", "y = relu(x[2,4])"), [X], custom_ops=[given])


def test_a_library_of_something_else_is_refused() -> None:
    import _ctypes

    with pytest.raises(UsageError, match="has no function RegisterCustomOps"):
        custom_operators.register([_ctypes.__file__])


def test_targets_of_torch_refuse_it() -> None:
    with pytest.raises(UsageError, match="custom_ops are of ONNX files"):
        graphopt.optimize(torch.nn.ReLU(), None, target="torch-cpu", example_inputs=X, custom_ops=["some.so"])


def test_the_command_takes_libraries(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(custom(), path)
    for arguments in (["optimize", str(path), "--dry-run"], ["bench", str(path)]):
        result = CliRunner().invoke(app, [*arguments, "--custom-ops", "nowhere.so"])
        assert result.exit_code != 0 and "there is no file nowhere.so" in f"{result.output}{result.exception}"


def test_an_error_names_the_operators_and_not_those_that_the_file_defines() -> None:
    graph = build("onnx", "y = own.ops.Twice(x[2,4])")
    with pytest.raises(GraphError, match=r"does not know own\.ops\.Twice: "):
        graph.evaluate({"x": torch.ones(2, 4)}, graph.outputs)


def test_operators_of_onnxruntime_extensions() -> None:
    extensions = pytest.importorskip("onnxruntime_extensions")
    proto = custom()
    proto.graph.node[1].domain, proto.graph.node[1].op_type = "ai.onnx.contrib", "Inverse"
    proto.opset_import[-1].domain = "ai.onnx.contrib"
    x = torch.eye(64) * 9
    small = graphopt.optimize(proto, "sparsify{amount=0.01}", example_inputs=x, custom_ops=[extensions], measure=False)
    assert small.report.agreement[0].cosine > 0.9
