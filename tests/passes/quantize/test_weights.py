"""quantize: what becomes of weights, biases and tables, by scheme, bits, blocks and the accuracy methods."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.measure.machine import cpu_saturates
from graphopt.numerics.quantize import fit
from graphopt.passes import Quantize
from graphopt.passes.quantize.quantize import Bits, Scheme
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from tests.language import (
    FakeTarget,
    assert_unchanged,
    build,
    declined,
    declines,
    feeds,
    outputs,
    producer,
    run,
    stored,
    weight_of,
)

LINEAR = "y = linear(x[64,32], W[16,32], B[16])"
NARROW = {"linear": (8, 4), "embedding": (8, 4)}
WEIGHT_ONLY = {"linear": ("static", "weight-only"), "embedding": ("weight-only",)}


def correlated(graph: Graph, seed: int) -> dict[str, Tensor]:
    """Inputs whose features go together, with a mean that is not 0."""
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, 32)
    return {name: x @ mixing + 0.5 for name, x in feeds(graph, seed).items()}


def dequantized(site: Node) -> Tensor:
    """The weight that the integers of a site stand for."""
    maker = producer(site.required("weight"))
    found: Tensor = maker.graph.evaluate(feeds(maker.graph), [maker.result])[0]
    return found


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False), (2, True)])
def test_weight_only_in_blocks(dialect: str, bits: Bits, symmetric: bool) -> None:
    graph = build(dialect, LINEAR)
    weight = weight_of(graph.nodes[0])
    options = Quantize(scheme="weight-only", bits=bits, block=16, symmetric=symmetric, clip=False)
    run(options, graph)
    grid = fit(weight, bits=bits, block=16, symmetric=symmetric)
    maker = producer(graph.sites("linear")[0].required("weight"))
    assert [node.kind for node in graph.nodes if node.kind != "cast"] == ["dequantize", "linear"]
    assert torch.equal(stored(maker, "x"), grid.round(weight)) and torch.equal(stored(maker, "scale"), grid.scale)
    assert (maker.operand("zero_point") is None) == symmetric
    assert (maker.attributes["axis"], maker.attributes["block"], maker.attributes["bits"]) == (1, 16, bits)
    assert torch.equal(dequantized(graph.sites("linear")[0]), grid.values(grid.round(weight)))
    assert_unchanged(options, graph)


def test_blocks_without_asking(dialect: str) -> None:
    text = "a = linear(x[2,64], W[4,64])\nb = linear(z[2,48], V[4,48])\nc = linear(x, U[4,64])\nreturn a, b, c"
    graph = build(dialect, text)
    run(Quantize(scheme="weight-only", bits={f"node:{graph.nodes[2].name}": 8, "linear": 4}), graph)
    makers = [producer(site.required("weight")).attributes for site in graph.sites("linear")]
    assert [(found["block"], found["bits"]) for found in makers] == [(32, 4), (16, 4), (0, 8)]


def test_gptq_makes_less_error(dialect: str) -> None:
    batches: list[dict[str, Tensor]] = []
    errors = {}
    for rounding in ("nearest", "gptq"):
        graph = build(dialect, LINEAR)
        batches = batches or [correlated(graph, seed) for seed in range(4)]
        expected = outputs(graph, batches[0])[0]
        options = Quantize(scheme="weight-only", bits=4, rounding=rounding, bias_correction=False)
        run(options, graph, calibration=batches)
        errors[rounding] = float((outputs(graph, batches[0])[0] - expected).square().sum())
    assert errors["gptq"] < errors["nearest"] / 2


def test_the_bias_takes_over_the_mean_error(dialect: str) -> None:
    for text in (LINEAR, LINEAR.replace(", B[16]", "")):
        graph = build(dialect, text)
        batches = [correlated(graph, seed) for seed in range(4)]
        expected = torch.cat([outputs(graph, batch)[0] for batch in batches])
        run(Quantize(scheme="weight-only", bits=4, rounding="nearest"), graph, calibration=batches)
        found = torch.cat([outputs(graph, batch)[0] for batch in batches])
        assert (found - expected).mean(0).abs().max() < 1e-5 * expected.abs().max()


def test_the_bias_takes_over_what_rounding_inputs_shifts(dialect: str) -> None:
    """The range cuts off the tail of what comes in, so that integers are too small on average."""
    graph = build(dialect, LINEAR)
    batches = [{name: x.square() * x.abs() for name, x in correlated(graph, seed).items()} for seed in range(4)]
    expected = torch.cat([outputs(graph, batch)[0] for batch in batches])
    run(Quantize(scheme="static"), graph, calibration=batches)
    found = torch.cat([outputs(graph, batch)[0] for batch in batches])
    assert (found - expected).mean(0).abs().max() < 1e-5 * expected.abs().max()


def test_weights_are_fitted_to_inputs_in_integers(dialect: str) -> None:
    """Four features of 32 set the scale, and of the others little is left in integers."""
    errors = {}
    for rounding in ("nearest", "gptq"):
        graph = build(dialect, LINEAR)
        large = torch.ones(32).index_fill(0, torch.arange(4), 100.0)
        batches = [{name: x * large for name, x in feeds(graph, seed).items()} for seed in range(8)]
        expected = torch.cat([outputs(graph, batch)[0] for batch in batches])
        run(Quantize(scheme="static", observer="minmax", rounding=rounding, smooth=False), graph, calibration=batches)
        wrong = torch.cat([outputs(graph, batch)[0] for batch in batches]) - expected
        errors[rounding] = float((wrong - wrong.mean(0)).square().sum())
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_a_computed_bias_is_not_corrected(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,32], W[16,32], b[16])")
    run(Quantize(), graph, calibration=[feeds(graph)])
    assert graph.sites("linear")[0].bias == graph.inputs[1]


def test_clip_searches_the_scale(dialect: str) -> None:
    scales = []
    for clip in (True, False):
        graph = build(dialect, LINEAR)
        run(Quantize(scheme="weight-only", clip=clip, bits=4), graph)
        scales.append(stored(producer(graph.sites("linear")[0].required("weight")), "scale"))
    assert (scales[0].abs() <= scales[1].abs()).all() and (scales[0].abs() < scales[1].abs()).any()


def test_schemes_by_site(dialect: str) -> None:
    text = "a = linear(x[2,32], W[8,32])\nb = linear(x, V[8,32])\nc = linear(x, U[8,32])\nreturn a, b, c"
    graph = build(dialect, text)
    first, second = (f"node:{node.name}" for node in graph.nodes[:2])
    context = run(Quantize(scheme={first: "dynamic", second: "weight-only"}), graph)
    assert declines(context) == [Decline("no_term_matches", option="scheme")]
    kinds = [producer(site.input).kind if site.input.producer else "float" for site in graph.sites("linear")]
    assert kinds == ["dequantize", "float", "float"]


def test_auto_is_weight_only_where_nothing_else_is_fast(dialect: str) -> None:
    graph = build(dialect, LINEAR)
    run(Quantize(), graph, target=FakeTarget(schemes={"linear": ("weight-only",)}, weight_bits=NARROW))
    assert [node.kind for node in graph.nodes] == ["dequantize", "linear"]


def test_seven_bits_where_products_saturate(dialect: str) -> None:
    for bits, most in ((7, 63), (8, 127)):
        graph = build(dialect, LINEAR)
        target = FakeTarget(schemes={"linear": ("dynamic",)}, bits=bits)
        context = run(Quantize(scheme="dynamic"), graph, target=target)
        steps = stored(producer(graph.sites("linear")[0].required("weight")), "x")
        assert int(steps.abs().max()) == most
        assert ("7 bits" in context.record.notes[0]) == (bits == 7) and "VNNI" in context.record.notes[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2", True), ("avx2 avx512f", True), ("avx2 avx512f avx512_vnni", False), ("avx2 avx_vnni", False),
     ("asimddp i8mm", False), ("", False)],
)  # fmt: skip
def test_which_cpus_saturate(flags: str, expected: bool) -> None:
    assert cpu_saturates(flags) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "weight-only", "bits": 2}, "a weight-only linear has weights of 8 or 4 bits here, not 2"),
        ({"scheme": "dynamic", "bits": 4}, "a dynamic linear has weights of 8 or 7 bits here, not 4"),
        ({"scheme": "weight-only", "block": 64}, "block 64 does not divide 32 inputs"),
    ],
)
def test_what_no_weight_can_have_is_an_error(dialect: str, options: Any, reason: str) -> None:
    graph = build(dialect, LINEAR)
    target = FakeTarget(schemes={"linear": ("static", "dynamic", "weight-only")}, weight_bits=NARROW)
    with pytest.raises(UsageError, match=f"nothing is left to quantize .*: {reason}"):
        run(Quantize(**options), graph, target=target, calibration=[feeds(graph)])


def test_a_block_that_divides_some_weights_declines_the_others(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,64], W[4,64])\nb = linear(z[2,48], V[4,48])\nreturn a, b")
    assert declines(run(Quantize(scheme="weight-only", block=32), graph)) == [
        Decline("block_not_dividing", block=32, inputs=48)
    ]


@pytest.mark.parametrize(("width", "blocks"), [(64, 2), (48, 3), (50, 1), (127, 1), (129, None)])
def test_a_row_that_no_block_divides_has_one_scale_where_it_is_short(dialect: str, width: int, blocks: int) -> None:
    graph = build(dialect, f"y = linear(x[2,{width}], W[4,{width}])")
    context = run(Quantize(scheme="weight-only", bits=4), graph) if blocks else None
    if context is None:
        with pytest.raises(UsageError, match=f"block 32 does not divide {width} inputs"):
            run(Quantize(scheme="weight-only", bits=4), graph)
        return
    (weight,) = graph.sites("dequantize")
    scale = graph.constant(weight.required("scale"))
    assert scale is not None and scale.numel() == 4 * blocks
    assert declines(context) == []


def test_where_the_others_made_the_model_slower_nothing_is_quantized(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,24], V[32,24])\ny = linear(h, W[4,32])")
    narrow, wide = (site.label for site in graph.sites("linear"))
    context = Context(reverted={wide: Decline("slower", before=1.0, after=2.0)})
    run_pass(Quantize(scheme="weight-only", block=32), graph, context)
    codes = {label: reason.code for label, reason in context.record.declined.items()}
    assert codes == {narrow: "block_not_dividing", wide: "slower"}


def test_a_model_without_sites_is_an_error(dialect: str) -> None:
    with pytest.raises(UsageError, match=r"no site in \[linear,conv,embedding,conv_transpose,lstm,gru,rnn\]"):
        run(Quantize(), build(dialect, "y = relu(x[2])"))


@pytest.mark.parametrize(("scheme", "bits", "form"), [("dynamic", None, (0, 0, 8)), ("weight-only", 4, (1, 32, 4))])
def test_tables(dialect: str, scheme: Scheme, bits: Bits | None, form: tuple[int, int, int]) -> None:
    graph = build(dialect, "y = embedding(T[9,32], ids[2]:int64)")
    table = stored(graph.nodes[0], "table")
    run(Quantize(scheme=scheme, bits=bits), graph)
    maker = graph.sites("dequantize")[0]
    assert (maker.attributes["axis"], maker.attributes["block"], maker.attributes["bits"]) == form
    grid = fit(table, bits=form[2], block=form[1] or None, search=form[2] < 7)
    assert torch.equal(stored(maker, "x"), grid.round(table)) and torch.equal(stored(maker, "scale"), grid.scale)


def test_products_of_two_activations(dialect: str) -> None:
    graph = build(dialect, "a = matmul(x[2,3,4], z[2,4,5])\nb = matmul(x, V[2,4,4])\nreturn a, b")
    context = run(Quantize(targets=Selector("matmul")), graph, calibration=[feeds(graph)])
    assert declined(context) == ["matmul_side_stored"]
    assert [producer(value).kind for value in graph.sites("matmul")[0].operands] == ["dequantize", "dequantize"]


def test_products_of_other_floats_are_declined(dialect: str) -> None:
    graph = build(dialect, "y = matmul(x[2,3,4]:float16, z[2,4,5]:float16)")
    context = run(Quantize(targets=Selector("matmul")), graph, calibration=[feeds(graph)])
    assert declines(context) == [Decline("not_float32", name="x", dtype="float16")] and context.record.changed == 0


def test_ranges_that_say_little_are_noted(dialect: str) -> None:
    text = "z = mul(x[2,8], Z[1]:zeros)\ny = linear(z, W[4,8])\nu = linear(add(z, O[1]:ones), V[4,8])\nreturn y, u"
    graph = build(dialect, text)
    notes = run(Quantize(scheme="static"), graph, calibration=[feeds(graph)]).record.notes
    assert "is all zero" in notes[0] and "is constant (1)" in notes[0]


PADDED = "k = mul(x[2,3,8], unsqueeze(cast(attention_mask[2,3]:int64, dtype=float32), axes=[2]))\ny = linear(k, V[4,8])"


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_values_that_calibration_never_exercises_are_named(dialect: str, scheme: Scheme) -> None:
    graph = build(dialect, PADDED)
    padding = feeds(graph) | {"attention_mask": torch.zeros(2, 3, dtype=torch.int64)}
    (linear,) = graph.sites("linear")
    where = {"static": linear.input.producer, "dynamic": linear}[scheme]
    assert where is not None
    with pytest.raises(UsageError, match=rf"no calibration batch has numbers for .*{where.label}; add batches that do"):
        run(Quantize(scheme=scheme), graph, calibration=[padding])


@pytest.mark.parametrize(
    "text",
    [
        "y = linear(mul(x[4,8], S[8]:values(1,1,1,200,1,1,1,1)), W[4,8])",
        "s = reshape(S[8]:values(1,1,1,200,1,1,1,1), SHAPE[3]:values(8,1,1):int64)\n"
        "y = conv(mul(x[4,8,5,5], s), W[4,8,1,1])",
    ],
)
def test_outlier_channels_are_noted(text: str, dialect: str) -> None:
    graph = build(dialect, text)
    (note,) = run(Quantize(scheme="static", smooth=False), graph, calibration=[feeds(graph)]).record.notes
    assert "(1 of 8: 3; up to " in note
