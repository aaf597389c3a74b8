"""--mesh, and the commands under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import refused, write_model


def test_a_mesh_needs_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    source, target = write_model(tmp_path / "m.onnx"), tmp_path / "small.onnx"
    said = refused(2, "optimize", source, "-o", target, "--passes", "quantize", "--mesh", "dp=2")
    assert "takes 2 processes, and there is 1" in said and "torchrun --nproc-per-node 2" in said
    assert not target.exists()


@pytest.mark.slow
def test_the_demo_distils_in_two_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "graphopt", "demo", "--distill", "-o", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("written: ") == 1 and (tmp_path / "model.onnx").exists()
    first, last = found.stdout.partition(" steps: ")[2].splitlines()[0].split(" to ")
    assert float(last) < float(first)
