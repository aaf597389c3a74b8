"""`graphopt sensitivity`: the table, JSON, the cache, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.cli.test_cli import done, refused, run


def test_shows_the_most_sensitive_site_first(model: Path, calibration: Path) -> None:
    shown = done("sensitivity", model, "--setting", "low-rank{rank=1}", "--calibration", calibration)
    lines = shown.splitlines()
    figures = {line.split()[0]: float(line.split()[1]) for line in lines[2:4]}
    assert set(figures) == {"encoder.fc1", "head"} and list(figures.values()) == sorted(figures.values())
    assert "over 3 batches" in shown and "setting: low-rank{rank=1}" in lines


def test_several_settings_as_json_with_a_cache(model: Path, calibration: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    settings = ["--setting", "low-rank{rank=1}", "--setting", "quantize{scheme=dynamic}"]
    options = ["--calibration", calibration, "--cache", cache, "--steps", 1, "--sites", "head", "--json"]
    arguments = ["sensitivity", model, *settings, *options]
    facts = json.loads(done(*arguments))
    assert facts["settings"] == ["low-rank{rank=1}", "quantize{scheme=dynamic}"] and facts["batches"] == 1
    low_rank, quantize = facts["rows"]
    assert low_rank["site"] == quantize["site"] == "head"
    assert low_rank["damage"]["sqnr"] < quantize["damage"]["sqnr"]
    kept = cache.read_text()
    assert len(kept.splitlines()) == 2
    assert json.loads(done(*arguments)) == facts and cache.read_text() == kept


def test_refusals(model: Path, calibration: Path, tmp_path: Path) -> None:
    setting = "--setting", "quantize"
    assert refused(2, "sensitivity", tmp_path / "none.onnx", *setting, "--calibration", calibration) == (
        f"there is no file {tmp_path / 'none.onnx'}"
    )
    unasked = run("sensitivity", model, *setting)
    assert unasked.exit_code == 2 and "--calibration" in unasked.stderr
    assert "simplify has no targets" in refused(
        2, "sensitivity", model, "--setting", "simplify", "--calibration", calibration
    )
    assert "'encoder.fc2' selects no site of the model; did you mean 'encoder.fc1'?" in refused(
        2, "sensitivity", model, *setting, "--calibration", calibration, "--sites", "encoder.fc2"
    )
    np.savez(tmp_path / "wrong.npz", y=np.zeros((4, 16), np.float32))
    assert "calibration has no 'x'" in refused(
        2, "sensitivity", model, *setting, "--calibration", tmp_path / "wrong.npz"
    )
