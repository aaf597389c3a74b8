"""prune: units go whole, what reads them is solved again, and the report says which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_type_hints

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from graphopt import optimize
from graphopt.errors import PassError, UsageError
from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.measure.timing import Ratio
from graphopt.passes import REGISTRY, Prune
from graphopt.passes.prune.importance import CRITERIA
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from tests.language import (
    FakeTarget,
    assert_unchanged,
    build,
    declines,
    feeds,
    listing,
    outputs,
    run,
    stored,
    weight_of,
)
from tests.models import ConvNet, Encoder, images, padding, seeded, tokens

MLP = """
h = gelu(linear(x[batch,8], W[16,8], B[16]))
y = linear(h, V[6,16], C[6])
"""
CHAIN = "h = relu(linear(x[batch,4], W[8,4]))\ni = relu(linear(h, V[8,8]))\ny = linear(i, U[3,8])"


def test_removes_the_weakest_neurons_whole(dialect: str) -> None:
    graph = build(dialect, MLP)
    up, bias, down = (tensor.clone() for tensor in (weight_of(graph.nodes[0]), stored(graph.nodes[0], "bias"),
                                                   weight_of(graph.nodes[2])))  # fmt: skip
    name = graph.nodes[0].label
    context = run(Prune(neurons=0.25, criterion="l2"), graph)
    norms = (up.square().sum(1) + bias.square() + down.square().sum(0)).numpy()
    keep = np.sort(np.argsort(norms)[4:])
    assert listing(graph)[0].startswith("%0 = linear(x[batch,8], [12,8], [12])")
    assert torch.equal(weight_of(graph.nodes[0]), up[keep]) and torch.equal(stored(graph.nodes[0], "bias"), bias[keep])
    assert torch.equal(weight_of(graph.nodes[2]), down[:, keep])
    assert context.record.changed == 1 and context.record.eligible[0] == name
    assert f"neurons: {name} 16 -> 12" in context.record.notes


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_those_of_all_weights_of_a_unit(dialect: str, criterion: Any, order: int) -> None:
    graph = build(dialect, "y = linear(relu(linear(x[2,3], W[4,3])), V[2,4])")
    weights = torch.cat([weight_of(graph.nodes[0]), weight_of(graph.nodes[2]).T], 1).double()
    kept = weight_of(graph.nodes[0])[weights.norm(order, dim=1).argsort()[1:].sort().values].clone()
    run(Prune(neurons=0.25, criterion=criterion), graph)
    assert torch.equal(weight_of(graph.nodes[0]), kept)


def test_activations_decide_where_weights_do_not(dialect: str) -> None:
    """All weights are equal: the neurons whose inputs are small matter least."""
    graph = build(dialect, "y = linear(relu(linear(x[batch,4], W[4,4]:values(1,0,0,0,0))), V[2,4]:ones)")
    batch = torch.tensor([[5.0, 0.1, 3.0, 0.2], [4.0, 0.2, 2.0, 0.1]])
    run(Prune(neurons=0.5, compensate=False), graph, calibration=[{"x": batch}])
    assert weight_of(graph.nodes[0]).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_random_follows_the_seed(dialect: str) -> None:
    def kept(seed: int) -> list[Any]:
        graph = build(dialect, MLP)
        run(Prune(neurons=0.5, criterion="random", seed=seed), graph)
        return list(weight_of(graph.nodes[0]).tolist())

    assert kept(0) == kept(0) != kept(1)


def test_taylor_keeps_what_the_loss_depends_on() -> None:
    """The loss reads the first output only: a neuron that matters to the second alone can go."""
    text = "y = linear(relu(linear(x[batch,4], W[4,4]:values(1,0,0,0,0))), V[2,4]:values(1,0,1,0,0,9,0,9))"
    graph = build("fx", text)
    data = Calibration([{"x": torch.ones(3, 4)}], graph.inputs)
    context = Context(calibration=data, loss=lambda outputs, batch: outputs[0][:, 0].sum())
    run_pass(Prune(neurons=0.5, criterion="taylor", compensate=False), graph, context)
    assert weight_of(graph.nodes[0]).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_consumers_are_solved_again_as_numpy_would(dialect: str) -> None:
    graph = build(dialect, MLP)
    batch = feeds(graph, batch=500)
    hidden = graph.evaluate(batch, [graph.nodes[1].result])[0].double().numpy()
    down, bias = weight_of(graph.nodes[2]).double().numpy(), stored(graph.nodes[2], "bias").double().numpy()
    run(Prune(neurons=0.5, criterion="l2"), graph, calibration=[batch])
    assert [node.kind for node in graph.nodes] == ["linear", "gelu", "linear"]
    rows = weight_of(graph.nodes[0])
    before = weight_of(build(dialect, MLP).nodes[0])
    keep = np.array([int((before == row).all(1).nonzero()) for row in rows])
    centred = hidden - hidden.mean(0)
    ridge = np.diag(np.sqrt(0.1 * (centred**2).sum(0)[keep]))
    inputs = np.vstack([centred[:, keep], ridge])
    solved = np.linalg.lstsq(inputs, np.vstack([centred @ down.T, ridge @ down[:, keep].T]), rcond=None)[0].T
    assert np.allclose(weight_of(graph.nodes[2]).numpy(), solved, rtol=1e-4, atol=1e-5)
    expected = bias + down @ hidden.mean(0) - solved @ hidden.mean(0)[keep]
    assert np.allclose(stored(graph.nodes[2], "bias").numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [
    MLP,
    "h = relu(conv(x[batch,3,8,8], W[16,3,3,3], B[16]))\ny = conv(h, V[4,16,3,3], C[4], stride=[2,2])",
    "h = relu(conv(x[batch,3,8,8], W[16,3,3,3]))\ny = conv(h, V[4,16,3,3], padding=[1,1,1,1])",
], ids=["linear", "conv", "conv without bias"])  # fmt: skip
def test_solving_again_brings_the_outputs_nearer(dialect: str, text: str) -> None:
    kind = "channels" if "conv" in text else "neurons"
    batch = feeds(build(dialect, text), batch=200, seed=1)
    errors = []
    for compensate in (False, True):
        graph = build(dialect, text)
        expected = outputs(graph, batch)[0]
        run(Prune(**{kind: 0.5}, compensate=compensate), graph, calibration=[batch])  # type: ignore[arg-type]
        assert weight_of(graph.nodes[0]).shape[0] == 8
        errors.append(float((outputs(graph, batch)[0] - expected).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_unit_that_repeats_others_goes_without_a_trace(dialect: str) -> None:
    """Two neurons compute what two others do: half can go, and the consumers take it up, but for the damping."""
    graph = build(dialect, "y = linear(relu(linear(x[batch,2], W[4,2]:values(1,0,0,1,1,0,0,1))), V[3,4], C[3])")
    batch = feeds(graph, batch=100)
    expected = outputs(graph, batch)[0]
    run(Prune(neurons=0.5), graph, calibration=[batch])
    assert len({tuple(row) for row in weight_of(graph.nodes[0]).tolist()}) == 2  # one of each
    found = outputs(graph, batch)[0]
    assert float((found - expected).square().mean()) < 0.01 * float(expected.var(0).mean())


def test_layers_in_a_row_are_all_cut_and_solved_again(dialect: str) -> None:
    """The middle one is emitted again for its inputs, and shrinks by its outputs too."""
    graph = build(dialect, CHAIN)
    batch = feeds(graph, batch=50)
    run(Prune(neurons=0.5), graph, calibration=[batch])
    assert [tuple(weight_of(site).shape) for site in graph.sites("linear")] == [(4, 4), (4, 4), (3, 4)]


def test_a_weight_that_others_read_is_not_solved_again(dialect: str) -> None:
    """It is the table of an embedding too: only its columns go."""
    text = "h = relu(linear(embedding(T[9,8], ids[2,3]:int64), W[8,8]))\ny = linear(relu(linear(h, V[8,8])), T)"
    graph = build(dialect, text)
    table = weight_of(graph.sites("linear")[-1]).clone()
    context = run(Prune(width=0.5), graph, calibration=[feeds(graph)])
    left = weight_of(graph.sites("linear")[-1])
    assert left.shape == (9, 4)
    assert all(any(torch.equal(column, other) for other in table.T) for column in left.T)
    assert any(note.startswith("tied weights stay as they are: ") for note in context.record.notes)


@pytest.mark.parametrize("target_share", [0.6, pytest.param(0.8, marks=pytest.mark.slow)])
def test_an_encoder_meets_its_budget(dialect: str, target_share: float) -> None:
    target = {"fx": "fbgemm", "onnx": "onnxruntime"}[dialect]
    batch = {"ids": tokens(), "mask": padding()}
    small = optimize(seeded(Encoder), f"prune{{flops={target_share}}}", target=target, example_inputs=batch,
                     calibration=[batch])  # fmt: skip
    before, after = small.report.cost_before.flops, small.report.cost_after.flops
    assert before and after and abs(after / before - target_share) <= 0.02 * target_share
    assert small(**batch).shape == (2, 7, 32)


def test_conv_channels_meet_their_budget_and_convs_stay_int8() -> None:
    batch = {"x": images()}
    small = optimize(seeded(ConvNet), "prune{flops=0.6},quantize", example_inputs=batch, calibration=[batch])
    record = next(record for record in small.report.passes if record.name == "prune")
    before, after = record.cost_before.flops, record.cost_after.flops
    assert before and after and abs(after / before - 0.6) <= 0.02 * 0.6
    assert small.report.kernels["QLinearConv"] == 3


def test_the_parameter_budget_counts_what_is_stored(dialect: str) -> None:
    graph = build(dialect, MLP)
    before = Cost.of(graph).parameters
    context = run(Prune(params=0.63, scope="global"), graph)
    assert Cost.of(graph).parameters == before - 6 * (8 + 1 + 6)
    assert context.record.notes[0] == "0.634 of the params stay, of 0.63 that the budget leaves"


class Timed(FakeTarget):
    """A target whose time is the number of parameters."""

    def ratios(
        self, graph: Graph, baseline: Graph, feeds: Any, *, threads: int | None = None, rounds: int = 15
    ) -> list[Ratio]:
        share = Cost.of(graph).parameters / Cost.of(baseline).parameters
        return [Ratio(1 / share, 0, 9, rounds, 0, {}) for _ in feeds]


def test_the_latency_budget_is_bisected_on_measurements(dialect: str) -> None:
    graph = build(dialect, MLP)
    before = Cost.of(graph).parameters
    context = Context(target=Timed(), feeds=[feeds(graph)])
    run_pass(Prune(latency=0.7), graph, context)
    assert 0.6 <= Cost.of(graph).parameters / before <= 0.7


def test_rounds_to_what_the_target_runs_fast(dialect: str) -> None:
    graph = build(dialect, MLP.replace("16", "64"))
    run(Prune(neurons=0.3, round_to=16), graph)
    assert weight_of(graph.nodes[0]).shape[0] == 48


def test_locked_groups_are_declined_with_the_lock(dialect: str) -> None:
    graph = build(dialect, MLP)
    last = graph.nodes[2].label
    context = run(Prune(neurons=0.5), graph)
    assert list(context.record.declined) == [last]
    assert declines(context) == [Decline("axis_of_output", output="y")]
    with pytest.raises(UsageError, match=rf"prune: {last} \(neurons\) cannot shrink: it is the model's output"):
        run(Prune(neurons=0.5, targets=Selector(last)), build(dialect, MLP))


@pytest.mark.parametrize("options", [{"neurons": 0.5, "heads": 0.5}, {"amount": 0.5}])
def test_a_kind_that_is_not_there_is_skipped_with_a_note(options: dict[str, Any], dialect: str) -> None:
    graph = build(dialect, MLP)
    notes = run(Prune(**options), graph).record.notes
    assert weight_of(graph.nodes[0]).shape == (8, 8)
    assert "heads: no group that may be cut" in notes
    assert [note for note in notes if "width" in note or "pooler" in note] == []


def test_a_comma_between_options_is_taken() -> None:
    assert str(parse("prune{neurons=0.5,channels=0.5}", REGISTRY)) == "prune{neurons=0.5 channels=0.5}"


POOLED = """
h = slice(gelu(linear(x[2,5,8], W[8,8])), axis=1, start=0, end=1)
p = gelu(linear(h, P[16,8], B[16]))
y = linear(p, V[3,16])
"""


def test_a_pooler_is_cut_only_where_it_is_asked_for(dialect: str) -> None:
    for pass_ in (Prune(neurons=0.5), Prune(amount=0.5), Prune(params=0.9)):
        graph = build(dialect, POOLED)
        run(pass_, graph)
        up, pooler, _ = (weight_of(site).shape for site in graph.sites("linear"))
        assert up[0] < 8 and pooler[0] == 16
    graph = build(dialect, POOLED)
    run(Prune(pooler=0.5), graph)
    assert [tuple(weight_of(site).shape) for site in graph.sites("linear")] == [(8, 8), (8, 8), (3, 8)]


@pytest.mark.parametrize("options", [{"neurons": 0.5}, {"amount": 0.5}, {"flops": 0.5}])
def test_a_model_of_locked_groups_says_what_locks_them(dialect: str, options: dict[str, Any]) -> None:
    graph = build(dialect, "y = linear(x[2,4], W[8,4])")
    told = rf"can shrink; locked: {graph.nodes[0].label} \(neurons\): it is the model's output 'y' \(graphopt inspect"
    with pytest.raises(UsageError, match=told):
        run(Prune(**options), graph)


def test_ignoring_a_module_spares_what_it_produces_and_not_what_it_reads(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    middle = graph.nodes[2]
    run(Prune(neurons=0.5, ignore=Selector.of(middle)), graph)
    assert [tuple(weight_of(site).shape) for site in graph.sites("linear")] == [(4, 4), (8, 4), (3, 8)]
    last = build(dialect, CHAIN)
    run(Prune(neurons=0.5, targets=Selector.of(last.nodes[2])), last)
    assert [tuple(weight_of(site).shape) for site in last.sites("linear")] == [(8, 4), (4, 8), (3, 4)]


def test_a_quantized_model_is_called_one(dialect: str) -> None:
    graph = build(dialect, "w = dequantize(x[8,4]:int8, S[8]:ones, axis=0)\ny = relu(w)")
    with pytest.raises(UsageError, match="has no group of neurons; its groups: none; it is quantized already: change"):
        run(Prune(neurons=0.5), graph)


def test_ignoring_a_group_by_its_name_puts_it_back(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    second = graph.nodes[2].label
    run(Prune(neurons=0.5, ignore=Selector(second)), graph)
    assert [tuple(weight_of(site).shape) for site in graph.sites("linear")] == [(4, 4), (8, 4), (3, 8)]


def test_a_share_that_rounds_to_nothing_is_declined(dialect: str) -> None:
    graph = build(dialect, MLP)
    name = graph.nodes[0].label
    context = run(Prune(neurons=0.01), graph)
    assert context.record.declined[name].code == "no_units_go"
    assert declines(context)[-1] == Decline("no_units_go", size=16, kind="neurons")
    assert_unchanged(Prune(neurons=0.01), graph)


def test_the_option_names_every_criterion() -> None:
    assert get_type_hints(Prune)["criterion"] == Literal["auto", *CRITERIA]


def test_the_former_name_of_an_option_is_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="importance is called criterion now"):
        (former,) = parse("prune{neurons=0.5 importance=l1}", REGISTRY).passes
    assert former == Prune(neurons=0.5, criterion="l1")
    with pytest.raises(UsageError, match="no option 'importance'"):
        parse("prune{neurons=0.5 importance=l1 criterion=l2}", REGISTRY)


@pytest.mark.parametrize(("options", "message"), [
    ({}, r"give amount, shares by kind \(neurons, heads, channels, pooler, width, layers\), or one budget \(flops, "),
    ({"amount": 0.5, "neurons": 0.5}, "and not amount and neurons"),
    ({"amount": 0.5, "params": 0.5}, "and not amount and params"),
    ({"amount": 1.0}, "amount is 1.0; give a number of at least 0 and below 1"),
    ({"neurons": 1.0}, "neurons is 1.0; give a number of at least 0 and below 1"),
    ({"heads": -0.1}, "heads is -0.1; give a number of at least 0"),
    ({"channels": "half"}, "channels is 'half'"),
    ({"flops": 0}, "flops is 0; give a number above 0 and below 1"),
    ({"params": 1.0}, "params is 1.0; give a number above 0"),
    ({"flops": 0.5, "params": 0.5}, "and not flops and params"),
    ({"neurons": 0.5, "latency": 0.5}, "and not neurons and latency"),
    ({"neurons": 0.5, "criterion": "size"}, "criterion is 'size'; give auto, l1, l2, activation, taylor, movement or"),
    ({"neurons": 0.5, "scope": "local"}, "scope is 'local'; give layer or global"),
    ({"flops": 0.5, "kinds": ["rows"]}, "kinds is 'rows'; give neurons, heads, channels, pooler, width or layers"),
    ({"flops": 0.5, "kinds": []}, "kinds is empty; give some of neurons, heads, channels, pooler, width"),
    ({"neurons": 0.5, "round_to": 0}, "round_to is 0; give a whole number of at least 1"),
    ({"neurons": 0.5, "round_to": True}, "round_to is True; give a whole number of at least 1"),
    ({"neurons": 0.5, "compensate": "maybe"}, "compensate is 'maybe'; give true, false or none"),
    ({"neurons": 0.5, "compensate": 1}, "compensate is 1; give true, false or none"),
    ({"neurons": 0.5, "criterion": "random", "seed": "abc"}, "seed is 'abc'; give a whole number"),
    ({"neurons": 0.5, "seed": 1}, "seed is for criterion=random, and criterion is auto"),
    ({"params": 0.5, "schedule": "cubic"}, "give amount, or shares by kind, in place of params"),
    ({"neurons": 0.5, "criterion": "movement", "scope": "global"}, "movement ranks the units of each group"),
    ({"neurons": 0.5, "criterion": "movement", "compensate": True}, "makes up for what goes; leave compensate out"),
    ({"neurons": 0.5, "kinds": "heads"}, "kinds are those that a budget cuts; give a share for each instead"),
])  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="prune: .*" + message):
        Prune(**options)


@pytest.mark.parametrize(("options", "message"), [
    ({"heads": 0.5}, r"the model has no group of heads; its groups: 2 of neurons; locked: \S+ \(neurons\): it is the"),
    ({"neurons": 0.5, "criterion": "activation"}, "prune needs calibration data"),
    ({"neurons": 0.5, "compensate": True}, "prune needs calibration data"),
    ({"neurons": 0.5, "criterion": "taylor"}, "prune follows gradients, and"),
    ({"flops": 0.5}, "flops=0.5 needs the sizes of the inputs: pass example_inputs"),
    ({"params": 0.05}, "params=0.05 cannot be reached: with every group that may be cut at its smallest, 0.085 stay"),
    ({"neurons": 0.5, "targets": Selector("nowhere")}, "'nowhere' selects no group of neurons"),
    ({"neurons": 0.5, "ignore": Selector("nowhere")}, "'nowhere' selects no group of neurons"),
])  # fmt: skip
def test_says_what_is_missing(dialect: str, options: dict[str, Any], message: str) -> None:
    graph = build(dialect, MLP)
    text = graph.text()
    with pytest.raises(UsageError, match=message):
        run(Prune(**options), graph)
    assert graph.text() == text


def test_a_generator_is_refused_before_it_is_read(dialect: str) -> None:
    graph = build(dialect, MLP)
    read: list[int] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        read.append(1)
        yield feeds(graph)

    context = Context(calibration=Calibration(batches(), graph.inputs))
    with pytest.raises(UsageError, match=r"reads the calibration batches twice.*or use compensate=false"):
        run_pass(Prune(neurons=0.5), graph, context)
    assert not read
    run_pass(Prune(neurons=0.5, criterion="l2"), graph, context)
    assert weight_of(graph.nodes[0]).shape == (8, 8)


def test_a_share_that_is_not_met_says_why(dialect: str) -> None:
    graph = build(dialect, MLP.replace("16", "32"))
    notes = run(Prune(neurons=0.999, round_to=16), graph).record.notes
    assert "0.750 of the neurons go, of 0.999 asked: sizes are multiples of 8 (round_to=1 takes any)" in notes
    notes = run(Prune(neurons=0.99), build(dialect, MLP)).record.notes
    assert "0.938 of the neurons go, of 0.99 asked: units go whole, and one of each group stays at least" in notes
    assert not [note for note in run(Prune(neurons=0.5), build(dialect, MLP)).record.notes if "asked" in note]


def test_a_budget_that_is_missed_names_the_next_size(dialect: str) -> None:
    graph = build(dialect, "y = linear(relu(linear(x[2,4], W[4,4])), V[4,4])")
    notes = run(Prune(params=0.95), graph).record.notes
    assert notes == ["1.000 of the params stay, of 0.95 that the budget leaves: the next sizes leave 0.750"]


def test_flops_are_said_once(dialect: str) -> None:
    graph = build(dialect, MLP)
    context = Context(feeds=[feeds(graph)])
    run_pass(Prune(flops=0.5), graph, context)
    assert len([note for note in context.record.notes if "flops" in note.lower()]) == 1


def test_flops_that_cannot_be_counted_name_the_node() -> None:
    """How many rows NonZero finds is known only when it runs."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[m,3] y) {
            h = MatMul(x, W)
            r = Relu(h)
            s = MatMul(r, V)
            n = NonZero(s)
            t = Cast<to = 1>(n)
            u = Transpose<perm = [1, 0]>(t)
            y = MatMul(u, U)
        }""")
    drawn = np.random.default_rng(0)
    for name, shape in {"W": (4, 8), "V": (8, 5), "U": (2, 3)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(drawn.normal(size=shape).astype("f"), name))
    batch = {"x": torch.ones(2, 4)}
    with pytest.raises(UsageError, match=r"prune: flops=0.5 cannot be counted, as the sizes at .* use params="):
        optimize(model, "prune{flops=0.5}", example_inputs=batch)
    assert optimize(model, "prune{params=0.7}", example_inputs=batch).report.passes


def test_latency_needs_a_target(dialect: str) -> None:
    graph = build(dialect, MLP)
    with pytest.raises(UsageError, match="latency is measured, and no target in particular does not run here"):
        run_pass(Prune(latency=0.5), graph, Context(feeds=[feeds(graph)]))


def test_text_form() -> None:
    text = "prune{flops=0.6 kinds=[heads,neurons] scope=global}"
    (pass_,) = parse(text, REGISTRY).passes
    assert pass_ == Prune(flops=0.6, kinds=("heads", "neurons"), scope="global") and str(pass_) == text


@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_nan_names_the_site(dialect: str, criterion: Any) -> None:
    graph = build(dialect, "y = linear(relu(linear(x[2,4], W[8,4]:values(1,nan))), V[3,8])")
    reason = rf"pass prune failed.*the weight of {graph.nodes[0].label} has 16 of 32 values NaN"
    with pytest.raises(PassError, match=reason):
        run(Prune(neurons=0.5, criterion=criterion), graph)


TRANSPOSED = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(16, 4, 2))


@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm"])
def test_what_no_linear_or_conv_reads_is_weighed_by_its_weights(target: str) -> None:
    batch = images()
    small = optimize(TRANSPOSED.eval(), "prune{channels=0.5}", target=target, example_inputs=batch, calibration=[batch])
    record = next(record for record in small.report.passes if record.name == "prune")
    assert "channels: 0 16 -> 8" in record.notes
    assert "weighed by l2, as no linear or conv with a stored float weight reads them: 0" in record.notes
    with pytest.raises(UsageError, match=r"no group can be weighed \(0: criterion=activation cannot"):
        optimize(TRANSPOSED, "prune{channels=0.5 criterion=activation}", target=target, example_inputs=batch,
                 calibration=[batch])  # fmt: skip


def test_what_a_batch_norm_has_seen_is_no_weight(dialect: str) -> None:
    """Channels with large running means are not worth more."""
    text = "h = batch_norm(conv(x[2,3,4,4], W[4,3,1,1]:values(1,1,1,9,9,9)), G[4]:ones, B[4]:zeros, M[4]:values(99,0), S[4]:ones)"  # noqa: E501
    graph = build(dialect, text + "\ny = conv(relu(h), V[2,4,1,1]:ones)")
    run(Prune(channels=0.5, criterion="l2"), graph)
    assert weight_of(graph.sites("conv")[0]).flatten().tolist() == [9.0] * 6
