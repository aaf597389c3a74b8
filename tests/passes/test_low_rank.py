"""low-rank: linear -> a thin pair."""

from typing import Any

import pytest
import torch

from graphopt.numerics import factor
from graphopt.passes import LowRank
from graphopt.pipeline import PassError, Selector, UsageError
from tests.language import assert_outputs_equal, assert_unchanged, build, declined, listing, run, weight_of


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
    u, v = factor.truncate(weight, rank=3)
    assert torch.equal(weight_of(outer), u) and torch.equal(weight_of(inner), v)


@pytest.mark.parametrize(("rank", "kept"), [(2, 2), (0.25, 2), (0.26, 3)])
def test_rank_as_a_count_and_as_a_share(dialect: str, rank: float, kept: int) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[16,8])")
    run(LowRank(rank=rank), graph)
    assert weight_of(graph.nodes[0]).shape == (kept, 8)


def test_keeps_a_dynamic_batch(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch,4,8], W[16,8])")
    run(LowRank(rank=2), graph)
    assert listing(graph)[1] == "%1 = linear(%0[batch,4,2], [16,2])"


def test_declines_a_full_rank_linear(dialect: str) -> None:
    context = run(LowRank(energy=1.0), build(dialect, "y = linear(x[2,8], W[8,8]:seed3)"))
    assert declined(context) == ["rank 8 holds no fewer numbers than [8, 8]"]
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
    assert declined(context) == ["weight is computed by the graph", "already quantized"]


def test_leaves_a_tied_weight_tied(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\ny = linear(h, T)")
    context = run(LowRank(rank=1), graph)
    assert [reason.split(" ")[:5] for reason in declined(context)] == [["weight", "is", "tied", "with", "embedding"]]


def test_linears_that_share_a_weight_share_the_pair(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[8,8]:rank2)\nb = linear(z[2,8], W, B[8])\nreturn a, b")
    original = graph.clone()
    run(LowRank(rank=2), graph)
    assert graph.sites("linear")[0].operand("weight") == graph.sites("linear")[2].operand("weight")
    assert_outputs_equal(graph, original, rtol=1e-5)


def test_ignore_and_other_words(dialect: str) -> None:
    text = "h = linear(x[2,8], W[8,8]:rank2)\nr = relu(h)\ny = linear(r, V[8,8]:rank2)"
    graph = build(dialect, text)
    first, last = graph.sites("linear")
    context = run(LowRank(targets=Selector("linear", "relu"), ignore=Selector(last.name)), graph)
    assert declined(context) == ["relu is not a linear"]
    assert len(graph.sites("linear")) == 3 and last in graph.nodes and first not in graph.nodes


def test_nan_names_the_site(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[8,8]:values(1,nan))")
    label = graph.nodes[0].label
    with pytest.raises(PassError, match=rf"the weight of {label} has 32 of 64 values NaN"):
        run(LowRank(), graph)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "half"])
def test_refuses_ranks_out_of_range(rank: Any) -> None:
    with pytest.raises(UsageError, match=rf"low-rank: rank is {rank!r}; give a whole number of at least 1, or a share"):
        LowRank(rank=rank)


@pytest.mark.parametrize("energy", [0, 1.1, None, True])
def test_refuses_energies_out_of_range(energy: Any) -> None:
    with pytest.raises(UsageError, match=rf"low-rank: energy is {energy!r}; give a share in \(0, 1\]"):
        LowRank(energy=energy)
