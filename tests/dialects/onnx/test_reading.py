"""Which ONNX operators are read as ops, by old spellings and new, and what the ops become at older opsets."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from graphopt.dialects.onnx.export import deployable
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.ops import OPS
from tests.dialects.fx.test_graph import CASES, Case, normal, operand_names, reference
from tests.dialects.onnx.test_graph import emitted
from tests.models import model, plain_run

POOL = {"kernel": (2, 2), "stride": (1, 1), "padding": (0,) * 4}
LOW, HIGH, WIDE = torch.tensor(-0.1), torch.tensor([0.7]), torch.tensor([0, 1, 0, 0, 2, 0, 0, 0])
SIDES, LAST = torch.tensor([1, 2, 0, -1]), torch.tensor([-1, 1])
READ: dict[str, tuple[str, int, dict[str, Tensor], str, dict[str, Any] | None]] = {
    "MaxPool": ("y = MaxPool<kernel_shape = [2,2]>(x)", 8, {}, "max_pool", POOL | {"dilation": (1, 1)}),
    "MaxPool of all attributes": (
        "y = MaxPool<kernel_shape = [3,2], strides = [2,1], pads = [1,0,0,1], dilations = [1,2], ceil_mode = 1>(x)", 12,
        {}, "max_pool",
        {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0, 0, 1), "dilation": (1, 2), "ceil": True}),
    "MaxPool VALID": ("y = MaxPool<kernel_shape = [2,2], auto_pad = \"VALID\">(x)", 23, {}, "max_pool",
                      POOL | {"dilation": (1, 1)}),
    "MaxPool SAME": ("y = MaxPool<kernel_shape = [2,2], auto_pad = \"SAME_UPPER\">(x)", 23, {}, "max_pool",
                     POOL | {"padding": (0, 0, 1, 1), "dilation": (1, 1)}),
    "AveragePool SAME": (
        "y = AveragePool<kernel_shape = [3,1], strides = [2,4], auto_pad = \"SAME_LOWER\">(x)", 20, {}, "average_pool",
        POOL | {"kernel": (3, 1), "stride": (2, 4), "padding": (1, 0, 0, 0)}),
    "AveragePool SAME that begins behind the first element": (
        "y = AveragePool<kernel_shape = [1,1], strides = [3,1], auto_pad = \"SAME_UPPER\">(x)", 20, {},
        "onnx.AveragePool", None),
    "MaxPool and indices": ("y, i = MaxPool<kernel_shape = [2,2]>(x)", 23, {}, "onnx.MaxPool", None),
    "AveragePool": ("y = AveragePool<kernel_shape = [2,2]>(x)", 9, {}, "average_pool", POOL),
    "AveragePool of all attributes": (
        "y = AveragePool<kernel_shape = [2,2], strides = [2,2], pads = [1,0,1,1], ceil_mode = 1, "
        "count_include_pad = 1>(x)", 22, {}, "average_pool",
        {"kernel": (2, 2), "stride": (2, 2), "padding": (1, 0, 1, 1), "ceil": True, "include_pad": True}),
    "AveragePool not dilated": ("y = AveragePool<kernel_shape = [2,2], dilations = [1,1]>(x)", 19, {}, "average_pool",
                                POOL),
    "AveragePool dilated": ("y = AveragePool<kernel_shape = [2,2], dilations = [2,2]>(x)", 19, {}, "onnx.AveragePool",
                            None),
    "GlobalAveragePool": ("y = GlobalAveragePool(x)", 23, {}, "mean", {"axes": (2, 3)}),
    "Clip": ("y = Clip(x, L, H)", 23, {"L": LOW, "H": HIGH}, "clip", {"low": -0.1, "high": 0.7}),
    "Clip from above": ("y = Clip(x, , H)", 13, {"H": HIGH}, "clip", {"high": 0.7}),
    "Clip by attributes": ("y = Clip<max = 0.5>(x)", 10, {}, "clip", {"high": 0.5}),
    "Clip without bounds": ("y = Clip(x)", 23, {}, "identity", {}),
    "Clip by a value": ("m = ReduceMin<keepdims = 0>(x) y = Clip(x, m)", 23, {}, "onnx.Clip", None),
    "Clip of long integers": ("i = Cast<to = 7>(x) c = Clip(i, N) y = Cast<to = 1>(c)", 23,
                              {"N": torch.tensor(2**53 + 1)}, "cast", {"dtype": torch.float32}),
    "LeakyRelu": ("y = LeakyRelu(x)", 23, {}, "leaky_relu", {"slope": 0.01}),
    "LeakyRelu of a slope": ("y = LeakyRelu<alpha = 0.2>(x)", 6, {}, "leaky_relu", {"slope": 0.2}),
    "HardSigmoid of torch": ("y = HardSigmoid<alpha = 0.16666667>(x)", 23, {}, "hard_sigmoid", {}),
    "HardSigmoid of Keras": ("y = HardSigmoid(x)", 23, {}, "onnx.HardSigmoid", None),
    "HardSwish": ("y = HardSwish(x)", 14, {}, "hard_swish", {}),
    "Concat": ("y = Concat<axis = -1>(x, x, C)", 23, {"C": normal(2, 3, 6, 1)}, "concat", {"axis": -1}),
    "Pad": ("y = Pad(x, P, L)", 13, {"P": WIDE, "L": LOW}, "pad", {"padding": (0, 1, 0, 0, 2, 0, 0, 0), "value": -0.1}),
    "Pad by attributes": ("y = Pad<pads = [0,1,0,0,2,0,0,0]>(x)", 10, {}, "pad", {"padding": (0, 1, 0, 0, 2, 0, 0, 0)}),
    "Pad along axes": ("y = Pad(x, S, , A)", 18, {"S": SIDES, "A": LAST}, "pad",
                       {"padding": (0, 2, 0, 1, 0, -1, 0, 0)}),
    "Pad that reflects": ("y = Pad<mode = \"reflect\">(x, P)", 23, {"P": torch.ones(8).long()}, "onnx.Pad", None),
    "Squeeze": ("y = Squeeze(Z, A)", 13, {"Z": normal(1, 3, 1), "A": torch.tensor([-1])}, "squeeze", {"axes": (-1,)}),
    "Squeeze by attribute": ("y = Squeeze<axes = [0,2]>(Z)", 11, {"Z": normal(1, 3, 1)}, "squeeze", {"axes": (0, 2)}),
    "Squeeze of all": ("y = Squeeze(Z)", 23, {"Z": normal(1, 3, 1)}, "onnx.Squeeze", None),
    "Unsqueeze": ("y = Unsqueeze(x, A)", 23, {"A": LAST}, "unsqueeze", {"axes": (-1, 1)}),
    "Unsqueeze by attribute": ("y = Unsqueeze<axes = [0,5]>(x)", 11, {}, "unsqueeze", {"axes": (0, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_an_operator_is_read_as_a_op_where_both_are_equal(name: str) -> None:
    body, opset, tensors, kind, attributes = READ[name]
    proto = model(f"g (float[2,3,6,6] x) => (float y) {{ {body} }}", tensors, opset=opset)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    graph, inputs = OnnxGraph.from_model(proto), {"x": normal(2, 3, 6, 6)}
    node = graph.nodes[-1]
    assert node.kind == kind
    if attributes is not None:
        assert dict(node.attributes) == dict(OPS[kind].attributes) | attributes
    wanted = plain_run(proto, inputs)[0]
    assert torch.equal(graph.evaluate(inputs, graph.outputs)[0], wanted)
    again = graph.emit_all(node, *node.operands)[0]
    assert again.shape == tuple(wanted.shape)
    assert torch.equal(graph.evaluate(inputs, [again])[0], wanted)
    if attributes is not None:  # what the op means
        operands = [value if value is None else graph.evaluate(inputs, [value])[0] for value in node.operands]
        torch.testing.assert_close(OPS[kind].reference(*operands, **node.attributes), wanted, rtol=1e-6, atol=1e-6)


NEW = [
    (op, case)
    for op in ("concat", "max_pool", "average_pool", "clip", "leaky_relu", "hard_sigmoid", "hard_swish", "pad",
                 "squeeze", "unsqueeze")
    for case in CASES[op]
]  # fmt: skip


@pytest.mark.parametrize("opset", [13, 18, 22])
@pytest.mark.parametrize(("op", "case"), NEW)
def test_a_op_is_written_at_an_older_opset(op: str, case: Case, opset: int) -> None:
    graph, inputs = emitted(op, case)
    proto = ir.to_proto(deployable(graph, opset))
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    torch.testing.assert_close(plain_run(proto, inputs)[0], reference(op, *case)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [10, 12])
@pytest.mark.parametrize(("op", "case"), NEW)
def test_a_op_is_emitted_into_a_file_of_an_old_opset(op: str, case: Case, opset: int) -> None:
    tensors, attributes = case
    assert tensors[0] is not None
    if opset == 10 and op in ("clip", "pad") and tensors[0].dtype != torch.float32:
        pytest.skip("onnxruntime has kernels of Clip and Pad before opset 11 for floats only")
    if opset == 10 and attributes.get("low", 0) > attributes.get("high", 9):
        pytest.skip("onnxruntime's Clip of opset 6 refuses bounds in this order")
    graph = OnnxGraph.from_model(model("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset))
    names = operand_names(op, tensors)
    constants = [None if t is None else graph.add_constant(t, name) for name, t in zip(names, tensors, strict=True)]
    result = graph.emit(op, *constants, **attributes)
    assert result.producer is not None and result.producer.kind == op
    torch.testing.assert_close(graph.evaluate({}, [result])[0], reference(op, *case)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [None, 13])
def test_a_global_average_pool_stays_one(opset: int | None) -> None:
    """Engines have kernels for it in their own layout and in integers; a ReduceMean leaves both."""
    text = "g (float[2,3,6,6] x) => (float[2,3,1,1] y) { r = Relu(x) y = GlobalAveragePool(r) }"
    graph = OnnxGraph.from_model(model(text))
    relu, mean = graph.nodes
    graph.replace(mean, graph.emit(mean, relu.result, at=mean))
    graph.replace(relu, graph.emit("silu", relu.input, at=relu))
    written = ir.to_proto(deployable(graph, opset))
    assert written.graph.node[-1].op_type == "GlobalAveragePool"
    x = normal(2, 3, 6, 6)
    expected = torch.nn.functional.silu(x).mean((2, 3), keepdim=True)
    torch.testing.assert_close(plain_run(written, {"x": x})[0], expected)


def test_dilations_of_one_are_no_reason_to_refuse_an_opset() -> None:
    text = "g (float[1,1,4,4] x) => (float[1,1,3,3] y) { y = AveragePool<kernel_shape = [2,2], dilations = [1,1]>(x) }"
    written = ir.to_proto(deployable(OnnxGraph.from_model(model(text)), 13))
    x = normal(1, 1, 4, 4)
    torch.testing.assert_close(plain_run(written, {"x": x})[0], torch.nn.functional.avg_pool2d(x, 2, 1))
