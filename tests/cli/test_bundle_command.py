"""graphopt bundle, verify, and optimize --bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.cli.test_cli import done, refused
from tests.serving.conftest import write_tokenizer


def manifest(bundle: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return found


def test_bundle_and_verify(model: Path, calibration: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    said = done("bundle", model, "-o", bundle, "--inputs", calibration, "--name", "tiny", "--reference", model)
    assert said.startswith("tiny: 2 files have their hashes") and f"written: {bundle}" in said
    assert manifest(bundle)["name"] == "tiny"
    found = json.loads(done("verify", bundle, "--json"))
    assert found["cases"] > 1 and found["missing_flags"] == ""


def test_optimize_writes_a_bundle(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done("optimize", model, "--bundle", bundle, "--no-measure", "--quiet")
    assert done("verify", bundle).startswith("bundle: 2 files have their hashes")


def test_a_flipped_byte_is_exit_code_1(model: Path, tmp_path: Path) -> None:
    done("bundle", model, "-o", tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model.onnx"
    content = np.fromfile(weights, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(weights)
    assert "model.onnx is not the file that the bundle was made with" in refused(1, "verify", tmp_path / "bundle")


def test_what_is_no_bundle(model: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refused(1, "verify", tmp_path / "nowhere")
    assert "is no bundle: it holds no manifest.json" in refused(1, "verify", tmp_path)
    assert "there is no file" in refused(2, "bundle", tmp_path / "no.onnx", "-o", tmp_path / "b")
    assert "dry-run writes nothing" in refused(2, "optimize", model, "--dry-run", "--bundle", tmp_path / "b")


def test_code_and_tokenizer_are_options(model: Path, tmp_path: Path) -> None:
    said = refused(1, "bundle", model, "-o", tmp_path / "b", "--code", "nobody's")
    assert 'needs the code "nobody\'s", which no installed package has' in said
    folder = write_tokenizer(tmp_path / "hf")
    said = refused(2, "bundle", model, "-o", tmp_path / "with", "--tokenizer", folder)
    assert "the model takes x, and a tokenizer gives input_ids" in said
