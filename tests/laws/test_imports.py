"""The layers of the import contract in pyproject.toml: they hold, and an import that goes up breaks them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("graphopt", "passes", "backends", "pyproject.toml")


def checkout(folder: Path) -> Path:
    """A copy of the sources, links kept."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on a checkout; its sources come before an installed graphopt."""
    program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_the_layers_hold(tmp_path: Path) -> None:
    done = lint(checkout(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "planted", "broken"),
    [
        ("passes/cast.py", "from graphopt.cli import app", "graphopt.passes.cast -> graphopt.cli.app"),
        ("passes/prune/sizing.py", "def f():\n    import graphopt.api", "graphopt.passes.prune.sizing -> graphopt.api"),
        ("backends/openvino.py", "from graphopt.passes import cast", "graphopt.backends.openvino -> graphopt.passes"),
        ("graphopt/ir/graph.py", "from graphopt.numerics import metrics", "graphopt.ir.graph -> graphopt.numerics"),
        ("graphopt/numerics/fold.py", "import numpy", "graphopt.numerics.fold -> numpy"),
        ("passes/approximate.py", "import onnx_ir", "graphopt.passes.approximate -> onnx_ir"),
        ("graphopt/measure/timing.py", "import onnxruntime", "graphopt.measure.timing -> onnxruntime"),
    ],
)
def test_an_import_that_goes_up_is_seen(file: str, planted: str, broken: str, tmp_path: Path) -> None:
    path = checkout(tmp_path) / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{planted}\n", encoding="utf-8")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert broken in " ".join(done.stdout.split())


def test_a_pass_sees_no_graph_of_a_framework(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "passes", tmp_path / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "passes" / "cast.py").write_text("import torch\n\nx: torch.fx.Graph\n", encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "passes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "TID251" in done.stdout and "passes/cast.py:3" in done.stdout
