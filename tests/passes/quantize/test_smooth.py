"""smooth: channels of activations of like size, at no cost."""

import re
from dataclasses import replace

import pytest
import torch

from graphopt.numerics.metrics import sqnr
from graphopt.passes import Quantize, Smooth
from graphopt.passes.quantize.quantize import Scheme
from graphopt.pipeline.selectors import Selector
from tests.language import assert_outputs_equal, build, declined, feeds, outputs, run, weight_of

GATED = """
    n = layer_norm(x[32,8], G[8]:values(1,1,30,1,1,1,1,1), B[8])
    g = mul(silu(linear(n, W[8,8])), linear(n, V[8,8], C[8]))
    y = linear(g, U[4,8])
    """
DEPTHWISE = """
    c = relu(conv(x[2,3,8,8], V[4,3,3,3], B[4]))
    d = conv(c, W[4,1,3,3], groups=4, padding=[1,1,1,1])
    y = conv(max_pool(relu(d), kernel=[2,2]), U[5,4,3,3])
    """


@pytest.mark.parametrize(("text", "changed"), [(GATED, 3), (DEPTHWISE, 2)], ids=["gated", "depthwise"])
def test_the_function_stays_and_the_graph_too(dialect: str, text: str, changed: int) -> None:
    graph = build(dialect, text)
    original = graph.clone()
    context = run(Smooth(), graph, calibration=[feeds(graph, seed) for seed in range(3)])
    assert graph.text() == original.text() and context.record.changed == changed
    assert_outputs_equal(graph, original, rtol=1e-5)


def test_outliers_cost_less_behind_it(dialect: str) -> None:
    found = {}
    for smoothed in (False, True):
        graph = build(dialect, GATED)
        batches = [feeds(graph, seed) for seed in range(4)]
        expected = outputs(graph)[0]
        if smoothed:
            run(Smooth(), graph, calibration=batches)
        run(Quantize(scheme="static", rounding="nearest", smooth=False), graph, calibration=batches)
        found[smoothed] = sqnr(expected, outputs(graph)[0])
    assert found[True] > found[False] + 1.5


def test_static_quantization_begins_with_it(dialect: str) -> None:
    by_itself, behind = build(dialect, GATED), build(dialect, GATED)
    batches = [feeds(behind, seed) for seed in range(4)]
    context = run(Quantize(scheme="static"), by_itself, calibration=batches)
    assert "alpha of SmoothQuant" in context.record.notes[0]
    run(Smooth(), behind, calibration=batches)
    run(Quantize(scheme="static", smooth=False), behind, calibration=batches)
    assert by_itself.text() == behind.text()
    assert torch.equal(outputs(by_itself)[0], outputs(behind)[0])


def test_dynamic_sites_stay_as_they_are(dialect: str) -> None:
    graph = build(dialect, GATED)
    before = weight_of(graph.sites("layer_norm")[0])
    context = run(Quantize(scheme="dynamic"), graph, calibration=[feeds(graph)])
    assert torch.equal(weight_of(graph.sites("layer_norm")[0]), before) and context.record.changed


@pytest.mark.parametrize("spelling", ["node", "path"])
def test_a_site_alone_is_not_smoothed_however_it_is_selected(dialect: str, spelling: str) -> None:
    for options, smoothed in ((Quantize(scheme="static"), True), (Quantize(scheme="static").alone(), False)):
        graph = build(dialect, GATED)
        node = graph.sites("linear")[0]
        targets = Selector.of(node) if spelling == "node" else Selector(f"re:^{re.escape(node.label)}$")
        before = weight_of(graph.sites("layer_norm")[0])
        context = run(replace(options, targets=targets), graph, calibration=[feeds(graph)])
        assert torch.equal(weight_of(graph.sites("layer_norm")[0]), before) != smoothed and context.record.changed


def test_options_by_name_hold_after_smoothing(dialect: str) -> None:
    """Smoothing puts other nodes in place of the sites, and of the other readers of their inputs."""
    graph = build(dialect, GATED)
    first, before = graph.sites("linear")[0], weight_of(graph.sites("layer_norm")[0])
    by_name: dict[str, Scheme] = {Selector.of(first).terms[0]: "static", "linear": "dynamic"}
    for goal in (None, -100.0):
        smoothed = graph.clone()
        context = run(Quantize(scheme=by_name, sqnr=goal), smoothed, calibration=[feeds(graph)])
        assert not torch.equal(weight_of(smoothed.sites("layer_norm")[0]), before)
        assert context.record.eligible == [site.label for site in graph.sites("linear")]
        assert context.record.changed == 3 and declined(context) == []
        assert len(smoothed.sites("quantize")) == 3 and len(smoothed.sites("choose_qparams")) == 2


def test_channels_of_a_depthwise_conv_reach_equally_far(dialect: str) -> None:
    graph = build(dialect, DEPTHWISE)
    batches = [feeds(graph, seed) for seed in range(3)]
    run(Smooth(), graph, calibration=batches)
    value = graph.sites("conv")[1].input
    reached = torch.cat([graph.evaluate(batch, [value])[0] for batch in batches]).amax((0, 2, 3))
    assert torch.allclose(reached, reached[0].expand(4), rtol=1e-4)


def test_rows_of_a_linear_may_be_counted_anew_in_front_of_it(dialect: str) -> None:
    text = (
        "n = layer_norm(x[4,2,8], G[8]:values(1,1,30,1,1,1,1,1), C[8])\n"
        "y = linear(reshape(n, S[2]:int64:values(%s)), W[4,%d])"
    )
    for shape, width, changed in (("8,8", 8, 1), ("4,16", 16, 0)):
        graph = build(dialect, text % (shape, width))
        original = graph.clone()
        context = run(Smooth(), graph, calibration=[feeds(graph, seed) for seed in range(3)])
        assert context.record.changed == changed
        assert_outputs_equal(graph, original, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("y = linear(x[2,8], W[4,8])", ["input_cannot_absorb"]),
        ("y = linear(gelu(linear(x[2,8], W[8,8])), V[4,8])",
         ["input_cannot_absorb", "cannot_absorb"]),
        ("n = layer_norm(x[2,8], G[8])\na = linear(n, W[8,8])\ny = add(a, n)", ["input_shared"]),
        ("h = linear(x[2,8], W[8,8])\ny = linear(h, W)",
         ["weight_shared", "weight_shared"]),
        ("c = conv(x[1,4,4,4], V[4,4,1,1])\ny = conv(c, W[4,2,1,1], groups=2)",
         ["input_cannot_absorb", "conv_grouped"]),
        # A square would take the factors twice, a pool mixes the channels of a linear, a norm over two axes has many.
        ("h = linear(x[2,8], W[8,8])\ny = linear(mul(h, h), V[4,8])",
         ["input_cannot_absorb", "mul_cannot_absorb"]),
        ("h = linear(x[1,2,8,8], W[8,8])\n"
         "y = linear(max_pool(h, kernel=[3,3], padding=[1,1,1,1], stride=[1,1]), V[4,8])",
         ["input_cannot_absorb", "cannot_absorb"]),
        ("y = linear(layer_norm(x[2,8,8], G[8,8], C[8,8]), W[4,8])", ["norm_over_several_axes"]),
        ("h = linear(x[2,8]:float16, W[8,8]:float16)\ny = linear(h, V[4,8]:float16)",
         ["not_float32", "not_float32"]),
    ],
)  # fmt: skip
def test_declines(dialect: str, text: str, codes: list[str]) -> None:
    graph = build(dialect, text)
    assert declined(run(Smooth(), graph, calibration=[feeds(graph)])) == codes


def test_weights_stay_with_their_sites(dialect: str) -> None:
    graph = build(dialect, GATED)
    before = [weight_of(site) for site in graph.sites("linear")]
    run(Smooth(), graph, calibration=[feeds(graph, seed) for seed in range(3)])
    ratios = [weight_of(site) / old for site, old in zip(graph.sites("linear"), before, strict=True)]
    assert torch.allclose(ratios[0], ratios[0][0].expand_as(ratios[0]), rtol=1e-5)  # one factor an input channel
