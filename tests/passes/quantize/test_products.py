"""quantize scales outlier channels by a product in front of linears, where nothing absorbs the factors at no cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.graph import Graph
from graphopt.numerics.metrics import sqnr
from graphopt.passes import Quantize
from graphopt.passes.quantize.channel_scaling import Scalable, rescale, smooth_channels
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from tests.language import FakeTarget, assert_outputs_equal, build, feeds, listing, outputs, run

SHARED = """
    n = layer_norm(x[64,8], G[8]:values(1,1,40,1,1,1,1,1), B[8])
    y = add(linear(n, W[8,8], C[8]), n)
    """
GELU = """
    a = gelu(linear(x[64,8], W[16,8], C[16]:values(0,0,0,30,0,0,0,0,0,0,0,0,0,0,0,0)))
    y = linear(a, V[8,16])
    """
EVEN = "n = layer_norm(x[64,8], G[8], B[8])\ny = add(linear(n, W[8,8]), n)"
STATIC = Quantize(scheme="static", rounding="nearest", bias_correction=False, observer="minmax")


def smoothed(graph: Graph, context: Context | None = None, *, adds: bool = True) -> list[str]:
    """Smooth all linears; why the others stay as they are."""
    batches = Calibration([feeds(graph, seed) for seed in range(3)], graph.inputs)
    context = context or Context()
    context.calibration = batches
    _, declined = smooth_channels(graph, context, graph.sites("linear"), adds=adds)
    graph.sweep()
    return [why.code for why in declined.values()]


@pytest.mark.parametrize(("text", "products"), [(SHARED, 1), (GELU, 1), (EVEN, 0)], ids=["shared", "gelu", "even"])
def test_a_product_is_added_where_it_is_worth_it(dialect: str, text: str, products: int) -> None:
    graph = build(dialect, text)
    original = graph.clone()
    smoothed(graph)
    assert len(graph.sites("mul")) == products
    assert_outputs_equal(graph, original, rtol=1e-5)


def test_other_readers_get_the_value_as_it_is(dialect: str) -> None:
    graph = build(dialect, SHARED)
    smoothed(graph)
    assert listing(graph) == [
        "%0 = layer_norm(x[64,8], [8], [8])",
        "%1 = mul(%0[64,8], [8])",
        "%2 = linear(%1[64,8], [8,8], [8])",
        "%3 = add(%2[64,8], %0[64,8])",
        "return %3[64,8]",
    ]


def test_nothing_is_added_by_smooth_itself(dialect: str) -> None:
    graph = build(dialect, SHARED)
    assert smoothed(graph, adds=False) == ["input_shared"] and not graph.sites("mul")


def test_a_target_that_quantizes_as_it_computes_gets_none(dialect: str) -> None:
    graph = build(dialect, GELU)
    assert "cannot_absorb" in smoothed(graph, Context(target=FakeTarget(quantizes=("gelu",))))
    assert not graph.sites("mul")


def test_what_a_conv_makes_gets_none(dialect: str) -> None:
    graph = build(dialect, "c = relu(conv(x[4,3,6,8], K[4,3,1,1]:values(1,1,90)))\ny = linear(c, W[4,8])\nreturn y, c")
    smoothed(graph)
    assert not graph.sites("mul")


@pytest.mark.parametrize("text", [SHARED, GELU], ids=["shared", "gelu"])
def test_static_quantization_is_closer_with_it(dialect: str, text: str) -> None:
    found = {}
    for smooth in (False, True):
        graph = build(dialect, text)
        expected = outputs(graph)[0]
        context = run(Quantize(**vars(STATIC) | {"smooth": smooth}), graph,
                      calibration=[feeds(graph, seed) for seed in range(4)])  # fmt: skip
        found[smooth] = sqnr(expected, outputs(graph)[0])
        assert any("by a product of their own" in note for note in context.record.notes) == smooth
    assert found[True] > found[False] + 3


@settings(max_examples=20, deadline=None)
@given(exponents=st.lists(st.integers(-20, 20), min_size=8, max_size=8))
def test_factors_that_are_powers_of_two_change_no_bit(exponents: list[int]) -> None:
    graph = build("fx", SHARED)
    expected = outputs(graph)[0]
    (site,) = graph.sites("linear")
    rescale(graph, [(Scalable(site.input, [site], (), 8), torch.tensor([2.0**one for one in exponents]))])
    assert len(graph.sites("mul")) == 1 and torch.allclose(outputs(graph)[0], expected, rtol=1e-6, atol=1e-6)
