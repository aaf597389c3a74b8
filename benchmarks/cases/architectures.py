"""One pipeline over many architectures: what each pass changed, and how far each file is from where it came from.

A row falls short, and the case with it, where a pass changes nothing, a file does not compute what its graph does, or
a figure is below its bound.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator
from rich.text import Text
from torch import Tensor

import graphopt
from benchmarks.case import Settings, at_least, checked, table
from benchmarks.models import Architecture, Batch, architectures, tensors
from graphopt.numerics import metrics

PASSES = "sparsify{amount=0.3},low-rank{rank=0.25},quantize{scheme=dynamic}"
QUANTIZE = "quantize{scheme=dynamic}"
SAME_FUNCTION = 0.9999
"""Least cosine between a graph and the file written from it, in any engine."""
QUANTIZED = 0.98
"""Least cosine between a module and the same with int8 linears."""
SIMPLIFIED = 1e-5
"""Largest error of simplify, relative to the largest entry of the output."""

COLUMNS = (
    "model", "sparsify", "low-rank", "quantize", "file in ort", "portable file", "simplify error", "quantize cosine",
)  # fmt: skip


def run(settings: Settings) -> bool:
    title = f"{PASSES}: sites changed of eligible; of cosines and errors the worst of two shapes"
    rows, failures, holds = table(title, *COLUMNS), list[str](), True
    for name, make in architectures(settings).items():
        architecture = make()

        def cells(count: int, measure: Callable[[Architecture, int], list[Text]]) -> list[Text]:
            try:
                return measure(architecture, settings.threads)  # noqa: B023  # called within this turn
            except Exception as error:
                failures.append(f"{architecture.name}, {measure.__name__}: {type(error).__name__}: {error}")  # noqa: B023
                return [checked("failed", False)] * count

        row = [*cells(5, compressed), *cells(1, simplified), *cells(1, quantized)]
        holds = holds and not any(cell.style for cell in row)
        rows.add_row(name, *row)
    settings.console.print(rows)
    bounds = f"cosine of files {SAME_FUNCTION}, of quantize {QUANTIZED}; relative error of simplify {SIMPLIFIED:g}"
    settings.console.print(f"bounds: {bounds}", highlight=False)
    for failure in failures:
        settings.console.print(failure, style="red", markup=False, highlight=False)
    return holds


def compressed(architecture: Architecture, threads: int) -> list[Text]:
    """Sites changed by each pass; cosines of the exported and of the portable file to the optimized graph."""
    small = graphopt.optimize(architecture.module, PASSES, example_inputs=architecture.batches, threads=threads)
    cells = []
    for name in ("sparsify", "low-rank", "quantize"):
        record = next(record for record in small.report.passes if record.name == name)
        cells.append(checked(f"{record.changed} of {len(record.eligible)}", record.changed > 0))
    with tempfile.TemporaryDirectory() as folder:
        file = small.export(Path(folder) / "model.onnx")
        portable = small.export(Path(folder) / "portable.onnx", portable=True)
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        evaluator = ReferenceEvaluator(str(portable))
        for engine in (session, evaluator):
            worst = min(
                cosine(small.folded.evaluate(batch, small.folded.outputs), run_file(engine, batch))
                for batch in architecture.batches
            )
            cells.append(at_least(worst, SAME_FUNCTION, 6))
    return cells


def simplified(architecture: Architecture, threads: int) -> list[Text]:
    """The largest error of simplify alone against the module, relative to the output's largest entry."""
    small = graphopt.optimize(architecture.module, "simplify", example_inputs=architecture.batches, threads=threads)
    worst = max(
        metrics.max_error(a, b) / float(a.abs().max())
        for batch in architecture.batches
        for a, b in zip(architecture.outputs(batch), tensors(small(**batch)), strict=True)
    )
    return [checked(f"{worst:.1e}", worst <= SIMPLIFIED)]


def quantized(architecture: Architecture, threads: int) -> list[Text]:
    """The cosine of quantize alone to the module."""
    small = graphopt.optimize(architecture.module, QUANTIZE, example_inputs=architecture.batches, threads=threads)
    worst = min(cosine(architecture.outputs(batch), tensors(small(**batch))) for batch in architecture.batches)
    return [at_least(worst, QUANTIZED)]


def run_file(engine: Any, batch: Batch) -> list[Tensor]:
    """What an InferenceSession or a ReferenceEvaluator returns for a batch."""
    return [torch.as_tensor(output) for output in engine.run(None, {name: t.numpy() for name, t in batch.items()})]


def cosine(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The worst over the outputs."""
    return min(metrics.cosine(a, b) for a, b in zip(expected, found, strict=True))
