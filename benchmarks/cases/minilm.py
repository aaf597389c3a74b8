"""all-MiniLM-L6-v2 in ONNX Runtime: int8 against the exporter's fp32 files, in speed and in what the embeddings say.

The baseline is torch.onnx.export(dynamo=True) at its default opset, in a session with default options but for the
number of threads; a second table has the same model at opset 23, which is faster by itself.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from rich.table import Table
from torch import Tensor, nn

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, at_least, checked, table, times
from benchmarks.models import Batch, minilm
from graphopt.backends.measure import Ratio, geometric_mean, paired
from graphopt.numerics import metrics

SHAPES = ((1, 16), (1, 128), (8, 128), (32, 32))
COSINE = 0.99
"""Least mean cosine of embeddings to fp32's."""
SPEEDUP = 2.7
"""Least geometric mean of graphopt's better scheme over the baseline."""
CALIBRATION = 512
"""Sentences of STS-B train to calibrate on."""

BASELINE, OPSET_23 = "fp32, default opset", "fp32, opset 23"
DYNAMIC, STATIC, PEER = "graphopt dynamic", "graphopt static", "onnxruntime quantize_dynamic"


def run(settings: Settings) -> bool:
    model, tokens = minilm(), sentences.tokenizer()
    shapes = {f"{batch}x{length}": sentences.filled(tokens, batch, length) for batch, length in SHAPES}
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(model, list(shapes.values()), calibration(settings, tokens), Path(folder))
        sessions = {name: session(path, settings.threads) for name, path in files.items()}
        holds = True
        for baseline in (BASELINE, OPSET_23):
            rows, means = speeds(sessions, baseline, shapes, settings.rounds)
            settings.console.print(rows)
            if baseline == BASELINE:
                best = max(means[DYNAMIC], means[STATIC])
                holds = best >= SPEEDUP
                verdict = checked(f"graphopt's better scheme: {best:.2f}, bound {SPEEDUP}", holds)
                settings.console.print(verdict)
        rows, near = quality(sessions, files, tokens, settings)
        settings.console.print(rows)
    return holds and near


def make_files(model: nn.Module, examples: list[Batch], batches: list[Batch], folder: Path) -> dict[str, Path]:
    """Every file that is compared, by its row's name."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = {name: folder / f"{index}.onnx" for index, name in enumerate((BASELINE, OPSET_23, DYNAMIC, STATIC, PEER))}
    export(model, examples[-1], files[BASELINE])
    export(model, examples[-1], files[OPSET_23], opset=23)
    for name, scheme in ((DYNAMIC, "dynamic"), (STATIC, "static")):
        given = batches if name == STATIC else None
        small = graphopt.optimize(model, f"quantize{{scheme={scheme}}}", example_inputs=examples, calibration=given)
        small.export(files[name])
    with quiet():
        quantize_dynamic(files[BASELINE], files[PEER], per_channel=True, weight_type=QuantType.QInt8)
    return files


def export(model: nn.Module, example: Batch, path: Path, opset: int | None = None) -> None:
    """torch's own exporter, at its default opset without one, with dynamic batch and length."""
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    with quiet():
        program = torch.onnx.export(
            model, (), kwargs=example, dynamo=True, dynamic_shapes=axes, opset_version=opset, verbose=False
        )
        assert program is not None
        program.save(str(path), external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress of exporters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def calibration(settings: Settings, tokens: Any) -> list[Batch]:
    """Sentences of STS-B train where there is data, the bundled ones elsewhere."""
    path = settings.file("stsb", "sts-train.csv")
    if path is None:
        return sentences.batches(tokens, sentences.BUNDLED, 8)
    pairs = sentences.read_pairs(path)
    return sentences.batches(tokens, sentences.spread(pairs.first, CALIBRATION))


def session(path: Path, threads: int) -> ort.InferenceSession:
    """Default options, but for the threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def speeds(
    sessions: Mapping[str, ort.InferenceSession], baseline: str, shapes: Mapping[str, Batch], rounds: int
) -> tuple[Table, dict[str, float]]:
    """Times as fast as the baseline: a row a candidate, a column a shape; and the geometric means."""
    others = ["control", *(name for name in sessions if name != baseline)]
    cells: dict[str, list[Ratio]] = {name: [] for name in others}
    for batch in shapes.values():
        feeds = {name: tensor.numpy() for name, tensor in batch.items()}
        calls = {name: functools.partial(one.run, None, feeds) for name, one in sessions.items()}
        found = paired(calls | {"control": calls[baseline]}, baseline=baseline, rounds=rounds)
        for name in others:
            cells[name].append(found[name])
    means = {name: geometric_mean(ratio.median for ratio in row) for name, row in cells.items()}
    rows = table(f"times as fast as {baseline}, with 95% intervals", "", *shapes, "geometric mean")
    for name, row in cells.items():
        rows.add_row(name, *map(times, row), f"{means[name]:.2f}")
    return rows, means


def quality(
    sessions: Mapping[str, ort.InferenceSession], files: Mapping[str, Path], tokens: Any, settings: Settings
) -> tuple[Table, bool]:
    """Embeddings against the baseline's, Spearman on STS-B dev where there is data, and the files' sizes."""
    path = settings.file("stsb", "sts-dev.csv")
    pairs = None if path is None else sentences.read_pairs(path)
    texts = sentences.BUNDLED if pairs is None else [*pairs.first, *pairs.second]
    batches = sentences.batches(tokens, texts)
    expected, holds = embed(sessions[BASELINE], batches), True
    rows = table(f"{len(texts)} sentences", "", "mean cosine to fp32", "Spearman on STS-B dev", "MB")
    for name, one in sessions.items():
        found = embed(one, batches)
        cosine = at_least(metrics.mean_cosine(expected, found), COSINE)
        holds = holds and (not cosine.style or name == PEER)
        rank = "needs --data" if pairs is None else f"{sentences.spearman(pairs, *found.chunk(2)):.2f}"
        rows.add_row(name, cosine, rank, f"{files[name].stat().st_size / 1e6:.1f}")
    return rows, holds


def embed(one: ort.InferenceSession, batches: list[Batch]) -> Tensor:
    """Embeddings of all sentences, in order."""
    parts = []
    for batch in batches:
        hidden, *_ = one.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        parts.append(sentences.pooled(torch.as_tensor(hidden), batch["attention_mask"]))
    return torch.cat(parts)
