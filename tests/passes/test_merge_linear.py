"""merge-linear: linears on one value -> slices of one."""

from typing import Any

import pytest
import torch

from graphopt.passes import FoldInt8, MergeLinear, Quantize
from graphopt.pipeline.selectors import Selector
from tests.language import assert_outputs_equal, assert_unchanged, build, feeds, listing, run, stored

THREE = "q = linear(x[2,8], Q[4,8], A[4])\nk = linear(x, K[2,8])\nv = linear(x, V[4,8], B[4])\nreturn q, k, v"


def test_merges_linears_on_one_value(dialect: str) -> None:
    graph = build(dialect, THREE)
    original = graph.clone()
    context = run(MergeLinear(), graph)
    assert listing(graph) == [
        "%0 = linear(x[2,8], [10,8], [10])",
        "%1 = slice(%0[2,10], axis=1, end=4)",
        "%2 = slice(%0[2,10], axis=1, start=4, end=6)",
        "%3 = slice(%0[2,10], axis=1, start=6, end=10)",
        "return %1[2,4], %2[2,2], %3[2,4]",
    ]
    assert context.record.changed == 3
    assert_outputs_equal(graph, original, rtol=1e-6)
    assert_unchanged(MergeLinear(), graph)


def test_no_linear_has_a_bias(dialect: str) -> None:
    graph = build(dialect, "q = linear(x[2,8], Q[4,8])\nk = linear(x, K[2,8])\nreturn q, k")
    run(MergeLinear(), graph)
    assert graph.nodes[0].bias is None


def test_a_missing_bias_is_zeros(dialect: str) -> None:
    graph = build(dialect, THREE)
    run(MergeLinear(), graph)
    assert stored(graph.nodes[0], "bias")[4:6].tolist() == [0, 0]


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("folded", [False, True])
def test_merges_quantized_linears_before_and_after_folding(dialect: str, scheme: Any, folded: bool) -> None:
    graph = build(dialect, THREE)
    run(Quantize(scheme=scheme), graph, calibration=[feeds(graph)])
    if folded:
        run(FoldInt8(), graph)
    original = graph.clone()
    run(MergeLinear(), graph)
    (merged,) = graph.sites("linear", "linear_int8")
    assert merged.kind == ("linear_int8" if folded else "linear")
    int8 = [tensor for _, tensor in graph.constants() if tensor.dtype == torch.int8]
    assert [tuple(tensor.shape) for tensor in int8] == [(10, 8)]
    assert_outputs_equal(graph, original, rtol=1e-6)
    assert_unchanged(MergeLinear(), graph)


def test_a_linear_alone_is_not_eligible(dialect: str) -> None:
    context = run(MergeLinear(), build(dialect, "h = linear(x[2,8], W[8,8])\ny = linear(h, V[8,8])"))
    assert context.record.eligible == [] and context.record.changes == 0


def test_declines_a_computed_bias_and_the_linear_left_alone(dialect: str) -> None:
    graph = build(dialect, "q = linear(x[2,8], Q[4,8], b[4])\nk = linear(x, K[2,8])\nreturn q, k")
    context = run(MergeLinear(), graph)
    assert [reason.code for reason in context.record.declined.values()] == ["bias_computed", "alone_on_input"]


def test_leaves_a_tied_weight_tied(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\na = linear(h, T)\nb = linear(h, W[4,8])\nreturn a, b")
    context = run(MergeLinear(), graph)
    (tied, _) = context.record.declined.values()
    assert (tied.code, tied.values["op"]) == ("weight_shared", "embedding") and context.record.changes == 0


def test_leaves_what_is_ignored(dialect: str) -> None:
    graph = build(dialect, THREE)
    names = [site.name for site in graph.sites("linear")]
    context = run(MergeLinear(ignore=Selector(f"node:{names[1]}")), graph)
    assert len(context.record.eligible) == context.record.changed == 2
    assert [site.result.shape for site in graph.sites("linear")] == [(2, 8), (2, 2)]
