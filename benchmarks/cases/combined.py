"""Pruning, sparsity, low rank and int8 in one call on MiniLM: one file, and what each step cost and bought."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

import graphopt
from benchmarks import sentences, trained
from benchmarks.case import Settings, table
from benchmarks.cases.pruned import outputs
from graphopt.measure.timing import paired
from graphopt.report import terminal

PIPELINE = "prune{flops=0.7},sparsify{pattern=2:4 criterion=sparsegpt},low-rank{params=0.9},quantize"
SHAPES = ((1, 128), (8, 128))


def run(settings: Settings) -> bool:
    task = trained.minilm(settings)
    tokens = sentences.tokenizer()
    examples = [sentences.filled(tokens, *shape) for shape in SHAPES]
    options: dict[str, Any] = {
        "example_inputs": examples, "calibration": task.calibration, "threads": settings.threads
    }  # fmt: skip
    small = graphopt.optimize(task.model, PIPELINE, **options)
    settings.console.print(terminal.report(small.report))
    others = {"fp32": None, "int8": "quantize"}
    plain = {name: graphopt.optimize(task.model, passes, **options) for name, passes in others.items()}
    rows = table("MiniLM, times as fast as fp32", "", *(f"{b}x{n}" for b, n in SHAPES), "Spearman on dev", "MB")
    with tempfile.TemporaryDirectory() as folder:
        for name, one in (plain | {"all four": small}).items():
            file = one.export(Path(folder) / f"{name}.onnx")
            ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])  # the file alone, as deployed
            ratios = [
                paired(
                    {"fp32": partial(plain["fp32"].runner, batch), "it": partial(one.runner, batch)},
                    baseline="fp32",
                    rounds=settings.rounds,
                )["it"]
                for batch in examples
            ]
            score = task.score(task.predict(partial(outputs, one)))
            cells = [f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" for ratio in ratios]
            rows.add_row(name, *cells, f"{score:.2f}", f"{file.stat().st_size / 1e6:.1f}")
    settings.console.print(rows)
    return True
