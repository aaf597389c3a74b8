"""Recurrent layers: what passes make of them in the two dialects, whose gates are in another order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graphopt.capture.onnx_conversion import to_onnx
from graphopt.capture.sources import capture
from graphopt.ir.graph import Graph
from graphopt.ir.ops import OPS
from graphopt.ir.ops.recurrent import reordered
from graphopt.numerics.metrics import within_tolerance
from graphopt.passes import Prune, Quantize
from graphopt.pipeline.passes import Pass
from tests.dialects.test_recurrent import LAYERS, classifier, ids
from tests.language import outputs, run


def stored(graph: Graph) -> list[Tensor]:
    """The weights, their integers and their scales, by layer, with gates in ONNX's order."""
    found = []
    for site in graph.sites(*LAYERS):
        wanted = OPS[site.kind].attributes.get("gates", "h")
        given = site.attributes.get("gates", "h")
        order = [given.index(gate) for gate in wanted]
        for value in site.operands[1:3]:
            assert value is not None
            maker = value.producer
            parts = [value] if maker is None else [maker.required("x"), maker.required("scale")]
            tensors = [tensor for part in parts if (tensor := graph.constant(part)) is not None]
            found += [reordered(tensor, order, axis=min(1, tensor.dim() - 1)) for tensor in tensors]
    return found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "passes",
    [[], pytest.param([Prune(neurons=0.5, round_to=1)], marks=pytest.mark.slow),
     pytest.param([Quantize(scheme="weight-only")], marks=pytest.mark.slow),
     [Prune(neurons=0.5, round_to=1), Quantize(scheme="weight-only")]],
    ids=lambda passes: ",".join(map(str, passes)) or "capture",
)  # fmt: skip
def test_passes_are_equal_to_the_bit(kind: str, passes: Sequence[Pass]) -> None:
    example = ids(2, 5)
    graphs = [capture(classifier(kind), dialect, example_inputs=example).graph for dialect in ("fx", "onnx")]
    for pass_ in passes:
        for graph in graphs:
            run(pass_, graph)
    ours, theirs = map(stored, graphs)
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    longer = {"ids": ids(3, 8)}
    assert all(map(within_tolerance, outputs(graphs[0], longer), outputs(graphs[1], longer)))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_of_torch_becomes_the_graph_of_onnx(kind: str) -> None:
    example = ids(2, 5)
    ours, theirs = (capture(classifier(kind), dialect, example_inputs=example).graph for dialect in ("fx", "onnx"))
    converted = to_onnx(ours, [{"ids": example}])
    assert all(torch.equal(a, b) for a, b in zip(stored(converted), stored(theirs), strict=True))
    longer = {"ids": ids(3, 8)}
    assert all(map(within_tolerance, outputs(theirs, longer), outputs(converted, longer)))
