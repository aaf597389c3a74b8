"""sparsify on the fx and the onnx capture of one module: the same bits, given the same statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from graphopt.ir.graph import Graph, Value
from graphopt.passes import Sparsify
from graphopt.pipeline.calibration import Calibration, S
from tests.twins.test_twins import MODELS, assert_twins, captured, key, twins


class Recorded(Calibration):
    """The second moments that one dialect saw, given to the other: by what reads a value, and how."""

    def __init__(self, name: str) -> None:
        found = captured(name, "fx")
        super().__init__([found.feeds[0]], found.graph.inputs)
        self.seen: dict[Any, Any] = {}

    def observe(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        pairs = list(wanted)
        keys = [(key(value), getattr(statistic, "conv", None)) for value, statistic in pairs]
        assert len(set(keys)) == len(keys)
        if not self.seen:
            self.seen = dict(zip(keys, super().observe(graph, pairs), strict=True))
        return iter([self.seen[one] for one in keys])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "pass_",
    [
        Sparsify(pattern="1x2", scope="global"),
        Sparsify(criterion="random", seed=3),
        Sparsify(criterion="threshold", amount=0.3),
        Sparsify(criterion="wanda"),
        Sparsify(criterion="wanda", pattern="2:4"),
        Sparsify(criterion="sparsegpt"),
        Sparsify(criterion="sparsegpt", pattern="2:4"),
    ],
    ids=str,
)
def test_equal_to_the_bit(name: str, pass_: Sparsify) -> None:
    assert_twins(twins(name, pass_, calibration=Recorded(name)))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_each_dialect_choose_alike(name: str) -> None:
    pair = twins(name, Sparsify(criterion="wanda"), calibration=[captured(name, "fx").feeds[0]])
    for site in pair[0].sites("linear", "conv"):
        (other,) = [one for one in pair[1].sites(site.kind) if one.path == site.path]
        assert site.weight is not None and other.weight is not None
        same = (site.weight == 0) == (other.weight == 0)
        assert float(same.double().mean()) > 0.99
