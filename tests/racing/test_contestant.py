"""Processes that run one graph: a healthy one, and those that fail, crash and hang."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.lowering.backend import Backend
from graphopt.racing.contestant import Contestant, Lost
from graphopt.result import Optimized
from tests.racing import fakes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(program: torch.export.ExportedProgram) -> Optimized:
    return graphopt.optimize(program, "quantize{scheme=dynamic}", target="fbgemm")


def started(backend: Backend, small: Optimized, folder: Path, **options: float) -> Contestant:
    return Contestant(backend, small.lowered, small.feeds, folder, 1, **options)


def test_runs_and_times_a_graph(small: Optimized, tmp_path: Path) -> None:
    contestant = started(fakes.Healthy(), small, tmp_path)
    try:
        expected = small.runner(small.feeds[0])
        torch.testing.assert_close(contestant.outputs(0), expected)
        assert contestant.calls[0].seconds(3) > 0
    finally:
        contestant.close()


@pytest.mark.parametrize(
    ("backend", "how"),
    [
        (fakes.Failing(), "failed: this engine has no kernel for that"),
        (fakes.Crashing(), r"its process died of signal 11 \(SIGSEGV\)"),
        (fakes.Hanging(), "gave no answer in 1 s"),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_says_how_an_engine_is_lost(backend: Backend, how: str, small: Optimized, tmp_path: Path) -> None:
    with pytest.raises(Lost, match=how):
        started(backend, small, tmp_path, limit=1.0 if backend.name == "hanging" else 60.0)


def test_a_process_that_dies_later_is_lost(small: Optimized, tmp_path: Path) -> None:
    contestant = started(fakes.Healthy(), small, tmp_path)
    try:
        contestant._process.kill()
        with pytest.raises(Lost, match=r"signal 9 .*memory"):
            contestant.seconds(0, 1)
    finally:
        contestant.close()
