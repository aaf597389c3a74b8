"""Text classification with BERT: fine-tune, prune, distil, quantize to int8, bundle with the tokenizer, serve, ask.

    python examples/text_classification.py
    python examples/text_classification.py --data my.csv --text COLUMN --label COLUMN
    python examples/text_classification.py --model FOLDER     # a BERT of yours, with its tokenizer

GRAPHOPT_DATA=FOLDER takes the sentences of SST-2 from that folder; without it and without --data they are made from
templates. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.request import Request, urlopen

import torch
import typer
from frame import Out, Size, Summary, data, folder, program
from texts import encoder
from torch import Tensor

import graphopt
from graphopt import UsageError
from graphopt.cli.sources import read_table
from graphopt.serving import Predictor

LENGTH = 64
"""Tokens at which texts are cut."""
SENTENCES = 4000
"""Of SST-2 that are taken; of a table of yours it is all rows."""
STEPS = 100
"""Batches that are learned from at least: a small table is read several times."""
SUBJECTS = "the film", "this book", "her new album", "the hotel", "our dinner", "the second season", "his speech"
WORDS = {
    "positive": ("wonderful", "a pleasure from start to end", "better than I had hoped", "charming", "worth its price"),
    "negative": ("dreadful", "a waste of time", "far worse than expected", "boring", "not worth the money"),
}
FRAMES = "{} was {}.", "I think {} was {}.", "To me {} was simply {}.", "Everyone said that {} was {}, and it is true."

Rows = list[tuple[str, str]]
"""Texts and their classes."""


def templates() -> Rows:
    """A few hundred sentences."""
    every = itertools.product(SUBJECTS, WORDS, range(5), FRAMES)
    return [(frame.format(subject, WORDS[kind][place]), kind) for subject, kind, place, frame in every]


def sst2() -> Rows | None:
    """Sentences of the train part of SST-2, where it is there."""
    file = data("sst2", "train.tsv")
    if file is None:
        return None
    _, rows = read_table(file, ["sentence", "label"])
    random.Random(0).shuffle(rows)
    return [(text, ("negative", "positive")[int(label)]) for _, (text, label) in rows[:SENTENCES]]


def table(path: Path, text: str | None, label: str | None) -> Rows:
    """The rows of a .csv or .tsv file. Raises UsageError, naming the line or the column."""
    names, rows = read_table(path)
    for option, name in (("--text", text), ("--label", label)):
        if name not in names:
            what = f"has no column {name!r}" if name else f"has several columns: say which one to read, {option} COLUMN"
            raise UsageError(f"{path} {what}; there are {', '.join(names)}")
    found = [(number, row[names.index(text or "")].strip(), row[names.index(label or "")]) for number, row in rows]
    for number, *cells in found:
        if not all(cells):
            empty = label if cells[0] else text
            raise UsageError(f"{path}, line {number}: {empty} is empty; fill it, or remove the line")
    classes = {kind for *_, kind in found}
    if len(classes) == 1:
        raise UsageError(f"{path}: all rows have the {label} {classes.pop()!r}; a classifier needs two classes")
    if 2 * len(classes) > len(found):
        raise UsageError(f"{path}: {label} has {len(classes)} values in {len(found)} rows; name a column of classes")
    return [(cell, kind) for _, cell, kind in found]


class Batches:
    """Texts in batches of about one length, tokenized when their turn comes, and the numbers of their classes."""

    def __init__(self, tokenizer: Any, rows: Rows, classes: Sequence[str], batch: int) -> None:
        self.tokenizer, self.classes = tokenizer, list(classes)
        ordered = sorted(rows, key=lambda row: len(row[0]))  # alike in length: little padding
        self.parts = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
        random.Random(0).shuffle(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for part in self.parts:
            texts = [text for text, _ in part]
            inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
            yield {**inputs, "labels": torch.tensor([self.classes.index(kind) for _, kind in part])}


def accuracy(model: Callable[..., Any], batches: Batches) -> float:
    """Share of texts whose class is found."""
    right = []
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            right.append(torch.as_tensor(model(**batch)["logits"]).argmax(-1) == labels)
    return float(torch.cat(right).float().mean())


def served(bundle: Path, texts: Sequence[str]) -> list[Any]:
    """What `graphopt serve` answers to texts over HTTP. Raises UsageError where it does not start."""
    command = [sys.executable, "-m", "graphopt", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address, line = "", ""
        for line in server.stderr:
            address = line.split()[-1] if "listening on" in line else address
            if address and "loaded" in line:
                break
        else:
            raise UsageError(f"the server did not start: {line.strip()}")
        try:
            requests = (Request(f"{address}/predict", text.encode(), {"Content-Type": "text/plain"}) for text in texts)
            return [json.load(urlopen(one))["predictions"][0] for one in requests]
        finally:
            server.terminate()


def main(
    size: Size = "full",
    out: Out = Path("out/text_classification"),
    table_file: Annotated[Path | None, typer.Option("--data", help="A .csv or .tsv file with a header line.")] = None,
    text: Annotated[str | None, typer.Option(help="Its column of texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Its column of classes.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a BERT and its tokenizer; MiniLM without it.")] = None,
) -> None:
    """Make a small, fast classifier of texts, and a bundle that answers."""
    out, summary = folder(out), Summary()
    full = size == "full"
    rows = (sst2() or templates()) if table_file is None else table(table_file, text, label)
    random.Random(0).shuffle(rows)
    rows = rows if full else rows[:20]
    classes = sorted({kind for _, kind in rows})
    module, tokenizer = encoder(
        "AutoModelForSequenceClassification", model, size,
        id2label=dict(enumerate(classes)), label2id={kind: number for number, kind in enumerate(classes)},
    )  # fmt: skip
    cut = max(1, len(rows) // 5)
    dev, train = (Batches(tokenizer, part, classes, 32 if full else 8) for part in (rows[:cut], rows[cut:]))

    def score(candidate: Any) -> float:
        return accuracy(candidate, dev)

    steps = f"steps={max(len(train), STEPS)}" if full else "steps=1"
    tuned = graphopt.optimize(module, f"finetune{{{steps} lr=1e-4}}", training=train, evaluate=score, measure=False)
    small = graphopt.optimize(
        tuned,
        f"prune{{neurons=0.5 heads=0.25}},distill{{{steps} lr=1e-4}},"
        f"quantize{{scheme=static}},distill{{steps={30 if full else 1} lr=1e-5}}",
        training=train, calibration=train, calibration_steps=8, evaluate=score,
    )  # fmt: skip

    checkpoint = out / "checkpoint"  # the model as it was fine-tuned, its tokenizer, and the names of the classes
    module.load_state_dict(tuned.state_dict())
    module.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    bundle = small.bundle(out / "bundle", tokenizer=checkpoint)
    asked = [row for row, _ in rows[:3]]
    for row, answer in zip(asked, served(bundle, asked), strict=True):
        print(f"{row[:80]}  {answer[0]['label']} ({answer[0]['score']:.0%})")
    summary["accuracy"] = (
        f"{score(tuned):.1%} -> {score(Predictor(bundle)):.1%} of {cut} texts that it was not trained on"
    )
    summary.model(small, bundle / "model.onnx", size)
    summary.show()


if __name__ == "__main__":
    program(main)
