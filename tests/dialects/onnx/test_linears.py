"""Whatever way a product with a stored weight is written, it is a linear, and computes what the file says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.dialects.onnx.graph import OnnxGraph

IN, OUT = 5, 3


class _File:
    """An ONNX model that is written node by node."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = np.float32) -> str:
        return self.store(self.random.standard_normal(shape).astype(dtype))

    def store(self, array: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(array, f"stored{len(self.stored)}"))
        return str(self.stored[-1].name)

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [f"value{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])

    def model(self, x_shape: list[int], y: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)
        result = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [x], [result], self.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def disguised(draw: Any, file: _File, *shape: int) -> str:
    """A stored weight of this shape behind nodes that compute it of constants."""
    how = draw(st.sampled_from(["plain", "half", "identity", "transpose", "flat", "norm", "low rank", "two turns"]))
    last = len(shape) - 1
    back = [last, *range(last)]  # the last axis first
    match how:
        case "half":
            return file.add("Cast", file.normal(*shape, dtype=np.float16), to=TensorProto.FLOAT)
        case "identity":
            return file.add("Identity", file.add("Identity", file.normal(*shape)))
        case "transpose":
            stored = file.normal(shape[last], *shape[:last])
            return file.add("Transpose", stored, perm=[*range(1, len(shape)), 0])
        case "two turns":
            turned = file.add("Transpose", file.normal(*shape), perm=back)
            return file.add("Transpose", turned, perm=[*range(1, len(shape)), 0])
        case "flat":
            return file.add("Reshape", file.normal(int(np.prod(shape))), file.store(np.array(shape, np.int64)))
        case "norm":
            v = file.normal(*shape)
            return file.add("Mul", file.add("Div", v, file.add("ReduceL2", v, keepdims=1)), file.normal(shape[last]))
        case "low rank" if len(shape) == 2:
            update = file.add("MatMul", file.normal(shape[0], 2), file.normal(2, shape[1]))
            return file.add("Add", file.normal(*shape), update)
        case _:
            return file.normal(*shape)


@st.composite
def gemms(draw: Any) -> onnx.ModelProto:
    file = _File(draw(st.integers(0, 99)))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    alpha, beta = (draw(st.sampled_from([1.0, 0.5, -2.0])), draw(st.sampled_from([1.0, 0.25, 0.0])))
    weight = disguised(draw, file, *((OUT, IN) if trans_b else (IN, OUT)))
    shapes: list[tuple[int, ...] | None] = [None, (OUT,), (1, OUT), (1,), (), (1, 1), (4, OUT), (4, 1)]
    c = draw(st.sampled_from(shapes))
    given = ["x", weight] if c is None else ["x", weight, file.normal(*c)]
    y = file.add("Gemm", *given, transA=int(trans_a), transB=int(trans_b), alpha=alpha, beta=beta)
    if draw(st.booleans()):
        y = file.add("Add", y, file.normal(*draw(st.sampled_from([(OUT,), (1, OUT), (), (4, OUT)]))))
    return file.model([IN, 4] if trans_a else [4, IN], y)


@st.composite
def matmuls(draw: Any) -> onnx.ModelProto:
    file = _File(draw(st.integers(0, 99)))
    x = draw(st.sampled_from([[IN], [4, IN], [2, 4, IN], [2, 1, 4, IN]]))
    ranks = [(IN, OUT)] if len(x) == 1 else [(IN, OUT), (1, IN, OUT), (1, 1, IN, OUT), (IN,)]
    y = file.add("MatMul", "x", disguised(draw, file, *draw(st.sampled_from(ranks))))
    if draw(st.booleans()):
        bias = file.normal(*draw(st.sampled_from([(), (1,), (1, 1, 1)])))
        y = file.add("Add", *draw(st.permutations([y, bias])))
    return file.model(x, y)


@st.composite
def einsums(draw: Any) -> onnx.ModelProto:
    """Letters that only one side has go to the result; those of both are summed over."""
    file = _File(draw(st.integers(0, 99)))
    sizes = {"a": 2, "b": 4, "i": 3, "j": 2, "o": 3, "p": 2}
    rows, summed, columns = (
        draw(st.lists(st.sampled_from(both), min_size=1, max_size=2, unique=True)) for both in ("ab", "ij", "op")
    )
    x, w, y = ("".join(draw(st.permutations(one))) for one in (rows + summed, summed + columns, rows + columns))
    weight = disguised(draw, file, *(sizes[one] for one in w))
    sides = [(x, "x"), (w, weight)]
    sides = sides if draw(st.booleans()) else sides[::-1]
    equation = f"{sides[0][0]},{sides[1][0]}->{y}"
    result = file.add("Einsum", sides[0][1], sides[1][1], equation=equation)
    return file.model([sizes[one] for one in x], result)


@given(st.one_of(gemms(), matmuls(), einsums()))
@settings(max_examples=60, deadline=None)
def test_every_spelling_of_a_linear_is_one_and_computes_the_same(model: onnx.ModelProto) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    graph = OnnxGraph.from_model(model)
    graph.verify()
    (linear,) = graph.sites("linear")
    assert linear.weight is not None
    assert not {"matmul", "onnx.Gemm", "onnx.Einsum"} & {node.kind for node in graph.nodes}
    (wanted,) = session.run(None, {"x": x})
    (found,) = graph.evaluate({"x": torch.from_numpy(x)}, graph.outputs)
    torch.testing.assert_close(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_weight_of_an_axis_of_one_is_stored_once_for_all_its_readers() -> None:
    file = _File(0)
    weight = file.normal(1, IN, OUT)
    y = file.add("Add", file.add("MatMul", "x", weight), file.add("MatMul", file.add("Relu", "x"), weight))
    graph = OnnxGraph.from_model(file.model([2, 4, IN], y))
    assert len(graph.sites("linear")) == 2
    assert [tuple(tensor.shape) for _, tensor in graph.constants() if tensor.numel() == IN * OUT] == [(OUT, IN)]


def test_a_weight_that_others_read_is_not_scaled_but_its_input() -> None:
    """Two factors would store it twice."""
    file = _File(0)
    weight = file.normal(IN, IN)
    first = file.add("Gemm", "x", weight, alpha=0.5)
    graph = OnnxGraph.from_model(file.model([4, IN], file.add("Gemm", first, weight, alpha=3.0)))
    assert [node.kind for node in graph.nodes] == ["mul", "linear", "mul", "linear"]
    assert [tuple(tensor.shape) for _, tensor in graph.constants() if tensor.dim()] == [(IN, IN)]
