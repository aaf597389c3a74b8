"""Adapters: both dialects behind one interface, and the stages of raising in the order that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.dialects import raising
from graphopt.dialects.adapter import DIALECTS, adapter
from graphopt.dialects.fx import raising as fx_raising
from graphopt.dialects.onnx import raising as onnx_raising
from graphopt.errors import GraphError
from tests.language import assert_outputs_equal, build


def test_a_graph_is_loaded_by_the_name_of_its_dialect(dialect: str, tmp_path: Path) -> None:
    graph = build(dialect, "y = relu(x[2,3])")
    graph.save(tmp_path / "graph")
    loaded = adapter(dialect).graph.load(tmp_path / "graph")
    assert loaded.dialect == dialect and loaded.text() == graph.text()


def test_an_unknown_dialect_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(GraphError, match=r"there is no dialect 'onx'.*'onnx'"):
        adapter("onx")


def test_a_model_of_onnx_is_no_program() -> None:
    with pytest.raises(GraphError, match="an ONNX model cannot go to a target of the fx dialect"):
        adapter("fx").from_model(object())


def test_raising_runs_every_stage(dialect: str) -> None:
    """Constants come first: the epsilon of this norm is computed."""
    graph = build(dialect, """
        eps = mul(A[]:values(0.01), B[]:values(0.1))
        r = rsqrt(add(mean(pow(x[2,3,8], TWO[]:values(2)), axes=[-1]), eps))
        y = mul(G[8], mul(x, r))""")
    original = graph.clone()
    assert adapter(dialect).raise_(graph) == {"rms-norm-rsqrt": 1}
    assert [node.kind for node in graph.nodes] == ["rms_norm"]
    assert_outputs_equal(graph, original, rtol=2e-6)
    assert torch.tensor(graph.nodes[0].attributes["eps"]).allclose(torch.tensor(0.001))


def test_stages_have_names_of_their_own() -> None:
    assert DIALECTS == ("fx", "onnx")
    for stages, first in ((fx_raising.STAGES, ["recurrent layers", "constants"]), (onnx_raising.FORMS, ["constants"])):
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)
        assert names[: len(first)] == first
        assert [stage for stage in stages if stage in raising.FORMS] == list(raising.FORMS)
