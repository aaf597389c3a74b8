"""Small networks to train, their batches, and the training of one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from graphopt.capture.sources import capture
from graphopt.ir.graph import Graph
from graphopt.pipeline.batches import Batches
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.loss import cross_entropy
from graphopt.training.checkpoints import Checkpoints
from graphopt.training.loop import Trainer
from graphopt.training.objective import Labels
from graphopt.training.settings import Settings
from tests.language import build

PERCEPTRON = "y = linear(relu(linear(x[batch,6], W[8,6], B[8])), V[4,8], C[4])"


def samples(count: int = 24, width: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and the classes that a fixed linear map gives them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=draw)
    return x, (x @ torch.randn(width, classes, generator=draw)).argmax(-1)


def batches(size: int = 4, **of_samples: int) -> list[tuple[Tensor, ...]]:
    """The samples as tuples of inputs and labels, in order."""
    return list(zip(*(torch.split(one, size) for one in samples(**of_samples)), strict=True))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """The samples with noise of all three global generators, as an augmentation would add it."""

    def __init__(self) -> None:
        self.x, self.y = samples()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * (torch.randn(6) + np.random.randn() + random.random())
        return self.x[place] + noise.float(), self.y[place]


def shuffled(size: int = 4, dataset: Dataset[Any] | None = None) -> DataLoader[Any]:
    return DataLoader(dataset or TensorDataset(*samples()), batch_size=size, shuffle=True)


class Dropping(nn.Module):
    """x (batch, 6) -> (batch, 4): a linear, a batch norm, dropout, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return y


def dropping() -> Dropping:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropping().eval()


@cache
def _dropping_graph() -> Graph:
    return capture(dropping(), "fx", example_inputs=samples(4)[0]).graph


def dropping_graph() -> Graph:
    return _dropping_graph().clone()


def trainer(
    graph: Graph,
    data: Any,
    *,
    loss: Callable[..., Tensor] | None = None,
    evaluate: Callable[[Graph], float] | None = None,
    checkpoint: Path | None = None,
    watchers: list[Instrument] | None = None,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> Trainer:
    """Of cross-entropy on a CPU, with a checkpoint after each step where a file is given."""
    settings = Settings(**{"lr": 0.01, "device": "cpu", **options})
    return Trainer(
        graph, Labels(loss or cross_entropy_of_list), Batches(data, graph.inputs, name="training"), settings,
        evaluate=evaluate, watchers=watchers or [], frozen=frozen,
        checkpoints=None if checkpoint is None else Checkpoints(checkpoint, graph, 1e-9),
    )  # fmt: skip


def cross_entropy_of_list(outputs: Any, batch: Any) -> Tensor:
    return cross_entropy(list(outputs), batch)


def perceptron() -> Graph:
    return build("fx", PERCEPTRON)


def weights(graph: Graph) -> dict[str, Tensor]:
    """The constants of a graph in floats, by name."""
    return {name: tensor.detach() for name, tensor in graph.constants() if tensor.is_floating_point()}


def same(a: Graph, b: Graph) -> bool:
    """Whether two graphs have the same constants, bit for bit."""
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def accuracy(graph: Graph) -> float:
    x, y = samples()
    (logits,) = graph.evaluate({graph.inputs[0].name: x}, graph.outputs)
    return float((logits.argmax(-1) == y).float().mean())


class Stopped(Exception):
    """What a crash is in these tests."""


class Stop(Instrument):
    """Crashes after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def trained(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.step and "loss" in line:
            raise Stopped


class Lines(Instrument):
    """All lines that a training tells."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []

    def trained(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)


def generator(count: int = 6) -> Iterator[tuple[Tensor, ...]]:
    yield from batches(count=4 * count)


def accuracy_of(model: Any) -> float:
    """Of a model that is called like the original."""
    x, y = samples()
    return float((model(x).argmax(-1) == y).float().mean())
