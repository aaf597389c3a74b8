"""Mixed precision: it trains, and a gradient that overflows is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.measure.timing import paired
from graphopt.training import precision
from graphopt.training.precision import Amp, chosen, device_of
from tests.training.networks import accuracy, batches, perceptron, same, trainer, weights


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_products_are_of_the_type_and_the_loss_falls(amp: Any) -> None:
    types = set()

    def loss(outputs: Any, batch: Any) -> Tensor:
        types.add(outputs[0].dtype)
        return F.cross_entropy(outputs[0].float(), batch.labels)

    graph = perceptron()
    outcome = trainer(graph, batches(), epochs=20, lr=0.05, amp=amp, loss=loss, evaluate=accuracy).run()
    losses = [line["loss"] for line in outcome.lines if "loss" in line]
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert types == {torch.float32 if amp == "off" else getattr(torch, amp)}
    assert outcome.metric is not None and outcome.metric > 0.8
    assert all(one.dtype == torch.float32 for one in weights(graph).values())


class Overflowing(torch.autograd.Function):
    """Its gradient does not fit into half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient * 1e30).half().float()


def test_a_gradient_that_overflows_is_skipped_and_the_scale_falls() -> None:
    """Each weight stays through that step, and Adam's averages too, so that the rest is as if it had not been."""
    calls = 0

    def small(outputs: Any, batch: Any) -> Tensor:
        return 0.01 * F.cross_entropy(outputs[0].float(), batch.labels)

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = small(outputs, batch)
        return Overflowing.apply(value) if calls == 3 else value  # type: ignore[no-untyped-call]

    graph, without = perceptron(), perceptron()
    options: dict[str, Any] = {"amp": "float16", "decay": "none", "warmup": 0}
    training = trainer(graph, batches(), epochs=1, loss=loss, **options)
    training.run()
    assert training.amp.scaler.get_scale() == 65536 / 2
    data = batches()
    trainer(without, [*data[:2], *data[3:]], epochs=1, loss=small, **options).run()
    for (name, a), b in zip(weights(graph).items(), weights(without).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-3), name
    for amp in ("off", "bfloat16"):
        assert not Amp(amp, torch.device("cpu")).scaler.is_enabled()


class Ratio:
    def __init__(self, low: float) -> None:
        self.low, self.median, self.high = low, low, low


@pytest.mark.parametrize(("low", "name"), [(1.2, "bfloat16"), (0.9, "off")])
def test_auto_takes_what_is_faster(low: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "paired", lambda calls, **options: {"bfloat16": Ratio(low)})
    called: list[str] = []

    @contextmanager
    def trial() -> Iterator[Any]:
        yield lambda amp: lambda: called.append(amp.name)

    notes: list[str] = []
    assert chosen("auto", torch.device("cpu"), trial, notes).name == name
    assert called == ["off", "bfloat16"]
    assert notes == [f"amp={name}: a step in bfloat16 is {low:.2f} times as fast [{low:.2f}, {low:.2f}] here"]


def test_what_is_steadily_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the timing as it is, on a clock that only steps advance: the rounds are enough to tell."""
    now = [0.0]

    def step(amp: Amp) -> Any:
        def call() -> None:
            now[0] += 0.03 if amp.name == "bfloat16" else 0.06

        return call

    def probe() -> None:
        now[0] += 0.001

    options: Any = {"clock": lambda: now[0], "sleep": lambda seconds: None, "probe": probe}
    monkeypatch.setattr(precision, "paired", partial(paired, **options))
    notes: list[str] = []
    assert chosen("auto", torch.device("cpu"), lambda: nullcontext(step), notes).name == "bfloat16"
    assert notes == ["amp=bfloat16: a step in bfloat16 is 2.00 times as fast [2.00, 2.00] here"]


def test_a_trial_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: Any, **options: Any) -> Any:
        for call in calls.values():
            call()
        return {"bfloat16": Ratio(0.9)}

    monkeypatch.setattr(precision, "paired", timed)
    auto, off = perceptron(), perceptron()
    trainer(auto, batches(), epochs=1, amp="auto").run()
    trainer(off, batches(), epochs=1).run()
    assert same(auto, off)


def test_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device=cuda, and torch finds no GPU here: use device=cpu"):
        device_of("cuda")
