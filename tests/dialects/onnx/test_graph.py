"""The ONNX dialect: each op emitted, run and read back; spellings; what changes a graph; checks; files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode, OnnxValue
from graphopt.errors import GraphError
from graphopt.ir.graph import Value
from graphopt.ir.ops import OPS
from tests.dialects.fx.test_graph import CASES, Case, integers, normal, operand_names, reference
from tests.language import build, feeds, outputs
from tests.models import model, plain_run

PER_CHANNEL = torch.tensor([0.001, 0.002, 0.003, 0.004, 0.005])
MORE_CASES: dict[str, list[Case]] = {
    "attention": [
        # One mask row for all queries, as encoders pad: onnxruntime's own kernel refuses it.
        ([normal(2, 4, 3, 8), normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1), normal(2, 1, 1, 5) > -1],
         {"scale": 0.5}),
        ([normal(2, 3, 32), normal(2, 5, 32), normal(2, 5, 32, seed=1), normal(2, 1, 1, 5)],
         {"heads": 4, "kv_heads": 4}),
        ([normal(2, 5, 32), normal(2, 5, 16), normal(2, 5, 16, seed=1)], {"heads": 4, "kv_heads": 2, "causal": True}),
        ([normal(2, 4, 3, 8), normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1), normal(2, 4, 3, 5)], {}),
    ],
    "conv_transpose": [
        ([normal(2, 4, 5, 6), normal(4, 3, 3, 3), normal(3)],
         {"stride": (2, 2), "padding": (1, 0, 0, 2), "output_padding": (1, 0), "dilation": (1, 1), "groups": 1}),
    ],
    "lstm": [
        ([normal(5, 2, 3), normal(2, 16, 3), normal(2, 16, 4), normal(2, 32),
          torch.tensor([5, 3], dtype=torch.int32), normal(2, 2, 4), normal(2, 2, 4, seed=1), normal(2, 12)],
         {"direction": "bidirectional"}),
        ([normal(5, 2, 3), normal(1, 16, 3), normal(1, 16, 4), None, None, None, None, normal(1, 12)],
         {"direction": "reverse"}),
    ],
    "gru": [
        ([normal(5, 2, 3), normal(1, 12, 3), normal(1, 12, 4), normal(1, 24), torch.tensor([2, 4], dtype=torch.int32)],
         {"direction": "reverse"}),
        ([normal(5, 2, 3), normal(2, 12, 3), normal(2, 12, 4), normal(2, 24), torch.tensor([2, 5], dtype=torch.int32),
          normal(2, 2, 4)], {"direction": "bidirectional", "reset_after": False}),
    ],
    "rnn": [
        ([normal(5, 2, 3), normal(1, 4, 3), normal(1, 4, 4), None, torch.tensor([4, 1], dtype=torch.int32)],
         {"activation": "relu"}),
    ],
    "conv_int8": [
        ([integers(2, 4, 9, 9), torch.tensor(0.05), torch.tensor(117, dtype=torch.uint8),
          integers(5, 4, 3, 3, dtype=torch.int8), PER_CHANNEL, torch.tensor(0.1), torch.tensor(7, dtype=torch.uint8),
          normal(5)], {"stride": (1, 1), "padding": (0,) * 4, "dilation": (2, 2), "groups": 1}),
    ],
    "max_pool": [([integers(1, 2, 6, 6)], {"kernel": (2, 2), "stride": (1, 1), "padding": (0,) * 4,
                                           "dilation": (1, 1)})],
    "unsqueeze": [([normal(2, 3)], {"axes": (0, 3, 1)})],
    "slice": [([normal(4, 6)], {"axis": 0, "start": 3, "end": 4})],
    "softmax": [([normal(2, 3, 4)], {})],
    "transpose": [([normal(3, 4)], {"perm": (1, 0)})],
}  # fmt: skip
ALL_CASES = [(op, case) for cases in (CASES, MORE_CASES) for op, several in cases.items() for case in several]


def emitted(op: str, case: Case) -> tuple[OnnxGraph, dict[str, Tensor]]:
    """A graph of one op whose operands are inputs (a shape and an embedding's table are constants), and feeds."""
    tensors, attributes = case
    names = operand_names(op, tensors)
    given = {n: t for n, t in zip(names, tensors, strict=False) if t is not None}
    stored = {"shape", "table"} & set(given)
    inputs = {name: tensor for name, tensor in given.items() if name not in stored}
    graph = OnnxGraph.empty({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items()})
    values: dict[str, Value] = {value.name: value for value in graph.inputs}
    values |= {name: graph.add_constant(given[name], name) for name in stored}
    results = graph.emit_all(op, *[values.get(name) for name in names], **attributes)
    graph.set_outputs(dict(zip(OPS[op].results, results, strict=True)))
    graph.verify()
    return graph, inputs


# --- ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case"), ALL_CASES)
def test_a_op_is_emitted_run_and_read_back(op: str, case: Case) -> None:
    graph, inputs = emitted(op, case)
    expected = reference(op, *case)
    assert [value.name for value in graph.outputs] == list(OPS[op].results)
    for found, value, wanted in zip(graph.evaluate(inputs, graph.outputs), graph.outputs, expected, strict=True):
        assert (value.shape, value.dtype) == (tuple(wanted.shape), wanted.dtype)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    node = graph.outputs[0].producer
    assert node is not None and node.kind == op
    assert _close(node.attributes, dict(OPS[op].attributes) | case[1], op)
    assert [value.name for value in node.operands if value is not None and not value.is_constant] == list(inputs)
    again = graph.emit_all(node, *node.operands)
    for found, wanted in zip(graph.evaluate(inputs, again), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _close(found: Mapping[str, Any], expected: dict[str, Any], op: str) -> bool:
    """Equal attributes: ONNX holds floats in 32 bits, and reads kv_heads from heads where it is left out."""
    if op == "attention" and not expected["kv_heads"]:
        expected = expected | {"kv_heads": found["kv_heads"] if found["kv_heads"] == expected["heads"] else 0}
    exact = {key: value for key, value in expected.items() if not isinstance(value, float)}
    rounded = {key: pytest.approx(value, rel=1e-6) for key, value in expected.items() if isinstance(value, float)}
    return dict(found) == exact | rounded


@pytest.mark.parametrize(("op", "case"), ALL_CASES)
def test_a_op_survives_clone_and_file(op: str, case: Case, tmp_path: Path) -> None:
    graph, inputs = emitted(op, case)
    graph.save(tmp_path / "graph.onnx")
    expected = graph.evaluate(inputs, graph.outputs)
    for other in (graph.clone(), OnnxGraph.load(tmp_path / "graph.onnx")):
        other.verify()
        assert other.text() == graph.text()
        torch.testing.assert_close(other.evaluate(inputs, other.outputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", ["out_in", "in_out"])
def test_linear_int8_in_all_its_forms(kind: str, bias: bool, stored: str) -> None:
    """Static scales are constants; a weight stored (in, out) is read through a view, without a Transpose."""
    x, weight = integers(3, 4), integers(5, 4, dtype=torch.int8, seed=1)
    scale, zero, per_row = torch.tensor(0.03), torch.tensor(99, dtype=torch.uint8), torch.rand(5) / 9
    graph = OnnxGraph.empty({"x": ((3, 4), torch.uint8), "s": ((), torch.float32), "z": ((), torch.uint8)})
    static = [graph.add_constant(scale), graph.add_constant(zero)]
    s, z = static if kind == "static" else graph.inputs[1:]
    w = graph.add_constant(weight) if stored == "out_in" else graph.add_constant(weight.t().contiguous()).transpose()
    b = graph.add_constant(normal(5)) if bias else None
    y = graph.emit("linear_int8", graph.inputs[0], s, z, w, graph.add_constant(per_row), b)
    graph.set_outputs({"y": y})
    found = graph.evaluate({"x": x, "s": scale, "z": zero}, graph.outputs)[0]
    wanted = OPS["linear_int8"].reference(x, scale, zero, weight, per_row, normal(5) if bias else None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (site,) = graph.nodes
    assert site.weight is not None and torch.equal(site.weight, weight)


@pytest.mark.parametrize(
    ("text", "attributes", "message"),
    [
        ("linear", {"axis": 1}, "axis"),
        ("no_such_op", {}, "no op"),
        ("gelu", {"approximate": "none", "alpha": 1.0}, "alpha"),
    ],
)
def test_emit_refuses_what_the_op_does_not_have(text: str, attributes: dict[str, Any], message: str) -> None:
    graph = OnnxGraph.empty({"x": ((2, 4), torch.float32)})
    with pytest.raises(GraphError, match=message):
        graph.emit(text, graph.inputs[0], **attributes)
    assert not graph.nodes


def test_emit_refuses_operands_that_do_not_fit() -> None:
    graph = OnnxGraph.empty({"x": ((2, 4), torch.float32), "y": ((3, 5), torch.float32)})
    x, y = graph.inputs
    with pytest.raises(GraphError, match="needs its operand 'weight'"):
        graph.emit("linear", x)
    with pytest.raises(GraphError, match="takes"):
        graph.emit("relu", x, y)
    with pytest.raises(GraphError, match="MatMul does not fit"):
        graph.emit("matmul", x, y)
    other = build("fx", "y = relu(x[2,4])")
    with pytest.raises(GraphError, match="not a value of an ONNX graph"):
        graph.emit("relu", other.inputs[0])
    assert not graph.nodes


def test_ops_that_a_file_at_an_old_opset_cannot_spell_are_refused() -> None:
    text = "g (float[2,4] x, float[1,2,3,4] q) => (float[2,4] y) { y = Relu(x) }"
    graph = OnnxGraph.from_model(model(text, opset=17))
    x, q = graph.inputs
    with pytest.raises(GraphError, match="opset 17; it needs 20"):
        graph.emit("gelu", x)
    with pytest.raises(GraphError, match="opset 17; it needs 23"):
        graph.emit("attention", q, q, q)
    with pytest.raises(GraphError, match="opset 17; it needs 23"):
        graph.emit("rms_norm", x, graph.add_constant(torch.ones(4)))


def test_text_is_the_same_in_both_dialects() -> None:
    text = """
        h = linear(x[batch,8], W[6,8], b[6])
        n = layer_norm(gelu(h), G[6], B[6], eps=0.001)
        s, z = choose_qparams(n)
        q = quantize(n, s, z)
        y = dequantize(q, s, z)
        t = transpose(y, perm=[1,0])
        m = softmax(add(t, t), axis=0)
        return m, q
    """
    assert build("onnx", text).text() == build("fx", text).text()


# --- reading spellings ---------------------------------------------------------------------------------------------

W, B = normal(4, 6), normal(6, seed=1)
SPELLINGS = {
    "MatMul and Add": ("h = MatMul(x, W)  y = Add(h, B)", {"W": W, "B": B}, "linear(x[2,4], [6,4], [6])"),
    "Add and MatMul": ("h = MatMul(x, W)  y = Add(B, h)", {"W": W, "B": B}, "linear(x[2,4], [6,4], [6])"),
    "MatMul": ("y = MatMul(x, W)", {"W": W}, "linear(x[2,4], [6,4])"),
    "Gemm": ("y = Gemm(x, W, B)", {"W": W, "B": B}, "linear(x[2,4], [6,4], [6])"),
    "Gemm transB": ("y = Gemm<transB = 1>(x, W, B)", {"W": W.t().contiguous(), "B": B},
                    "linear(x[2,4], [6,4], [6])"),
    "Gemm and Add": ("h = Gemm(x, W)  y = Add(h, B)", {"W": W, "B": B}, "linear(x[2,4], [6,4], [6])"),
    "Transpose": ("w = Transpose(W)  y = MatMul(x, w)", {"W": W.t().contiguous()}, "linear(x[2,4], [6,4])"),
    "Transpose perm": ("w = Transpose<perm = [1,0]>(W)  y = MatMul(x, w)", {"W": W.t().contiguous()},
                       "linear(x[2,4], [6,4])"),
    "Transpose twice": ("t = Transpose(W)  w = Transpose<perm = [1,0]>(t)  y = MatMul(x, w)", {"W": W},
                        "linear(x[2,4], [6,4])"),
    "Constant node": ("W = Constant<value = float[4,1] {1, 2, 3, 4}>()  y = MatMul(x, W)", {}, "linear(x[2,4], [1,4])"),
    "Gemm alpha": ("y = Gemm<alpha = 0.5>(x, W, B)", {"W": W, "B": B}, "linear(x[2,4], [6,4], [6])"),
    "Gemm beta": ("y = Gemm<beta = 2.0>(x, W, B)", {"W": W, "B": B}, "linear(x[2,4], [6,4], [6])"),
    "Gemm beta of zero": ("y = Gemm<beta = 0.0>(x, W, B)", {"W": W, "B": B}, "linear(x[2,4], [6,4])"),
    "Gemm transA": ("t = Transpose(x)  y = Gemm<transA = 1>(t, W)", {"W": W}, "linear(%1[2,4], [6,4])"),
    "Gemm of one number": ("y = Gemm(x, W, C)", {"W": W, "C": normal(1)}, "linear(x[2,4], [6,4], [6])"),
    "bias of rows": ("y = Gemm(x, W, C)", {"W": W, "C": normal(2, 1)}, "add(%0[2,6], [2,1])"),
    "computed bias": ("c = Relu(x)  y = Gemm<beta = 0.5>(x, W, c)", {"W": normal(4, 4)}, "add(%2[2,4], %1[2,4])"),
    "Transpose of no axis": ("w = Transpose<perm = [0,1]>(W)  y = MatMul(x, w)", {"W": normal(4, 4)},
                             "linear(x[2,4], [4,4])"),
    "Identity": ("w = Identity(W)  y = MatMul(x, w)", {"W": W}, "linear(x[2,4], [6,4])"),
    "Cast": ("w = Cast<to = 1>(W)  y = MatMul(x, w)", {"W": W.half()}, "linear(x[2,4], [6,4])"),
    "Reshape and Transpose": ("s = Constant<value_ints = [6, 4]>()  r = Reshape(W, s)  w = Transpose(r)  "
                              "y = MatMul(x, w)", {"W": normal(24)}, "linear(x[2,4], [6,4])"),
    "weight norm": ("n = ReduceL2<keepdims = 1>(W)  d = Div(W, n)  w = Mul(d, g)  y = MatMul(x, w)",
                    {"W": W, "g": normal(6)}, "linear(x[2,4], [6,4])"),
    "MatMul of an axis of one": ("y = MatMul(x, W)", {"W": normal(1, 4, 6)}, "unsqueeze(%0[2,6], axes=[0])"),
    "MatMul of a vector": ("y = MatMul(x, W)", {"W": normal(4)}, "squeeze(%0[2,1], axes=[1])"),
    "MatMul of heads": ("y = MatMul(x, W)", {"W": normal(3, 4, 6)}, "matmul(x[2,4], [3,4,6])"),
    "Einsum": ('y = Einsum<equation = "nk,km->nm">(x, W)', {"W": W}, "linear(x[2,4], [6,4])"),
    "Einsum of heads": ('y = Einsum<equation = "nk,khd->nhd">(x, W)', {"W": normal(4, 3, 2)},
                        "onnx.Reshape(%0[2,6], [3]:int64)"),
    "Einsum of a batch": ('y = Einsum<equation = "nk,nkm->nm">(x, W)', {"W": normal(2, 4, 3)},
                          "onnx.Einsum(x[2,4], [2,4,3], equation=nk,nkm->nm)"),
    "wide bias": ("h = MatMul(x, W)  y = Add(h, C)", {"W": W, "C": normal(2, 6)}, "add(%0[2,6], [2,6])"),
    "bias of a row": ("h = MatMul(x, W)  y = Add(h, C)", {"W": W, "C": normal(1, 6)}, "linear(x[2,4], [6,4], [6])"),
    "bias of more rank": ("h = MatMul(x, W)  y = Add(h, C)", {"W": W, "C": normal(1, 1, 6)}, "add(%0[2,6], [1,1,6])"),
    "constant left": ("y = MatMul(C, x)", {"C": normal(3, 2)}, "matmul([3,2], x[2,4])"),
    "integer weight": ("i = Cast<to = 6>(x)  y = MatMul(i, W)", {"W": W.to(torch.int32)},
                       "matmul(%0[2,4]:int32, [4,6]:int32)"),
    "softmax": ("y = Softmax(x)", {}, "softmax(x[2,4])"),
    "layer_norm": ("y = LayerNormalization<axis = 1>(x, W)", {"W": normal(4)}, "layer_norm(x[2,4], [4])"),
    "layer_norm of broadcast weight": ("y = LayerNormalization<axis = 0>(x, W)", {"W": normal(4)},
                                       "onnx.LayerNormalization(x[2,4], [4], axis=0)"),
    "mean": ("a = Constant<value_ints = [1]>()  y = ReduceMean<keepdims = 0>(x, a)", {},
             "mean(x[2,4], axes=[1], keepdim=False)"),
    "mean of all": ("y = ReduceMean(x)", {}, "onnx.ReduceMean(x[2,4])"),
    "reshape that copies": ("s = Constant<value_ints = [0, -1]>()  y = Reshape(x, s)", {},
                            "onnx.Reshape(x[2,4], [2]:int64)"),
    "reshape": ("s = Constant<value_ints = [4, -1]>()  y = Reshape(x, s)", {}, "reshape(x[2,4], [2]:int64)"),
    "slice": ("a = Constant<value_ints = [1]>()  e = Constant<value_ints = [99]>()  y = Slice(x, a, e, a)", {},
              "slice(x[2,4], axis=1, start=1, end=4)"),
    "slice from the end": ("a = Constant<value_ints = [-1]>()  e = Constant<value_ints = [9]>()  y = Slice(x, a, e, a)",
                           {}, "onnx.Slice(x[2,4], [1]:int64, [1]:int64, [1]:int64)"),
    "embedding": ("i = Cast<to = 7>(x)  y = Gather(W, i)", {"W": normal(9, 3)}, "embedding([9,3], %0[2,4]:int64)"),
    "gather of columns": ("i = Cast<to = 7>(x)  y = Gather<axis = 1>(W, i)", {"W": normal(3, 9)},
                          "onnx.Gather([3,9], %0[2,4]:int64, axis=1)"),
    "gather of a value": ("i = Constant<value_int = 1>()  y = Gather(x, i)", {}, "onnx.Gather(x[2,4], []:int64)"),
    "dropout": ("y = Dropout(x)", {}, "identity(x[2,4])"),
    "quantize without a zero point": ("y = QuantizeLinear(x, S)", {"S": torch.tensor(0.1)},
                                      "onnx.QuantizeLinear(x[2,4], [])"),
    "quantize to int8": ("y = QuantizeLinear<output_dtype = 3>(x, S)", {"S": torch.tensor(0.1)},
                         "quantize(x[2,4], [])"),
    "quantize to int16": ("y = QuantizeLinear<output_dtype = 5>(x, S)", {"S": torch.tensor(0.1)},
                          "onnx.QuantizeLinear(x[2,4], [], output_dtype=5)"),
    "add of attributes": ("y = Add(x, x)", {}, "add(x[2,4], x[2,4])"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_read(name: str) -> None:
    body, tensors, expected = SPELLINGS[name]
    proto = model(f"g (float[2,4] x) => (y) {{ {body} }}".replace("(y) {", "(float y) {"), tensors)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    if "uantize" in name:
        proto.graph.output[0].type.tensor_type.elem_type = {"quantize to int8": 3, "quantize to int16": 5}.get(name, 2)
    if name == "integer weight":
        proto.graph.output[0].type.tensor_type.elem_type = 6
    graph = OnnxGraph.from_model(proto)
    graph.verify()
    assert graph.text().splitlines()[-2].split(" = ", 1)[1].split("  #")[0] == expected
    inputs = {"x": torch.tensor([[0.0, 1.0, 2.0, 0.0], [2.0, 1.0, 1.0, 0.0]])}
    torch.testing.assert_close(graph.evaluate(inputs, graph.outputs), plain_run(proto, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("y = Conv<auto_pad = \"SAME_UPPER\">(x, W)", "onnx.Conv"),
        ("y = Conv<pads = [1,0,0,1]>(x, W)", "conv"),
        ("y = Conv(x, W)", "conv"),
        ("y = Conv<auto_pad = \"VALID\">(x, W)", "conv"),
        ("y = BatchNormalization(x, C, C, C, V)", "batch_norm"),
    ],
)
def test_spellings_of_convs_and_batch_norms(body: str, kind: str) -> None:
    tensors = {"W": normal(5, 3, 2, 2), "C": normal(3), "V": normal(3) ** 2}
    used = {name: tensor for name, tensor in tensors.items() if name in body}
    proto = model(f"g (float[2,3,6,6] x) => (float[n,c,h,w] y) {{ {body} }}", used)
    graph = OnnxGraph.from_model(proto)
    (node,) = graph.nodes
    assert node.kind == kind
    inputs = feeds(graph)
    torch.testing.assert_close(graph.evaluate(inputs, graph.outputs), plain_run(proto, inputs), rtol=1e-6, atol=1e-6)
    if kind == "conv":
        emitted_anew = graph.emit("conv", *node.operands, **node.attributes)
        assert emitted_anew.shape == node.result.shape
        assert torch.equal(graph.evaluate(inputs, [emitted_anew])[0], graph.evaluate(inputs, graph.outputs)[0])


def test_attention_with_what_the_op_lacks_is_opaque() -> None:
    text = "g (float[2,4,3,8] q) => (float[2,4,3,8] y) { y = Attention<softcap = 2.0>(q, q, q) }"
    assert OnnxGraph.from_model(model(text)).nodes[0].kind == "onnx.Attention"


def test_softmax_of_old_opsets_flattened_its_input() -> None:
    text = "g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) { y = Softmax(x)  z = Softmax<axis = 2>(x) }"
    graph = OnnxGraph.from_model(model(text, opset=11))
    assert [node.kind for node in graph.nodes] == ["onnx.Softmax", "softmax"]


def test_a_file_that_runs_no_attention_of_one_mask_row_is_made_to() -> None:
    text = """g (float[b,4,n,8] q, bool[b,1,1,n] m) => (float[b,4,n,8] y) { y = Attention(q, q, q, m) }"""
    graph = OnnxGraph.from_model(model(text))
    q, mask = normal(2, 4, 5, 8), torch.tensor([[[[True, True, True, False, True]]]]).repeat(2, 1, 1, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
    torch.testing.assert_close(graph.evaluate({"q": q, "m": mask}, graph.outputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert [node.kind for node in graph.nodes] == ["attention"]


# --- views of stored weights ---------------------------------------------------------------------------------------


def test_a_weight_is_seen_as_out_in_and_never_copied() -> None:
    weight = normal(16, 9)
    proto = model("g (float[2,16] x) => (float[2,9] y) { y = MatMul(x, W) }", {"W": weight})
    graph = OnnxGraph.from_model(proto)
    (site,) = graph.sites("linear")
    assert site.weight is not None and torch.equal(site.weight, weight.t())
    stored = next(tensor for name, tensor in graph.constants() if name == "W")
    assert site.weight.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    assert site.required("weight").producer is None


def test_a_view_used_outside_linear_becomes_a_transpose() -> None:
    graph = OnnxGraph.empty({"x": ((6, 4), torch.float32)})
    view = graph.add_constant(W).transpose()
    assert view.shape == (6, 4)
    graph.set_outputs({"y": graph.emit("mul", graph.inputs[0], view)})
    x = normal(6, 4)
    graph.verify()
    torch.testing.assert_close(graph.evaluate({"x": x}, graph.outputs)[0], x * W.t())


# --- changing ------------------------------------------------------------------------------------------------------


def relus() -> OnnxGraph:
    text = """g (float[n,4] x) => (float[n,4] y, float[n,4] z) { h = Relu(x)  y = Tanh(h)  z = Exp(y) }"""
    return OnnxGraph.from_model(model(text))


def test_replacing_what_makes_an_output_keeps_its_name() -> None:
    graph = relus()
    tanh = graph.nodes[1]
    graph.replace(tanh, graph.emit("sigmoid", tanh.input, at=tanh))
    graph.sweep()
    graph.verify()
    assert [value.name for value in graph.outputs] == ["y", "z"]
    assert [node.kind for node in graph.nodes] == ["relu", "sigmoid", "exp"]
    x = normal(3, 4)
    expected = x.relu().sigmoid()
    torch.testing.assert_close(graph.evaluate({"x": x}, graph.outputs), [expected, expected.exp()])


def test_an_output_gets_a_name_that_another_value_had() -> None:
    body = "g (float[2,4] x) => (float[2,6] r) { z = MatMul(x, y)  r = Relu(z) }"
    graph = OnnxGraph.from_model(model(body, {"y": W}))
    graph.set_outputs({"y": graph.outputs[0], "z": graph.emit("exp", graph.outputs[0])})
    x = normal(2, 4)
    expected = (x @ W).relu()
    torch.testing.assert_close(plain_run(ir.to_proto(graph.model), {"x": x}), [expected, expected.exp()])


@pytest.mark.parametrize("place", ["input", "constant", "other output", "inner"])
def test_an_output_may_be_replaced_by_any_value(place: str) -> None:
    graph = relus()
    relu, tanh, exp = graph.nodes
    x = normal(2, 4)
    constant = normal(2, 4, seed=5)
    value: Value = {
        "input": graph.inputs[0], "constant": graph.add_constant(constant), "other output": tanh.result,
        "inner": relu.result,
    }[place]  # fmt: skip
    graph.replace(exp, value)
    graph.sweep()
    graph.verify()
    assert [value.name for value in graph.outputs] == ["y", "z"]
    wanted = {"input": x, "constant": constant, "other output": x.relu().tanh(), "inner": x.relu()}[place]
    found = graph.evaluate({"x": x}, graph.outputs)
    torch.testing.assert_close(found, [x.relu().tanh(), wanted])


def test_only_unused_nodes_of_this_graph_are_erased() -> None:
    graph = relus()
    relu, tanh, _ = graph.nodes
    for node in (relu, tanh):
        with pytest.raises(GraphError, match="cannot be erased: its result is used"):
            graph.erase(node)
    with pytest.raises(GraphError, match=r"not .* a node of this graph"):
        graph.erase(graph.clone().nodes[0])
    spare = graph.emit("relu", relu.result).producer
    assert spare is not None and graph.version == 0
    graph.erase(spare)
    assert graph.version == 1 and len(graph.nodes) == 3
    with pytest.raises(GraphError, match=r"not .* a node of this graph"):
        graph.replace(spare, relu.result)


def test_sweep_removes_what_nobody_uses() -> None:
    graph = relus()
    relu, tanh, _ = graph.nodes
    chain = graph.emit("exp", graph.emit("mul", relu.result, graph.add_constant(normal(4)), at=tanh), at=tanh)
    assert chain.producer is not None and len(graph.nodes) == 5
    assert graph.sweep() == 2
    assert len(graph.nodes) == 3 and not list(graph.constants()) and graph.version == 0
    graph.replace(tanh, graph.inputs[0])  # relu is now unused
    assert graph.sweep() == 1 and relu not in graph.nodes


def test_emit_and_add_constant_are_inert_and_take_the_path_of_the_site() -> None:
    proto = model("g (float[2,4] x) => (float[2,6] y) { [\"/block.0/up/MatMul\"] y = MatMul(x, W) }", {"W": W})
    graph = OnnxGraph.from_model(proto)
    (site,) = graph.nodes
    assert site.path == "block.0.up" and graph.version == 0
    value = graph.emit("relu", site.input, at=site)
    assert value.producer is not None and value.producer.path == "block.0.up"
    assert [node.kind for node in graph.nodes] == ["relu", "linear"]
    assert graph.version == 0


def test_a_clone_is_independent_and_shares_the_weights() -> None:
    proto = model("g (float[2,16] x) => (float[2,9] y) { y = MatMul(x, W) }", {"W": normal(16, 9)})
    graph = OnnxGraph.from_model(proto)
    clone = graph.clone()
    before = graph.text()
    (site,) = clone.nodes
    weight, bias = clone.add_constant(normal(9, 16)), clone.add_constant(normal(9))
    clone.replace(site, clone.emit("linear", site.input, weight, bias))
    clone.sweep()
    assert graph.text() == before and clone.version == 1 and graph.version == 0
    again = graph.clone()
    (name, tensor), (_, shared) = *graph.constants(), *again.constants()
    assert name == "W" and tensor.data_ptr() == shared.data_ptr()


# --- checks --------------------------------------------------------------------------------------------------------


def test_verify_finds_a_value_that_is_read_too_early() -> None:
    graph = relus()
    first = graph.model.graph[0]
    graph.model.graph.remove(first)
    graph.model.graph.append(first)
    with pytest.raises(GraphError, match="before anything defines it"):
        graph.verify()


def test_verify_finds_a_name_that_is_defined_twice() -> None:
    graph = relus()
    graph.model.graph[1].outputs[0].name = graph.model.graph[0].outputs[0].name
    with pytest.raises(GraphError, match="a second time"):
        graph.verify()


def test_verify_finds_a_op_without_body_and_an_output_without_source() -> None:
    graph = build("onnx", "y = linear(x[2,4], W[6,4])")
    assert isinstance(graph, OnnxGraph)
    graph.model.functions.clear()
    with pytest.raises(GraphError, match="no function body"):
        graph.verify()
    graph = relus()
    graph.model.graph.outputs.append(ir.Value(name="stray"))
    with pytest.raises(GraphError, match="'stray' is not defined"):
        graph.verify()


def test_an_error_names_the_module_path() -> None:
    proto = model('g (float[2,4] x) => (float[2,4] z) { ["/block/Relu"] y = Relu(x)  ["/block/act/Exp"] z = Exp(y) }')
    graph = OnnxGraph.from_model(proto)
    relu = graph.model.graph[0]
    graph.model.graph.remove(relu)
    graph.model.graph.append(relu)
    with pytest.raises(GraphError, match=r"\(block\.act\)"):
        graph.verify()


def test_evaluate_names_missing_inputs_and_reads_any_value() -> None:
    graph = relus()
    relu = graph.nodes[0]
    with pytest.raises(GraphError, match="missing: x"):
        graph.evaluate({}, graph.outputs)
    x, constant = normal(3, 4), graph.add_constant(B)
    found = graph.evaluate({"x": x}, [relu.result, graph.inputs[0], constant, relu.result])
    torch.testing.assert_close(found, [x.relu(), x, B, x.relu()])
    assert torch.equal(graph.evaluate({}, [constant])[0], B)


def test_equal_signatures_compute_equal_results() -> None:
    text = """g (float[n,4] x, float[n,4] z) => (float[n,4] y) {
        a = Clip(x, L)  b = Clip(z, L)  c = Dropout(x)  r = RandomNormalLike(x)  d = Elu<alpha = 2.0>(x)  e = Elu(x)
        y = Sum(a, b, c, r, d, e)
    }"""
    clip, other, _, random, elu, plain, _ = OnnxGraph.from_model(model(text, {"L": torch.tensor(0.0)})).nodes
    assert clip.signature == other.signature is not None
    assert random.signature is None
    assert elu.signature != plain.signature


def test_an_old_add_with_attributes_is_no_op() -> None:
    """Before opset 7, Add took the axis that its second operand lies along."""
    proto = model("g (float[2,4] x, float[2] v) => (float[2,4] y) { y = Add<axis = 0, broadcast = 1>(x, v) }", opset=6)
    assert OnnxGraph.from_model(proto).nodes[0].kind == "onnx.Add"


def test_views_compare_by_what_they_view() -> None:
    graph = relus()
    assert graph.nodes[0] == graph.nodes[0] and hash(graph.nodes[0]) == hash(graph.nodes[0])
    assert graph.nodes[0] != graph.clone().nodes[0]
    assert isinstance(graph.nodes[0], OnnxNode) and isinstance(graph.inputs[0], OnnxValue)
    assert graph.inputs[0] == graph.nodes[0].input and graph.inputs[0] != graph.inputs[0].transpose()


@pytest.mark.parametrize(("limit", "kept"), [(0, False), (2**28, True)])
def test_a_large_session_is_dropped_when_it_is_released(
    limit: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.dialects.onnx.graph._LARGE", limit)
    graph = build("onnx", "y = linear(x[2,4], W[3,4], B[3])")
    assert isinstance(graph, OnnxGraph)
    expected = outputs(graph)
    graph.release()
    assert (graph._session is not None) is kept
    torch.testing.assert_close(outputs(graph), expected)


def test_results_of_two_branches_are_picked_at_each_run() -> None:
    graph = build("onnx", "y = relu(x[2,3])")
    assert isinstance(graph, OnnxGraph)
    (node,), (x,) = graph.nodes, graph.inputs
    flag = graph.emit("onnx.Less", graph.emit("mean", x, axes=(0, 1), keepdim=False, at=node),
                      graph.add_constant(torch.tensor(0.0)), at=node)  # fmt: skip
    (result,) = graph.emit_if(flag, lambda: [graph.emit("sub", graph.add_constant(torch.tensor(1.0)), x, at=node)],
                              lambda: [graph.emit("exp", x, at=node)], node)  # fmt: skip
    graph.replace(node, result)
    graph.sweep()
    graph.verify()
    assert [one.kind for one in graph.nodes] == ["mean", "onnx.Less", "onnx.If"] and result.shape == (2, 3)
    for given, expected in ((torch.ones(2, 3), torch.ones(2, 3).exp()), (-torch.ones(2, 3), 2 * torch.ones(2, 3))):
        torch.testing.assert_close(graph.evaluate({"x": given}, graph.outputs)[0], expected)
        torch.testing.assert_close(graph.clone().evaluate({"x": given}, graph.clone().outputs)[0], expected)
