"""Sentence embeddings with MiniLM: quantize alone, or cut a part of it first and recover by distillation.

    python examples/sentence_embeddings.py

GRAPHOPT_DATA=FOLDER takes the sentences of the STS benchmark from that folder; else they are made from templates.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from frame import Deployed, Out, Size, Summary, data, folder, program
from texts import encoder
from torch import Tensor

import graphopt

PARTS = (
    ("a child", "the old sailor", "a young doctor", "my neighbour", "the orchestra", "a stray dog", "an engineer"),
    ("is waiting for", "has lost", "is looking at", "writes about", "dreams of", "cannot find", "has painted"),
    ("a red bicycle", "the last train", "a letter from home", "fresh bread", "the broken clock", "a quiet garden"),
    ("in the rain", "every Sunday", "near the harbour", "before breakfast", "without a word", "at the station"),
    ("", ", it seems", ", I hear", ", as always"),
)


def sentences(number: int, seed: int) -> list[str]:
    """From the STS benchmark where it is there: `number` of them, drawn from its train or, for seed 0, its dev part."""
    file = data("stsb", "sts-train.csv" if seed else "sts-dev.csv")
    if file is None:
        every = [" ".join(parts[:-1]) + parts[-1] + "." for parts in itertools.product(*PARTS)]
    else:
        every = [cell for line in file.read_text("utf-8").splitlines() for cell in line.split("\t")[5:7]]
    return random.Random(seed).sample(every, number)


class Batches:
    """Sentences in batches, tokenized when their turn comes."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], batch: int = 32) -> None:
        self.tokenizer = tokenizer
        self.parts = [list(texts[start : start + batch]) for start in range(0, len(texts), batch)]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Any:
        for part in self.parts:
            yield dict(self.tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt"))


def embeddings(model: Callable[..., Any], batches: Batches) -> Tensor:
    """One row for each sentence: the mean of its tokens, of length 1."""
    rows = []
    for batch in batches:
        with torch.no_grad():
            states = model(**batch)["last_hidden_state"]
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def fidelity(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The mean cosine to the embeddings before, and the rank correlation of the similarities of all pairs."""
    rows, columns = torch.triu_indices(len(before), len(before), 1)
    ranks = torch.stack([(x @ x.T)[rows, columns].argsort().argsort().double() for x in (before, after)])
    return float((before * after).sum(-1).mean()), float(torch.corrcoef(ranks)[0, 1])


def main(size: Size = "full", out: Out = Path("out/sentence_embeddings")) -> None:
    """Compress a sentence encoder in two ways, and compare what they cost."""
    out, summary = folder(out), Summary()
    full = size == "full"
    module, tokenizer = encoder("AutoModel", None, size)
    train = Batches(tokenizer, sentences(3072 if full else 16, seed=1), 32 if full else 8)
    dev = Batches(tokenizer, sentences(256 if full else 8, seed=0), 32 if full else 8)
    exact = embeddings(module, dev)

    recover = f"distill{{{'epochs=2' if full else 'steps=1'} lr=2e-4 hidden=1}}"
    for name, passes in {
        "int8": "quantize{scheme=static}",
        "cut": f"prune{{neurons=0.5 heads=0.25}},{recover},quantize{{scheme=static}}",
    }.items():
        small = graphopt.optimize(
            module, passes, training=train if "distill" in passes else None, calibration=train, calibration_steps=8
        )
        path = small.export(out / f"{name}.onnx")
        cosine, ranks = fidelity(exact, embeddings(Deployed(path), dev))
        summary[f"{name} accuracy"] = f"cosine {cosine:.4f} to float32, rank correlation of similarities {ranks:.4f}"
        summary.model(small, path, size, name)
    summary.show()


if __name__ == "__main__":
    program(main)
