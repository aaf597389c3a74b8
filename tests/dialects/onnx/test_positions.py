"""Masks that exporters write as arithmetic on positions, against onnxruntime on the model as it was exported."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
import torch

from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.positions import raise_positions

MASK = """
<ir_version: 10, opset_import: ["": 20]>
mask (bool[rows, seq] mask, float[batch, seq] x) => (bool[batch, 1, seq, seq] y)
<int64 zero = {0}, int64 one = {1}, int64[1] ones = {1}, int64[1] a0 = {0}, int64[1] last = {-1},
 int64[3] behind = {1, 2, 3}, int64[3] before = {0, 1, 2}, int64[3] around = {0, 1, 3}, bool true = {1},
 int64[seq] columns>
{
    n0 = Shape <start: int = 0, end: int = 1> (x)
    n1 = Shape <start: int = 1, end: int = 2> (x)
    batch = Squeeze (n0)
    seq = Squeeze (n1)
    rows = Range (START, batch, one)
    columns = Range (zero, seq, STEP)
    row = Unsqueeze (rows, behind)
    column = Unsqueeze (columns, before)
    query = Unsqueeze (columns, around)
    holds = GreaterOrEqual (query, zero)
    always = And (true, holds)
    both = Max (row, column)
    shape = Shape (both)
    r = Expand (row, shape)
    c = Expand (column, shape)
    r1 = Unsqueeze (r, last)
    c1 = Unsqueeze (c, last)
    indices = Concat <axis: int = -1> (ORDER)
    gathered = GatherND (mask, indices)
    allowed = And (always, gathered)
    target = Concat <axis: int = 0> (n0, ones, n1, n1)
    y = Expand (allowed, target)
}
"""


def exported(start: str = "zero", step: str = "one", order: str = "r1, c1") -> onnx.ModelProto:
    return onnx.parser.parse_model(MASK.replace("START", start).replace("STEP", step).replace("ORDER", order))


def run(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return torch.from_numpy(np.asarray(result))


@pytest.mark.parametrize("rows", [3, 5])
def test_a_mask_gathered_in_order_is_the_mask(rows: int) -> None:
    """Its first rows, where it may have more than the batch."""
    model = exported()
    graph = OnnxGraph.from_model(model)
    raise_positions(graph)
    assert graph.version == 2
    graph.sweep()
    kinds = [node.kind for node in graph.nodes]
    assert not {"onnx.GatherND", "onnx.Range", "onnx.And", "onnx.GreaterOrEqual"} & set(kinds)
    graph.verify()
    generator = torch.Generator().manual_seed(0)
    feeds = {"mask": torch.rand(rows, 4, generator=generator) > 0.4, "x": torch.zeros(3, 4)}
    (found,) = graph.evaluate(feeds, graph.outputs)
    assert found.equal(run(model, feeds))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"start": "one"}, "rows would begin with the second"),
        ({"step": "batch"}, "columns would be left out"),
        ({"order": "c1, r1"}, "the mask would be transposed"),
    ],
)
def test_positions_in_another_order_are_gathered(changed: dict[str, str], why: str) -> None:
    graph = OnnxGraph.from_model(exported(**changed))
    raise_positions(graph)
    assert "onnx.GatherND" in [node.kind for node in graph.nodes], why
