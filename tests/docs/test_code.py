"""The code in README.md and docs/ runs, page by page, as it stands there.

A page finds `model`, `batch` and `loader` prepared, and `model.onnx`, `quantized.onnx` and `data.npz` in its folder.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch import Tensor, nn
from typer.testing import CliRunner

from graphopt.cli.app import app
from tests.models import Encoder, exported, padding, seeded, tokens

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BATCHES = 2


def command(example: Example) -> None:
    """Run the lines of a shell block that call graphopt."""
    for line in str(example.parsed).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "graphopt", line
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def parsed(page: Path) -> Document:
    parsers = (PythonCodeBlockParser(), CodeBlockParser("shell", command), SkipParser())
    return Sybil(parsers, path=str(page.parent), patterns=[page.name]).parse(page)


def batch(seed: int = 0) -> dict[str, Tensor]:
    return {"ids": tokens(seed=seed), "mask": padding()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read."""
    folder = tmp_path_factory.mktemp("docs")
    onnx.save(exported(seeded(Encoder, 1), batch(), 17, dynamo=False), folder / "model.onnx")
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(folder / "model.onnx", folder / "quantized.onnx")
    rows = [batch(seed) for seed in range(BATCHES)]
    data = {name: np.concatenate([row[name].numpy() for row in rows]) for name in rows[0]}
    np.savez(folder / "data.npz", allow_pickle=False, **data)
    return folder


def marked(page: Path) -> Any:
    """Pages that train take most of a minute each."""
    return pytest.param(page, marks=[pytest.mark.slow] if "training" in page.name else [])


@pytest.mark.parametrize(
    "page", [marked(page) for page in PAGES if list(parsed(page).examples())], ids=lambda page: page.name
)
def test_code_runs(page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("a_page")  # where the dataclasses of a page look their types up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model: nn.Module = seeded(Encoder, 1)
    prepared: dict[str, Any] = {"model": model, "batch": batch(), "loader": [batch(seed) for seed in range(BATCHES)]}
    document = parsed(page)
    document.namespace = module.__dict__
    document.namespace.update(prepared)
    for example in document.examples():
        example.evaluate()
