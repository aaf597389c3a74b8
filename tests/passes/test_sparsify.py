"""sparsify: the smallest weights become zero."""

from typing import Any

import pytest
import torch

from graphopt.numerics.prune import magnitude_mask, sparsity
from graphopt.passes import Sparsify
from graphopt.pipeline import PassError, Selector, UsageError
from tests.language import assert_unchanged, build, declined, listing, run, weight_of

TWO = "h = linear(x[2,8], W[16,8])\ny = linear(h, V[4,16]:seed7, B[4])"


def test_zeros_the_smallest_of_each_weight(dialect: str) -> None:
    graph = build(dialect, TWO)
    before = listing(graph)
    weights = [weight_of(site).clone() for site in graph.nodes]
    context = run(Sparsify(amount=0.25), graph)
    assert listing(graph) == before
    for site, weight in zip(graph.nodes, weights, strict=True):
        assert torch.equal(weight_of(site), weight * magnitude_mask(weight, 0.25))
    assert context.record.changed == 2 and declined(context) == []
    assert "they bring speed only where kernels skip zeros" in context.record.notes[0]
    assert_unchanged(Sparsify(amount=0.25), graph)


def test_conv_keeps_its_attributes(dialect: str) -> None:
    graph = build(dialect, "y = conv(x[1,4,6,6], W[4,2,3,3], B[4], stride=[2,2], padding=[1,1,1,1], groups=2)")
    attributes = dict(graph.nodes[0].attributes)
    run(Sparsify(amount=0.5), graph)
    assert graph.nodes[0].attributes == attributes and sparsity(weight_of(graph.nodes[0])) == 0.5


def test_global_ranks_all_weights_together(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,2], W[2,2]:values(1,2,3,4))\ny = linear(h, V[2,2]:values(5,6,7,8))")
    context = run(Sparsify(amount=0.5, scope="global"), graph)
    first, last = graph.nodes
    assert weight_of(first).tolist() == [[0, 0], [0, 0]] and weight_of(last).tolist() == [[5, 6], [7, 8]]
    assert declined(context) == ["0 of 4 weights are to go"]
    assert_unchanged(Sparsify(amount=0.5, scope="global"), graph)


def test_declines_with_numbers(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,3], W[2,3])\ny = linear(h, V[2,2]:values(0,0,0,9))\nreturn h, y")
    context = run(Sparsify(amount=0.05), graph)
    assert declined(context) == ["0 of 6 weights are to go", "0 of 4 weights are to go"]
    context = run(Sparsify(amount=0.5), graph)
    assert declined(context) == ["2 of 4 weights are to go, and they are zero"]


def test_declines_what_is_no_stored_float_weight(dialect: str) -> None:
    graph = build(
        dialect,
        """
        computed = linear(x[2,8], w[8,8])
        quantized = linear(x, dequantize(W[8,8]:int8:values(1,2,3), S[8]:ones, axis=0))
        return computed, quantized
        """,
    )
    assert declined(run(Sparsify(), graph)) == ["weight is computed by the graph", "already quantized"]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_pattern_that_matches_all_prunes_linears_and_convs_only(dialect: str, scope: str) -> None:
    text = "h = linear(x[2,8], W[8,8])\nn = layer_norm(h, G[8]:seed3, B[8])\ny = rms_norm(n, R[8]:seed4)"
    graph = build(dialect, text)
    norms = [weight_of(node).clone() for node in graph.nodes[1:]]
    context = run(Sparsify(targets=Selector("*"), scope=scope), graph)
    assert declined(context) == [f"{kind} is neither linear nor conv" for kind in ("layer_norm", "rms_norm")]
    assert context.record.changed == 1 and sparsity(weight_of(graph.nodes[0])) == 0.5
    assert all(torch.equal(weight_of(node), norm) for node, norm in zip(graph.nodes[1:], norms, strict=True))


def test_only_norms_selected_leaves_the_graph(dialect: str) -> None:
    graph = build(dialect, "y = rms_norm(x[2,8], R[8]:seed4)")
    assert_unchanged(Sparsify(targets=Selector("*"), scope="global"), graph)


def test_leaves_a_tied_weight_tied(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\ny = linear(h, T)")
    context = run(Sparsify(), graph)
    assert declined(context) == [f"weight is tied with embedding {graph.sites('embedding')[0].label}"]


def test_a_shared_weight_is_stored_once(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[8,8])\nb = linear(a, W)")
    run(Sparsify(), graph)
    assert len(list(graph.constants())) == 1


def test_keeps_the_dtype(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8]:float16, W[8,8]:float16)")
    run(Sparsify(), graph)
    assert weight_of(graph.nodes[0]).dtype == torch.float16


def test_nan_names_the_site(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[8,8]:values(1,nan))")
    label = graph.nodes[0].label
    with pytest.raises(PassError, match=rf"the weight of {label} has 32 of 64 values NaN"):
        run(Sparsify(), graph)


@pytest.mark.parametrize("amount", [-0.1, 1, 1.5, "half", None, True])
def test_refuses_amounts_out_of_range(amount: Any) -> None:
    with pytest.raises(UsageError, match=rf"sparsify: amount is {amount!r}; give a number of at least 0 and below 1"):
        Sparsify(amount=amount)


def test_refuses_an_unknown_scope() -> None:
    with pytest.raises(UsageError, match="sparsify: scope is 'layer'; give local or global"):
        Sparsify(scope="layer")
