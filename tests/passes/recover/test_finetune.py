"""Training on labels through `optimize`: what torch itself would have learned is what ships, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import Optimized, PassError
from graphopt.pipeline.instruments import Instrument
from tests.training.networks import Noisy, Stopped, batches, dropping, samples, shuffled
from tests.training.test_loop import Interrupt

X = samples(4)[0]


def optimize(model: Any, passes: str, **options: Any) -> Optimized:
    return graphopt.optimize(model, passes, **{"target": "torch-cpu", "agree": False, **options})


def same(a: Optimized, b: Optimized) -> bool:
    ours, theirs = (dict(one.transformed.constants()) for one in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def notes(small: Optimized) -> list[list[str]]:
    return [record.notes for record in small.report.passes if record.name == "finetune"]


def trained_by_torch(reference: nn.Module) -> None:
    """What finetune{epochs=2 lr=0.02 warmup=0 decay=none weight_decay=0} does, as a loop of torch alone."""
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.02, weight_decay=0)
    reference.train()
    for x, y in batches() * 2:
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()


class Convolution(nn.Module):
    """x (batch, 6) -> (batch, 4): a convolution and a linear, each with a batch norm.

    Without biases: their gradient is rounding alone, of which Adam would make whole steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv1d(1, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)
        self.linear, self.norm2 = nn.Linear(24, 4, bias=False), nn.BatchNorm1d(4, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv(x.unsqueeze(1))))
        z: Tensor = self.norm2(self.linear(y.flatten(1)))
        return z


class Recurrence(nn.Module):
    """x (batch, 6), read as 6 steps -> (batch, 4): two layers of an LSTM in both directions, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(1, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x.unsqueeze(2))
        z: Tensor = self.linear(y.mean(1))
        return z


class Tied(nn.Module):
    """x (batch, 6) -> (batch, 4): one weight under three names, of which the forward pass uses the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6, bias=False)
        self.first, self.second = nn.Sequential(self.shared, nn.Tanh()), nn.Sequential(self.shared, nn.Tanh())
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.second(self.first(x)))
        return y


@pytest.mark.parametrize("kind", [Recurrence, Tied])
def test_what_has_other_names_in_the_graph_is_handed_back(kind: type[nn.Module]) -> None:
    """A recurrent layer has one weight for both of its directions, and one bias for both of its products; a tied
    weight has one of its names."""
    torch.manual_seed(0)
    model, reference = kind().eval(), kind()
    reference.load_state_dict(model.state_dict())
    small = optimize(
        model, "finetune{epochs=2 lr=0.02 warmup=0 decay=none weight_decay=0}", training=batches(), example_inputs=X
    )
    trained_by_torch(reference)
    found = small.state_dict()
    assert found.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
        assert not torch.equal(found[name], model.state_dict()[name])


@pytest.mark.parametrize("target", ["torch-cpu", "onnxruntime"])
def test_weights_and_statistics_are_those_of_torch(target: str) -> None:
    torch.manual_seed(0)
    model = Convolution().eval()
    reference = Convolution()
    reference.load_state_dict(model.state_dict())
    small = optimize(
        model, "finetune{epochs=2 lr=0.02 warmup=0 decay=none weight_decay=0}", target=target, training=batches(),
        example_inputs=X,
    )  # fmt: skip
    trained_by_torch(reference)
    reference.eval()
    x, _ = samples(16, seed=1)
    with torch.no_grad():
        assert torch.allclose(small(x), reference(x), atol=1e-3)
        assert not torch.allclose(small(x), model(x), atol=0.1)


def test_the_users_generators_stay_and_the_seed_decides() -> None:
    def states() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), kind, list(keys), rest, random.getstate()

    results = []
    for users in (1, 2):
        torch.manual_seed(users), np.random.seed(users), random.seed(users)
        before = states()
        results.append(optimize(dropping(), "finetune{epochs=2}", training=shuffled(4, Noisy())))
        assert states() == before
    assert same(*results)


class Crash(Instrument):
    """Crashes at the n-th step of all passes together."""

    def __init__(self, step: int) -> None:
        self.left = step

    def trained(self, line: Mapping[str, Any]) -> None:
        self.left -= "loss" in line
        if not self.left:
            raise Stopped


PASSES = (
    f"finetune{{epochs=2 lr=0.02 checkpoint_minutes={1e-9}}},prune{{neurons=0.5}},"
    f"distill{{epochs=1 hidden=1 match={{first=first}} optimizer=sgd lr=0.1 checkpoint_minutes={1e-9}}},"
    f"finetune{{epochs=1 accumulate=2 checkpoint_minutes={1e-9}}}"
)
"""12 steps, 6 steps and 3 steps."""


def test_a_crash_in_any_pass_of_a_pipeline_changes_nothing(tmp_path: Path) -> None:
    def run(**options: Any) -> Optimized:
        return optimize(dropping(), PASSES, training=shuffled(4, Noisy()), example_inputs=X, **options)

    unbroken = run()
    for step in (5, 12, 3, 3, 2):  # of the 21; each time some were kept
        with pytest.raises(PassError, match="Stopped"):
            run(checkpoint=tmp_path, instruments=[Crash(step)])
    resumed = run(checkpoint=tmp_path)
    assert same(resumed, unbroken)
    ours, theirs = ([one.training for one in small.report.passes] for small in (resumed, unbroken))
    assert ours == theirs
    assert sorted(one.name for one in tmp_path.iterdir() if one.suffix == ".safetensors") == [
        "0-finetune.safetensors", "1-distill.safetensors", "2-finetune.safetensors",
    ]  # fmt: skip


def test_ctrl_c_ends_one_pass_and_goes_on_to_the_next(tmp_path: Path) -> None:
    passes = "finetune{epochs=2 lr=0.02},finetune{epochs=1 lr=0.01}"
    options: dict[str, Any] = {"training": shuffled(), "example_inputs": X}
    small = optimize(dropping(), passes, instruments=[Interrupt(9)], checkpoint=tmp_path, **options)
    first, second = notes(small)
    assert first[0] == "interrupted at step 9: the best weights so far are kept" and "9 steps" in first
    assert "6 steps" in second
    again = optimize(dropping(), passes, checkpoint=tmp_path, **options)
    assert same(again, optimize(dropping(), passes, **options)) and not same(again, small)
    with pytest.raises(KeyboardInterrupt):
        optimize(dropping(), passes, instruments=[Interrupt(3, times=2)], **options)


def test_the_best_weights_are_never_worse_than_the_start() -> None:
    x, y = samples()

    def accuracy(model: Any) -> float:
        return float((model(x).argmax(-1) == y).float().mean())

    model = dropping()
    small = optimize(model, "finetune{epochs=3 lr=5}", training=batches(), evaluate=accuracy, example_inputs=X)
    assert accuracy(small) >= accuracy(model)
    told = [line["metric"] for line in small.report.passes[0].training if "metric" in line]
    assert len(told) == 4 and accuracy(small) == pytest.approx(max(told))
