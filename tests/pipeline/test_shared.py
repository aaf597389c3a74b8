"""Passes that several targets have in common run once, and leave what they would leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import PassError, UsageError
from graphopt.ir.graph import Graph
from graphopt.measure.timing import Ratio
from graphopt.passes import REGISTRY
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline, leaves
from graphopt.pipeline.shared import SharedPasses, shared
from graphopt.pipeline.text import parse
from tests.language import FakeTarget, build


@dataclass(frozen=True)
class Timed(FakeTarget):
    """A target that takes a graph's time from its parameters; of one that is not the baseline, so many times that."""

    times: float = 1.0

    def ratios(
        self,
        graph: Graph,
        baseline: Graph,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        threads: int | None = None,
        rounds: int = 15,
    ) -> list[Ratio]:
        took, takes = (Context().cost(one).parameters for one in (baseline, graph))
        ratio = took / takes / self.times
        return [Ratio(ratio, ratio, ratio, 15, 0, {}) for _ in feeds]


@dataclass(frozen=True)
class Silent(Pass):
    """Measures, and does not say so."""

    name: ClassVar[str] = "silent"
    stage: ClassVar[Stage] = Stage.PRUNE

    def run(self, graph: Graph, context: Context) -> None:
        context.target.ratios(graph, graph, context.feeds)


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


@pytest.mark.parametrize("passes", ["prune{latency=0.6 round_to=1}", "low-rank{rank=break-even}"])
def test_what_is_measured_on_one_target_is_not_taken_for_another(passes: str) -> None:
    graph = build("onnx", "h = linear(x[2,32], V[64,32])\nr = relu(h)\ny = linear(r, W[32,64])")
    pipeline, common = parse(f"sparsify{{amount=0.5}},{passes}", REGISTRY), SharedPasses()
    targets = [Timed(), Timed(times=1.3, name="other")]
    feeds = [{"x": torch.ones(2, 32)}]
    texts = []
    for target in targets:
        alone, beside = Context(target=target, feeds=feeds), Context(target=target, feeds=feeds)
        texts.append(pipeline.apply(graph, alone).text())
        assert common.apply(pipeline, graph, beside).text() == texts[-1]
        assert beside.target is target
    assert texts[0] != texts[1]  # else this says nothing


def test_a_pass_that_measures_must_say_so() -> None:
    graph = build("onnx", "y = linear(x[2,16], W[16,16])")
    with pytest.raises(PassError, match=r"silent failed: .*times graphs on toy.*let it be True"):
        SharedPasses().apply(Pipeline([Silent()]), graph, Context(target=Timed()))


TERMS = ("simplify", "sparsify{amount=0.5}", "prune{amount=0.5}", "prune{latency=0.5}", "low-rank{rank=break-even}",
         "prune{amount=0.5 criterion=movement}", "prune{latency=0.5 criterion=movement}", "low-rank", "distill",
         "quantize", "cast{dtype=bfloat16}", "(simplify,sparsify{amount=0.5})")  # fmt: skip


@settings(deadline=None)  # a pass is imported where it is first named
@given(st.lists(st.sampled_from(TERMS), max_size=6))
def test_what_is_shared_never_measures_and_never_rounds(terms: list[str]) -> None:
    try:
        pipeline = parse(",".join(terms), REGISTRY) if terms else Pipeline()
    except UsageError:  # the stages are out of order
        return
    first = shared(pipeline.passes)
    assert pipeline.passes[: len(first)] == first
    Pipeline(first), Pipeline(pipeline.passes[len(first) :])  # both may run by themselves
    inside = [leaf for one in first for leaf in leaves(one)]
    assert not any(leaf.measures or leaf.stage >= Stage.QUANTIZE for leaf in inside)
    if not any(leaf.measures or leaf.stage >= Stage.QUANTIZE for leaf in pipeline.leaves()):
        assert first == pipeline.passes
