"""`graphopt compare`: outputs, sites, JSON, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_cli import RANDOM, done, refused, write_model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, its quantized form, and inputs."""
    np.savez(tmp_path / "inputs.npz", x=RANDOM.normal(size=(20, 16)).astype(np.float32))
    first, second = write_model(tmp_path / "tiny.onnx"), tmp_path / "small.onnx"
    done("optimize", first, "-o", second, "--passes", "quantize{scheme=weight-only}")
    return first, second, tmp_path / "inputs.npz"


def test_outputs_and_sites(models: tuple[Path, Path, Path]) -> None:
    first, second, inputs = models
    shown = done("compare", first, second, "--data", inputs, "--sites").splitlines()
    assert shown[0].split() == ["output", "SQNR", "cosine", "max", "error", "top-1"]
    assert "over 3 batches; SQNR and cosine are of the worst" in shown and "no site is below 10 dB" in shown
    rows = [line.split() for line in shown]
    assert [row[0] for row in rows if row[1:2] == ["linear"]] == ["encoder.fc1", "head"]
    assert not any("site" in line for line in done("compare", first, second, "--data", inputs).splitlines())


def test_json(models: tuple[Path, Path, Path]) -> None:
    first, second, inputs = models
    facts = json.loads(done("compare", first, second, "--data", inputs, "--steps", 1, "--json"))
    assert facts["batches"] == 1 and facts["propagation"] is None and facts["outputs"][0]["sqnr"] > 30
    facts = json.loads(done("compare", first, first, "--data", inputs, "--sites", "--json"))
    assert {one["sqnr"] for one in facts["propagation"]["sites"]} == {"inf"} and facts["propagation"]["lost"] is None


def test_refusals(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first, _, inputs = models
    missing = tmp_path / "none.onnx"
    assert refused(2, "compare", first, missing, "--data", inputs) == f"there is no file {missing}"
