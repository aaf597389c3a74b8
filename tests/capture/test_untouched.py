"""Inputs that are no tensors (texts, sequences, maps): as examples, for calibration, and in a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.errors import GraphError, UsageError
from graphopt.ir.graph import tensors_digest
from graphopt.ir.untouched import Untouched

WORDS = np.array(["a", "b", "a"], object)
WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def file(input_: onnx.ValueInfoProto, *nodes: onnx.NodeProto) -> onnx.ModelProto:
    """The input through the nodes to `d`, float [n,4], and a linear."""
    linear = helper.make_node("MatMul", ["d", "w"], ["y"])
    table = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
    stored = [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(table, "e")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([*nodes, linear], "g", [input_], [output], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def texts() -> tuple[onnx.ModelProto, Any]:
    encode = helper.make_node("LabelEncoder", ["x"], ["i"], domain="ai.onnx.ml", keys_strings=["a", "b"],
                              values_int64s=[0, 1])  # fmt: skip
    gather = helper.make_node("Gather", ["e", "i"], ["d"])
    return file(helper.make_tensor_value_info("x", TensorProto.STRING, ["n"]), encode, gather), WORDS


def sequence() -> tuple[onnx.ModelProto, Any]:
    join = helper.make_node("ConcatFromSequence", ["x"], ["d"], axis=0)
    rows = [np.ones((1, 4), np.float32), np.full((2, 4), 0.5, np.float32)]
    return file(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None), join), rows


def mapping() -> tuple[onnx.ModelProto, Any]:
    value = onnx.ValueInfoProto(name="x")
    value.type.map_type.key_type = TensorProto.INT64
    value.type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    cast = helper.make_node("CastMap", ["x"], ["d"], domain="ai.onnx.ml", cast_to="TO_FLOAT")
    return file(value, cast), {0: 1.0, 1: 0.5, 2: -1.0, 3: 2.0}


KINDS = {"texts": texts, "a sequence": sequence, "a map": mapping}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [None, "quantize{scheme=static}"])
def test_an_input_that_is_no_tensor(kind: str, passes: str | None, tmp_path: Path) -> None:
    model, given = KINDS[kind]()
    [expected] = ort.InferenceSession(model.SerializeToString()).run(None, {"x": given})
    small = graphopt.optimize(model, passes, example_inputs={"x": given}, calibration=[{"x": given}] * 2)
    written = ort.InferenceSession(small.export(tmp_path / "out.onnx")).run(None, {"x": given})
    for found in (small(x=given)["y"], *written):
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6 if passes is None else 0.05)


def test_texts_of_numpy_and_stacked_texts() -> None:
    model, words = texts()
    small = graphopt.optimize(
        model, "quantize{scheme=static}", example_inputs={"x": words.astype(str)}, calibration={"x": WORDS}
    )
    assert small(words)["y"].shape == (3, 3)
    with pytest.raises(UsageError, match="does not run"):
        small(x=np.ones(2))


def test_what_stands_for_texts_has_no_numbers() -> None:
    held = Untouched.of(WORDS)
    assert Untouched.of(held.clone()).held is WORDS
    assert list(Untouched.of(held[1:]).held) == ["b", "a"]
    with pytest.raises(GraphError, match="no numbers"):
        torch.add(held, 1)
    assert tensors_digest({"x": held}) != tensors_digest({"x": Untouched.of(np.array(["a", "b", "c"]))})
