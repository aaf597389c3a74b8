"""What files state wrongly: taken as engines take it, or refused in one sentence that names the node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.capture import capture
from graphopt.dialects.onnx.export import deployable
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import CaptureError
from tests.models import model, plain_run

X = torch.linspace(-2, 2, 12).reshape(3, 4)


def file(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **stored: object) -> onnx.ModelProto:
    """A model of one input x, float [n,4]."""
    tensors = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in stored.items()]
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def constant(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.float32)))


def assert_captured(proto: onnx.ModelProto, *notes: str) -> OnnxGraph:
    """Captured, it computes what the engine computes of the file; each note is there."""
    captured = capture(proto, "onnx", example_inputs=X)
    assert isinstance(captured.graph, OnnxGraph)
    found = captured.graph.evaluate({"x": X}, captured.graph.outputs)
    for a, b in zip(found, plain_run(proto, {"x": X}), strict=True):
        torch.testing.assert_close(a, b)
    assert [note for note in captured.notes if "lifted" not in note] == list(notes)
    return captured.graph


def test_of_constants_of_one_name_the_last_counts() -> None:
    add = helper.make_node("Add", ["x", "c"], ["y"])
    assert_captured(file(constant("c", 1.0), constant("c", 2.0), add))
    assert_captured(file(constant("c", 5.0), add, c=1.0))
    twice = file(add, c=1.0)
    twice.graph.initializer.append(numpy_helper.from_array(np.array(7, np.float32), "c"))
    assert_captured(twice)


def test_a_constant_of_another_attribute() -> None:
    number = helper.make_node("Constant", [], ["c"], value=1.5)
    assert_captured(file(number, helper.make_node("Add", ["x", "c"], ["y"])))


def test_an_input_that_is_an_output_too_keeps_its_shape() -> None:
    graph = assert_captured(file(helper.make_node("Relu", ["x"], ["y"]), outputs=("y", "x")))
    assert graph.inputs[0].shape == ("n", 4)


def test_a_negative_size_is_open() -> None:
    proto = file(helper.make_node("Relu", ["x"], ["y"]))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert assert_captured(proto, "a size of 'x' is -1, and is taken as open").inputs[0].shape == ("?", 4)


@pytest.mark.parametrize("shape", [None, [2**31, 4]])
def test_no_feeds_are_made_of_unknown_rank_or_beyond_memory(shape: list[int] | None) -> None:
    proto = file(helper.make_node("Einsum", ["x", "x"], ["y"], equation="ab,cb->ac"))
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    captured = capture(proto, "onnx")
    assert captured.feeds == [] and any("none are made for 'x'" in note for note in captured.notes)


@pytest.mark.parametrize(("elem_type", "shape"), [(TensorProto.FLOAT, [1]), (TensorProto.INT64, ["n", 4])])
def test_a_false_inner_statement_is_inferred_anew(elem_type: int, shape: list[int | str]) -> None:
    proto = file(helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"]),
                 helper.make_node("Abs", ["b"], ["y"]))  # fmt: skip
    expected = plain_run(proto, {"x": X})[0]
    proto.graph.value_info.append(helper.make_tensor_value_info("a", elem_type, shape))
    captured = capture(proto, "onnx", example_inputs=X)
    assert any("a type or shape of 'a' that its nodes do not give" in note for note in captured.notes)
    values = [result for node in captured.graph.nodes for result in node.results]
    assert {(value.shape, value.dtype) for value in values} == {(("n", 4), torch.float32)}
    torch.testing.assert_close(captured.graph.evaluate({"x": X}, captured.graph.outputs)[0], expected)


def test_a_false_statement_within_a_branch_is_inferred_anew() -> None:
    proto = model("""g (float[n,4] x, bool k) => (float[n,4] y) {
        y = If (k) <then_branch = t () => (float[n,4] b) { a = Relu(x) b = Neg(a) },
                    else_branch = e () => (float[n,4] c) { c = Abs(x) }> }""")
    branch = proto.graph.node[0].attribute[0].g
    branch.value_info.append(helper.make_tensor_value_info("a", TensorProto.INT64, [7]))
    captured = capture(proto, "onnx")
    assert any("a type or shape of 'a' that its nodes do not give" in note for note in captured.notes)


@pytest.mark.parametrize("typed", [True, False])
def test_a_loop_that_carries_a_sequence(typed: bool) -> None:
    proto = model("""g (float[n,4] x) => (float[m,4] y) {
        m = Constant<value_int = 3>() s = SequenceEmpty()
        z = Loop(m, , s) <body = b (int64 i, bool c, seq(float) before) => (bool d, seq(float) after) {
            r = Relu(x) d = Identity(c) after = SequenceInsert(before, r) }>
        y = ConcatFromSequence<axis = 0>(z) }""", opset=17)
    body = proto.graph.node[2].attribute[0].g
    for value in () if typed else (body.input[2], body.output[1]):
        value.ClearField("type")
    small = graphopt.optimize(proto, example_inputs=X)
    torch.testing.assert_close(small(X)["y"], plain_run(proto, {"x": X})[0])


@pytest.mark.parametrize("opset", [1, 3, 5, 6])
def test_a_file_older_than_the_engine_is_respelled(opset: int) -> None:
    def node(op_type: str, *inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
        old = {"consumed_inputs": [0] * len(inputs)} if opset < 6 and op_type in ("Relu", "BatchNormalization") else {}
        return helper.make_node(op_type, inputs, [output], **old, **attributes)  # type: ignore[arg-type]

    reshape = (node("Reshape", "r", output="f", shape=[0, 4]) if opset < 5
               else node("Reshape", "r", "s", output="f"))  # fmt: skip
    nodes = [
        node("BatchNormalization", "x", "g", "h", "h", "g", output="b", is_test=1), node("Relu", "b", output="r"),
        reshape, node("Dropout", "f", output="d", is_test=1), node("Gemm", "d", "w", "g", output="p", broadcast=1),
        node("Add", "p", "g", output="y", broadcast=1),
    ]  # fmt: skip
    g, h = np.array([[1, 2, 3, 4], [0, 1, 0, -1]], np.float32)
    w = np.eye(4, dtype=np.float32) * 2
    proto = file(*nodes, g=g, h=h, w=w)
    if opset >= 5:
        proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 4]), "s"))
    proto.opset_import[0].version = opset
    captured = capture(proto, "onnx", example_inputs=X)
    assert f"respelled from opset {opset} to 7, the first that engines run" in captured.notes
    normal = (X.numpy() - h) / np.sqrt(g + 1e-5) * g + h
    found = captured.graph.evaluate({"x": X}, captured.graph.outputs)[0]
    torch.testing.assert_close(found, torch.from_numpy(np.maximum(normal, 0) @ w + 2 * g))


def test_an_old_file_whose_axis_is_named_stays_and_is_refused_by_name() -> None:
    shift = helper.make_node("Add", ["x", "c"], ["y"], name="shift", broadcast=1, axis=0)
    proto = file(shift, c=np.array([1, 2, 3], np.float32))
    proto.opset_import[0].version = 6
    with pytest.raises(CaptureError, match=r"Add\(6\) node with name 'shift'"):
        capture(proto, "onnx", example_inputs=X)


def test_a_weight_unlike_its_declaration(capsys: pytest.CaptureFixture[str]) -> None:
    proto = file(helper.make_node("MatMul", ["x", "w"], ["y"]), w=np.ones((4, 3)))
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 5]))
    captured = capture(proto, "onnx", example_inputs=X)
    assert captured.notes[0] == "'w' is declared as float [4, 5], and holds float [4, 3], which is used"
    assert captured.graph.evaluate({"x": X}, captured.graph.outputs)[0].shape == (3, 3)
    assert capsys.readouterr() == ("", "")


RELU = helper.make_node("Relu", ["x"], ["a"], name="first")
REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "reads nothing": (file(RELU, helper.make_node("Add", ["a", "b"], ["y"], name="sum")),
                      "Add (sum) reads 'b', which nothing makes"),
    "made twice": (file(RELU, helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["a"], ["y"])),
                   "Neg (a) makes 'a' again, which Relu (first) has made"),
    "makes an input": (file(helper.make_node("Neg", ["x"], ["x"]), outputs=("x",)),
                       "Neg (x) makes 'x' again, which is an input or a stored constant"),
    "no attribute": (file(helper.make_node("Cast", ["x"], ["y"], name="to")), "Cast (to) lacks its attribute 'to'"),
    "another attribute": (file(helper.make_node("Cast", ["x"], ["y"], to="float")),
                          "Cast (y) has STRING as its attribute 'to', which takes INT"),
    "no outputs": (file(RELU, outputs=()), "the graph has no outputs: it computes nothing"),
    "no such output": (file(RELU), "the output 'y' is made by nothing"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_engine_reads_is_refused_by_name(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto, reason = REFUSED[what]
    with pytest.raises(CaptureError) as caught:
        capture(proto, "onnx", example_inputs=X)
    assert str(caught.value) == reason
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    with pytest.raises(CaptureError) as caught:
        capture(str(path), "onnx")
    assert str(caught.value) == f"{path}: {reason}"
    assert capsys.readouterr() == ("", "")


def test_a_node_name_that_is_no_utf8_is_dropped(tmp_path: Path) -> None:
    content = file(helper.make_node("Relu", ["x"], ["y"], name="n__de")).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(content.replace(b"n__de", b"n\xf2\xe4de"))
    captured = capture(str(path), "onnx")
    assert "the name of a node (Relu (y)) is not UTF-8, and was dropped" in captured.notes


@pytest.mark.parametrize("place", ["input", "output", "op_type", "name", "graph output", "graph input"])
@pytest.mark.parametrize("byte", [b"\xff", b"m"])
def test_a_name_that_is_half_of_the_file_is_cut_in_messages(place: str, byte: bytes, tmp_path: Path) -> None:
    """A wrong length makes what follows a part of the name."""
    long, ends = "L" * 900, {"inputs": ["x"], "outputs": ["y"]}
    given: dict[str, Any] = {"op_type": "Relu", "name": "n", **ends}
    changes: dict[str, dict[str, Any]] = {
        "input": {"inputs": [long]}, "output": {"outputs": [long]}, "op_type": {"op_type": long, "inputs": ["z"]},
        "name": {"name": long, "inputs": ["z"]},
    }  # fmt: skip
    node = helper.make_node(**{**given, **changes.get(place, {})})
    proto = file(node, outputs=(long if place == "graph output" else "y",))
    if place == "graph input":
        for _ in range(2):
            proto.graph.input.add().CopyFrom(helper.make_tensor_value_info(long, TensorProto.FLOAT, [1]))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString().replace(b"L", byte))
    with pytest.raises(CaptureError) as caught:
        capture(str(path), "onnx")
    assert len(str(caught.value).replace(str(path), "")) < 300


def test_a_message_that_prints_a_whole_node_gives_its_cause() -> None:
    proto = file(helper.make_node("Softmax", ["x"], ["y"], axis=-1))
    proto.graph.node[0].attribute[0].type = onnx.AttributeProto.UNDEFINED
    with pytest.raises(CaptureError) as caught:
        capture(proto, "onnx")
    assert "Node(" not in str(caught.value) and len(str(caught.value)) < 200


def test_several_nodes_of_one_name() -> None:
    proto = file(helper.make_node("Relu", ["x"], ["a"], name="n"), helper.make_node("Neg", ["a"], ["y"], name="n"))
    captured = capture(proto, "onnx", example_inputs=X)
    assert "several nodes are called 'n'; they were renamed" in captured.notes
    names = [node.name for node in ir.to_proto(deployable(captured.graph)).graph.node]  # type: ignore[arg-type]
    assert len(set(names)) == 2


def test_a_message_of_the_engine_is_one_short_line() -> None:
    turn = helper.make_node("Reshape", ["w", "s"], ["r"], name="turn")
    proto = file(turn, helper.make_node("MatMul", ["x", "r"], ["y"]), w=np.ones((3, 5)))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([4, 3]), "s"))
    with pytest.raises(CaptureError, match=r"Reshape \(turn\): .*cannot be reshaped") as caught:
        capture(proto, "onnx", example_inputs=X)
    assert len(str(caught.value)) < 300 and "onnxruntime::" not in str(caught.value)


# --- names, maps, and inputs with defaults -------------------------------------------------------------------------


def test_inputs_of_subgraphs_keep_their_names(tmp_path: Path) -> None:
    """Contrib operators find what they feed by name: the input of a decoder is called like that of the model."""
    proto = model("""g (float[n,4] x, int64 k) => (float[n,4] y) {
        c = Constant<value_int = 1>() t = Cast<to = 9>(c)
        y = Loop(k, t, x)<body = b (int64 i, bool go, float[n,4] x) => (bool go_on, float[n,4] z)
            { go_on = Identity(go) z = Relu(x) }>
    }""", opset=17)  # fmt: skip
    path = graphopt.optimize(proto, example_inputs={"x": X, "k": torch.tensor(2)}).export(tmp_path / "out.onnx")
    (loop,) = [node for node in onnx.load(path).graph.node if node.op_type == "Loop"]
    body = loop.attribute[0].g
    assert [value.name for value in body.input] == ["i", "go", "x"]
    assert [value.name for value in body.output] == ["go_on", "z"]
    expected = plain_run(proto, {"x": X, "k": torch.tensor(2)})[0]
    torch.testing.assert_close(plain_run(str(path), {"x": X, "k": torch.tensor(2)})[0], expected)


def with_default(read: Callable[[str], onnx.NodeProto], ir_version: int, *shape: int) -> onnx.ModelProto:
    proto = file(read("d"), d=np.full(shape, 0.5))
    proto.graph.input.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, shape))
    proto.ir_version = ir_version
    return proto


def test_an_input_with_a_default_can_be_given(tmp_path: Path) -> None:
    proto = with_default(lambda name: helper.make_node("Mul", ["x", name], ["y"]), 8)
    small = graphopt.optimize(proto, example_inputs=X)
    assert small.signature.inputs == ("x",) and small.signature.optional == ("d",)
    torch.testing.assert_close(small(x=X)["y"], X / 2)
    torch.testing.assert_close(small(x=X, d=torch.tensor(3.0))["y"], 3 * X)
    path = small.export(tmp_path / "out.onnx")
    torch.testing.assert_close(plain_run(str(path), {"x": X})[0], X / 2)
    torch.testing.assert_close(plain_run(str(path), {"x": X, "d": torch.tensor(3.0)})[0], 3 * X)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_a_weight_that_is_an_input_is_a_constant(ir_version: int) -> None:
    proto = with_default(lambda name: helper.make_node("MatMul", ["x", name], ["y"]), ir_version, 4, 2)
    captured = capture(proto, "onnx", example_inputs=X)
    assert captured.signature.optional == () and captured.graph.sites("linear")
    assert "inputs that the file stores are constants here: 'd'" in captured.notes


def test_before_ir_4_an_input_with_a_default_is_a_constant() -> None:
    proto = with_default(lambda name: helper.make_node("Mul", ["x", name], ["y"]), 3)
    captured = capture(proto, "onnx", example_inputs=X)
    assert captured.signature.optional == ()
    assert "inputs that the file stores are constants here: 'd'" in captured.notes


def test_an_input_that_holds_a_map_is_passed_through(tmp_path: Path) -> None:
    node = helper.make_node("DictVectorizer", ["m"], ["v"], domain="ai.onnx.ml", int64_vocabulary=[3, 1, 2])
    type_ = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    graph = helper.make_graph(
        [node, helper.make_node("Neg", ["v"], ["y"])], "g", [helper.make_value_info("m", type_)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    small = graphopt.optimize(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    path = small.export(tmp_path / "out.onnx")
    assert onnx.load(path).graph.input[0].type == type_


