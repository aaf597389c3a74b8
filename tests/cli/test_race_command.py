"""A race from the shell: several targets, and what cannot be raced."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_cli import done, refused


def test_takes_several_targets(model: Path, tmp_path: Path) -> None:
    arguments = "optimize", model, "-o", tmp_path / "small.onnx", "--no-measure", "--within", "2"
    shown = done(*arguments, "--target", "fastest", "--precision", "float32")
    assert "nothing is measured" in shown and "race of the engines" in shown
    facts = json.loads((tmp_path / "small.onnx.json").read_text())
    assert facts["load"]["python"].endswith("('small.onnx', options, providers=['CPUExecutionProvider'])")
    assert "torch-cpu" in done(*arguments, "--target", "onnxruntime,torch-cpu")


def test_what_cannot_be_raced(model: Path, tmp_path: Path) -> None:
    arguments = "optimize", model, "--dry-run"
    assert "can only be raced on this one" in refused(2, *arguments, "--target", "fastest", "--cpu", "avx2")
    assert "did you mean 'bfloat16'" in refused(2, *arguments, "--precision", "bf16")
    assert "no target 'onnx'" in refused(2, *arguments, "--target", "torch-cpu,onnx")
    wrong = "optimize", model, "-o", tmp_path / "small.xyz", "--target", "onnxruntime,torch-cpu"
    assert "writes .onnx" in refused(2, *wrong)
