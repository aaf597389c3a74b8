"""low-rank: linear or conv -> a thin pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.backends import target
from graphopt.capture.sources import capture
from graphopt.errors import PassError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.measure.timing import Ratio
from graphopt.numerics import factor
from graphopt.passes import REGISTRY, LowRank, Quantize
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import Pipeline, run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from graphopt.report.records import PassRecord
from tests import models
from tests.language import (
    FakeTarget,
    assert_outputs_equal,
    assert_unchanged,
    build,
    declined,
    declines,
    feeds,
    listing,
    outputs,
    producer,
    run,
    stored,
    weight_of,
)  # fmt: skip
from tests.twins import test_twins as twins


@dataclass(frozen=True)
class Target(FakeTarget):
    """A target that runs multiples of 4 fast, and tells the ratio of times that a test wants for each graph."""

    round_to: Mapping[str, int] = field(default_factory=lambda: {"rank": 4})
    faster: Callable[[Graph], float] = lambda graph: 1.0
    asked: list[Any] = field(default_factory=list)

    def ratios(
        self,
        graph: Graph,
        baseline: Graph,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        threads: int | None = None,
        rounds: int = 15,
    ) -> list[Ratio]:
        graph.verify()
        self.asked.append((len(feeds), threads))
        ratio = self.faster(graph)
        return [Ratio(ratio, ratio - 0.01, ratio + 0.01, 15, 0, {}) for _ in feeds]


def measured(pass_: Pass, graph: Graph, target: Target, sizes: Iterable[int] = (2, 5)) -> Context:
    context = Context(target=target, feeds=[feeds(graph, batch=size) for size in sizes], threads=3)
    run_pass(pass_, graph, context)
    graph.verify()
    return context


# --- by one rule for each site -------------------------------------------------------------------------------------


def test_splits_a_low_rank_linear(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[8,8]:rank2, B[8])")
    original = graph.clone()
    run(LowRank(energy=0.999), graph)
    assert listing(graph) == [
        "%0 = linear(x[2,8], [2,8])",
        "%1 = linear(%0[2,2], [8,2], [8])",
        "return %1[2,8]",
    ]
    assert_outputs_equal(graph, original, rtol=1e-5)
    assert_unchanged(LowRank(energy=0.999), graph)


def test_the_pair_is_the_best_of_its_rank(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[16,8])")
    weight = weight_of(graph.nodes[0])
    run(LowRank(rank=3), graph)
    inner, outer = graph.nodes
    u, v = factor.decompose(weight).cut(3)
    assert torch.equal(weight_of(outer), u) and torch.equal(weight_of(inner), v)


@pytest.mark.parametrize(
    ("choice", "kept"),
    [({"rank": 2}, 2), ({"rank": 0.25}, 2), ({"rank": 0.26}, 3), ({"energy": 0.9}, 2), ({"energy": 0.97}, 3),
     ({"error": 0.2}, 2), ({"error": 0.18}, 3), ({}, 2)],
)  # fmt: skip
def test_one_way_chooses_the_rank(dialect: str, choice: dict[str, Any], kept: int) -> None:
    """At rank 2, 149 of 154.55 squares are kept (0.964), and the error is the root of 5.55 / 154.55 (0.1895)."""
    graph = build(dialect, "y = linear(x[2,8], W[16,8])")
    values = torch.tensor([10.0, 7.0, 2.0, 1.0, 0.5, 0.5, 0.2, 0.1])
    left, right = (torch.linalg.qr(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)))[0] for n in (16, 8))
    with_weight(graph, left * values @ right.T)
    run(LowRank(**choice), graph)
    assert weight_of(graph.nodes[0]).shape == (kept, 8)


def with_weight(graph: Graph, weight: Tensor) -> None:
    """Another weight for the only linear or conv."""
    (site,) = graph.sites("linear", "conv")
    operands = site.input, graph.add_constant(weight), site.bias
    graph.replace(site, graph.emit(site.kind, *operands, at=site, **site.attributes))
    graph.sweep()


def test_keeps_a_dynamic_batch(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch,4,8], W[16,8])")
    run(LowRank(rank=2), graph)
    assert listing(graph)[1] == "%1 = linear(%0[batch,4,2], [16,2])"


@pytest.mark.parametrize(
    ("choice", "kept"), [({"rank": 0.2}, 8), ({"rank": 5}, 5), ({"energy": 0.05}, 4), ({"rank": 0.7}, 19)]
)
def test_ranks_go_up_to_what_the_target_runs_fast(dialect: str, choice: dict[str, Any], kept: int) -> None:
    """A quarter of 26 ranks is 6, rounded up to 8; a count stays; of 19, 20 would gain nothing (20 · 78 = 1560)."""
    graph = build(dialect, "y = linear(x[2,26], W[60,26])" if kept == 19 else "y = linear(x[2,30], W[40,30])")
    context = run(LowRank(**choice), graph, target=Target(round_to={"rank": 20 if kept == 19 else 4}))
    if kept == 19:
        assert declines(context) == [Decline("pair_not_smaller", rank=19, pair=1634, whole=1560, shape=[60, 26])]
    else:
        assert weight_of(graph.nodes[0]).shape == (kept, 30)


def test_a_rank_that_gains_only_unrounded_stays(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,16], W[16,16])")  # 7 is the largest rank that gains
    run(LowRank(rank=0.3), graph, target=Target(round_to={"rank": 8}))
    assert weight_of(graph.nodes[0]).shape == (5, 16)


def test_declines_a_full_rank_linear(dialect: str) -> None:
    context = run(LowRank(energy=1.0), build(dialect, "y = linear(x[2,8], W[8,8]:seed3)"))
    assert declines(context) == [Decline("pair_not_smaller", rank=8, pair=128, whole=64, shape=[8, 8])]
    assert context.record.eligible and context.record.changed == 0


def test_declines_what_is_no_stored_float_weight(dialect: str) -> None:
    context = run(
        LowRank(rank=1),
        build(
            dialect,
            """
            computed = linear(x[2,8], w[8,8])
            quantized = linear(x, dequantize(W[8,8]:int8:values(1,2,3), S[8]:ones, axis=0))
            return computed, quantized
            """,
        ),
    )
    assert declined(context) == ["weight_computed", "already_quantized"]


def test_leaves_a_tied_weight_tied(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\ny = linear(h, T)")
    context = run(LowRank(rank=1), graph)
    assert declined(context) == ["weight_tied", "op_without_form"]


def test_linears_that_share_a_weight_share_the_pair(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[8,8]:rank2)\nb = linear(z[2,8], W, B[8])\nreturn a, b")
    original = graph.clone()
    run(LowRank(rank=2), graph)
    assert graph.sites("linear")[0].operand("weight") == graph.sites("linear")[2].operand("weight")
    assert_outputs_equal(graph, original, rtol=1e-5)


def test_ignore_and_other_ops(dialect: str) -> None:
    text = "h = linear(x[2,8], W[8,8]:rank2)\nr = relu(h)\ny = linear(r, V[8,8]:rank2)"
    graph = build(dialect, text)
    first, last = graph.sites("linear")
    context = run(LowRank(targets=Selector("linear", "relu"), ignore=Selector(last.name)), graph)
    assert declines(context) == [Decline("not_linear_or_conv", op="relu")]
    assert len(graph.sites("linear")) == 3 and last in graph.nodes and first not in graph.nodes


# --- convs ---------------------------------------------------------------------------------------------------------


def test_a_conv_splits_by_channel(dialect: str) -> None:
    text = "y = conv(x[batch,6,9,8], W[12,6,3,3], B[12], stride=[2,1], padding=[1,2,1,2], dilation=[1,2])"
    graph = build(dialect, text)
    original = graph.clone()
    run(LowRank(rank=4, conv="channel"), graph)
    assert listing(graph) == [
        "%0 = conv(x[batch,6,9,8], [4,6,3,3], stride=[2,1], padding=[1,2,1,2], dilation=[1,2])",
        "%1 = conv(%0[batch,4,5,8], [12,4,1,1], [12], stride=[1,1], padding=[0,0,0,0], dilation=[1,1])",
        "return %1[batch,12,5,8]",
    ]
    assert_is_product(graph, original)
    assert_unchanged(LowRank(rank=2), graph)


def assert_is_product(pair: Graph, original: Graph) -> None:
    """A pair by channel computes what the original does with the product of both weights."""
    inner, outer = (weight_of(site) for site in pair.sites("linear", "conv"))
    product = outer.flatten(1) @ inner.flatten(1)
    with_weight(original, product.reshape(outer.shape[0], *inner.shape[1:]))
    assert_outputs_equal(pair, original, rtol=1e-5)


def test_a_conv_splits_spatially(dialect: str) -> None:
    """A kernel that is an outer product of its two axes, and of channels, is one of rank 1: equal but for rounding."""
    graph = build(dialect, "y = conv(x[1,2,9,8], W[3,2,3,2], B[3], stride=[2,1], padding=[1,2,1,2], dilation=[1,2])")
    with_weight(graph, torch.einsum("o,j,c,i->ocij", *(torch.arange(1.0, n + 1) for n in (3, 2, 2, 3))))
    original = graph.clone()
    run(LowRank(energy=0.999), graph)
    assert listing(graph) == [
        "%0 = conv(x[1,2,9,8], [1,2,3,1], stride=[2,1], padding=[1,0,1,0], dilation=[1,1])",
        "%1 = conv(%0[1,1,5,8], [3,1,1,2], [3], stride=[1,1], padding=[0,2,0,2], dilation=[1,2])",
        "return %1[1,3,5,10]",
    ]
    assert_outputs_equal(graph, original, rtol=1e-5)
    assert_unchanged(LowRank(energy=0.999), graph)


@pytest.mark.parametrize("shape", ["x[2,6,9], W[12,6,3]", "x[2,6,5,4], W[12,6,1,1]", "x[2,6,5], W[12,6,1]"])
def test_convs_of_one_axis_and_of_none_split_by_channel(dialect: str, shape: str) -> None:
    graph = build(dialect, f"y = conv({shape}, B[12])")
    original = graph.clone()
    run(LowRank(rank=3), graph)
    assert [weight_of(site).shape[:2] for site in graph.nodes] == [(3, 6), (12, 3)]
    assert_is_product(graph, original)
    assert_unchanged(LowRank(rank=2), graph)


@pytest.mark.parametrize(
    ("text", "conv", "why"),
    [
        ("conv(x[1,4,5,5], W[8,1,3,3], groups=4)", "channel", Decline("grouped_conv", groups=4, channels=1)),
        ("conv(x[1,4,5,5], W[8,2,3,3], groups=2)", "spatial", Decline("grouped_conv", groups=2, channels=2)),
        ("conv(x[1,4,5,5], W[8,4,1,1])", "spatial", Decline("kernel_of_one_axis", kernel=[1, 1])),
        ("conv(x[1,4,5], W[8,4,3])", "spatial", Decline("kernel_of_one_axis", kernel=[3])),
        (
            "conv(x[1,2,8,8], W[9,2,2,2], stride=[1,4])", "spatial",
            Decline("pair_not_cheaper", rank=3, factor=pytest.approx(1.42, abs=0.005), shape=[9, 2, 2, 2]),
        ),
    ],
)  # fmt: skip
def test_declines_a_conv(dialect: str, text: str, conv: Any, why: Decline) -> None:
    assert declines(run(LowRank(rank=why.values.get("rank", 1), conv=conv), build(dialect, f"y = {text}"))) == [why]


# --- by what is computed -------------------------------------------------------------------------------------------


def batches(graph: Graph, count: int = 8) -> list[dict[str, Tensor]]:
    """Inputs whose features differ in size by a factor of 100."""
    made = [feeds(graph, seed) for seed in range(count)]
    for batch in made:
        for name, tensor in batch.items():
            batch[name] = tensor * torch.logspace(0, -2, tensor.shape[-1])
    return made


@pytest.mark.parametrize("text", ["linear(x[4,9], W[7,9], B[7])", "conv(x[2,3,6,5], W[7,3,2,2], padding=[1,0,1,0])"])
def test_calibration_makes_the_output_error_smallest(dialect: str, text: str) -> None:
    graph = build(dialect, f"y = {text}")
    plain, seen = graph.clone(), batches(graph)
    run(LowRank(rank=3, conv="channel"), graph, calibration=seen)
    run(LowRank(rank=3, fit="weights", conv="channel"), plain, calibration=seen)
    original = build(dialect, f"y = {text}")

    def error(pair: Graph) -> float:
        return sum(float((outputs(pair, one)[0] - outputs(original, one)[0]).square().sum()) for one in seen)

    assert error(graph) < 0.9 * error(plain)
    # by numpy, from the outputs themselves: their best approximation of rank 3
    bias = 0 if original.nodes[0].bias is None else stored(original.nodes[0], "bias")
    rows = torch.cat([outputs(original, one)[0] - bias for one in seen])
    rows = rows if rows.dim() == 2 else rows.permute(0, 2, 3, 1).flatten(0, 2)
    tail = np.linalg.svd(rows.double().numpy(), compute_uv=False)[3:]
    assert error(graph) == pytest.approx(float((tail**2).sum()), rel=1e-3)


def test_padding_does_not_count(dialect: str) -> None:
    text = "y = linear(x[batch,seq,6], W[5,6])\nm = cast(attention_mask[batch,seq]:int64, dtype=float32)\nreturn y, m"
    graphs = [build(dialect, text) for _ in range(2)]
    x = torch.randn(2, 9, 6, generator=torch.manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    noise = torch.where(mask.unsqueeze(-1) > 0, x, 1000 * torch.randn(2, 9, 6))
    for graph, batch in zip(graphs, (x, noise), strict=True):
        run(LowRank(rank=2), graph, calibration=[{"x": batch, "attention_mask": mask}])
    for ours, theirs in zip(*(graph.sites("linear") for graph in graphs), strict=True):
        assert torch.equal(weight_of(ours), weight_of(theirs))


def test_sites_that_share_a_weight_count_together(dialect: str) -> None:
    text = "a = linear(x[4,6], W[5,6])\nb = linear(z[4,6], W)\nreturn a, b"
    graph, one = build(dialect, text), build(dialect, "y = linear(x[8,6], W[5,6])")
    seen = [feeds(graph, seed) for seed in range(3)]
    run(LowRank(rank=2), graph, calibration=seen)
    run(LowRank(rank=2), one, calibration=[{"x": torch.cat([batch["x"], batch["z"]])} for batch in seen])
    assert weight_of(graph.sites("linear")[0]).shape == (2, 6)
    for ours, theirs in zip(graph.sites("linear")[:2], one.sites("linear"), strict=True):
        torch.testing.assert_close(weight_of(ours), weight_of(theirs), rtol=1e-4, atol=1e-5)


def test_a_singular_covariance_is_damped_and_named(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,8], W[8,8])\ny = linear(relu(h), V[8,8])")
    labels = [site.label for site in graph.sites("linear")]
    context = run(LowRank(rank=2), graph, calibration=[feeds(graph)])
    (note,) = context.record.notes
    assert note.startswith("the calibration batches span only some directions") and note.endswith(", ".join(labels))
    assert not run(LowRank(rank=2), build(dialect, "y = linear(x[9,8], W[8,8])"), calibration=[
        {"x": torch.randn(99, 8)[start : start + 9]} for start in range(0, 99, 9)
    ]).record.notes  # fmt: skip


@pytest.mark.slow
def test_calibrated_twins_are_equal_to_the_bit() -> None:
    """From the statistics that one dialect saw."""
    splits: Any = ("bert", "channel"), ("decoder", "channel"), ("convs", "channel"), ("convs", "spatial")
    for name, conv in splits:
        captured = twins.captured(name, "fx")
        recorded = Recorded(captured.graph, captured.feeds[0])
        for pass_ in (LowRank(error=0.3, conv=conv), LowRank(rank=0.25, conv=conv)):
            twins.assert_twins(twins.twins(name, pass_, calibration=recorded))


class Recorded(twins.Recorded):
    """One value may have several statistics: of a 1x1 and of a 3x3 conv that both read it."""

    def observe(self, graph: Graph, wanted: Iterable[Any]) -> Any:
        pairs = list(wanted)
        keys = [(*twins.key(value), str(statistic.features)) for value, statistic in pairs]
        if not self.seen:
            observed = Calibration.observe(self, graph, pairs)
            self.seen = dict(zip(keys, observed, strict=True))
        return iter([self.seen[one] for one in keys])


# --- budgets -------------------------------------------------------------------------------------------------------

NETWORK = """
a = linear(x[4,64], A[96,64]:rank24, P[96])
b = linear(relu(a), B[64,96])
c = linear(relu(b), C[32,64]:rank9)
"""


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.8, 0.95])
def test_budgets_are_met(dialect: str, kind: str, share: float) -> None:
    graph = build(dialect, NETWORK)
    record = run(LowRank(**{kind: share}), graph).record  # type: ignore[arg-type]
    left = counted(record, kind)
    assert 0.98 * share <= left <= share
    assert record.notes == [f"{left:.4f} of the model's {kind} stay, of {share} allowed"]


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_budgets_of_convs_count_both_halves(dialect: str, kind: str) -> None:
    """A stride makes the halves of a spatial pair run at different sizes."""
    text = """
    a = conv(x[1,16,24,20], A[48,16,3,3], stride=[2,2], padding=[1,1,1,1])
    b = conv(relu(a), B[48,48,3,3], padding=[0,1,0,1])
    c = conv(relu(b), C[32,48,1,1])
    """
    for conv in ("channel", "spatial"):
        graph = build(dialect, text)
        record = run(LowRank(conv=conv, **{kind: 0.5}), graph).record  # type: ignore[arg-type]
        share = counted(record, kind)
        assert 0.95 * 0.5 <= share <= 0.5, conv
        assert record.notes[0].startswith(f"{share:.4f} of the model's {kind} stay, of 0.5 allowed"), conv


def counted(record: PassRecord, kind: str) -> float:
    """The share of the cost that is left."""
    before, after = ({"params": cost.parameters, "flops": cost.flops or 0}[kind]
                     for cost in (record.cost_before, record.cost_after))  # fmt: skip
    return after / before


def test_a_budget_is_spent_where_it_buys_most(dialect: str) -> None:
    """Against every choice of ranks for two layers."""
    text = "a = linear(x[2,10], A[10,10], P[10])\ny = linear(relu(a), B[12,10])"
    graph = build(dialect, text)
    spectra = [factor.decompose(weight_of(site)) for site in graph.sites("linear")]
    budget = 0.6 * (100 + 10 + 120) - 10

    def options(spectrum: factor.Spectrum, rows: int) -> list[tuple[float, float]]:
        pairs = [(float(spectrum.errors()[rank]), rank * (rows + 10.0)) for rank in range(1, 10)]
        return [*(pair for pair in pairs if pair[1] < rows * 10), (0.0, rows * 10.0)]

    best = min(
        a[0] + b[0] for a in options(spectra[0], 10) for b in options(spectra[1], 12) if a[1] + b[1] <= budget
    )
    run(LowRank(params=0.6), graph)
    found = 0.0
    for spectrum, inner in zip(spectra, graph.sites("linear")[::2], strict=True):
        found += float(spectrum.errors()[weight_of(inner).shape[0]])
    assert found == pytest.approx(best, abs=1e-9)


def test_what_is_worth_its_numbers_stays_whole(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,32], A[32,32]:rank1)\ny = linear(relu(a), B[32,32])")
    kept = graph.sites("linear")[1]
    context = run(LowRank(params=0.7), graph)
    assert kept in graph.nodes and len(graph.sites("linear")) == 3
    (why,) = declines(context)
    assert why.code == "worth_its_cost" and 0 < why.values["error"] < 1
    assert [why.values[name] for name in ("budget", "rank", "shape")] == ["params", 15, [32, 32]]


def test_a_budget_in_coarse_steps_says_why_it_is_missed(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,16], W[24,16])")  # 4 or 8 ranks of 40 numbers, of 384
    context = run(LowRank(params=0.6), graph, target=Target())
    assert weight_of(graph.nodes[0]).shape == (4, 16)
    assert context.record.notes == [
        "0.4167 of the model's params stay, of 0.6 allowed: the next step of any rank costs more than is left"
    ]


def test_a_budget_out_of_reach_says_how_far_it_goes(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[40,10], ids[2]:int64)\ny = linear(h, W[40,10])")
    with pytest.raises(UsageError, match=r"params=0.4 cannot be reached: the smallest pairs leave 0.562 of the model's "
                       r"params, 0.500 being in what cannot be split"):  # fmt: skip
        run(LowRank(params=0.4), graph)


def test_flops_need_sizes(dialect: str) -> None:
    with pytest.raises(UsageError, match="flops need the sizes of all axes; pass example_inputs, or use params="):
        run(LowRank(flops=0.5), build(dialect, "y = linear(x[batch,8], W[8,8])"))


# --- break-even ----------------------------------------------------------------------------------------------------


def test_break_even_is_the_largest_rank_that_is_surely_faster(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[batch,32], A[32,32])\nb = linear(relu(a), B[32,32])\ny = linear(b, C[40,32])")

    def faster(trial: Graph) -> float:
        """Square ones pay up to rank 8, tall ones never; both square ones are split at once."""
        ranks = {weight_of(site).shape[0] for site in trial.sites("linear")} - {32, 40}
        assert len(ranks) == 1 and len(trial.sites("linear")) in (4, 5)
        return 1.2 if len(trial.sites("linear")) == 5 and max(ranks) <= 8 else 1.005  # too near 1 to be sure

    target = Target(faster=faster)
    context = measured(LowRank(rank="break-even"), graph, target)
    assert [tuple(weight_of(site).shape) for site in graph.sites("linear")] == [(8, 32), (32, 8)] * 2 + [(40, 32)]
    assert set(target.asked) == {(2, 3)} and len(target.asked) <= 5
    speedups = "1.005 at rank 4, 1.005 at rank 8"
    assert declines(context) == [Decline("no_rank_faster", shape=[40, 32], count=1, speedups=speedups)]
    assert context.record.notes[0] == (
        "times as fast as the original with [32, 32] (x2) split: 1.200 at rank 8, 1.005 at rank 12"
    )


def test_break_even_needs_a_target_and_examples() -> None:
    graph = build("fx", "y = linear(x[batch,8], W[8,8])")
    for given in (None, Target()):
        with pytest.raises(UsageError, match="rank=break-even is measured; give a target and example_inputs"):
            run(LowRank(rank="break-even"), graph, target=given)


# --- with other passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["y = linear(x[4,16], W[16,16], B[16])", "y = conv(x[1,8,6,6], W[16,8,3,3], B[16])"])
def test_quantize_calibrates_the_inner_value(dialect: str, text: str) -> None:
    graph = build(dialect, text)
    seen = [feeds(graph, seed) for seed in range(4)]
    run(LowRank(rank=3), graph, calibration=seen)
    inner = graph.nodes[0].result
    low, high = (torch.stack([graph.evaluate(one, [inner])[0] for one in seen]).double() for _ in range(2))
    scale = float(high.max().clamp(min=0) - low.min().clamp(max=0)) / 255
    run(Quantize(scheme="static", smooth=False), graph, calibration=seen)
    outer = graph.sites("linear", "conv")[1]
    quantized = producer(producer(outer.input).operands[0])
    assert quantized.kind == "quantize" and float(stored(quantized, "scale")) == pytest.approx(scale, rel=1e-5)
    assert producer(quantized.input).kind in ("linear", "conv")


# --- text and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pass_",
    [
        LowRank(), LowRank(rank=8), LowRank(rank=0.25), LowRank(rank="break-even"), LowRank(energy=0.9),
        LowRank(error=0.1, fit="outputs"), LowRank(params=0.6, conv="spatial"),
        LowRank(flops=0.5, fit="weights", conv="channel"),
    ],
    ids=str,
)  # fmt: skip
def test_text_and_back(pass_: LowRank) -> None:
    assert parse(str(pass_), REGISTRY) == Pipeline([pass_])


def test_nan_names_the_site(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[8,8]:values(1,nan))")
    label = graph.nodes[0].label
    with pytest.raises(PassError, match=rf"the weight of {label} has 32 of 64 values NaN"):
        run(LowRank(), graph)


def test_outputs_need_calibration(dialect: str) -> None:
    with pytest.raises(UsageError, match="low-rank needs calibration data"):
        run(LowRank(fit="outputs"), build(dialect, "y = linear(x[2,8], W[8,8])"))


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "half"])
def test_refuses_ranks_out_of_range(rank: Any) -> None:
    with pytest.raises(UsageError, match=rf"low-rank: rank is {rank!r}; give a whole number of at least 1, a number "):
        LowRank(rank=rank)


@pytest.mark.parametrize("energy", [0, 1.1, "all", True])
def test_refuses_energies_out_of_range(energy: Any) -> None:
    with pytest.raises(UsageError, match=rf"low-rank: energy is {energy!r}; give a number above 0 and at most 1"):
        LowRank(energy=energy)


@pytest.mark.parametrize("option", ["error", "params", "flops"])
@pytest.mark.parametrize("value", [0, 1, -0.5, 1.1, True, "half"])
def test_refuses_shares_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"low-rank: {option} is {value!r}; give a number above 0 and below 1"):
        LowRank(**{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "energy": 0.9}, "rank and energy choose ranks in different ways; give one of them"),
        ({"rank": "break-even", "params": 0.5, "flops": 0.5}, "rank and params and flops choose ranks"),
        ({"fit": "output"}, "fit is 'output'; give auto, weights or outputs"),
        ({"conv": "depth"}, "conv is 'depth'; give auto, channel or spatial"),
    ],
)
def test_refuses_what_contradicts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"low-rank: {message}"):
        LowRank(**options)


@pytest.mark.parametrize("conv", ["channel", "spatial"])
@pytest.mark.parametrize("name", ["onnxruntime", "fbgemm"])
def test_pairs_of_convs_run_on_the_target(name: str, conv: Any) -> None:
    backend = target(name)
    captured = capture(models.seeded(models.ConvNet), backend.dialect, example_inputs=models.images())
    graph = captured.graph.clone()
    record = run(LowRank(rank=2, conv=conv), graph).record
    assert record.changed
    expected, found = outputs(graph, captured.feeds[0]), backend.compile(backend.lower(graph)[0])(captured.feeds[0])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
