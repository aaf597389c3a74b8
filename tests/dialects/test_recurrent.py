"""Recurrent layers of torch and of ONNX files as ops: raised, run at other lengths, taken back to torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graphopt import to_torch
from graphopt.capture.sources import Captured, capture
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import CaptureError, GraphError
from graphopt.ir.cost import Cost
from graphopt.ir.ops import OPS

LAYERS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "gru": (nn.GRU, {"num_layers": 2, "bias": False}),
    "rnn": (nn.RNN, {"nonlinearity": "relu", "batch_first": False, "bidirectional": True}),
}


class Classifier(nn.Module):
    """Ids (batch, length) -> 3 scores, by a recurrent layer of 6 hidden units over 4 features."""

    def __init__(self, kind: str, **changed: Any) -> None:
        super().__init__()
        layer, options = LAYERS[kind]
        self.table = nn.Embedding(11, 4)
        made: Any = layer
        self.layer: nn.RNNBase = made(4, 6, **{"batch_first": True, **options, **changed})
        self.head = nn.Linear(6 * (1 + self.layer.bidirectional), 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.layer(x)[0] if self.layer.batch_first else self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        scores: Tensor = self.head(y.mean(1))
        return scores


def classifier(kind: str, **changed: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(kind, **changed).eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(length))


def ran(captured: Captured, **feeds: Tensor) -> Tensor:
    return captured.graph.evaluate(feeds, captured.graph.outputs)[0]


@pytest.fixture(params=["fx", "onnx"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_ops_of_any_length(kind: str, dialect: str) -> None:
    """Though torch unrolls them over the length of the example, and hides that their first states are zeros."""
    module = classifier(kind)
    captured = capture(module, dialect, example_inputs=ids(2, 5), dynamic_shapes={"ids": {0: "batch", 1: "length"}})
    sites = captured.graph.sites(kind)
    assert len(sites) == module.layer.num_layers and not captured.notes
    assert all(value is None for site in sites for value in site.operands[4:])
    assert captured.graph.inputs[0].shape == ("batch", "length")
    for batch, length in ((2, 5), (3, 9), (1, 1)):
        found = ran(captured, ids=ids(batch, length))
        torch.testing.assert_close(found, module(ids(batch, length)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_flops_are_those_of_the_products(kind: str, dialect: str) -> None:
    module = classifier(kind)
    graph = capture(module, dialect, example_inputs=ids(2, 5)).graph
    weights = [p for name, p in module.layer.named_parameters() if "weight" in name]
    products = sum(2 * 2 * 5 * weight.numel() for weight in weights)
    assert Cost.of(graph, {"batch": 2, "seq": 5}).flops == products + 2 * 2 * module.head.weight.numel()


class States(nn.Module):
    """Takes and returns the states of two layers, last ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 6, num_layers=2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.layer(x, (h, c))
        return y, h, c


def test_states_are_passed_from_layer_to_layer(dialect: str) -> None:
    torch.manual_seed(0)
    module, feeds = States().eval(), {"x": torch.randn(5, 3, 4), "h": torch.randn(2, 3, 6), "c": torch.randn(2, 3, 6)}
    captured = capture(module, dialect, example_inputs=feeds, dynamic_shapes={"x": {0: "length"}, "h": {}, "c": {}})
    feeds["x"] = torch.randn(8, 3, 4)
    found = captured.graph.evaluate(feeds, captured.graph.outputs)
    torch.testing.assert_close(found, list(module(**feeds)), rtol=1e-5, atol=1e-6)


def test_projections_stay_an_operation_of_torch(dialect: str) -> None:
    module = classifier("lstm", num_layers=1, bidirectional=False, proj_size=3)
    module.head = nn.Linear(3, 3)
    if dialect == "onnx":
        with pytest.raises(CaptureError, match=r"projections.*use a target of PyTorch"):
            capture(module, dialect, example_inputs=ids(2, 5))
    else:
        graph = capture(module, dialect, example_inputs=ids(2, 5)).graph
        assert graph.sites("aten.lstm.input") and not graph.sites("lstm")


class Table(nn.Module):
    """Fits one length alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def test_a_named_axis_that_the_model_fixes_is_an_error(dialect: str) -> None:
    x = torch.randn(2, 5, 4)
    with pytest.raises(CaptureError, match=r"axis 1 of x 'length', and the export fixed it at 5: .*x \+ self\.table"):
        capture(Table(), dialect, example_inputs=x, dynamic_shapes={"x": {1: "length"}})
    captured = capture(Table(), dialect, example_inputs=x, dynamic_shapes={"x": {0: "batch"}})
    assert captured.graph.inputs[0].shape == ("batch", 5, 4)


# --- ONNX files ----------------------------------------------------------------------------------------------------

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def onnx_model(op_type: str, outputs: list[str], inputs: list[str] | None = None, **attributes: Any) -> onnx.ModelProto:
    """One recurrent operator over x of 3 features, with 4 hidden units."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    rows, generator = 4 * GATES[op_type], torch.Generator().manual_seed(0)
    shapes = {"W": (directions, rows, 3), "R": (directions, rows, 4), "B": (directions, 2 * rows)}
    stored = [numpy_helper.from_array(torch.randn(shape, generator=generator).numpy(), name)
              for name, shape in shapes.items()]  # fmt: skip
    x: list[str | int | None] = ["batch", "length", 3] if attributes.get("layout") else ["length", "batch", 3]
    node = helper.make_node(op_type, ["x", "W", "R", "B", *(inputs or [])], outputs, hidden_size=4, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name],
        [*stored, numpy_helper.from_array(torch.tensor([5, 2], dtype=torch.int32).numpy(), "lengths")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("outputs", [["y"], ["", "h"]])
def test_results_that_a_file_leaves_out_are_there(op_type: str, outputs: list[str]) -> None:
    graph = OnnxGraph.from_model(onnx_model(op_type, outputs, direction="bidirectional"))
    (site,) = graph.sites("lstm", "gru", "rnn")
    assert len(site.results) == len(OPS[site.kind].results)
    feeds = {"x": torch.randn(5, 2, 3)}
    stored = [None if value is None else graph.constant(value) for value in site.operands[1:4]]
    wanted = OPS[site.kind].reference(feeds["x"], *stored, **site.attributes)[outputs.index(outputs[-1])]
    torch.testing.assert_close(graph.evaluate(feeds, graph.outputs), [wanted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op_type", GATES)
def test_a_batch_that_comes_first_is_put_second(op_type: str) -> None:
    """ONNX Runtime does not run layout=1 by itself."""
    first = OnnxGraph.from_model(onnx_model(op_type, ["y", "h"], layout=1))
    second = OnnxGraph.from_model(onnx_model(op_type, ["y", "h"]))
    x = torch.randn(2, 5, 3)
    y, h = first.evaluate({"x": x}, first.outputs)
    expected_y, expected_h = second.evaluate({"x": x.transpose(0, 1)}, second.outputs)
    torch.testing.assert_close([y, h], [expected_y.permute(2, 0, 1, 3), expected_h.transpose(0, 1)])


@pytest.mark.parametrize("attributes", [{"clip": 1.0}, {"input_forget": 1}, {"activations": ["Relu"] * 3}])
def test_other_recurrences_stay_operators(attributes: dict[str, Any]) -> None:
    graph = OnnxGraph.from_model(onnx_model("LSTM", ["y"], **attributes))
    assert [node.kind for node in graph.nodes] == ["onnx.LSTM"]


@pytest.mark.parametrize("op_type", GATES)
def test_a_file_becomes_a_module_that_learns(op_type: str) -> None:
    own: dict[str, Any] = {"linear_before_reset": 1} if op_type == "GRU" else {}
    model = onnx_model(op_type, ["y"], **own)
    module = to_torch(model, torch.randn(5, 2, 3))
    module(torch.randn(4, 1, 3))["y"].sum().backward()
    learned = dict(module.named_parameters())
    assert len(learned) == 3 and all(p.grad is not None and bool(p.grad.any()) for p in learned.values())


def test_lengths_of_sequences_have_no_module() -> None:
    with pytest.raises(CaptureError, match="no lengths of sequences"):
        to_torch(onnx_model("LSTM", ["y"], ["lengths"]), torch.randn(5, 2, 3))


# --- the operators of torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_module(kind: str) -> None:
    module = classifier(kind)
    graph = capture(module, "fx", example_inputs=ids(2, 5)).graph
    small = graph.module()
    small(ids(3, 7)).square().sum().backward()
    module(ids(3, 7)).square().sum().backward()
    torch.testing.assert_close(small.get_parameter("head.weight").grad, module.head.weight.grad)
    found = graph.unpacked(small).keys()
    assert found == {f"layer.{name}" for name, _ in module.layer.named_parameters()}
    assert squares(small) == pytest.approx(squares(module), rel=1e-4)


def squares(module: nn.Module) -> float:
    """The sum of the squares of all gradients."""
    return sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_package_of_any_length_is_refused(kind: str, tmp_path: Path) -> None:
    """It would compute something else at other lengths than the example's."""
    graph = capture(classifier(kind), "fx", example_inputs=ids(2, 5)).graph
    with pytest.raises(GraphError, match=f"is {kind} over the dynamic axis 'seq'"):
        graph.package(tmp_path / "small.pt2", {"ids": ids(2, 5)}, {})


@pytest.mark.parametrize("kind", LAYERS)
def test_a_program_of_torch_has_the_same_ops(kind: str, dialect: str) -> None:
    """Which torch.export made by itself, with the operators of aten and one length."""
    module, example = classifier(kind), ids(2, 5)
    with torch.no_grad():
        program = torch.export.export(module, (example,), strict=False)
    captured = capture(program, dialect)
    sites = captured.graph.sites(kind)
    assert len(sites) == module.layer.num_layers and all(value is None for site in sites for value in site.operands[4:])
    torch.testing.assert_close(ran(captured, ids=example), module(example), rtol=1e-5, atol=1e-6)
