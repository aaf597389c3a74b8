"""Branches of conditions and bodies of loops: what passes and the lowering do to the weights inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError, UsageError
from graphopt.numerics.metrics import sqnr
from tests.fuzz.onnx_graphs import Array, session

FEEDS = {"x": torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).numpy()}


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 4


def branch(name: str, activation: str, seed: int) -> onnx.GraphProto:
    """Two linears with an activation between; the second reads a tensor of the graph around it, transposed."""
    nodes = [
        helper.make_node("MatMul", ["x", f"{name}.W"], [f"{name}.h"], name=f"/{name}/fc1/MatMul"),
        helper.make_node("Add", [f"{name}.h", f"{name}.b"], [f"{name}.z"], name=f"/{name}/fc1/Add"),
        helper.make_node(activation, [f"{name}.z"], [f"{name}.a"], name=f"/{name}/act/{activation}"),
        helper.make_node("Transpose", ["shared"], [f"{name}.t"], name=f"/{name}/fc2/Transpose"),
        helper.make_node("MatMul", [f"{name}.a", f"{name}.t"], [f"{name}.y"], name=f"/{name}/fc2/MatMul"),
    ]
    stored = {f"{name}.W": numbers(seed, 32, 24), f"{name}.b": numbers(seed + 1, 24)}
    result = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["n", 16])
    return helper.make_graph(nodes, name, [], [result], [numpy_helper.from_array(a, n) for n, a in stored.items()])


def branching(opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], name="/choice/If",
                          then_branch=branch("then", "Relu", 1), else_branch=branch("else", "Tanh", 5))],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32]),
         helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(numbers(9, 16, 24), "shared")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def looping() -> onnx.ModelProto:
    """x = tanh(x W) three times, in a loop."""
    weight = numpy_helper.from_array(numbers(2, 32, 32), "W")
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("MatMul", ["state", "W"], ["m"], name="fc"),
         helper.make_node("Tanh", ["m"], ["next"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("state", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
         helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n", 32])],
        [weight],
    )  # fmt: skip
    times, start = np.array(3, np.int64), np.array(True)
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "start", "x"], ["y"], body=body, name="steps")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(times, "times"), numpy_helper.from_array(start, "start")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def inner(model: onnx.ModelProto) -> list[list[str]]:
    """The operators of each graph inside a node, in order."""
    held = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [[node.op_type for node in graph.node] for graph in held]


def require_near(model: onnx.ModelProto, written: onnx.ModelProto, least: float) -> None:
    """SQNR in dB, of each branch, with and without the engine's optimizer."""
    for flag in (True, False):
        feeds = FEEDS | ({"flag": np.array(flag)} if len(model.graph.input) > 1 else {})
        (expected,) = session(model).run(None, feeds)
        for level in ("DISABLE_ALL", "ENABLE_ALL"):
            (found,) = session(written, level).run(None, feeds)
            assert sqnr(torch.from_numpy(expected), torch.from_numpy(found)) >= least


@pytest.mark.parametrize(("passes", "operator", "least"), [
    (None, "MatMul", 100), ("quantize{scheme=weight-only}", "MatMulNBits", 30), ("cast", "MatMul", 50),
    ("quantize{scheme=weight-only bits=4}", "MatMulNBits", 12), ("sparsify{amount=0.1}", "MatMul", 15),
    ("quantize{scheme=dynamic}", "DynamicQuantizeMatMul", 28), ("low-rank{energy=1}", "MatMul", 100),
])  # fmt: skip
def test_passes_reach_the_weights_of_branches(passes: str | None, operator: str, least: float, tmp_path: Path) -> None:
    model = branching()
    small = graphopt.optimize(model, passes)
    written = onnx.load(small.export(tmp_path / "small.onnx"))
    for operators in inner(written):
        assert operators.count(operator) == 2
        assert passes == "cast" or "Transpose" not in operators, operators
    require_near(model, written, least)
    if passes is not None:
        (record,) = [one for one in small.report.passes if one.name == passes.partition("{")[0]]
        names = {f"{name}.{layer}" for name in ("then", "else") for layer in ("fc1", "fc2")}
        assert names <= set(record.eligible) and (names.isdisjoint(record.declined) or passes.startswith("low-rank"))


def test_passes_reach_the_weights_of_a_loop(tmp_path: Path) -> None:
    model = looping()
    written = onnx.load(graphopt.optimize(model, "quantize{scheme=weight-only}").export(tmp_path / "small.onnx"))
    assert inner(written) == [["Identity", "MatMulNBits", "Tanh"]]
    require_near(model, written, 25)


def test_weights_of_branches_at_another_opset(tmp_path: Path) -> None:
    model = branching()
    written = onnx.load(graphopt.optimize(model).export(tmp_path / "small.onnx", opset=12))
    assert inner(written)[0].count("MatMul") == 2
    require_near(model, written, 100)


def test_static_sites_in_a_branch_are_declined() -> None:
    batches = [FEEDS | {"flag": np.array(flag)} for flag in (True, False)]
    small = graphopt.optimize(branching(), "quantize{scheme=static}", calibration=batches)
    (record,) = [one for one in small.report.passes if one.name == "quantize"]
    assert {record.declined[f"then.{layer}"].code for layer in ("fc1", "fc2")} == {"not_calibrated_in_body"}


def test_a_selector_may_name_a_site_in_a_branch() -> None:
    small = graphopt.optimize(branching(), "quantize{scheme=weight-only targets=then.fc1}")
    (record,) = [one for one in small.report.passes if one.name == "quantize"]
    assert record.eligible == ["then.fc1"] and not record.declined


def test_values_of_a_branch_are_known_where_they_are_constant() -> None:
    graph = OnnxGraph.from_model(branching())
    body = graph.bodies[0]
    linear = body.sites("linear")[0]
    constant = body.emit("mul", linear.required("weight"), body.add_constant(torch.tensor(2.0)), at=linear)
    weight = linear.weight
    assert weight is not None and torch.equal(body.evaluate({}, [constant])[0], 2 * weight)
    with pytest.raises(GraphError, match="'x' is known only where the graph around this one runs"):
        body.evaluate({}, [linear.result])


def test_a_block_that_divides_sites_of_branches_alone_is_no_error() -> None:
    model = branching()
    model.graph.node.insert(0, helper.make_node("MatMul", ["given", "first"], ["x"], name="/first/MatMul"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("given", TensorProto.FLOAT, ["n", 6]))
    model.graph.initializer.append(numpy_helper.from_array(numbers(7, 6, 32), "first"))
    small = graphopt.optimize(model, "quantize{scheme=weight-only bits=4 block=32}")
    (record,) = [one for one in small.report.passes if one.name == "quantize"]
    assert set(record.declined) == {"first", "then.fc2", "else.fc2"} and record.changed == 2
    with pytest.raises(UsageError, match="first: block 64 does not divide 6 inputs"):
        graphopt.optimize(model, "quantize{scheme=weight-only bits=4 block=64}")


def shared() -> onnx.ModelProto:
    """One weight, read by a linear and by one in each branch."""
    branches = [
        helper.make_graph([helper.make_node("MatMul", ["u", "W"], [name], name=f"/{name}/MatMul")], name, [],
                          [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32])])
        for name in ("then", "else")
    ]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["u"], name="/outer/MatMul"),
         helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32]),
         helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(numbers(3, 32, 32), "W")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("passes", [None, "quantize{scheme=weight-only}", "quantize{scheme=dynamic}", "cast"])
def test_a_weight_that_branches_share_is_stored_once(passes: str | None, tmp_path: Path) -> None:
    small = graphopt.optimize(shared(), passes)
    written = onnx.load(small.export(tmp_path / "small.onnx"))
    assert sum(int(np.prod(stored.dims)) >= 32 * 32 for stored in written.graph.initializer) == 1
    assert sum(tensor.numel() >= 32 * 32 for _, tensor in small.transformed.constants()) == 1


def test_equal_tensors_of_bodies_are_one_constant() -> None:
    graph = OnnxGraph.from_model(branching())
    first, second = graph.bodies
    tensor = torch.randn(8, 8)
    stored = first.add_constant(tensor)
    assert second.add_constant(tensor.clone()) == stored == graph.add_constant(tensor)
    assert first.add_constant(tensor.half()) != stored and first.add_constant(tensor.reshape(4, 16)) != stored


def test_no_site_is_noted_only_where_the_whole_model_has_none() -> None:
    found = {
        targets: graphopt.optimize(branching(), f"sparsify{{amount=0.5 targets={targets}}}").report.passes
        for targets in ("then.fc1", "linear")
    }
    for passes in found.values():
        assert not [note for one in passes for note in one.notes if "selects no site" in note]
