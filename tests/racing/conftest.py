"""What tests of races share: engines that are fakes, and processes that are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import TARGETS
from graphopt.ir.graph import Feeds, Graph
from graphopt.lowering.backend import Backend
from graphopt.measure import limits, timing
from graphopt.measure.timing import Ratio, Ratios
from graphopt.racing import contest
from graphopt.racing.contestant import Lost
from tests.racing import fakes

LIMITS = limits.Limits({"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, 1e9, 2)


class Linears(nn.Module):
    """x (batch, 16) -> (batch, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


@dataclass
class Stage:
    """What engines do in a scripted race: nothing takes time, and nothing runs in another process."""

    speeds: dict[str, float] = field(default_factory=dict)
    """By the label of a candidate, how many times as fast as the baseline; 1 where it is not here."""
    noise: dict[tuple[str, str], float] = field(default_factory=dict)
    """By engine and precision, what its outputs are multiplied by, less 1."""
    lost: dict[str, str] = field(default_factory=dict)
    """By engine, how each of its processes ends when it starts."""
    lost_later: dict[str, Lost] = field(default_factory=dict)
    """By engine, how each of its processes ends in the race."""
    started: list[str] = field(default_factory=list)
    """The engines of all processes that were started, in order."""
    references: list[tuple[float, ...]] = field(default_factory=list)
    """What each of them was told of another's first runs."""
    open: int = 0
    """Processes that run now."""
    races: int = 0

    def paired_calls(
        self, candidates: Mapping[str, Sequence[Any]], *, baseline: str, rounds: int = timing.ROUNDS, **options: Any
    ) -> dict[str, Ratios]:
        """In place of `timing.paired_calls`."""
        for call in (one for calls in candidates.values() for one in calls if hasattr(one, "seconds")):
            call.seconds(1)
        self.races += baseline != "input"
        found = {}
        for name, calls in candidates.items():
            speed = self.speeds.get(name, 1.0)
            seconds = {baseline: (0.001, 0.001), name: (0.001 / speed, 0.001 / speed)}
            ratio = Ratio(speed, speed, speed, rounds, 0, seconds)
            found[name] = Ratios(ratio, (ratio,) * len(calls))
        return found

    def contestant(
        self, backend: Backend, graph: Graph, feeds: Sequence[Feeds], folder: Path, threads: int | None,
        reference: Sequence[float],
    ) -> FakeContestant:  # fmt: skip
        """In place of `Contestant`."""
        self.started.append(backend.name)
        self.references.append(tuple(reference))
        if backend.name in self.lost:
            raise Lost(self.lost[backend.name])
        self.open += 1
        noise = self.noise.get((backend.name, backend.precision), 0.0)
        outputs = [[one * (1 + noise) for one in graph.evaluate(each, graph.outputs)] for each in feeds]
        return FakeContestant(self, outputs, self.lost_later.get(backend.name))


@dataclass
class FakeContestant:
    """A contestant in this process."""

    stage: Stage
    results: list[list[Tensor]]
    lost: Lost | None = None
    first_seconds: tuple[float, ...] = (0.25,)

    @property
    def number(self) -> int:
        return len(self.results)

    @property
    def calls(self) -> list[FakeContestant]:
        return [self] * self.number

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        if self.lost is not None:
            raise self.lost
        return 0.001 * calls

    def outputs(self, shape: int) -> list[Tensor]:
        return self.results[shape]

    def close(self) -> None:
        self.stage.open -= 1


@pytest.fixture(scope="session")
def program() -> torch.export.ExportedProgram:
    """A small model, exported once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Linears().eval()
    return torch.export.export(module, (torch.randn(4, 16, generator=torch.Generator().manual_seed(1)),))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes are targets."""
    for name, where in fakes.ENGINES.items():
        monkeypatch.setitem(cast(dict[str, str], TARGETS.built_in), name, where)


@pytest.fixture
def stage(engines: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    """A scripted race of fakes."""
    found = Stage()
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "paired_calls", found.paired_calls)
    monkeypatch.setattr(contest, "Contestant", found.contestant)
    monkeypatch.setattr(limits, "measured", lambda: LIMITS)
    return found
