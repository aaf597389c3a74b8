"""quantize: quantize and dequantize around float ops."""

import re
from dataclasses import replace
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch

from graphopt.errors import PassError, UsageError
from graphopt.ir.decline import Decline
from graphopt.numerics import quantize
from graphopt.numerics.metrics import cosine
from graphopt.numerics.observe import OBSERVERS
from graphopt.numerics.quantize import BLOCKS
from graphopt.passes import Quantize
from graphopt.passes.quantize.plan import Asked, SitePlan, WeightPlan, plan_of
from graphopt.passes.quantize.quantize import Scheme
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import Selector
from tests.language import (
    FakeTarget,
    assert_unchanged,
    build,
    declined,
    declines,
    feeds,
    listing,
    output_names,
    outputs,
    producer,
    run,
    stored,
    weight_of,
)
from tests.models import quantize_weight

BLOCK = """
    c = conv(x[1,4,6,6], V[4,4,3,3], B[4], padding=[1,1,1,1])
    r = relu(c)
    d = conv(r, W[4,4,3,3], padding=[1,1,1,1])
    s = add(d, r)
    y = relu(s)
    """


def test_dynamic_linear(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8], B[4])")
    original = graph.clone()
    integers, scales = quantize_weight(weight_of(graph.nodes[0]))
    run(Quantize(scheme="dynamic"), graph)
    assert listing(graph) == [
        "%0, %1 = choose_qparams(x[2,8])",
        "%2 = quantize(x[2,8], %0[], %1[]:uint8)",
        "%3 = dequantize(%2[2,8]:uint8, %0[], %1[]:uint8)",
        "%4 = dequantize([4,8]:int8, [4], axis=0)",
        "%5 = linear(%3[2,8], %4[4,8], [4])",
        "return %5[2,4]",
    ]
    weight = producer(graph.sites("linear")[0].required("weight"))
    assert torch.equal(stored(weight, "x"), integers) and torch.equal(stored(weight, "scale"), scales)
    assert cosine(outputs(original)[0], outputs(graph)[0]) > 0.999
    assert_unchanged(Quantize(scheme="dynamic"), graph)


def test_static_linear_takes_its_range_from_calibration(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8])")
    batches = [feeds(graph, seed) for seed in (1, 2)]
    low, high = (float(end) for end in torch.aminmax(torch.cat([batch["x"] for batch in batches])))
    run(Quantize(observer="minmax"), graph, calibration=batches)
    assert listing(graph) == [
        "%0 = quantize(x[2,8], [], []:uint8)",
        "%1 = dequantize(%0[2,8]:uint8, [], []:uint8)",
        "%2 = dequantize([4,8]:int8, [4], axis=0)",
        "%3 = linear(%1[2,8], %2[4,8], [4])",  # the bias takes over what rounding shifts outputs by
        "return %3[2,4]",
    ]
    step = graph.nodes[0]
    found = [stored(step, name).item() for name in ("scale", "zero_point")]
    assert found == list(quantize.activation_parameters(low, high))
    assert_unchanged(Quantize(), graph, calibration=batches)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_sites_on_one_value_share_its_integers(dialect: str, scheme: Scheme) -> None:
    text = "a = linear(x[2,8], W[4,8])\nb = linear(x, V[4,8])\nc = add(a, b)\nd = linear(x, W, B[4])\nreturn c, d"
    graph = build(dialect, text)
    run(Quantize(scheme=scheme), graph, calibration=[feeds(graph)])
    assert len(graph.sites("quantize")) == 1 and len(graph.sites("choose_qparams")) == (scheme == "dynamic")
    assert len({site.input for site in graph.sites("linear")}) == 1
    assert len(graph.sites("dequantize")) == 3  # x, W (read twice) and V


def test_static_convs_and_their_add_are_a_closed_region(dialect: str) -> None:
    graph = build(dialect, BLOCK)
    original = graph.clone()
    add = graph.sites("add")[0]
    context = run(Quantize(), graph, calibration=[feeds(graph, seed) for seed in range(4)])
    assert context.record.eligible[2:] == [add.label] and context.record.changed == 3
    kinds = [node.kind for node in graph.nodes]
    assert [kind for kind in kinds if kind in ("conv", "relu", "add", "quantize")] == [
        "quantize", "conv", "relu", "quantize", "conv", "quantize", "add", "relu", "quantize",
    ]  # fmt: skip
    add = graph.sites("add")[0]
    assert [producer(value).kind for value in add.operands] == ["dequantize", "dequantize"]
    assert producer(graph.outputs[0]).kind == "dequantize" and output_names(graph) == ["y"]
    assert cosine(outputs(original)[0], outputs(graph)[0]) > 0.999
    assert_unchanged(Quantize(), graph, calibration=[feeds(graph)])


def test_the_first_reader_of_a_shared_value_may_be_the_add(dialect: str) -> None:
    graph = build(
        dialect,
        """
        p = gelu(x[1,4,6,6])
        c = conv(z[1,4,6,6], V[4,4,1,1])
        s = add(c, p)
        y = conv(p, U[4,4,1,1])
        return s, y
        """,
    )
    run(Quantize(), graph, calibration=[feeds(graph)])
    assert graph.sites("add")[0].operand("b") == graph.sites("conv")[1].input
    assert [user.kind for user in graph.sites("gelu")[0].result.users] == ["quantize"]


def test_the_result_of_a_static_linear_stays_float_for_others(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,8], W[8,8])\ny = linear(h, V[8,8])\ns = add(h, y)")
    run(Quantize(), graph, calibration=[feeds(graph)])
    assert [producer(value).kind for value in graph.sites("add")[0].operands] == ["linear", "linear"]


def test_an_add_of_a_float_value_stays_float(dialect: str) -> None:
    graph = build(dialect, "c = conv(x[1,4,6,6], V[4,4,1,1])\ny = add(c, z[1,4,6,6])")
    context = run(Quantize(), graph, calibration=[feeds(graph)])
    assert producer(graph.outputs[0]).kind == "add" and declines(context) == [Decline("side_in_float", value="z")]


def test_an_add_that_the_target_has_no_kernel_for_stays_float(dialect: str) -> None:
    graph = build(dialect, BLOCK)
    target = FakeTarget(schemes={"conv": ("static",)})
    context = run(Quantize(), graph, target=target, calibration=[feeds(graph)])
    assert producer(graph.outputs[0]).kind == "relu"
    assert declined(context) == ["no_static_kernel"]


@pytest.mark.parametrize("calibrated", [True, False])
def test_auto_is_static_with_calibration(dialect: str, calibrated: bool) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8])")
    run(Quantize(), graph, calibration=[feeds(graph)] if calibrated else None)
    assert bool(graph.sites("choose_qparams")) != calibrated


def test_auto_takes_what_the_target_has(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[1,8], W[4,8])\nc = conv(z[1,4,6,6], V[4,4,1,1])\nreturn h, c")
    target = FakeTarget(schemes={"linear": ("dynamic",), "conv": ("static",)})
    run(Quantize(), graph, target=target, calibration=[feeds(graph)])
    assert len(graph.sites("choose_qparams")) == 1 and len(graph.sites("quantize")) == 3


def test_declines_ops_without_a_kernel(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[1,8], W[4,8])\nc = conv(z[1,4,6,6], V[4,4,1,1])\nreturn h, c")
    target = FakeTarget(schemes={"conv": ("static",)})
    assert declines(run(Quantize(), graph, target=target)) == [
        Decline("no_kernel", target="toy", scheme="dynamic", op="linear"),
        Decline("no_kernel_uncalibrated", target="toy", scheme="dynamic", op="conv"),
    ]
    context = run(Quantize(targets=Selector("relu")), build(dialect, "y = relu(x[2])"))
    assert declines(context) == [Decline("no_integer_form", op="relu")]


def test_declines_what_is_no_stored_float_weight(dialect: str) -> None:
    graph = build(
        dialect,
        """
        a = linear(x[2,8], w[8,8])
        b = linear(x, dequantize(W[8,8]:int8:values(1,2,3), S[8]:ones, axis=0))
        c = linear(h[2,8]:float16, V[8,8]:float16)
        return a, b, c
        """,
    )
    context = run(Quantize(), graph)
    assert declined(context)[2:] == ["not_float32"] and context.record.changed == 0
    assert list(context.record.declined.values())[:2] == ["weight is computed by the graph", "already quantized"]


def test_a_tied_table_is_stored_once(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\ny = linear(h, T)")
    run(Quantize(scheme="static"), graph, calibration=[feeds(graph)])
    table = producer(graph.sites("linear")[0].required("weight"))
    assert stored(table, "x").dtype == torch.int8 and table.attributes["axis"] == 0
    assert len(table.result.users) == 2


def test_a_table_stays_float_with_the_linear_that_reads_it(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[2]:int64)\ny = linear(h, T)")
    last = graph.sites("linear")[0]
    context = run(Quantize(ignore=Selector("linear")), graph)
    assert declines(context) == [Decline("table_tied", site=last.label)]
    assert context.record.changes == 0


def test_ignored_sites_stay_float(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,8], W[8,8])\ny = linear(h, V[8,8])")
    last = graph.nodes[1]
    run(Quantize(ignore=Selector(last.name)), graph)
    assert last in graph.nodes and last.weight is not None and graph.nodes[-1] == last


def test_a_constant_activation_gets_scale_1(dialect: str) -> None:
    graph = build(dialect, "y = linear(relu(mul(x[2,8], Z[1]:zeros)), W[4,8])")
    run(Quantize(scheme="static"), graph, calibration=[feeds(graph)])
    step = graph.sites("quantize")[0]
    assert stored(step, "scale").item() == 1 and stored(step, "zero_point").item() == 0


def test_nan_names_the_site(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[8,8]:values(1,nan))")
    with pytest.raises(PassError, match=rf"{graph.nodes[0].label}: weight has 32 of 64 values NaN"):
        run(Quantize(), graph)


def test_infinite_activations_name_the_node(dialect: str) -> None:
    graph = build(dialect, "h = div(x[2,8], Z[1]:zeros)\ny = linear(h, W[4,8])")
    with pytest.raises(PassError, match=graph.nodes[0].label):
        run(Quantize(scheme="static"), graph, calibration=[feeds(graph)])


def test_static_needs_calibration(dialect: str) -> None:
    with pytest.raises(UsageError, match=r"needs calibration data.*, or use scheme=dynamic"):
        run(Quantize(scheme="static"), build(dialect, "y = linear(x[2,8], W[4,8])"))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"scheme": "int8"}, "scheme is 'int8'; give auto, static, dynamic, weight-only or a value for each site"),
        ({"scheme": {"linear": "int8"}}, "scheme is 'int8'; give auto, static, dynamic or weight-only"),
        ({"observer": "max"}, "observer is 'max'; give mse, percentile, minmax or entropy"),
        ({"bits": 3}, "bits is 3; give 8, 7, 4, 2, a value for each site or none"),
        ({"bits": 8.0}, "bits is 8.0; give 8, 7, 4, 2"),
        ({"bits": {"conv": 8, "linear": 3}}, "bits is 3; give 8, 7, 4 or 2"),
        ({"block": 24}, "block is 24; give 16, 32, 64, 128, 256 or none"),
        ({"rounding": "best"}, "rounding is 'best'; give auto, nearest or gptq"),
        ({"clip": "False"}, "clip is 'False'; give true, false or none"),
        ({"symmetric": None}, "symmetric is None; give true or false"),
    ],
)
def test_refuses_unknown_options(options: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"quantize: {reason}")):
        Quantize(**options)


def test_options_name_what_there_is() -> None:
    """The choices of options are those of the numerics."""
    types = get_type_hints(Quantize)
    assert set(get_args(types["observer"])) == set(OBSERVERS)
    assert {*get_args(types["block"])} == {Literal[16, 32, 64, 128, 256], type(None)}
    assert BLOCKS == (16, 32, 64, 128, 256)


def test_the_old_name_of_gptq_is_accepted() -> None:
    with pytest.warns(DeprecationWarning, match="second-order is called gptq"):
        old: Any = {"rounding": "second-order"}
        assert Quantize(**old) == Quantize(rounding="gptq")


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_is_made_before_anything_changes(dialect: str) -> None:
    graph = build(dialect, BLOCK)
    before, context = graph.text(), Context(calibration=Calibration([feeds(graph)], graph.inputs))
    first, second = graph.sites("conv")
    (add,), (relu, end) = graph.sites("add"), graph.sites("relu")
    plan = plan_of(graph, {first: Asked("auto", 7), second: Asked("static", None)}, Quantize(clip=True), context)
    fitted = WeightPlan(clip=True, gptq=True, bias_correction=True)
    assert plan.sites == {first: SitePlan("static", replace(fitted, bits=7)), second: SitePlan("static", fitted)}
    assert plan.regions.joined == (add,) and plan.regions.closed == {first, second, add}
    assert plan.regions.observed == (graph.inputs[0], relu.result, second.result, end.result)
    assert plan.declined == {} and graph.text() == before
    kept = Decline("kept_for_goal", goal="sqnr=30", sqnr=20.0)
    plan = plan_of(graph, {first: Asked("auto", 7), second: Asked("static", None)}, Quantize(), context, {second: kept})
    assert plan.declined == {second: kept, add: Decline("side_in_float", value=second.label)}
    assert list(plan.sites) == [first] and plan.regions.observed == (graph.inputs[0], relu.result)
