"""A pass on the ONNX capture, and the same pass on the fx capture that becomes ONNX afterwards: one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import target
from graphopt.capture.onnx_conversion import to_onnx
from graphopt.capture.sources import Captured, capture
from graphopt.ir.graph import Graph, Shape
from graphopt.lowering.backend import Runner
from graphopt.numerics.metrics import sqnr, within_tolerance
from graphopt.passes import REGISTRY, FoldInt8, Simplify
from graphopt.pipeline.text import parse
from tests import models
from tests.language import outputs, run
from tests.twins.test_twins import Recorded, assert_twins


class Classifier(nn.Module):
    """ids (batch, seq) -> (batch, 1): rows of a table, their mean, two linears, of which the last has one output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(models.VOCABULARY, models.WIDTH), nn.LayerNorm(models.WIDTH)
        self.up, self.head = nn.Linear(models.WIDTH, 64), nn.Linear(64, 1)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.up(self.norm(self.embedding(ids).mean(1)))))
        return y


MODELS: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "encoder": (lambda: models.seeded(models.Encoder), {"ids": models.tokens(), "mask": models.padding()}),
    "gpt2": (models.gpt2, {"input_ids": models.tokens()}),
    "convs": (lambda: models.seeded(models.ConvNet), {"x": models.images()}),
    "classifier": (lambda: models.seeded(Classifier), {"ids": models.tokens()}),
}
BLOCKS = "quantize{scheme=weight-only block=16 "
CASES = [
    ("encoder", ""),
    ("encoder", "quantize{scheme=static}"),
    ("encoder", BLOCKS + "bits=4 symmetric=false}"),
    ("encoder", "prune{neurons=0.5 heads=0.5},quantize{scheme=dynamic bits=7}"),
    pytest.param("gpt2", "low-rank{rank=0.25},quantize{scheme=static}", marks=pytest.mark.slow),
    ("classifier", "quantize{scheme=static smooth=false}"),
    ("classifier", BLOCKS + "bits=4}"),
    ("convs", "quantize{scheme=static}"),
    ("convs", "prune{channels=0.5},quantize{scheme=dynamic}"),
    ("classifier", "sparsify{amount=0.5},quantize{scheme=static}"),
    ("classifier", BLOCKS + "bits=2}"),
    ("classifier", BLOCKS + "bits=8}"),
]


@cache
def captured(name: str, dialect: str) -> Captured:
    make, example = MODELS[name]
    found = capture(make(), dialect, example_inputs=example)
    run(Simplify(), found.graph)
    return found


def twins(name: str, passes: str) -> tuple[Graph, Graph, Graph]:
    """The fx graph after the passes, what it becomes in ONNX, and the ONNX graph after the passes.

    All are given one set of statistics, so that they choose the same scales.
    """
    fx, direct = captured(name, "fx").graph.clone(), captured(name, "onnx").graph.clone()
    for pass_ in parse(passes, REGISTRY).passes if passes else ():
        recorded = Recorded(fx, captured(name, "fx").feeds[0])
        for graph in (fx, direct):
            run(pass_, graph, calibration=recorded, target=target("onnxruntime"))
    converted = to_onnx(fx, captured(name, "fx").feeds)
    run(Simplify(), converted)
    return fx, converted, direct


def lowered(graph: Graph) -> Runner:
    folded, backend = graph.clone(), target("onnxruntime")
    run(FoldInt8(), folded)
    return backend.compile(backend.lower(folded)[0], threads=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "passes"), CASES)
def test_a_pass_before_and_after_the_conversion(name: str, passes: str) -> None:
    fx, converted, direct = twins(name, passes)
    feeds = captured(name, "fx").feeds[0]
    assert_twins((converted, direct))
    assert kinds(converted) == kinds(direct)
    assert signature(converted) == signature(direct)
    ours, theirs = lowered(converted), lowered(direct)
    assert kernels(ours) == kernels(theirs)
    assert_close(outputs(fx, feeds), outputs(converted, feeds))
    assert_close(theirs(feeds), ours(feeds))


def signature(graph: Graph) -> list[tuple[str, Shape | None]]:
    return [(value.name, value.shape) for value in (*graph.inputs, *graph.outputs)]


def kernels(runner: Runner) -> dict[str, int]:
    return {name: count for name, count in runner.kernels().items() if name != "Slice"}


def kinds(graph: Graph) -> Counter[tuple[str, str]]:
    """How often a module has each op and operator, aside from slices of whole axes, which fx drops when it is read, and
    from what prune in ONNX puts sizes together with."""
    return Counter((node.path, node.kind) for node in graph.nodes if node.kind not in ("onnx.Slice", "where"))


def assert_close(expected: list[Tensor], found: list[Tensor]) -> None:
    """Within the tolerance of floats; where activations are rounded, an integer here and there may be its neighbour."""
    for a, b in zip(expected, found, strict=True):
        assert within_tolerance(a, b) or sqnr(a, b) > 40
