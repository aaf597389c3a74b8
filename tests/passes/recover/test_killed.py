"""A training that is killed again and again ends in the same file, byte for byte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.passes.recover import trained_once

ROOT = Path(__file__).parents[3]


def start(*arguments: Path) -> subprocess.Popen[str]:
    """With another order of sets in each process, as Python has it by default."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    return subprocess.Popen(
        [sys.executable, trained_once.__file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip


def run(*arguments: Path) -> int:
    """The steps that a process took to its end."""
    with start(*arguments) as process:
        steps, _ = process.communicate()
    assert process.returncode == 0
    return len(steps.split())


def killed(steps: int, seconds: float, *arguments: Path) -> None:
    """A process that is killed some time after its n-th step."""
    with start(*arguments) as process:
        assert process.stdout is not None
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(seconds)
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_that_is_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    unbroken, resumed, folder = tmp_path / "unbroken.onnx", tmp_path / "resumed.onnx", tmp_path / "folder"
    assert run(unbroken) == trained_once.STEPS
    for _ in range(5):
        killed(draw.randint(1, trained_once.STEPS // 6), draw.uniform(0, 0.02), resumed, folder)
    assert run(resumed, folder) < trained_once.STEPS - 5
    assert resumed.read_bytes() == unbroken.read_bytes()
    assert run(resumed, folder) == 0  # all of it was done
    assert resumed.read_bytes() == unbroken.read_bytes()
