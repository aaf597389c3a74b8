"""Every op at every opset: what is written is valid and means the same there, or it is refused by name."""

from __future__ import annotations

import itertools
from contextlib import suppress

import onnx
import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented  # of a kernel for a type at an old opset

from graphopt.dialects.onnx.export import deployable
from graphopt.dialects.onnx.graph import OPSET, OnnxGraph
from graphopt.dialects.onnx.opset import OLDEST
from graphopt.errors import GraphError, SpellingError
from graphopt.ir.graph import Value
from graphopt.ir.ops import OPS
from tests.dialects.fx.test_graph import CASES, Case, normal, operand_names, reference
from tests.models import model, plain_run

OPSETS = range(OLDEST, OPSET + 1)


def written_at(op: str, case: Case, opset: int) -> OnnxGraph | None:
    """A graph of an opset that holds one op; None where the opset has no spelling of it."""
    tensors, attributes = case
    names = operand_names(op, tensors)
    given = {n: t for n, t in zip(names, tensors, strict=False) if t is not None}
    stored = {"shape", "table"} & set(given)
    inputs = {name: (tuple(t.shape), t.dtype) for name, t in given.items() if name not in stored}
    graph = OnnxGraph.empty(inputs)
    graph.model.graph.opset_imports[""] = opset
    values: dict[str, Value] = {value.name: value for value in graph.inputs}
    values |= {name: graph.add_constant(given[name], name) for name in stored}
    try:
        results = graph.emit_all(op, *[values.get(name) for name in names], **attributes)
    except SpellingError as error:
        assert f"opset {opset}" in str(error) or "opset 21" in str(error) or "opset 13" in str(error), error
        return None
    graph.set_outputs(dict(zip(OPS[op].results, results, strict=True)))
    return graph


def assert_computes(graph: OnnxGraph, opset: int, op: str, case: Case) -> None:
    """Written at an opset, the file is valid and gives the op's own result."""
    proto = ir.to_proto(deployable(graph, opset))
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [opset]
    onnx.checker.check_model(proto, full_check=True)
    tensors = dict(zip(operand_names(op, case[0]), case[0], strict=False))
    feeds = {value.name: tensor for value in graph.inputs if (tensor := tensors[value.name]) is not None}
    for found, wanted in zip(plain_run(proto, feeds), reference(op, *case), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_an_op_at_every_opset(op: str, case: Case) -> None:
    written = 0
    for opset in OPSETS:
        graph = written_at(op, case, opset)
        if graph is not None:
            with suppress(NotImplemented):
                assert_computes(graph, opset, op, case)
            written += 1
    assert written, "no opset has it"


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_an_op_is_exported_at_every_other_opset(op: str, case: Case) -> None:
    graph = written_at(op, case, OPSET)
    assert graph is not None
    for opset in OPSETS:
        try:
            with suppress(NotImplemented):
                assert_computes(graph, opset, op, case)
        except GraphError as error:
            assert graph.nodes[0].name in str(error) and len(str(error)) < 300


_OPERATORS = {
    "Softmax over all axes from one on": (11, "float[n,3,4] x", "y = Softmax<axis = 1>(x)"),
    "LogSoftmax": (11, "float[n,3,4] x", "y = LogSoftmax<axis = 1>(x)"),
    "Hardmax": (12, "float[n,3,4] x", "y = Hardmax<axis = -2>(x)"),
    "Softmax along one axis": (13, "float[n,3,4] x", "y = Softmax<axis = 1>(x)"),
    "LogSoftmax along one axis": (17, "float[n,3,4] x", "y = LogSoftmax<axis = -2>(x)"),
    "Mish": (18, "float[n,4] x", "y = Mish(x)"),
    "Trilu": (14, "float[n,4,5] x", "k = Constant<value_int = -1>() y = Trilu<upper = 0>(x, k)"),
    "ReduceMax": (18, "float[n,3,4] x", "a = Constant<value_ints = [1]>() y = ReduceMax<keepdims = 0>(x, a)"),
    "ReduceSum": (11, "float[n,3,4] x", "y = ReduceSum<axes = [1], keepdims = 0>(x)"),
    "ReduceL2 of all": (21, "float[n,3,4] x", "y = ReduceL2(x)"),
    "Split": (11, "float[n,4] x", "a, b = Split<axis = 1>(x) y = Sub(a, b)"),
    "Split by sizes": (18, "float[n,5] x", "s = Constant<value_ints = [2, 3]>() a, y = Split<axis = 1>(x, s)"),
    "Reshape": (12, "float[n,4] x", "s = Constant<value_ints = [0, 2, 2]>() y = Reshape(x, s)"),
    "Squeeze": (11, "float[n,1,4] x", "y = Squeeze<axes = [1]>(x)"),
    "Pad": (11, "float[n,4] x", "p = Constant<value_ints = [0, 1, 0, 2]>() y = Pad<mode = \"reflect\">(x, p)"),
    "Dropout": (11, "float[n,4] x", "y = Dropout(x)"),
    "Shape of a slice": (15, "float[n,3,4] x", "s = Shape<start = 1>(x) y = Cast<to = 1>(s)"),
    "SAME padding": (20, "float[n,2,4,5] x",
                     "y = AveragePool<auto_pad = \"SAME_UPPER\", kernel_shape = [1,3], strides = [2,2]>(x)"),
    "ceil_mode": (18, "float[n,2,5,5] x",
                  "y = AveragePool<ceil_mode = 1, kernel_shape = [2,2], strides = [2,2]>(x)"),
    "Resize by scales": (18, "float[n,1,4,4] x",
                         "s = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>() y = Resize<mode = \"linear\">(x, , s)"),
    "Resize to sizes": (13, "float[2,1,4,4] x",
                        "s = Constant<value_ints = [2, 1, 7, 9]>() y = Resize<mode = \"linear\">(x, , , s)"),
    "Upsample": (9, "float[n,1,4,4] x",
                 "s = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>() y = Upsample<mode = \"linear\">(x, s)"),
    "Upsample by an attribute": (7, "float[n,1,4,4] x", "y = Upsample<scales = [1.0, 1.0, 2.0, 3.0]>(x)"),
    "Resize before opset 11": (10, "float[n,1,4,4] x",
                               "s = Constant<value = float[4] {1.0, 1.0, 2.5, 0.5}>() y = Resize(x, s)"),
    "GroupNormalization": (21, "float[n,4,2,3] x", """
        s = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>() b = Constant<value_floats = [0.5, 1.5, -1.0, 0.0]>()
        y = GroupNormalization<num_groups = 2>(x, s, b)"""),
    "GroupNormalization of opset 18": (18, "float[n,4,2,3] x", """
        s = Constant<value_floats = [1.0, 2.0]>() b = Constant<value_floats = [0.5, 1.5]>()
        y = GroupNormalization<num_groups = 2>(x, s, b)"""),
    "CumSum": (14, "float[n,4] x", "a = Constant<value_int = 1>() y = CumSum(x, a)"),
    "a branch": (13, "float[n,3,4] x", """
        c = Constant<value_ints = [0]>() b = Cast<to = 9>(c) k = Squeeze(b)
        y = If(k)<then_branch = t () => (float[n,3,4] u) { u = Softmax<axis = 1>(x) },
                  else_branch = e () => (float[n,3,4] v) { v = LogSoftmax<axis = 1>(x) }>"""),
}  # fmt: skip
"""By what is special: an opset, the input, and lines that make y."""


@pytest.mark.parametrize("what", _OPERATORS)
def test_an_operator_is_exported_at_every_opset(what: str) -> None:
    source, inputs, body = _OPERATORS[what]
    proto = model(f"g ({inputs}) => (float y) {{ {body} }}", opset=source)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    graph = OnnxGraph.from_model(proto)
    sizes = [2 if isinstance(size, str) else size for size in graph.inputs[0].shape or ()]
    feeds = {"x": normal(*sizes)}
    expected = plain_run(proto, feeds)[0]
    refused = []
    for opset in OPSETS:
        try:
            written = ir.to_proto(deployable(graph, opset))
        except GraphError as error:
            assert len(str(error)) < 300
            refused.append(opset)
            continue
        torch.testing.assert_close(plain_run(written, feeds)[0], expected, rtol=1e-4, atol=1e-5)
    assert refused == _REFUSED.get(what, []), what


_REFUSED: dict[str, list[int]] = {
    "GroupNormalization of opset 18": [opset for opset in OPSETS if opset not in range(18, 21)],
}
"""Opsets at which an operator cannot be said."""


def test_an_operator_that_means_something_else_is_refused_by_name() -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y, bool[n,4] mask) { [drop] y, mask = Dropout(x) }", opset=11)
    graph = OnnxGraph.from_model(proto)
    with pytest.raises(GraphError, match=r"the mask of Dropout is another one from opset 12 on \(drop\)"):
        deployable(graph, 17)
    assert deployable(graph, 11).graph.opset_imports[""] == 11


@pytest.mark.parametrize(("source", "opset"), list(itertools.product((11, 13, 17, 22), repeat=2)))
def test_inner_shapes_are_those_of_the_opset(source: int, opset: int) -> None:
    """Inference of old opsets finds another size of a pool with ceil_mode: no shape of the other opset may stay."""
    body = "p = AveragePool<ceil_mode = 1, kernel_shape = [1,2], strides = [3,2]>(x) q = Relu(p) y = Add(q, p)"
    graph = OnnxGraph.from_model(model(f"g (float[n,2,5,4] x) => (float y) {{ {body} }}", opset=source))
    written = ir.to_proto(deployable(graph, opset))
    bare = onnx.ModelProto()
    bare.CopyFrom(written)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    found = {value.name: value.type for value in inferred.graph.value_info}
    assert {value.name: value.type for value in written.graph.value_info if value.name in found} == found
