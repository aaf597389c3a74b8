"""prune{layers=}: residual branches go whole, those without which the outputs move least, in both dialects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import optimize
from graphopt.errors import UsageError
from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.measure.timing import Ratio
from graphopt.passes import REGISTRY, Prune
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from tests.language import FakeTarget, assert_unchanged, build, declines, feeds, listing, run
from tests.models import ConvNet, Encoder, images, padding, seeded, tokens

STACK = """
x = layer_norm(i[batch,4], N[4])
a = add(x, linear(relu(linear(layer_norm(x, G[4]), W[8,4])), V[4,8]:values({},0,0)))
b = add(a, linear(relu(linear(layer_norm(a, H[4]), A[8,4])), C[4,8]:values({},0,0)))
c = add(b, linear(relu(linear(layer_norm(b, I[4]), D[8,4])), E[4,8]:values({},0,0)))
return c
"""
"""Three branches, and how much each adds."""


def stack(dialect: str, *strengths: float) -> tuple[Graph, list[str]]:
    """A graph, and what its branches are called."""
    graph = build(dialect, STACK.format(*strengths))
    return graph, [site.label for site in graph.sites("linear")[1::2]]


def calibrated(graph: Graph, **sizes: int) -> list[dict[str, Any]]:
    return [feeds(graph, seed, **sizes) for seed in range(2)]


def test_the_branch_that_matters_least_goes_whole(dialect: str) -> None:
    graph, (_, second, third) = stack(dialect, 2, 0.01, 1)
    context = run(Prune(layers=0.3), graph, calibration=calibrated(graph))
    assert listing(graph) == [
        "%0 = layer_norm(i[batch,4], [4])",
        "%1 = layer_norm(%0[batch,4], [4])",
        "%2 = linear(%1[batch,4], [8,4])",
        "%3 = relu(%2[batch,8])",
        "%4 = linear(%3[batch,8], [4,8])",
        "%5 = add(%0[batch,4], %4[batch,4])",
        "%6 = layer_norm(%5[batch,4], [4])",
        "%7 = linear(%6[batch,4], [8,4])",
        "%8 = relu(%7[batch,8])",
        "%9 = linear(%8[batch,8], [4,8])",
        "%10 = add(%5[batch,4], %9[batch,4])",
        "return %10[batch,4]",
    ]
    assert context.record.changed == 1 and len(context.record.eligible) == 3
    assert third in context.record.declined and context.record.declined[third].code == "branch_matters_more"
    first, asked = context.record.notes
    assert first.startswith(f"layers: 3 -> 2; gone, with what the outputs keep: {second} (")
    assert asked == "0.333 of the layers go, of 0.3 asked: branches go whole, and one stays at least"


def test_damage_is_measured_again_after_each(dialect: str) -> None:
    """The third branch undoes the first: alone, the second matters least of all, but with the second gone the first
    and the third matter less together than the fourth."""
    text = """
        x = relu(i[batch,4])
        a = add(x, linear(x, W[4,4]:values(5,0,0,0,0)))
        b = add(a, linear(x, V[4,4]:values(0.01,0,0,0,0)))
        c = add(b, linear(x, U[4,4]:values(-5.5,0,0,0,0)))
        d = add(c, linear(x, T[4,4]:values(2,0,0,0,0)))
        return d
    """
    graph = build(dialect, text)
    held = [site.label for site in graph.sites("linear")]
    context = run(Prune(layers=0.75), graph, calibration=calibrated(graph))
    note = next(note for note in context.record.notes if note.startswith("layers"))
    assert [note.index(name) for name in (held[1], held[3])] == sorted(note.index(name) for name in (held[1], held[3]))


def test_example_inputs_serve_without_calibration(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    run_pass(Prune(layers=0.3), graph, Context(feeds=[feeds(graph)]))
    assert len(graph.sites("linear")) == 4


@pytest.mark.parametrize(("share", "stay"), [(0.1, 3), (0.3, 2), (0.5, 2), (0.51, 1), (0.67, 1), (0.99, 1)])
def test_the_nearest_number_goes_and_one_stays(dialect: str, share: float, stay: int) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    context = run(Prune(layers=share), graph, calibration=calibrated(graph))
    assert len(graph.sites("linear")) == 2 * stay
    asked = [note for note in context.record.notes if "asked" in note]
    assert bool(asked) == (share in (0.1, 0.3, 0.5, 0.51, 0.99))


def test_what_rounds_to_nothing_is_declined_and_changes_nothing(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    context = run(Prune(layers=0.1), graph, calibration=calibrated(graph))
    assert declines(context) == [Decline("no_branch_goes", count=3)] * 3
    assert_unchanged(Prune(layers=0.1), graph, calibration=calibrated(graph))


def test_layers_go_before_units(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    context = run(Prune(layers=0.3, neurons=0.5), graph, calibration=calibrated(graph, batch=50))
    assert [tuple(site.weight.shape) for site in graph.sites("linear") if site.weight is not None] == [(4, 4)] * 4
    assert [note.split(":")[0] for note in context.record.notes if "->" in note] == ["layers", "neurons"]


def test_targets_and_ignore_choose_by_any_site_inside(dialect: str) -> None:
    graph, (first, second, _) = stack(dialect, 2, 0.01, 1)
    chosen = Prune(layers=0.5, targets=Selector(first, second), ignore=Selector(second))
    run(chosen, graph, calibration=calibrated(graph))
    assert len(graph.sites("linear")) == 6  # one alone stays
    graph, (first, second, _) = stack(dialect, 2, 0.01, 1)
    run(Prune(layers=0.5, ignore=Selector(second)), graph, calibration=calibrated(graph))
    assert {site.label for site in graph.sites("linear")} >= {first, second} and len(graph.sites("linear")) == 4


def test_a_layer_in_no_branch_is_declined_as_such(dialect: str) -> None:
    graph = build(dialect, """
        x = linear(i[batch,4], S[4,4])
        a = add(x, linear(x, W[4,4]:values(0.01)))
        b = add(a, linear(a, V[4,4]))
        y = relu(b)
    """)
    stem = graph.sites("linear")[0].label
    context = run(Prune(layers=0.5), graph, calibration=calibrated(graph))
    assert context.record.declined[stem].code == "in_no_branch" and stem in context.record.eligible


def test_a_branch_of_another_shape_stays(dialect: str) -> None:
    graph = build(dialect, """
        x = relu(i[1,4])
        a = add(x, mul(linear(x, W[4,4]), o[3,4]))
        b = add(a, linear(a, V[4,4]))
        c = add(b, linear(b, U[4,4]:values(0.01)))
        y = relu(c)
    """)
    context = run(Prune(layers=0.5), graph, calibration=calibrated(graph))
    assert [decline.code for decline in declines(context)] == ["shortcut_differs", "branch_matters_more"]
    assert len(graph.sites("linear")) == 2


def test_a_branch_that_the_others_lock_when_they_go_stays(dialect: str) -> None:
    """All three are sums with x: without two of them, the graph would return x twice."""
    graph = build(dialect, """
        x = relu(i[batch,4])
        a = add(x, linear(x, W[4,4]:values(0.01)))
        b = add(x, linear(x, V[4,4]:values(0.02)))
        c = add(x, linear(x, U[4,4]))
        return a, b, c
    """)
    context = run(Prune(layers=0.7), graph, calibration=calibrated(graph))
    assert [decline.code for decline in declines(context)] == ["shortcut_returned", "shortcut_returned"]
    assert len(graph.sites("linear")) == 2 and len(set(graph.outputs)) == 3


@pytest.mark.parametrize("of", ["flops", "params"])
def test_a_budget_takes_as_many_as_it_needs(dialect: str, of: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    sizes = {"batch": 3}
    whole = Cost.of(graph, sizes)
    context = Context(feeds=[feeds(graph)], calibration=Calibration(calibrated(graph), graph.inputs))
    run_pass(parse(f"prune{{{of}=0.7 kinds=layers}}", REGISTRY).passes[0], graph, context)
    assert len(graph.sites("linear")) == 4
    name = "flops" if of == "flops" else "parameters"
    left = getattr(Cost.of(graph, sizes), name) / getattr(whole, name)
    assert f"{left:.3f} of the {of} stay, of 0.7 that the budget leaves" in context.record.notes


@dataclass(frozen=True)
class Clocked(FakeTarget):
    """As fast as a graph has few linears."""

    def ratios(self, graph: Graph, baseline: Graph, feeds: Any, **options: Any) -> list[Ratio]:
        ratio = len(baseline.sites("linear")) / len(graph.sites("linear"))
        return [Ratio(ratio, ratio, ratio, 9, 0, {})]


def test_latency_is_measured_on_the_target(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    context = Context(target=Clocked(), feeds=[feeds(graph)])
    run_pass(Prune(latency=0.5, kinds=("layers",)), graph, context)
    assert len(graph.sites("linear")) == 2
    assert "0.333 of the latency stay, of 0.5 that the budget leaves" in context.record.notes


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": 0.5}, r"no batch to measure it on: pass calibration=<batches of inputs>, or example_inputs=<a batch>"),
    ({"layers": 0.5, "targets": Selector("nowhere")}, "'nowhere' selects no residual branch"),
    ({"layers": 0.5, "ignore": Selector("linear")}, "no residual branch can go; targets and ignore leave none"),
    ({"flops": 0.5, "kinds": ("layers",)}, "flops=0.5 needs the sizes of the inputs"),
    ({"latency": 0.5, "kinds": ("layers",)}, "latency=0.5 needs the sizes of the inputs"),
])  # fmt: skip
def test_says_what_is_missing(dialect: str, options: dict[str, Any], message: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    text = graph.text()
    with pytest.raises(UsageError, match=message):
        run(Prune(**options), graph)
    assert graph.text() == text


def test_a_budget_that_cannot_be_reached_leaves_the_graph(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    text = graph.text()
    with pytest.raises(UsageError, match=r"params=0.1 cannot be reached: without all residual .*, 0.3\d\d stay"):
        run(Prune(params=0.1, kinds=("layers",)), graph, calibration=calibrated(graph))
    assert graph.text() == text


def test_outputs_that_cannot_be_compared_are_no_measure() -> None:
    graph = build("onnx", """
        x = relu(i[n,4])
        a = add(x, linear(x, W[4,4]))
        y = onnx.NonZero(add(a, linear(a, V[4,4])))
    """)  # fmt: skip
    with pytest.raises(UsageError, match="no output can be compared, as the sizes of all of them depend on values"):
        run(Prune(layers=0.5), graph, calibration=[{"i": torch.ones(2, 4)}])


def test_a_model_without_branches_or_with_locked_ones_says_so(dialect: str) -> None:
    with pytest.raises(UsageError, match="the model has no residual branch: no sum x"):
        run(Prune(layers=0.5), build(dialect, "y = linear(relu(linear(x[2,4], W[4,4])), V[4,4])"))
    text = "x = relu(i[2,4])\nf = linear(x, W[4,4])\ny = mul(add(x, f), f)"
    with pytest.raises(UsageError, match=r"no residual branch can go; locked: .* \(layers\): what .* is read outside"):
        run(Prune(layers=0.5), build(dialect, text))


def test_what_the_model_lacks_is_skipped_with_a_note(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    context = run(Prune(layers=0.3, channels=0.5), graph, calibration=calibrated(graph))
    assert len(graph.sites("linear")) == 4 and "channels: no group that may be cut" in context.record.notes
    graph = build(dialect, "y = linear(relu(linear(x[batch,4], W[4,4])), V[4,4])")
    context = run(Prune(layers=0.3, neurons=0.5, criterion="l2"), graph)
    assert "layers: no residual branch that may go" in context.record.notes
    assert [tuple(site.weight.shape) for site in graph.sites("linear") if site.weight is not None] == [(2, 4), (4, 2)]
    with pytest.raises(UsageError, match="the model has no group of channels"):
        run(Prune(layers=0.3, channels=0.5), graph)


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": 0.5, "criterion": "l2"}, "criterion is for units, and layers go whole, by their damage"),
    ({"layers": 0.5, "round_to": 8}, "round_to is for units"),
    ({"layers": 0.5, "neurons": 0.5, "criterion": "movement"}, "movement learns which units go, and layers go whole"),
    ({"flops": 0.5, "kinds": ("layers", "neurons")}, "a budget cuts layers or units; give each a prune of its own"),
    ({"flops": 0.5, "layers": 0.5}, "and not layers and flops"),
    ({"layers": 1.0}, "layers is 1.0; give a number of at least 0 and below 1"),
])  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="prune: .*" + message):
        Prune(**options)


def test_a_generator_serves_layers_alone(dialect: str) -> None:
    def batches(graph: Graph) -> Iterator[dict[str, Any]]:
        yield from calibrated(graph)

    graph, _ = stack(dialect, 2, 0.01, 1)
    run_pass(Prune(layers=0.3), graph, Context(calibration=Calibration(batches(graph), graph.inputs)))
    assert len(graph.sites("linear")) == 4
    context = Context(calibration=Calibration(batches(graph), graph.inputs))
    with pytest.raises(UsageError, match="a generator gives them once"):
        run_pass(Prune(layers=0.5, neurons=0.5, criterion="l2", compensate=True), graph, context)


def test_an_encoder_loses_sublayers_and_runs(dialect: str) -> None:
    target = {"fx": "fbgemm", "onnx": "onnxruntime"}[dialect]
    example = {"ids": tokens(), "mask": padding()}
    small = optimize(seeded(Encoder), "prune{layers=0.5}", target=target, example_inputs=example, calibration=[example])
    record = next(record for record in small.report.passes if record.name == "prune")
    assert record.changed == 2 and record.eligible[3] == "layers.1.down"
    assert small(**example).shape == (2, 7, 32)


def test_a_cubic_schedule_reaches_the_share(dialect: str) -> None:
    graph, _ = stack(dialect, 2, 0.01, 1)
    context = Context(calibration=Calibration(calibrated(graph), graph.inputs))
    parse("repeat{times=2}(prune{layers=0.67 schedule=cubic})", REGISTRY).run(graph, context)
    assert len(graph.sites("linear")) == 2


def test_convs_beside_an_identity_shortcut(dialect: str) -> None:
    target = {"fx": "fbgemm", "onnx": "onnxruntime"}[dialect]
    with pytest.raises(UsageError, match="prune"):
        optimize(seeded(ConvNet), "prune{layers=0.5 ignore=conv2}", target=target, example_inputs=images())
    small = optimize(seeded(ConvNet), "prune{layers=0.5}", target=target, example_inputs=images())
    (record,) = [record for record in small.report.passes if record.name == "prune"]
    assert record.eligible[0] == "conv2" and record.declined["conv2"].code == "no_branch_goes"


@settings(max_examples=20, deadline=None)
@given(strengths=st.permutations([0.01, 0.5, 20.0]), dialect=st.sampled_from(["fx", "onnx"]))
def test_which_branch_goes_follows_what_it_adds(strengths: list[float], dialect: str) -> None:
    graph, held = stack(dialect, *strengths)
    context = run(Prune(layers=0.3), graph, calibration=calibrated(graph))
    assert [name for name in held if name not in context.record.declined] == [held[strengths.index(0.01)]]
