"""Zeros over the course of a pipeline: they grow by rounds, stay while weights are trained, move with SR-STE, and are
zeros among integers too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt import optimize
from graphopt.capture.sources import capture
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.numerics.sparsity import as_matrix
from graphopt.passes import REGISTRY, Prune
from graphopt.pipeline.batches import Batch, Batches
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import Pipeline
from graphopt.pipeline.text import parse
from tests.language import build, stored, weight_of
from tests.models import ConvNet, images, seeded

TRAINING = "finetune{steps=6 lr=1e-2 device=cpu}"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 100), nn.Linear(100, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


@cache
def layers() -> Graph:
    return capture(seeded(Layers), "fx", example_inputs=drawn(3, 16)).graph


class Watch(Instrument):
    """The weights after each pass, by the pass."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[Tensor]]] = []

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self.seen.append((pass_.name, [weight_of(site).clone() for site in graph.sites("linear", "conv")]))

    def of(self, name: str) -> list[list[Tensor]]:
        return [weights for passed, weights in self.seen if passed == name]


def squared(outputs: Sequence[Tensor], batch: Batch, **_: Any) -> Tensor:
    y = outputs[0]
    return F.mse_loss(y, batch.feeds["x"][:, : y.shape[1]].flatten(1)[:, : y.shape[1]])


def trained(graph: Graph, text: str, *watchers: Instrument) -> tuple[Graph, Context]:
    shape = [size if isinstance(size, int) else 8 for size in graph.inputs[0].shape or ()]
    data = [{"x": drawn(*shape, seed=seed)} for seed in range(3)]
    context = Context(training=Batches(data, graph.inputs, name="training"), loss=squared, instruments=watchers)
    context.original, context.outputs = graph, [value.name for value in graph.outputs]
    found = Pipeline(parse(text, REGISTRY).passes).apply(graph, context)
    found.verify()
    return found, context


def share(weight: Tensor) -> float:
    return float((weight == 0).double().mean())


# --- rounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "random"])
def test_zeros_grow_by_the_cubic_schedule_and_stay(criterion: str) -> None:
    """Zhu & Gupta 2017, equation 1, from 0 to 0.8 in three rounds: 0.8 (1 - (1 - t)³) at t = 1/3, 2/3, 1."""
    watch = Watch()
    sparsify = f"sparsify{{amount=0.8 schedule=cubic criterion={criterion}}}"
    trained(layers(), f"repeat{{times=3}}({sparsify},{TRAINING})", watch)
    rounds = watch.of("finetune")
    assert len(rounds) == 3
    for weights, amount in zip(rounds, (0.8 * 19 / 27, 0.8 * 26 / 27, 0.8), strict=True):
        assert [int((one == 0).sum()) for one in weights] == [round(amount * one.numel()) for one in weights]
    for before, after in pairwise(rounds):
        for one, other in zip(before, after, strict=True):
            assert not other[one == 0].any() and not torch.equal(one, other)


def test_units_go_by_the_schedule_as_a_share_of_the_first_round() -> None:
    """100 neurons: 0.8 · 19/27 and 0.8 · 26/27 of them are gone after the first two rounds, and 0.8 in the end."""
    watch = Watch()
    trained(layers(), f"repeat{{times=3}}(prune{{neurons=0.8 schedule=cubic}},{TRAINING})", watch)
    assert [len(up) for up, _ in watch.of("finetune")] == [44, 23, 20]
    watch = Watch()
    text = f"repeat{{times=2}}(prune{{neurons=0.8 schedule=cubic criterion=movement}},{TRAINING})"
    trained(layers(), text, watch)
    assert [len(up) for up, _ in watch.of("prune")] == [100, 30] and [len(up) for up, _ in watch.of("finetune")] == [
        30, 20
    ]  # fmt: skip
    found, _ = trained(layers(), "prune{neurons=0.8 schedule=cubic}")
    assert len(weight_of(found.sites("linear")[0])) == 20  # outside of repeat there is one round


def test_a_schedule_is_for_shares() -> None:
    with pytest.raises(UsageError, match="schedule lets the share of a kind grow"):
        Prune(params=0.5, schedule="cubic")


@pytest.mark.parametrize(("text", "message"), [
    ("repeat{times=3}(sparsify{amount=0.8 schedule=cubic},distill,quantize)",
     r"the second round of sparsify \(PRUNE\), distill \(RECOVER\), quantize \(QUANTIZE\) would go back a stage"),
    ("repeat{times=2}(prune{neurons=0.5},low-rank{rank=4},finetune)", "second round of prune"),
    ("quantize,repeat{times=2}(sparsify,finetune)", r"sparsify \(PRUNE\) cannot stand after quantize"),
])  # fmt: skip
def test_rounds_keep_the_order_of_stages(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, REGISTRY)


def test_rounds_from_a_module_to_onnx() -> None:
    batches = [drawn(8, 16, seed=seed) for seed in range(3)]
    small = optimize(
        seeded(Layers), "repeat{times=3}(sparsify{amount=0.8 schedule=cubic},distill{epochs=1 lr=1e-3}),"
        "quantize{scheme=dynamic}", example_inputs=batches[0], training=batches, measure=False,
    )  # fmt: skip
    names = [record.name for record in small.report.passes]
    assert names[:6] == ["sparsify", "distill"] * 3 and names.index("quantize") > 6
    assert not any("its own teacher" in note for record in small.report.passes for note in record.notes)
    for site in small.transformed.sites("linear"):
        dequantize = site.required("weight").producer
        assert dequantize is not None and share(stored(dequantize, "x")) >= 0.8


# --- what was zero before ------------------------------------------------------------------------------------------


def test_zeros_that_are_there_already_stay_too() -> None:
    graph = layers()
    first, _ = trained(graph, "sparsify{amount=0.5}")
    found, context = trained(first, f"sparsify{{amount=0.3}},{TRAINING}")
    assert [one.code for one in context.report.passes[0].declined.values()] == ["zero_already"] * 2
    assert [share(weight_of(site)) for site in found.sites("linear")] == [0.5, 0.5]


def test_what_other_passes_made_of_a_weight_trains() -> None:
    """Neither half of a low-rank pair has the zeros of the whole, and no mask fits it."""
    found, _ = trained(layers(), f"sparsify{{amount=0.5}},low-rank{{rank=4}},{TRAINING}")
    pair = [weight_of(site) for site in found.sites("linear") if site.label == "up"]
    assert [tuple(one.shape) for one in pair] == [(4, 16), (100, 4)] and not any(map(share, pair))
    pruned, _ = trained(layers(), f"sparsify{{amount=0.5}},prune{{neurons=0.5}},{TRAINING}")
    before, _ = trained(layers(), "sparsify{amount=0.5},prune{neurons=0.5}")
    for one, other in zip(before.sites("linear"), pruned.sites("linear"), strict=True):
        assert torch.equal(weight_of(one) == 0, weight_of(other) == 0) and share(weight_of(one)) > 0


# --- N:M -----------------------------------------------------------------------------------------------------------


def groups_of(weight: Tensor, size: int) -> set[int]:
    """How many zeros groups along the input have."""
    return set((as_matrix(weight).reshape(-1, size) == 0).sum(1).tolist())


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_sr_ste_moves_zeros_within_their_pattern(pattern: str) -> None:
    watch = Watch()
    text = f"sparsify{{pattern={pattern}}},distill{{steps=30 lr=1e-2 sr_ste=2e-4 device=cpu}}"
    found, context = trained(layers(), f"{text},distill{{steps=5 lr=1e-2 device=cpu}}", watch)
    (before,), (moved, fixed) = watch.of("sparsify"), watch.of("distill")
    gone = 4 - int(pattern[0])
    for one, other, last in zip(before, moved, fixed, strict=True):
        assert groups_of(one, 4) == groups_of(other, 4) == groups_of(last, 4) == {gone}
        assert not torch.equal(one == 0, other == 0) and torch.equal(other == 0, last == 0)
    kept = context.sparse["up"]
    assert kept.pattern == pattern and kept.mask is not None
    assert torch.equal(kept.mask, weight_of(found.sites("linear")[0]) != 0)


def test_sr_ste_of_a_conv_runs_over_channels() -> None:
    graph = capture(seeded(ConvNet), "fx", example_inputs={"x": images(4)}).graph
    found, _ = trained(graph, "sparsify{pattern=2:4 ignore=stem},finetune{steps=10 lr=1e-2 sr_ste=2e-4 device=cpu}")
    before, _ = trained(graph, "sparsify{pattern=2:4 ignore=stem}")
    sites = [site for site in found.sites("conv") if site.label != "stem"]
    assert all(groups_of(weight_of(site), 4) == {2} for site in sites) and len(sites) == 2
    there = {site.label: weight_of(site) for site in before.sites("conv")}
    assert any(not torch.equal(there[site.label] == 0, weight_of(site) == 0) for site in sites)


def test_sr_ste_through_the_rounding() -> None:
    text = "sparsify{pattern=2:4},quantize{scheme=dynamic},finetune{steps=20 lr=1e-2 sr_ste=2e-4 device=cpu}"
    found, _ = trained(layers(), text)
    before, _ = trained(layers(), "sparsify{pattern=2:4}")
    for site, one in zip(found.sites("linear"), before.sites("linear"), strict=True):
        (weight,) = found.evaluate({}, [site.required("weight")])
        assert all(count >= 2 for count in groups_of(weight, 4))
        assert weight[weight_of(one) == 0].any()


@pytest.mark.parametrize(("text", "message"), [
    ("sparsify{amount=0.5},finetune{sr_ste=2e-4}",
     "and those of up are unstructured: leave sr_ste out, or use sparsify{pattern=2:4}"),
    ("sparsify{pattern=4x1},finetune{sr_ste=2e-4}", "and those of up are 4x1"),
    ("finetune{sr_ste=2e-4}", "and there are none: put sparsify{pattern=2:4} in front of it"),
    ("sparsify{pattern=2:4},prune{neurons=0.5 round_to=50},prune{neurons=0.02},finetune{sr_ste=2e-4}",
     "sr_ste needs the pattern 2:4, and 49 along the input axis of down is no multiple of 4 any more: prune before"),
])  # fmt: skip
def test_refuses_sr_ste_where_no_pattern_fits(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        trained(layers(), text)
    assert message in str(caught.value)


# --- integers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect_path", ["module", "nameless"])
def test_zeros_stay_among_the_integers_and_what_only_rounds_to_zero_trains(dialect_path: str) -> None:
    """The small weight is no zero of sparsify: it rounds to the integer 0, and grows from there."""
    text = "y = linear(x[batch,4], W[1,4]:values(1,0.001,0.0005,-0.9))"
    if dialect_path == "module":
        module = nn.Sequential(nn.Linear(4, 1, bias=False))
        module[0].weight.data = torch.tensor([[1, 0.001, 0.0005, -0.9]])
        graph = capture(module.eval(), "fx", example_inputs={"input": drawn(2, 4)}).graph
    else:
        graph = build("fx", text)
    data = [{graph.inputs[0].name: drawn(8, 4, seed=seed)} for seed in range(3)]

    def second_and_third(outputs: Sequence[Tensor], batch: Batch, **_: Any) -> Tensor:
        x = next(iter(batch.feeds.values()))
        return F.mse_loss(outputs[0][:, 0], x[:, 0] + x[:, 1] + x[:, 2] - x[:, 3])

    context = Context(training=Batches(data, graph.inputs, name="training"), loss=second_and_third)
    steps = "sparsify{amount=0.25},quantize{scheme=dynamic},finetune{steps=60 lr=2e-2 device=cpu}"
    found = Pipeline(parse(steps, REGISTRY).passes).apply(graph, context)
    dequantize = found.sites("linear")[0].required("weight").producer
    assert dequantize is not None
    integers = stored(dequantize, "x").flatten().tolist()
    assert integers[2] == 0 and integers[1] > 50
