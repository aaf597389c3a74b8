"""Sessions that read their weights from a file, and weights that are transposed when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from graphopt.dialects.onnx import export, run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError
from tests.language import build, feeds

TEXT = "y = linear(relu(linear(x[2,32], V[64,32], A[64])), W[16,64], B[16])"


@pytest.mark.parametrize("level", ["disable", "all"])
def test_weights_from_a_file_are_the_same(level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = build("onnx", TEXT)
    assert isinstance(graph, OnnxGraph)
    given = feeds(graph)
    (expected,) = run.run(run.session(export.deployable(graph), level=level), given)
    monkeypatch.setattr(run, "_IN_FILE", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = run.session(export.deployable(graph), level=level)
    torch.testing.assert_close(run.run(session, given)[0], expected, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []  # the file is gone once the session has it


def test_a_transposed_weight_is_made_when_it_is_read() -> None:
    graph = build("onnx", TEXT)
    assert isinstance(graph, OnnxGraph)
    weight = graph.sites("linear")[0].required("weight")
    plain = graph.constant(weight)
    found = graph.add_transposed(weight, "other")  # type: ignore[arg-type]  # of this dialect
    again = graph.constant(found)
    assert plain is not None and again is not None and found.shape == (32, 64)
    assert torch.equal(again, plain.t()) and again.is_contiguous()
    held = found.native.const_value
    assert held is not None and held.numpy() is not held.numpy()
    np.testing.assert_array_equal(np.frombuffer(held.tobytes(), np.float32).reshape(32, 64), plain.t())
    with pytest.raises(GraphError, match="no constant matrix"):
        graph.add_transposed(graph.inputs[0], "third")  # type: ignore[arg-type]  # of this dialect
