"""What ONNX files may hold: each is optimized, and computes what the file computes, or is stepped over untouched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import graphopt
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.whole_slices import drop_whole_slices
from graphopt.numerics.metrics import cosine, sqnr, within_tolerance
from graphopt.result import Optimized
from tests.dialects.fx.test_graph import normal
from tests.models import model, plain_run

W, B = normal(4, 4), normal(4, seed=1)


def assert_same(proto: onnx.ModelProto, feeds: Mapping[str, Tensor], tmp_path: Path) -> Optimized:
    """Simplified and exported, the model gives what it gives as it stands, in the same order and by the same names."""
    result = graphopt.optimize(proto, example_inputs=dict(feeds))
    expected = plain_run(proto, feeds)
    path = result.export(tmp_path / "out.onnx")
    again = onnx.load(path)
    if all(output.type.tensor_type.HasField("shape") for output in proto.graph.output):
        onnx.checker.check_model(again, full_check=True)
    assert [o.name for o in again.graph.output] == [o.name for o in proto.graph.output]
    assert not any(domain.domain == "graphopt" for domain in again.opset_import)
    results = list(result(dict(feeds)).values())
    for wanted, found, written in zip(expected, results, plain_run(again, feeds), strict=True):
        if isinstance(wanted, Tensor):
            assert wanted.dtype == found.dtype and within_tolerance(wanted, found), (wanted, found)
            assert within_tolerance(wanted, written)
        else:
            assert repr(wanted) == repr(found) == repr(written)
    return result


def assert_quantizes(proto: onnx.ModelProto, feeds: Mapping[str, Tensor], linears: int) -> Optimized:
    """Dynamic quantization changes that many linears, and the outputs stay close."""
    result = graphopt.optimize(proto, "quantize{scheme=dynamic targets=linear}", example_inputs=dict(feeds))
    record = next(record for record in result.report.passes if record.name == "quantize")
    assert record.changed == linears
    for wanted, found in zip(plain_run(proto, feeds), result(dict(feeds)).values(), strict=True):
        assert cosine(wanted, found) > 0.99
    return result


X = {"x": normal(3, 4, seed=7)}


def test_unsorted_nodes() -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { h = MatMul(x, W)  y = Add(h, B) }", {"W": W, "B": B})
    nodes = [*proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    result = graphopt.optimize(proto, example_inputs=X)
    torch.testing.assert_close(result(**X)["y"], X["x"] @ W + B, rtol=1e-5, atol=1e-5)
    assert [node.kind for node in result.folded.nodes] == ["linear"]


def test_a_graph_with_a_cycle_is_refused() -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { h = Add(x, y)  y = Relu(h) }")
    with pytest.raises(graphopt.CaptureError, match="cycle"):
        graphopt.optimize(proto)


def test_constant_nodes(tmp_path: Path) -> None:
    text = """g (float[n,4] x) => (float[n,1] y, int64[2] c) {
        W = Constant<value = float[4,1] {1, -2, 3, 4}>()  B = Constant<value_floats = [5.0]>()
        h = MatMul(x, W)  y = Add(h, B)  c = Constant<value_ints = [1, 2]>()
    }"""
    result = assert_same(model(text), X, tmp_path)
    assert [node.kind for node in result.folded.nodes] == ["linear", "onnx.Constant"]  # the second is returned


def test_initializers_that_are_also_inputs(tmp_path: Path) -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, W) }", {"W": W})
    proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 4]))
    result = assert_same(proto, X, tmp_path)
    assert result.signature.inputs == ("x",)
    assert_quantizes(proto, X, 1)


@pytest.mark.parametrize(("given", "opset", "kept"), [(3, 13, 4), (8, 13, 8), (14, 21, 10), (14, 23, 11)])
def test_the_ir_version_is_no_newer_than_the_opset_needs(given: int, opset: int, kept: int) -> None:
    proto = model("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset)
    proto.ir_version = given
    graph = OnnxGraph.from_model(proto)
    assert graph.model.ir_version == kept
    graph.evaluate({"x": torch.ones(2)}, graph.outputs)


def test_initializers_shared_by_several_nodes(tmp_path: Path) -> None:
    text = """g (int64[n] i, float[n,4] x) => (float[n,4] y) {
        e = Gather(T, i)  h = MatMul(x, T)  u = MatMul(e, T)  y = Add(h, u)
    }"""
    feeds = {"i": torch.tensor([0, 3, 1]), **X}
    proto = model(text, {"T": W})
    result = assert_same(proto, feeds, tmp_path)
    assert result.report.cost_after.parameters == 16  # tied as it was: stored once
    assert_quantizes(proto, feeds, 2)
    pruned = graphopt.optimize(proto, "sparsify{amount=0.5}", example_inputs=feeds)
    record = next(record for record in pruned.report.passes if record.name == "sparsify")
    codes = sorted(reason.code for reason in record.declined.values())
    assert record.changed == 0 and codes == ["op_without_form", "weight_tied", "weight_tied"]


IF = """g (float[n,4] x, bool c) => (float[n,4] y) {
    h = MatMul(x, W)
    b = If(c) <
        then_branch = then () => (float[n,4] t) { u = MatMul(h, W)  t = Add(u, B) },
        else_branch = other () => (float[n,4] e) { e = Mul(x, B) }
    >
    y = MatMul(b, W)
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_if_with_weights_of_the_graph_around_it(condition: bool, tmp_path: Path) -> None:
    feeds = {**X, "c": torch.tensor(condition)}
    proto = model(IF, {"W": W, "B": B})
    result = assert_same(proto, feeds, tmp_path)
    assert [node.kind for node in result.folded.nodes] == ["linear", "onnx.If", "linear"]
    assert_quantizes(proto, feeds, 3)  # also the one in a branch


def test_a_reader_inside_a_branch_is_no_end_of_a_quantized_region(tmp_path: Path) -> None:
    text = """g (float[1,4,6,6] x, bool c) => (float[1,4,6,6] y) {
        h = Conv(x, V)
        y = If(c) <then_branch = t () => (float[1,4,6,6] p) { p = Relu(h) },
                   else_branch = e () => (float[1,4,6,6] q) { q = Add(h, h) }>
    }"""
    feeds = {"x": normal(1, 4, 6, 6), "c": torch.tensor(True)}
    proto = model(text, {"V": normal(4, 4, 1, 1)})
    graph = OnnxGraph.from_model(proto)
    assert [user.kind for user in graph.nodes[0].result.users] == ["onnx.If"]
    result = graphopt.optimize(proto, "quantize{scheme=static}", example_inputs=feeds, calibration=[feeds])
    assert sqnr(plain_run(proto, feeds)[0], result(**feeds)["y"]) > 30


def test_if_is_neither_folded_nor_merged(tmp_path: Path) -> None:
    text = """g (float[n,4] x) => (float[n,4] y) {
        a = If(C) <then_branch = t () => (float[n,4] p) { p = Mul(x, B) },
                   else_branch = e () => (float[n,4] q) { q = Add(x, B) }>
        b = If(C) <then_branch = t () => (float[n,4] p) { p = Mul(x, B) },
                   else_branch = e () => (float[n,4] q) { q = Sub(x, B) }>
        y = Sub(a, b)
    }"""
    result = assert_same(model(text, {"C": np.array(False), "B": B}), X, tmp_path)
    assert [node.kind for node in result.folded.nodes] == ["onnx.If", "onnx.If", "sub"]


def test_loop_with_weights_of_the_graph_around_it(tmp_path: Path) -> None:
    text = """g (float[n,4] x) => (float[n,4] y, float[k,n,4] s) {
        i = MatMul(x, W)
        y, s = Loop(N, C, i) <body = b (int64 step, bool go, float[n,4] v) => (bool on, float[n,4] w, float[n,4] o) {
            on = Identity(go)  m = MatMul(v, W)  a = Add(m, i)  w = Tanh(a)  o = Identity(w)
        }>
    }"""
    proto = model(text, {"W": W, "N": np.array(3), "C": np.array(True)})
    assert_same(proto, X, tmp_path)
    assert_quantizes(proto, X, 2)


def test_scan(tmp_path: Path) -> None:
    text = """g (float[5,4] x) => (float[4] y, float[5,4] s) {
        y, s = Scan<num_scan_inputs = 1, body = b (float[4] c, float[4] v) => (float[4] d, float[4] o) {
            a = Mul(c, B)  d = Add(a, v)  o = Identity(d)
        }>(B, x)
    }"""
    assert_same(model(text, {"B": B}), {"x": normal(5, 4)}, tmp_path)


def test_a_name_inside_a_subgraph_may_be_that_of_another_branch(tmp_path: Path) -> None:
    text = """g (float[n,4] x, bool c) => (float[n,4] y) {
        h = Relu(x)
        y = If(c) <then_branch = t () => (float[n,4] r) { u = Exp(h)  r = Tanh(u) },
                   else_branch = e () => (float[n,4] r) { u = Sin(h)  r = Tanh(u) }>
    }"""
    assert_same(model(text), {**X, "c": torch.tensor(False)}, tmp_path)


FUNCTION = """
<domain: "local", opset_import: ["" : 23]>
scaled<factor>(v, w) => (out) { f = Constant<value_float: float = @factor>()  m = MatMul(v, w)  out = Mul(m, f) }
"""


def test_functions_of_the_model_are_opened(tmp_path: Path) -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { h = local.scaled<factor = 2.5>(x, W)  y = Relu(h) }"
    proto = model(text + FUNCTION, {"W": W}, domains=["local"])
    result = assert_same(proto, X, tmp_path)
    assert [node.kind for node in result.folded.nodes] == ["linear", "mul", "relu"]
    assert_quantizes(proto, X, 1)


def test_contrib_operators_are_stepped_over(tmp_path: Path) -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { h = MatMul(x, W)  f = com.microsoft.FastGelu(h)  y = Add(f, B) }"
    proto = model(text, {"W": W, "B": B}, domains=["com.microsoft"])
    result = graphopt.optimize(proto, "quantize{scheme=dynamic}", example_inputs=X)
    assert "com.microsoft.FastGelu" in [node.kind for node in result.folded.nodes]
    assert cosine(plain_run(proto, X)[0], result(**X)["y"]) > 0.99


def test_a_domain_that_nobody_knows_stays_where_it_is() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { h = MatMul(x, W)  k = MatMul(x, W)  y = secret.Op(h, k) }"
    graph = OnnxGraph.from_model(model(text, {"W": W}, domains=["secret"]))
    graph.verify()
    assert [node.kind for node in graph.nodes] == ["linear", "linear", "secret.Op"]
    assert graph.nodes[-1].signature is None and graph.nodes[-1].result.shape == ("n", 4)
    small = graphopt.optimize(model(text, {"W": W}, domains=["secret"]))
    assert any("does not know secret.Op" in note for note in small.report.notes)
    assert "secret.Op" in [node.kind for node in small.lowered.nodes]


def test_values_of_unknown_rank(tmp_path: Path) -> None:
    text = """g (float[n,4] x, int64[k] s) => (float z) {
        h = MatMul(x, W)  r = Reshape(h, s)  m = MatMul(r, W)  t = Softmax(m)  u = Transpose(t)
        z = LayerNormalization(u, B)
    }"""
    proto = model(text, {"W": W, "B": normal(3)})
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds = {**X, "s": torch.tensor([3, 4])}
    graph = OnnxGraph.from_model(proto)
    assert graph.nodes[1].result.shape is None
    result = assert_same(proto, feeds, tmp_path)
    assert "onnx.Transpose" in [node.kind for node in result.folded.nodes]


def test_an_empty_graph_whose_outputs_are_inputs_and_initializers(tmp_path: Path) -> None:
    large = normal(40, 40)  # above what the runner hands over by address
    proto = model("g (float[n,4] x) => (float[n,4] x, float[4] B, float[40,40] L) { }", {"B": B, "L": large})
    assert_same(proto, X, tmp_path)


def test_an_output_that_is_an_input_beside_real_work(tmp_path: Path) -> None:
    text = "g (float[n,4] x) => (float[n,4] y, float[n,4] x, float[n,4] h) { h = MatMul(x, W)  y = Identity(h) }"
    assert_same(model(text, {"W": W}), X, tmp_path)


def test_one_value_returned_by_two_identities(tmp_path: Path) -> None:
    text = "g (float[n,4] x) => (float[n,4] a, float[n,4] b) { h = Relu(x)  a = Identity(h)  b = Identity(h) }"
    result = assert_same(model(text), X, tmp_path)
    assert result.signature.outputs == ("a", "b")


def test_nodes_without_names_and_with_the_same() -> None:
    text = 'g (float[n,4] x) => (float[n,4] y) { ["n"] h = Relu(x)  ["n"] k = Exp(h)  l = Exp(k)  y = Tanh(l) }'
    result = graphopt.optimize(model(text), example_inputs=X)
    assert len({node.name for node in result.captured.nodes}) == 4
    torch.testing.assert_close(result(**X)["y"], X["x"].relu().exp().exp().tanh(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_in_other_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    name = {torch.float16: "float16", torch.float64: "double"}[dtype]
    text = f"g ({name}[n,4] x) => ({name}[n,4] y) {{ h = MatMul(x, W)  r = Relu(h)  y = Add(r, B) }}"
    proto = model(text, {"W": W.to(dtype), "B": B.to(dtype)})
    feeds = {"x": X["x"].to(dtype)}
    assert_same(proto, feeds, tmp_path)
    result = graphopt.optimize(proto, "quantize{scheme=dynamic}", example_inputs=feeds)
    record = next(record for record in result.report.passes if record.name == "quantize")
    assert list(record.declined.values()) == [f"weight is {str(dtype)[6:]}, not float32"]


def test_bfloat16_weights(tmp_path: Path) -> None:
    """Stored in bfloat16 and computed in float32, as files do that save space."""
    proto = model("g (float[n,64] x) => (float[n,16] y) { w = Cast<to = 1>(W)  y = MatMul(x, w) }")
    weight = normal(64, 16)
    bits = weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    proto.graph.initializer.append(helper.make_tensor("W", TensorProto.BFLOAT16, [64, 16], bits, raw=True))
    graph = OnnxGraph.from_model(proto)
    ((_, tensor),) = graph.constants()
    assert torch.equal(tensor, weight.to(torch.bfloat16))
    feeds = {"x": normal(3, 64)}
    result = assert_same(proto, feeds, tmp_path)
    assert [node.kind for node in result.folded.nodes][-1] in ("linear", "matmul")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("passes", [None, "sparsify{amount=0.5}"])
def test_weights_that_are_stored_in_16_bits_stay_so(dtype: torch.dtype, passes: str | None, tmp_path: Path) -> None:
    text = "g (float[n,64] x) => (float[n,64] y) { v = Cast<to = 1>(W)  h = MatMul(x, v)  y = MatMul(h, V) }"
    proto = model(text, {"V": normal(64, 64)})
    bits = normal(64, 64).to(dtype).view(torch.int16).numpy().tobytes()
    kind = TensorProto.FLOAT16 if dtype is torch.float16 else TensorProto.BFLOAT16
    proto.graph.initializer.append(helper.make_tensor("W", kind, [64, 64], bits, raw=True))
    written = onnx.load(graphopt.optimize(proto, passes).export(tmp_path / "small.onnx"))
    short = {one.data_type: len(one.raw_data) for one in written.graph.initializer}
    assert short == {kind: 64 * 64 * 2, TensorProto.FLOAT: 64 * 64 * 4}
    assert [node.op_type for node in written.graph.node] == ["Cast", "MatMul", "MatMul"]
    if passes is None:
        assert_same(proto, {"x": normal(3, 64)}, tmp_path)


def test_slices_by_attributes_are_read() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { s = Slice<axes = [1], ends = [9], starts = [0]>(x)  y = Relu(s) }"
    graph = OnnxGraph.from_model(model(text, opset=9))
    drop_whole_slices(graph)
    assert [node.kind for node in graph.nodes] == ["onnx.Slice", "relu"]


def test_a_sequence_of_maps_is_read() -> None:
    result = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    nodes = [helper.make_node("Relu", ["x"], ["p"]),
             helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "g", [x], [helper.make_value_info("z", result)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    read = OnnxGraph.from_model(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    assert [node.kind for node in read.nodes] == ["relu", "ai.onnx.ml.ZipMap"]


def test_sequences_and_optionals(tmp_path: Path) -> None:
    text = """g (float[n,4] x) => (float[n,4] y) {
        a = Relu(x)  s = SequenceConstruct(a, x)  o = Optional(a)  p = OptionalGetElement(o)
        c = ConcatFromSequence<axis = 0>(s)  l = SequenceLength(s)  f = Cast<to = 1>(l)
        d = Split<num_outputs = 2, axis = 0>(c)  m = Add(p, f)  y = Add(m, d)
    }""".replace("d = Split", "d, e = Split")
    assert_same(model(text), X, tmp_path)


def test_a_sequence_may_be_returned() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { a = Relu(x)  y = SequenceConstruct(a, x) }"
    proto = model(text)
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 4])
    proto.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(element))
    result = graphopt.optimize(proto, example_inputs=X)
    first, second = result(**X)["y"]
    np.testing.assert_array_equal(first, X["x"].relu().numpy())
    np.testing.assert_array_equal(second, X["x"].numpy())


def test_strings(tmp_path: Path) -> None:
    text = """g (float[n,4] x) => (string[3] s, float[n,4] y, string[n,4] t) {
        y = Relu(x)  t = Cast<to = 8>(y)  s = Identity(S)
    }"""
    proto = model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(["a", "bc", ""], dtype=object), "S"))
    result = graphopt.optimize(proto, example_inputs=X)
    found = result(**X)
    assert list(found["s"]) == ["a", "bc", ""] and torch.equal(found["y"], X["x"].relu())
    onnx.checker.check_model(str(result.export(tmp_path / "out.onnx")))


def test_an_input_of_strings(tmp_path: Path) -> None:
    proto = model("g (string[n] s) => (bool[n] y) { y = Equal(s, S) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.array(["b"], dtype=object), "S"))
    result = graphopt.optimize(proto)
    path = result.export(tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(path)
    assert session.run(None, {"s": np.array(["a", "b"], dtype=object)})[0].tolist() == [False, True]
    assert result(np.array(["a", "b"], dtype=object))["y"].tolist() == [False, True]


def test_scalars_and_tensors_without_entries(tmp_path: Path) -> None:
    text = """g (float x, float[n,0] e) => (float y, float[n,4] z, int64[0] k) {
        y = Mul(x, S)  z = MatMul(e, E)  k = Identity(K)
    }"""
    tensors = {"S": torch.tensor(2.5), "E": torch.zeros(0, 4), "K": torch.zeros(0, dtype=torch.int64)}
    assert_same(model(text, tensors), {"x": torch.tensor(3.0), "e": torch.zeros(2, 0)}, tmp_path)


def test_a_batch_of_none(tmp_path: Path) -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { h = MatMul(x, W)  y = Add(h, B) }", {"W": W, "B": B})
    assert_same(proto, {"x": torch.zeros(0, 4)}, tmp_path)


def test_reshapes_that_copy_or_hold_zeros(tmp_path: Path) -> None:
    text = """g (float[n,4] x, float[n,0] e) => (float[n,2,2] y, float[z,n] z) {
        y = Reshape(x, A)  z = Reshape<allowzero = 1>(e, Z)
    }"""
    proto = model(text, {"A": torch.tensor([0, 2, 2]), "Z": torch.tensor([0, 3])})
    assert_same(proto, {**X, "e": torch.zeros(3, 0)}, tmp_path)


def test_random_operators_are_neither_folded_nor_merged() -> None:
    text = """g (float[n,4] x) => (float[2,2] y) {
        a = RandomNormal<shape = [2,2]>()  b = RandomNormal<shape = [2,2]>()  y = Sub(a, b)
    }"""
    result = graphopt.optimize(model(text, opset=21), example_inputs=X, agree=False)
    assert [node.kind for node in result.folded.nodes] == ["onnx.RandomNormal", "onnx.RandomNormal", "sub"]
    assert float(result(**X)["y"].abs().max()) > 0


def test_a_quantized_file_stays_quantized_and_right(tmp_path: Path) -> None:
    text = """g (float[n,4] x) => (float[n,4] y) {
        q = QuantizeLinear(x, S, Z)  d = DequantizeLinear(q, S, Z)
        w = DequantizeLinear<axis = 1>(W, V)  m = MatMul(d, w)  y = Add(m, B)
    }"""
    tensors: dict[str, Any] = {
        "S": torch.tensor(0.03), "Z": torch.tensor(120, dtype=torch.uint8), "V": torch.rand(4) / 50,
        "W": torch.randint(-127, 127, (4, 4), dtype=torch.int8), "B": B,
    }  # fmt: skip
    assert_same(model(text, tensors), X, tmp_path)


def test_sparse_initializers_and_functions_of_old_opsets(tmp_path: Path) -> None:
    """An opset-9 file: Slice and Dropout by attributes, Gemm with broadcast, BatchNormalization of one result."""
    text = """g (float[n,4] x) => (float[n,2] y) {
        g = Gemm(x, W, B)  d = Dropout<ratio = 0.5>(g)  b = BatchNormalization(d, B, B, B, V)
        y = Slice<axes = [1], starts = [1], ends = [3]>(b)
    }"""
    assert_same(model(text, {"W": W, "B": B, "V": B**2}, opset=9), X, tmp_path)


@pytest.mark.parametrize("outside", [True, False])
def test_weights_that_lie_in_another_file(outside: bool, tmp_path: Path) -> None:
    """Large and small ones, and one inside a branch: read, run, and written to another folder, inline or beside."""
    text = """g (float[n,64] x, bool c) => (float[n,64] y) {
        h = MatMul(x, W)  a = Add(h, B)
        y = If(c) <then_branch = t () => (float[n,64] p) { p = MatMul(a, V) },
                   else_branch = e () => (float[n,64] q) { q = Relu(a) }>
    }"""
    proto = model(text, {"W": normal(64, 64), "B": normal(64)})
    branch = next(attribute.g for attribute in proto.graph.node[2].attribute if attribute.name == "then_branch")
    branch.initializer.append(numpy_helper.from_array(normal(64, 64, seed=1).numpy(), "V"))
    feeds = {"x": normal(3, 64, seed=2), "c": torch.tensor(True)}
    (expected,) = plain_run(proto, feeds)
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    path = tmp_path / "from" / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=64)
    result = graphopt.optimize(path, example_inputs=feeds)
    torch.testing.assert_close(result(**feeds)["y"], expected, rtol=1e-4, atol=1e-4)
    result.folded.save(tmp_path / "to" / "graph.onnx")
    written = result.export(tmp_path / "to" / "m.onnx", external_data=outside)
    (tmp_path / "from").rename(tmp_path / "elsewhere")
    torch.testing.assert_close(plain_run(str(written), feeds)[0], expected, rtol=1e-4, atol=1e-4)
    loaded = OnnxGraph.load(tmp_path / "to" / "graph.onnx")
    torch.testing.assert_close(loaded.evaluate(feeds, loaded.outputs)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scopes", ["not a list", "['', 'a.b', 'n']", "[]"])
def test_paths_of_damaged_metadata_are_empty(scopes: str) -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", scopes
    (node,) = OnnxGraph.from_model(proto).nodes
    assert node.path == ("a.b" if "a.b" in scopes else "")


def test_the_model_handed_in_is_not_changed() -> None:
    proto = model(IF, {"W": W, "B": B})
    before = proto.SerializeToString(deterministic=True)
    graphopt.optimize(proto, "quantize{scheme=dynamic}", example_inputs={**X, "c": torch.tensor(True)})
    assert proto.SerializeToString(deterministic=True) == before
