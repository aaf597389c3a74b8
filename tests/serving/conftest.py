"""Bundles that several tests answer from, made once; a test that changes one takes a copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphopt
from tests.models import VOCABULARY, Encoder, exported, model, padding, seeded, tokens

WORDS = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(2, VOCABULARY))]


class Classifier(nn.Module):
    """input_ids, attention_mask (batch, seq) -> logits (batch, 3), which padding leaves as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(1), nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids, attention_mask)
        weights = attention_mask[..., None].to(hidden.dtype)
        return {"logits": self.head((hidden * weights).sum(1) / weights.sum(1))}


def batch() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": padding()}


def write_tokenizer(folder: Path, words: list[str] = WORDS, **config: Any) -> Path:
    """A Hugging Face folder without weights: a tokenizer of words, and the settings of a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ids, mask (batch, seq) -> y (batch, seq, 32)."""
    path = tmp_path_factory.mktemp("file") / "encoder.onnx"
    onnx.save(exported(seeded(Encoder, 1), {"ids": tokens(), "mask": padding()}, 17, dynamo=False), path)
    return path


@pytest.fixture(scope="session")
def encoder(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a float file."""
    folder = tmp_path_factory.mktemp("bundles") / "encoder"
    return graphopt.bundle(model_file, folder, inputs=[{"ids": tokens(), "mask": padding()}])


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer and labels, made of what `optimize` returned; its weights are dynamic int8."""
    folder = tmp_path_factory.mktemp("classifier")
    origin = write_tokenizer(
        folder / "hf",
        architectures=["TinyForSequenceClassification"],
        id2label={"0": "bad", "1": "good", "2": "other"},
        max_position_embeddings=32,
    )
    with torch.no_grad():
        small = graphopt.optimize(
            seeded(Classifier), "quantize{scheme=dynamic}", example_inputs=batch(), measure=False, agree=False
        )
    return small.bundle(folder / "classifier", tokenizer=origin)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a bundle, to be damaged."""

    def copy(bundle: Path) -> Path:
        return Path(copytree(bundle, tmp_path / "copies" / bundle.name))

    return copy


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a language model that writes w3 behind w2, w4 behind w3, and ends behind the last word."""
    folder = tmp_path_factory.mktemp("writer")
    origin = write_tokenizer(
        folder / "hf", architectures=["TinyForCausalLM"], eos_token_id=VOCABULARY - 1, max_position_embeddings=64
    )
    next_token = torch.eye(VOCABULARY).roll(1, 1) * 5
    graph = "g (int64[batch, seq] input_ids) => (float[batch, seq, 48] logits) {logits = Gather(T, input_ids)}"
    onnx.save(model(graph, {"T": next_token}), folder / "bigram.onnx")
    return graphopt.bundle(
        folder / "bigram.onnx", folder / "writer", tokenizer=origin, inputs=[{"input_ids": tokens()}]
    )
