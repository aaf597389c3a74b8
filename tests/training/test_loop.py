"""The loop: the steps are those of torch.optim written out, the best weights stay, and limits hold."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments import Instrument
from graphopt.training.schedule import learning_rate
from tests.language import build
from tests.training.networks import (
    Lines,
    Noisy,
    accuracy,
    batches,
    dropping_graph,
    generator,
    perceptron,
    same,
    shuffled,
    trainer,
    weights,
)


def reference(
    graph: Graph, data: list[tuple[Tensor, ...]], rates: list[float], optimizer: str, clip: float | None, decay: float
) -> dict[str, Tensor]:
    """The perceptron's weights after one step on each batch, by torch alone."""
    by_name = {name: nn.Parameter(one.clone()) for name, one in weights(graph).items()}
    matrices, vectors = [by_name["w"], by_name["v"]], [by_name["b"], by_name["c"]]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    chosen: torch.optim.Optimizer = (
        torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    )
    for (x, y), rate in zip(data, rates, strict=True):
        hidden = F.relu(F.linear(x, by_name["w"], by_name["b"]))
        loss = F.cross_entropy(F.linear(hidden, by_name["v"], by_name["c"]), y)
        chosen.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            gradients = [one.grad for one in by_name.values() if one.grad is not None]
            norm = math.sqrt(sum(float(one.square().sum()) for one in gradients))
            for one in gradients:
                one.mul_(min(1.0, clip / (norm + 1e-6)))
        for group in chosen.param_groups:
            group["lr"] = rate
        chosen.step()
    return {name: one.detach() for name, one in by_name.items()}


@settings(deadline=None, max_examples=10)
@given(
    optimizer=st.sampled_from(["adamw", "sgd"]),
    clip=st.sampled_from([None, 0.05, 1.0]),
    decay=st.sampled_from(["cosine", "linear", "none"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    warmup=st.sampled_from([0.0, 0.3]),
    epochs=st.integers(1, 2),
)
def test_steps_are_those_of_torch(
    optimizer: Any, clip: float | None, decay: Any, weight_decay: float, warmup: float, epochs: int
) -> None:
    graph, data = perceptron(), batches() * epochs
    rates = [0.05 * learning_rate((k + 0.5) / len(data), warmup=warmup, decay=decay) for k in range(len(data))]
    expected = reference(graph, data, rates, optimizer, clip, weight_decay)
    options = {"optimizer": optimizer, "clip": clip, "decay": decay, "weight_decay": weight_decay, "warmup": warmup}
    outcome = trainer(graph, batches(), lr=0.05, epochs=epochs, **options).run()
    assert outcome.steps == len(data)
    assert [line["lr"] for line in outcome.lines] == pytest.approx(rates)
    for name, tensor in weights(graph).items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_learning_rates_by_their_formulas() -> None:
    shares = [0.0, 0.05, 0.1, 0.55, 1.0]
    for decay, end in (("cosine", [0.5, 0]), ("linear", [0.5, 0]), ("none", [1, 1])):
        found = [learning_rate(t, warmup=0.1, decay=decay) for t in shares]
        assert found == pytest.approx([0, 0.5, 1, *end])
    assert learning_rate(0.1 + 0.9 / 3, warmup=0.1, decay="cosine") == pytest.approx(0.75)


def test_one_step_trains() -> None:
    graph, before = perceptron(), perceptron()
    assert trainer(graph, batches(), steps=1).run().steps == 1
    assert not same(graph, before)


@settings(deadline=None, max_examples=8)
@given(accumulate=st.sampled_from([2, 3, 6]), optimizer=st.sampled_from(["adamw", "sgd"]), epochs=st.integers(1, 2))
def test_accumulation_is_a_larger_batch(accumulate: int, optimizer: Any, epochs: int) -> None:
    small, large = perceptron(), perceptron()
    options: dict[str, Any] = {"epochs": epochs, "optimizer": optimizer, "clip": None}  # which hides a factor
    steps = trainer(small, batches(4), accumulate=accumulate, **options).run().steps
    assert steps == trainer(large, batches(4 * accumulate), **options).run().steps
    for (name, a), b in zip(weights(small).items(), weights(large).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_a_last_group_that_is_smaller_makes_a_step() -> None:
    outcome = trainer(perceptron(), batches(4), accumulate=4, epochs=2).run()  # of 6 batches: 4 and 2
    assert outcome.steps == 4


# --- random numbers ------------------------------------------------------------------------------------------------


def states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), kind, list(keys), rest, random.getstate()


def test_one_seed_gives_one_result_and_the_users_generators_stay() -> None:
    results = []
    for seed, users in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(users), np.random.seed(users), random.seed(users)
        before, graph = states(), dropping_graph()
        trainer(graph, shuffled(4, Noisy()), epochs=2, seed=seed, evaluate=accuracy).run()
        assert states() == before
        results.append(graph)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class Drawn(IterableDataset[Any]):
    """A stream of noise, of a length that only reading it tells."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in batches():
            yield x + 0.1 * torch.randn_like(x), y


def test_counting_a_stream_leaves_the_users_generators_alone() -> None:
    before = states()
    assert trainer(perceptron(), Drawn(), epochs=2).run().steps == 12
    assert states() == before


def test_each_epoch_has_an_order_of_its_own() -> None:
    orders: list[list[float]] = []

    def seen(outputs: Any, batch: Any) -> Tensor:
        orders.append(batch.feeds["x"][:, 0].tolist())
        return F.cross_entropy(outputs[0], batch.labels)

    trainer(perceptron(), shuffled(24), loss=seen, epochs=3).run()
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_dropout_is_active_in_training_and_batch_norms_learn_their_statistics() -> None:
    graph = dropping_graph()
    norm = graph.sites("batch_norm")[0]
    before = graph.constant(norm.required("mean")).clone()  # type: ignore[union-attr]
    found = []

    def noted(outputs: Any, batch: Any) -> Tensor:
        found.append(outputs[0].detach())
        return F.cross_entropy(outputs[0], batch.labels)

    data = batches(24)
    trainer(graph, data, loss=noted, epochs=3, lr=1e-12, weight_decay=0.0, accumulate=1).run()
    assert not torch.allclose(found[0], found[1], atol=1e-3)  # another mask, for the weights are the same
    ((x, _),) = data
    first = F.linear(x, weights(dropping_graph())["first.weight"], weights(dropping_graph())["first.bias"])
    expected = before
    for _ in range(3):
        expected = 0.9 * expected + 0.1 * first.mean(0)
    mean = graph.constant(graph.sites("batch_norm")[0].required("mean"))
    assert mean is not None and torch.allclose(mean, expected, atol=1e-5)


def test_a_frozen_batch_norm_stays_as_a_whole() -> None:
    graph, before = dropping_graph(), weights(dropping_graph())
    trainer(graph, batches(), epochs=2, frozen=("norm.weight", "norm.bias")).run()
    moved = {name for name, one in weights(graph).items() if not torch.equal(one, before[name])}
    assert moved == {"first.weight", "first.bias", "last.weight", "last.bias"}


# --- the best weights ----------------------------------------------------------------------------------------------


class Scripted:
    """An evaluation that gives these metrics in order, and keeps the weights that it saw."""

    def __init__(self, *metrics: float) -> None:
        self.metrics, self.seen = list(metrics), list[dict[str, Tensor]]()

    def __call__(self, graph: Graph) -> float:
        self.seen.append(weights(graph))
        return self.metrics[len(self.seen) - 1]


@settings(deadline=None, max_examples=10)
@given(metrics=st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4))
def test_the_first_best_weights_stay(metrics: list[float]) -> None:
    graph, evaluate = perceptron(), Scripted(*metrics)
    outcome = trainer(graph, batches(), epochs=3, evaluate=evaluate).run()
    best = metrics.index(max(metrics))
    assert outcome.metric == metrics[best] >= metrics[0]
    assert all(torch.equal(one, evaluate.seen[best][name]) for name, one in weights(graph).items())
    assert [line["metric"] for line in outcome.lines if "metric" in line] == metrics


def test_evaluations_by_steps_and_patience() -> None:
    evaluate = Scripted(1, 2, 2, 1, 9)
    outcome = trainer(perceptron(), batches(), epochs=9, evaluate=evaluate, evaluate_every=2, patience=2).run()
    assert [line["step"] for line in outcome.lines if "metric" in line] == [0, 2, 4, 6]
    assert outcome.steps == 6 and outcome.metric == 2


def test_what_is_told() -> None:
    lines = Lines()
    outcome = trainer(perceptron(), batches(), epochs=1, evaluate=accuracy, watchers=[lines]).run()
    assert lines.lines == outcome.lines
    assert [sorted(line) for line in lines.lines] == [["metric", "step"], *[["loss", "lr", "step"]] * 6,
                                                      ["metric", "step"]]  # fmt: skip


# --- limits --------------------------------------------------------------------------------------------------------


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from batches()


def test_steps_end_an_endless_stream() -> None:
    outcome = trainer(perceptron(), Endless(), steps=4, evaluate=accuracy).run()
    assert [line["step"] for line in outcome.lines if "metric" in line] == [0, 4]


def test_a_generator_is_read_once() -> None:
    assert trainer(perceptron(), generator(5), steps=5, evaluate=accuracy).run().steps == 5
    with pytest.raises(UsageError, match="the training batches are needed again, and a generator gives them once"):
        trainer(perceptron(), generator(5), steps=6).run()
    for epochs in (None, 2):
        with pytest.raises(UsageError, match=r"a generator can be read once.*pass a list or a DataLoader, or steps="):
            trainer(perceptron(), generator(5), epochs=epochs).run()
    with pytest.raises(UsageError, match="amp=auto times the first batch, and a generator gives it once"):
        trainer(perceptron(), generator(5), steps=5, amp="auto").run()


class Boastful(list[Any]):
    """A source that says it holds more than it does, as a stream of unequal shards may."""

    def __len__(self) -> int:
        return 10


def test_epochs_are_counted_by_reading() -> None:
    assert trainer(perceptron(), Boastful(batches()), epochs=2).run().steps == 12


def test_minutes_end_a_training() -> None:
    assert 0 < trainer(perceptron(), batches(), minutes=1e-4).run().steps < 10_000


@pytest.mark.parametrize("empty", [[], DataLoader(TensorDataset(torch.zeros(0, 6)), 4)], ids=["list", "loader"])
@pytest.mark.parametrize(("epochs", "steps"), [(1, None), (None, 1)])
def test_no_batches(empty: Any, epochs: int | None, steps: int | None) -> None:
    with pytest.raises(UsageError, match=r"training.* holds no batch"):
        trainer(perceptron(), empty, epochs=epochs, steps=steps).run()


# --- what goes wrong -----------------------------------------------------------------------------------------------


class Poisoned:
    """Cross-entropy that is some other number at one step."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor, self.calls = step, factor, 0

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs[0], batch.labels) * (self.factor if self.calls == self.step else 1.0)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(factor: float) -> None:
    graph, cut = perceptron(), perceptron()
    outcome = trainer(graph, batches(), epochs=2, loss=Poisoned(9, factor), decay="none", warmup=0).run()
    (note,) = outcome.notes
    assert note == (
        f"the loss is {factor} at step 9, with a learning rate of 0.01: training stopped, and the weights of step 7 "
        "are kept"
    )
    trainer(cut, batches(), steps=7, decay="none", warmup=0).run()
    assert same(graph, cut)


def test_a_loss_that_is_not_finite_leaves_the_best_weights() -> None:
    graph, evaluate = perceptron(), Scripted(1, 3, 2)
    outcome = trainer(graph, batches(), epochs=9, loss=Poisoned(15, math.nan), evaluate=evaluate).run()
    assert outcome.notes[-1].endswith("training stopped, and the weights of step 6 are kept")
    assert all(torch.equal(one, evaluate.seen[1][name]) for name, one in weights(graph).items())


@pytest.mark.parametrize("evaluate", [None, accuracy])
def test_a_loss_that_is_not_finite_from_the_start(evaluate: Any) -> None:
    graph, before = perceptron(), perceptron()
    message = r"the loss is nan at step 1, with a learning rate of .*, before anything was trained: look at the labels"
    with pytest.raises(UsageError, match=message):
        trainer(graph, batches(), epochs=1, loss=Poisoned(1, math.nan), evaluate=evaluate).run()
    assert same(graph, before)
    with pytest.raises(UsageError, match=r"at step 2, .*, before any weights were kept; give a lower lr, a lower clip"):
        trainer(graph, batches(), epochs=1, loss=Poisoned(2, math.nan)).run()


class Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


@pytest.mark.parametrize("evaluate", [None, accuracy])
def test_weights_that_are_not_finite_after_the_last_step(evaluate: Any) -> None:
    calls = 0

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = F.cross_entropy(outputs[0], batch.labels)
        return Exploding.apply(value) if calls == 6 else value  # type: ignore[no-untyped-call]

    graph = perceptron()
    outcome = trainer(graph, batches(), epochs=1, loss=loss, evaluate=evaluate).run()
    assert "is not finite after step 6, with a learning rate of" in outcome.notes[-1]
    assert all(bool(one.isfinite().all()) for one in weights(graph).values())


@pytest.mark.parametrize(
    ("gives", "message"),
    [(None, "evaluate gives None; give one number"), (math.nan, "evaluate gives NaN at step 0"),
     (torch.zeros(2), r"evaluate gives tensor\(\[0., 0.\]\); give one number"), ({}, "evaluate gives {}")],
)  # fmt: skip
def test_an_evaluation_without_a_number(gives: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(perceptron(), batches(), evaluate=lambda graph: gives).run()


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="no parameter is left to train"):
        trainer(perceptron(), batches(), frozen=("w", "b", "v", "c"))


def test_a_loss_without_a_gradient() -> None:
    with pytest.raises(UsageError, match=r"the loss has no gradient with respect to any parameter$"):
        trainer(perceptron(), batches(), loss=lambda outputs, batch: outputs[0].detach().sum()).run()


def test_parameters_that_the_loss_does_not_read_are_noted() -> None:
    graph = build("fx", "a = linear(x[batch,6], W[4,6])\nb = linear(x, V[4,6])\nreturn a, b")
    outcome = trainer(graph, batches(), epochs=1).run()
    assert outcome.notes == ["the loss does not depend on v, left as it was"]


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError("too much"),
     RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.")],
    ids=["cuda", "python", "windows"],
)  # fmt: skip
def test_out_of_memory_says_what_to_change(error: Exception) -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        raise error

    way_out = "out of memory with batches of 4: give batches of 2 with accumulate=6, whose steps are as large"
    with pytest.raises(UsageError, match=f"{way_out}, or amp=bfloat16"):
        trainer(perceptron(), batches(), loss=loss, accumulate=3).run()
    with pytest.raises(UsageError, match=rf"{way_out} \("):
        trainer(perceptron(), batches(), loss=loss, accumulate=3, amp="bfloat16").run()
    with pytest.raises(UsageError, match="with batches of one sample: give amp=bfloat16"):
        trainer(perceptron(), batches(1), loss=loss).run()


def test_out_of_memory_on_this_machine() -> None:
    with pytest.raises(UsageError, match="out of memory with batches of 4"):
        trainer(perceptron(), batches(), loss=lambda outputs, batch: torch.empty(10**15) + outputs[0].sum()).run()


def test_a_last_batch_of_one_sample_and_a_batch_norm() -> None:
    with pytest.raises(UsageError, match=r"holds one sample, and the statistics of a batch norm.*drop_last=True"):
        trainer(dropping_graph(), batches(23), epochs=1).run()


# --- Ctrl-C --------------------------------------------------------------------------------------------------------


class Interrupt(Instrument):
    """Sends Ctrl-C to the own process after some step, once or twice."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def trained(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.step and "loss" in line:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_the_training_after_the_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    graph, cut = perceptron(), perceptron()
    outcome = trainer(graph, batches(), epochs=3, decay="none", warmup=0, watchers=[Interrupt(8)]).run()
    assert outcome.steps == 8
    assert outcome.notes == ["interrupted at step 8: the best weights so far are kept"]
    trainer(cut, batches(), steps=8, decay="none", warmup=0).run()
    assert same(graph, cut)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_leaves_the_best_weights() -> None:
    graph, evaluate = perceptron(), Scripted(1, 3, 2)
    outcome = trainer(graph, batches(), epochs=3, evaluate=evaluate, watchers=[Interrupt(8)]).run()
    assert outcome.metric == 3 and outcome.steps == 8
    assert all(torch.equal(one, evaluate.seen[1][name]) for name, one in weights(graph).items())


def test_ctrl_c_twice_aborts() -> None:
    before, graph, original = signal.getsignal(signal.SIGINT), perceptron(), perceptron()
    with pytest.raises(KeyboardInterrupt):
        trainer(graph, batches(), epochs=3, watchers=[Interrupt(2, times=2)]).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert same(graph, original)


def test_ctrl_c_stays_ignored_where_it_is() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert trainer(perceptron(), batches(), epochs=1, watchers=[Interrupt(2)]).run().steps == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_samples_can_be_learned() -> None:
    graph = perceptron()
    before = accuracy(graph)
    found = trainer(graph, batches(), epochs=30, lr=0.05, evaluate=accuracy).run().metric
    assert before < 0.5 < 0.9 <= accuracy(graph) == found
