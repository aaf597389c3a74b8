"""Movement pruning: sparsify and prune mark, and the training behind them learns which weights and units go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from graphopt import optimize
from graphopt.capture.sources import capture
from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.numerics.sparsity import as_matrix
from graphopt.passes import REGISTRY, Distill, FineTune, Prune, Sparsify
from graphopt.pipeline.batches import Batch, Batches
from graphopt.pipeline.context import Context
from graphopt.pipeline.damage import units
from graphopt.pipeline.loss import cross_entropy
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import Pipeline, run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from graphopt.pipeline.zeros import MarkedUnits, MarkedZeros
from tests.language import build, declines, weight_of
from tests.models import ConvNet, Encoder, images, padding, plain_run, seeded, tokens

Data = Sequence[tuple[Tensor, Tensor]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def passes(text: str) -> list[Pass]:
    return list(parse(text, REGISTRY).passes)


def trained(
    graph: Graph, text: str, data: Any, *, loss: Callable[..., Tensor] = cross_entropy, **options: Any
) -> tuple[Graph, Context]:
    """The graph after a pipeline, whose training passes get these batches."""
    context = Context(training=Batches(data, graph.inputs, name="training"), loss=loss, **options)
    context.original, context.outputs = graph, [value.name for value in graph.outputs]
    found = Pipeline(passes(text)).apply(graph, context)
    found.verify()
    return found, context


def accuracy(data: Data, name: str = "input") -> Callable[[Graph], float]:
    def evaluate(graph: Graph) -> float:
        right = [graph.evaluate({name: x}, graph.outputs)[0].argmax(1) == y for x, y in data]
        return float(torch.cat(right).double().mean())

    return evaluate


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


# --- a structure to find -------------------------------------------------------------------------------------------

INPUTS, RELEVANT, CLASSES = 16, 4, 4


class Misleading(nn.Module):
    """Which of the first four inputs is the largest, by small weights; the others have large weights and say little,
    since these inputs are a thousandth in size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(INPUTS, CLASSES, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(drawn(CLASSES, INPUTS, seed=1).sign())
            self.head.weight[:, :RELEVANT] = 0.1 * torch.eye(CLASSES) - 0.05

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.head(input)
        return y


def misleading_data(count: int = 20) -> Data:
    found = []
    for seed in range(count):
        x = drawn(32, INPUTS, seed=seed)
        x[:, RELEVANT:] *= 1e-3
        found.append((x, x[:, :RELEVANT].argmax(1)))
    return found


def graph_of(module: nn.Module, example: Any) -> Graph:
    return capture(module, "fx", example_inputs=example).graph


TRAINING = "finetune{epochs=2 lr=1e-2 device=cpu evaluate_every=5}"


def test_finds_what_magnitude_does_not() -> None:
    data = misleading_data()
    graph = graph_of(Misleading(), data[0][0])
    score = accuracy(data)
    by_magnitude, _ = trained(graph, f"sparsify{{amount=0.75}},{TRAINING}", data, evaluate=score)
    by_movement, context = trained(
        graph, f"sparsify{{amount=0.75 criterion=movement}},{TRAINING}", data, evaluate=score
    )
    weight = weight_of(by_movement.sites("linear")[0])
    assert zeros(weight) == 48 and zeros(weight[:, RELEVANT:]) == 48
    assert score(by_magnitude) < 0.5 < 0.95 < score(by_movement)
    best = max(line["metric"] for line in context.record.training[1:] if "metric" in line and line["step"] > 28)
    assert score(by_movement) == best
    assert "75.0% of 1 weights" in context.record.notes[0]


class Units(nn.Module):
    """The first four hidden units read what matters, with small weights; four read what hardly varies, with large."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, 8), nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.weight[:4, :RELEVANT] = 0.3 * torch.eye(RELEVANT)
            self.up.weight[4:, RELEVANT : 2 * RELEVANT] = 5 * torch.eye(RELEVANT)
            self.down.weight.copy_(torch.cat([0.3 * torch.eye(CLASSES), 2 * drawn(CLASSES, 4)], 1))
            self.up.bias.fill_(0.1)
            self.down.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(input)))
        return y


def dense() -> nn.Module:
    """The same layers with weights at random."""
    module = seeded(Units)
    for seed, layer in enumerate((module.up, module.down)):
        assert isinstance(layer, nn.Linear)
        layer.weight.data = 0.3 * drawn(*layer.weight.shape, seed=seed)
    return module


def test_finds_the_units_that_the_norm_does_not() -> None:
    data = misleading_data()
    graph, score = graph_of(Units(), data[0][0]), accuracy(data)
    by_norm, _ = trained(graph, f"prune{{neurons=0.5 criterion=l2}},{TRAINING}", data, evaluate=score)
    by_movement, context = trained(
        graph, f"prune{{neurons=0.5 criterion=movement}},{TRAINING}", data, evaluate=score
    )
    up, down = by_movement.sites("linear")
    assert weight_of(up).shape == (4, INPUTS) and weight_of(down).shape == (CLASSES, 4)
    assert bool((weight_of(up)[:, :RELEVANT].abs().amax(0) > 0.1).all())  # all four that matter are read
    assert score(by_norm) + 0.1 < 0.9 < score(by_movement), (score(by_norm), score(by_movement))
    assert context.record.notes[0] == "neurons: up 8 -> 4"
    # What was evaluated with the units left out is what the smaller graph computes.
    assert f"metric {score(by_movement):.6g}" in context.record.notes[-2]


# --- marks ---------------------------------------------------------------------------------------------------------


def test_marking_changes_nothing() -> None:
    graph = graph_of(dense(), drawn(2, INPUTS))
    text, version, context = graph.text(), graph.version, Context()
    by_site = {"up": 0.25, "down": 0.5}
    for pass_ in (Prune(neurons=0.5, criterion="movement"), Sparsify(amount=by_site, criterion="movement")):
        run_pass(pass_, graph, context)
        assert context.record.notes[-1].startswith("nothing is ") and context.record.eligible[0] == "up"
    assert (graph.text(), graph.version, context.is_lossy, context.sparse) == (text, version, False, {})
    assert context.marks.units == {"up": MarkedUnits(8, 4)}
    assert context.marks.zeros == {"up": MarkedZeros("unstructured", 0.25), "down": MarkedZeros("unstructured", 0.5)}


def test_declines_what_has_its_zeros() -> None:
    graph = build("fx", "y = linear(x[2,4], W[1,4]:values(1,0,0,0))")
    context = Context()
    run_pass(Sparsify(criterion="movement", amount=0.75), graph, context)
    assert declines(context) == [Decline("zero_already", count=3, total=4)] and not context.marks


def test_declines_groups_that_zeros_do_not_stand_for() -> None:
    """The width is normalized: with zeros in front of a product, means would still be over all units."""
    graph = build("fx", """
        n = layer_norm(linear(x[batch,8], W[8,8]), G[8]:ones, B[8])
        y = linear(relu(linear(n, U[16,8])), D[4,16])
    """)  # fmt: skip
    with pytest.raises(UsageError, match=r"no group can be weighed .* a norm, a product of two computed values or no"):
        run_pass(Prune(width=0.5, criterion="movement"), graph, Context())
    context = Context()
    run_pass(Prune(width=0.5, neurons=0.5, criterion="movement"), graph, context)
    assert [one.code for one in context.record.declined.values()][-1] == "not_weighed_by_zeros"
    assert list(context.marks.units.values()) == [MarkedUnits(16, 8)]


@pytest.mark.parametrize(("text", "message"), [
    ("sparsify{criterion=movement}", "marks what the training behind it learns to remove, and there is none: put dist"),
    ("distill,prune{neurons=0.5 criterion=movement}", "and there is none"),
    ("sparsify{criterion=movement},quantize,distill", "and quantize comes first: put distill or finetune between them"),
    ("prune{neurons=0.5 criterion=movement},low-rank{rank=4},finetune", "and low-rank comes first"),
    ("repeat{times=2}(distill,sparsify{criterion=movement})", "and there is none"),
    ("sparsify{criterion=movement scope=global},distill", "movement ranks each weight by itself; use scope=local"),
    ("sparsify{criterion=movement allocate=sensitivity},distill", "movement leaves them to training"),
    ("sparsify{criterion=movement seed=1},distill", "seed is for criterion=random, and criterion is movement"),
])  # fmt: skip
def test_refuses_pipelines(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, REGISTRY)


def test_accepts_what_does_not_touch_the_weights() -> None:
    parse("sparsify{criterion=movement},simplify,prune{heads=0.5},distill,quantize", REGISTRY)
    parse("repeat{times=2}(sparsify{criterion=movement schedule=cubic},distill)", REGISTRY)


@pytest.mark.parametrize(("text", "message"), [
    ("sparsify{criterion=movement},finetune{freeze=down}",
     "finetune: freeze keeps the weight of down, and sparsify{criterion=movement} in front of it asks for zeros there"),
    ("prune{neurons=0.5 criterion=movement},finetune{freeze=down}",
     "freeze keeps the weight of down, and prune{criterion=movement} in front of it removes neurons of up"),
    ("prune{neurons=0.5 criterion=movement},prune{neurons=0.5 criterion=l2},finetune",
     "finetune: up was marked by prune{criterion=movement} as a group of 8 units, which it is no more: put finetune"),
    ("sparsify{pattern=2:4},sparsify{criterion=movement amount=0.8},finetune{sr_ste=1e-4}",
     "sr_ste lets the zeros of up move, and sparsify{criterion=movement} adds others to them: leave sr_ste out"),
    ("sparsify{criterion=movement pattern=2:4},finetune{sr_ste=1e-4}",
     "sr_ste lets the zeros of an N:M pattern move, and there are none: put sparsify{pattern=2:4} in front of it"),
])  # fmt: skip
def test_refuses_marks_that_cannot_be_met(text: str, message: str) -> None:
    graph = graph_of(dense(), drawn(2, INPUTS))
    with pytest.raises(UsageError) as caught:
        trained(graph, text, misleading_data(1))
    assert message in str(caught.value)


def test_sensitivity_cannot_try_it() -> None:
    with pytest.raises(UsageError, match="leaves it to a training what goes, and sites run alone"):
        list(units(graph_of(dense(), drawn(2, INPUTS)), [Sparsify(criterion="movement")], None, Context()))


# --- what is cut ---------------------------------------------------------------------------------------------------

SHORT = "finetune{steps=8 lr=1e-3 device=cpu}"


def squared(outputs: Sequence[Tensor], batch: Batch, **_: Any) -> Tensor:
    return outputs[0].square().mean()


def test_two_of_four_stay_everywhere() -> None:
    data = [(images(4, seed), torch.tensor([0, 1, 2, 3])) for seed in range(4)]
    graph = graph_of(seeded(ConvNet), images())
    found, context = trained(graph, f"sparsify{{criterion=movement pattern=2:4 ignore=stem}},{SHORT}", data)
    sites = [site for site in found.sites("linear", "conv") if site.label != "stem"]
    assert len(sites) == 3
    for site in sites:
        groups = as_matrix(weight_of(site)).reshape(-1, 4)
        assert set((groups == 0).sum(1).tolist()) == {2}
        kept = context.sparse[site.label]
        assert kept.pattern == "2:4" and kept.mask is not None and torch.equal(kept.mask, weight_of(site) != 0)


def test_a_share_by_site_is_exact() -> None:
    graph = graph_of(dense(), drawn(2, INPUTS))
    found, _ = trained(graph, f"sparsify{{criterion=movement amount={{up=0.3 down=0.9}}}},{SHORT}", misleading_data(4))
    assert [zeros(weight_of(site)) for site in found.sites("linear")] == [round(0.3 * 128), round(0.9 * 32)]


def test_zeros_that_were_there_stay_and_count() -> None:
    graph = graph_of(dense(), drawn(2, INPUTS))
    first, _ = trained(graph, f"sparsify{{amount=0.5}},{SHORT}", misleading_data(4))
    both, _ = trained(
        graph, f"sparsify{{amount=0.5}},{SHORT},sparsify{{criterion=movement amount=0.75}},{SHORT}", misleading_data(4)
    )
    for one, other in zip(first.sites("linear"), both.sites("linear"), strict=True):
        assert zeros(weight_of(other)) == 0.75 * weight_of(one).numel()
        assert not weight_of(other)[weight_of(one) == 0].any()


class Transposed(nn.Module):
    """A linear whose weight is (in, out), as transformers' Conv1D."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


CUT: dict[str, tuple[Any, Any, str, dict[str, tuple[int, ...]]]] = {
    "channels": (ConvNet, images(), "prune{channels=0.5 criterion=movement}", {
        "stem": (4, 3, 3, 3), "conv1": (4, 4, 3, 3), "conv2": (4, 4, 3, 3), "head": (5, 4),
    }),
    "heads": (lambda: Encoder(1), {"ids": tokens(), "mask": padding()},
              "prune{heads=0.5 neurons=0.25 criterion=movement}", {
        "layers.0.attention.query": (16, 32), "layers.0.attention.value": (16, 32),
        "layers.0.attention.out": (32, 16), "layers.0.up": (48, 32), "layers.0.down": (32, 48),
    }),
    "transposed": (lambda: nn.Sequential(Transposed(8, 8), Transposed(8, 16), nn.GELU(), Transposed(16, 4)),
                   drawn(5, 8), "prune{neurons=0.5 criterion=movement targets=1},"
                   "sparsify{criterion=movement amount=0.25 targets=0}", {
        "0": (8, 8), "1": (8, 8), "3": (4, 8),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_units_are_cut_and_the_graph_computes_what_was_evaluated(name: str) -> None:
    """Zeros in the weights that read the units give what the smaller graph gives."""
    module, example, text, shapes = CUT[name]
    captured = capture(seeded(module), "fx", example_inputs=example)
    graph, feeds = captured.graph, captured.feeds[0]
    seen: list[Tensor] = []

    def evaluate(trial: Graph) -> float:
        seen.append(trial.evaluate(feeds, trial.outputs)[0])
        return float(len(seen))

    found, context = trained(
        graph, f"{text},finetune{{steps=4 lr=1e-3 device=cpu}}", [feeds], loss=squared, evaluate=evaluate
    )
    there = {site.label: weight_of(site) for site in found.sites("linear", "conv")}
    assert {label: tuple(there[label].shape) for label in shapes} == shapes
    torch.testing.assert_close(found.evaluate(feeds, found.outputs)[0], seen[-1], rtol=1e-5, atol=1e-5)
    assert context.is_lossy and len(there) == len(graph.sites("linear", "conv"))
    if name == "transposed":
        assert zeros(there["0"]) == 16


# --- with others ---------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_model_as_captured() -> None:
    graph = graph_of(Units(), drawn(2, INPUTS))
    data = misleading_data(4)
    _, context = trained(graph, "prune{neurons=0.5 criterion=movement},distill{steps=8 device=cpu}", data)
    assert not any("its own teacher" in note for note in context.record.notes)
    assert context.original is graph and context.is_lossy and not context.marks
    _, context = trained(graph, "prune{neurons=0.5 criterion=movement},finetune{steps=8 device=cpu}", data)
    assert context.original is graph  # a finetune that loses nothing makes the teacher, and this one cuts


def test_the_onnx_file_has_the_zeros_and_shapes_and_computes_the_same(tmp_path: Path) -> None:
    data = misleading_data(6)
    x = data[0][0]
    text = f"prune{{neurons=0.5 criterion=movement}},sparsify{{criterion=movement amount=0.5 targets=up}},{SHORT}"
    small = optimize(dense(), text, target="onnxruntime", example_inputs=x, training=data, measure=False)
    small.export(tmp_path / "small.onnx")
    expected, _ = trained(graph_of(dense(), x), text, data)
    weights = [numpy_helper.to_array(one) for one in onnx.load(tmp_path / "small.onnx").graph.initializer]
    up = weight_of(expected.sites("linear")[0])
    assert up.shape == (4, 16) and zeros(up) > 0
    assert any(int((one == 0).sum()) == zeros(up) and one.size == up.numel() for one in weights)
    (y,) = expected.evaluate({"input": x}, expected.outputs)
    torch.testing.assert_close(plain_run(str(tmp_path / "small.onnx"), {"input": x})[0], y, rtol=1e-4, atol=1e-5)


def test_then_quantize_and_train_through_the_rounding() -> None:
    data = misleading_data(6)
    graph = graph_of(Misleading(), data[0][0])
    found, context = trained(
        graph, f"sparsify{{criterion=movement amount=0.75}},{SHORT},quantize{{scheme=dynamic}},{SHORT}", data
    )
    (site,) = found.sites("linear")
    (weight,) = found.evaluate({}, [site.required("weight")])
    assert weight.shape == (4, 16) and zeros(weight) >= 48
    kept = context.sparse["head"].mask
    assert kept is not None and not weight[~kept].any() and int((~kept).sum()) == 48


def test_options_of_both_ways_to_write_it() -> None:
    text = "sparsify{criterion=movement},distill"
    assert parse(text, REGISTRY) == Pipeline([Sparsify(criterion="movement"), Distill()])
    assert Prune(neurons=0.5, criterion="movement", targets=Selector("up")).marks and not Prune(neurons=0.5).marks
    assert FineTune().marks is False
