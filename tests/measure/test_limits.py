"""What a machine reaches, on a clock that only work advances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.measure import limits
from graphopt.measure.cache import Timings
from tests.cli.test_cli import done


class Clock:
    """Each look at it takes 20 ms."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.02
        return self.now


def test_is_measured_once_for_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIZE", 64)
    monkeypatch.setattr(limits, "COPIED", 1024)
    clock, kept = Clock(), Timings(tmp_path / "timings.sqlite")
    found = limits.measured(clock, kept)
    assert found.macs == pytest.approx(dict.fromkeys(["float32", "bfloat16", "int8"], 64**3 / 0.02))
    assert found.bandwidth == pytest.approx(2 * 1024 / 0.02)
    assert clock.now < 4 * (limits.SECONDS + 0.1)
    before = clock.now
    assert limits.measured(clock, kept) == found and clock.now == before
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # other instructions are another machine
    limits.measured(clock, kept)
    assert clock.now > before
    assert "float32 0, bfloat16 0, int8 0 GMAC/s" in limits.line(found)


def test_what_is_timed_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIZE", 32)
    for product in limits._products().values():
        torch.testing.assert_close(product(), torch.full((32, 32), 32.0), check_dtype=False)


def test_targets_says_what_the_machine_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "this machine: not measured" in done("targets")
    monkeypatch.delenv("GRAPHOPT_MEASURE")
    known = limits.Limits({"float32": 126e9, "int8": 2100e9}, 28e9, 2)
    monkeypatch.setattr(limits, "measured", lambda: known)
    assert "this machine, 2 threads: float32 126, int8 2100 GMAC/s, memory 28.0 GB/s" in done("targets")
    assert '"bandwidth": 28000000000.0' in done("targets", "--json")
