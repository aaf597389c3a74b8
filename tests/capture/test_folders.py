"""A folder of Hugging Face as a model: its config and its safetensors, and nothing that can run code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from typer.testing import CliRunner

import graphopt
from graphopt.capture.folders import opened
from graphopt.cli import app as cli
from graphopt.errors import CaptureError
from tests.models import bert, padding, tokens


def saved(folder: Path, **options: Any) -> None:
    model: Any = bert()
    model.save_pretrained(folder, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_is_a_model(folder: Path) -> None:
    loader = [{"input_ids": tokens(), "attention_mask": padding(), "labels": torch.ones(2)}]
    small = graphopt.optimize(str(folder), "quantize{scheme=dynamic}", calibration=loader)
    assert small.report.source.endswith("BertModel")
    inputs = {"input_ids": tokens(1, 3), "attention_mask": padding(1, 3)}
    expected, found = bert()(**inputs), small(**inputs)
    assert torch.cosine_similarity(found.pooler_output, expected.pooler_output).min() > 0.99


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    found = opened(tmp_path)
    expected = bert().state_dict()
    assert not found.training and found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def changed(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_folders_that_are_no_safe_models_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = folder / "ran"
    (folder / "modeling_mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    changed(folder, architectures=["MyBert"], auto_map={"AutoModel": "modeling_mine.MyBert"})
    with pytest.raises(CaptureError, match=r"is a MyBert, which transformers .* code in a folder is never run"):
        opened(folder)
    changed(folder, architectures=["BertModel"])
    assert type(opened(folder)).__name__ == "BertModel" and not ran.exists()
    for value in (None, [], "BertModel", [3]):
        changed(folder, architectures=value)
        with pytest.raises(CaptureError, match="names no architecture"):
            opened(folder)
    changed(folder, architectures=["BertConfig"])
    with pytest.raises(CaptureError, match="is a BertConfig, which"):
        opened(folder)
    changed(folder, architectures=["BertModel"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(CaptureError, match="pip install transformers"):
            opened(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CaptureError, match=r"holds pytorch_model\.bin, which may be a pickle .* save_pretrained"):
        graphopt.optimize(folder, example_inputs={"input_ids": tokens()})
    (folder / "config.json").write_text("{")
    with pytest.raises(CaptureError, match=r"config\.json is no JSON"):
        opened(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CaptureError, match=r"is a folder without config\.json"):
        opened(folder)


def test_a_folder_from_the_shell(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", input_ids=tokens().numpy(), attention_mask=padding().numpy())
    command = ["optimize", str(folder), "-o", str(tmp_path / "small.onnx"), "--inputs", str(tmp_path / "inputs.npz")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    session = ort.InferenceSession(str(tmp_path / "small.onnx"))
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
