"""How much memory is free, by the files of Linux."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.measure import memory


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max", "9", 8_192_000), ("3000000", "1000000", 2_000_000), ("5", "9", 0)]
)
def test_the_lesser_of_machine_and_container(tmp_path: Path, limit: str, used: str, free: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    groups = tmp_path / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    (groups / "memory.max").write_text(f"{limit}\n")
    (groups / "memory.current").write_text(f"{used}\n")
    assert memory.available(tmp_path) == free


def test_is_unknown_without_these_files(tmp_path: Path) -> None:
    assert memory.available(tmp_path) is None
