"""prune on the fx and the onnx capture of one module: the same units go, and what stays is the same to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from graphopt.analysis.branches import branches
from graphopt.analysis.groups import groups
from graphopt.ir.graph import Graph, Value
from graphopt.numerics.metrics import within_tolerance
from graphopt.passes import Prune
from graphopt.pipeline.calibration import Calibration, S
from tests.language import outputs
from tests.twins.test_twins import assert_twins, captured, key, twins

KINDS: dict[str, dict[str, float]] = {
    "bert": {"neurons": 0.5, "heads": 0.25},
    "gpt2": {"neurons": 0.5, "heads": 0.25, "width": 0.25},
    "decoder": {"neurons": 0.5, "heads": 0.5, "width": 0.25},
    "convs": {"channels": 0.25},
}


class Recorded(Calibration):
    """What one dialect saw, given to the other: by the value's place in the model, and by the kind of statistic."""

    def __init__(self, graph: Graph, feeds: dict[str, Any]) -> None:
        super().__init__([feeds], graph.inputs)
        self.seen: dict[tuple[Any, ...], Any] = {}

    def observe(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        pairs = [(value, statistic, (*key(value), type(statistic))) for value, statistic in wanted]
        unseen = [(value, statistic) for value, statistic, name in pairs if name not in self.seen]
        for (value, _), seen in zip(unseen, super().observe(graph, unseen), strict=True):
            self.seen[(*key(value), type(seen))] = seen
        return iter([self.seen[name] for _, _, name in pairs])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "gpt2" else []) for name in KINDS]
)
def test_groups_have_the_same_names(name: str) -> None:
    fx, onnx = (
        [(group.name, group.kind, group.size) for group in groups(captured(name, dialect).graph) if not group.locked]
        for dialect in ("fx", "onnx")
    )
    assert fx == onnx and fx


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("criterion", ["l1", "l2", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_decide_the_same(name: str, criterion: str, scope: str) -> None:
    pair = twins(name, Prune(**KINDS[name], criterion=criterion, scope=scope))  # type: ignore[arg-type]
    assert_twins(pair)
    example = captured(name, "fx").feeds[0]
    for ours, theirs in zip(*(outputs(graph, example) for graph in pair), strict=True):
        assert within_tolerance(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_recorded_activations_decide_the_same_and_solve_the_same(name: str) -> None:
    example = captured(name, "fx")
    pair = twins(name, Prune(**KINDS[name]), calibration=Recorded(example.graph, example.feeds[0]))  # type: ignore[arg-type]
    assert_twins(pair)


@pytest.mark.parametrize(("name", "share"), [("bert", 0.5), ("gpt2", 0.5), ("decoder", 0.5)])
def test_the_same_layers_go(name: str, share: float) -> None:
    assert_twins(twins(name, Prune(layers=share), calibration=[captured(name, "fx").feeds[0]]))


@pytest.mark.parametrize("name", KINDS)
def test_branches_have_the_same_names(name: str) -> None:
    fx, onnx = ([branch.name for branch in branches(captured(name, dialect).graph)] for dialect in ("fx", "onnx"))
    assert fx == onnx and fx
