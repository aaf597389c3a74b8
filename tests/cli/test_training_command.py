"""`graphopt optimize` with data to train on: a file comes back smaller, and as good as what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tests.cli.test_cli import done, refused

SCORE = """
import numpy as np

data = np.load(r"{data}")

def score(model):
    logits = np.asarray(list(model(x=data["x"]).values())[0])
    return float((logits.argmax(-1) == data["labels"]).mean())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier of four quadrants in an ONNX file, data with labels, and a script that scores models."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 2, generator=generator)
    labels = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    torch.onnx.export(net, (x[:2],), tmp_path / "model.onnx", dynamo=True, input_names=["x"], output_names=["logits"],
                      dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)  # fmt: skip
    np.savez(tmp_path / "data.npz", x=x.numpy(), labels=labels.numpy())
    (tmp_path / "script.py").write_text(SCORE.format(data=tmp_path / "data.npz"), encoding="utf-8")
    return tmp_path


def test_a_file_is_pruned_and_trained_on_labels(folder: Path) -> None:
    small = folder / "small.onnx"
    printed = done(
        "optimize", str(folder / "model.onnx"), "-o", str(small), "--json",
        "--passes", "prune{neurons=0.5},finetune{epochs=40 lr=0.03}",
        "--training", f"{folder / 'data.npz'}{{batch=32}}", "--evaluate", f"{folder / 'script.py'}:score",
        "--checkpoint", str(folder / "state"),
    )  # fmt: skip
    report = json.loads(printed)
    figures = report["shipped"]
    assert figures["trained"] == figures["shipped"] > 0.95 > figures["original"]
    data = np.load(folder / "data.npz")
    logits = ort.InferenceSession(small).run(None, {"x": data["x"]})[0]
    assert float((np.asarray(logits).argmax(-1) == data["labels"]).mean()) == pytest.approx(figures["shipped"])
    assert {file.suffix for file in (folder / "state").iterdir()} >= {".safetensors", ".json"}


def test_a_teacher_in_a_file(folder: Path) -> None:
    printed = done(
        "optimize", str(folder / "model.onnx"), "--dry-run", "--passes", "prune{neurons=0.5},distill{steps=4}",
        "--training", f"{folder / 'data.npz'}{{batch=32}}", "--teacher", str(folder / "model.onnx"),
    )  # fmt: skip
    assert "4 steps" in printed


def test_training_data_without_a_pass_that_trains_is_refused(folder: Path) -> None:
    printed = refused(
        2,
        "optimize", str(folder / "model.onnx"), "--dry-run", "--passes", "simplify",
        "--training", str(folder / "data.npz"),
    )  # fmt: skip
    assert "add distill or finetune" in printed
