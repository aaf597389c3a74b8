"""Processes that run one graph: a healthy one, and those that fail, crash and hang."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

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


def started(backend: Backend, small: Optimized, folder: Path, **options: Any) -> Contestant:
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
    ("backend", "how", "transient"),
    [
        (fakes.Failing(), "failed: this engine has no kernel for that", False),
        (fakes.Crashing(), r"its process died of signal 11 \(SIGSEGV\)", False),
        (fakes.Hanging(), "gave no answer in 1 s", True),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_says_how_an_engine_is_lost(
    backend: Backend, how: str, transient: bool, small: Optimized, tmp_path: Path
) -> None:
    with pytest.raises(Lost, match=how) as raised:
        started(backend, small, tmp_path, limit=1.0 if backend.name == "hanging" else 60.0)
    assert raised.value.transient == transient


def test_an_engine_that_is_far_slower_than_another_is_lost_for_good(
    small: Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.racing.contestant.START", 1.0)
    with pytest.raises(Lost, match="gave no answer in 1 s") as raised:
        started(fakes.Hanging(), small, tmp_path, reference=[0.01])
    assert not raised.value.transient


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "signal 9 .*memory"), (signal.SIGSTOP, "gave no answer in 5 s")]
)
def test_a_process_that_is_lost_later_has_ended(number: int, how: str, small: Optimized, tmp_path: Path) -> None:
    """Whatever it did: one that hangs would take time of the others."""
    contestant = started(fakes.Healthy(), small, tmp_path)
    contestant._limit = 5.0
    contestant._process.send_signal(number)
    with pytest.raises(Lost, match=how) as raised:
        contestant.seconds(0, 1)
    assert raised.value.transient and contestant._process.poll() is not None
    with pytest.raises(Lost, match=how) as again:  # as another block of the race would ask
        contestant.seconds(0, 1)
    assert str(again.value) == str(raised.value) and again.value.transient
    contestant.close()


def test_a_process_that_was_ended_says_so(small: Optimized, tmp_path: Path) -> None:
    contestant = started(fakes.Healthy(), small, tmp_path)
    contestant.close()
    with pytest.raises(Lost, match="has been ended"):
        contestant.seconds(0, 1)


def test_what_has_no_room_says_where(small: Optimized, tmp_path: Path) -> None:
    """As on a full disk: no file may be longer than some bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(Lost, match=r"cannot be written \(.*\): make room there, or set TMPDIR") as raised:
            started(fakes.Healthy(), small, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.transient
