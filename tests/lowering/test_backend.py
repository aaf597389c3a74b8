"""What every backend inherits: lowering through its rules, and the comparison of two graphs by time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from graphopt.backends import target
from graphopt.lowering.backend import Backend
from graphopt.measure.timing import Ratio
from graphopt.pipeline.target import AnyTarget, Target
from tests.language import build, feeds, outputs


def as_target(backend: Backend) -> Target:
    """For mypy: a Backend is all that passes may ask of a target."""
    return backend


TEXT = "y = relu(linear(x[batch,8], W[16,8], B[16]))"


def test_a_backend_answers_all_that_passes_may_ask() -> None:
    names = {name for name in (*vars(Target), *Target.__annotations__) if not name.startswith("_")}
    assert "why_float" in names and "schemes" in names
    for backend in (as_target(target("onnxruntime")), as_target(target("fbgemm")), AnyTarget()):
        assert all(hasattr(backend, name) for name in names)


def test_lower_leaves_the_graph_and_tells_what_each_rule_did() -> None:
    graph = build("onnx", "y = layer_norm(add(x[batch,8], r[batch,8]), G[8], B[8])")
    before = graph.text()
    lowered, logs = target("onnxruntime").lower(graph)
    assert graph.text() == before and [node.kind for node in lowered.nodes] == ["onnx.Sum", "layer_norm"]
    assert sum(log.hits for log in logs.values()) == 1
    inputs = feeds(graph)
    assert torch.allclose(outputs(lowered, inputs)[0], outputs(graph, inputs)[0], atol=1e-6)


@pytest.mark.parametrize(("name", "dialect"), [("onnxruntime", "onnx"), ("onnxruntime", "fx"), ("fbgemm", "fx")])
def test_ratios_time_both_graphs_on_each_feeds(name: str, dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = target(name)
    wide, narrow = (build(dialect, TEXT.replace("16", size)) for size in ("16", "4"))
    seen: list[dict[str, list[int]]] = []

    def paired(
        candidates: Mapping[str, Callable[[], Any]], *, baseline: str, rounds: int, clock: Any
    ) -> dict[str, Ratio]:
        assert baseline == "baseline" and rounds == 7
        seen.append({name: list(call()[0].shape) for name, call in candidates.items()})
        return {name: Ratio(float(len(seen)), 0, 9, rounds, 0, {}) for name in candidates}

    monkeypatch.setattr("graphopt.measure.timing.paired", paired)
    ratios = backend.ratios(narrow, wide, [feeds(wide, batch=2), feeds(wide, batch=5)], threads=1, rounds=7)
    assert [ratio.median for ratio in ratios] == [1.0, 2.0]
    assert seen == [{"baseline": [2, 16], "candidate": [2, 4]}, {"baseline": [5, 16], "candidate": [5, 4]}]
