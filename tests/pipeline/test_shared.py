"""Passes that several targets have in common run once, and leave what they would leave."""

from __future__ import annotations

import pytest
import torch

from graphopt.passes import REGISTRY
from graphopt.pipeline.context import Context
from graphopt.pipeline.shared import SharedPasses
from graphopt.pipeline.text import parse
from tests.language import build


@pytest.mark.parametrize(
    "passes", ["simplify,sparsify{amount=0.5}", "sparsify{amount=0.5},quantize{scheme=dynamic}",
               "quantize{scheme=dynamic}"],
)  # fmt: skip
def test_gives_what_the_pipeline_gives(dialect: str, passes: str) -> None:
    graph = build(dialect, "y = linear(x[2,16], W[16,16])")
    pipeline, shared = parse(passes, REGISTRY), SharedPasses()
    plain, x = Context(), {"x": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}
    expected = pipeline.apply(graph, plain)
    for _ in range(2):
        context = Context()
        found = shared.apply(pipeline, graph, context)
        assert found.text() == expected.text()
        for one, other in zip(found.evaluate(x, found.outputs), expected.evaluate(x, expected.outputs), strict=True):
            assert torch.equal(one, other)
        assert [record.text for record in context.report.passes] == [record.text for record in plain.report.passes]
        assert (context.is_lossy, context.sparse) == (plain.is_lossy, plain.sparse)


def test_runs_them_again_for_another_graph(dialect: str) -> None:
    pipeline, shared = parse("sparsify{amount=0.5}", REGISTRY), SharedPasses()
    first, second = (build(dialect, f"y = linear(x[2,{width}], W[{width},{width}])") for width in (16, 32))
    assert shared.apply(pipeline, first, Context()).text() != shared.apply(pipeline, second, Context()).text()
