"""all-MiniLM-L6-v2 in ONNX Runtime: int8 against the exporter's fp32 files, in speed and in what the embeddings say.

The baseline is torch.onnx.export(dynamo=True) at its default opset, in a session with default options but for the
number of threads; the last column is over the same model at opset 23, which is faster by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, at_least, checked, table
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import (
    BASELINE,
    attempt,
    exports,
    nncf_openvino,
    olive_dynamic,
    optimized_transformer,
    quantize_dynamic,
)
from benchmarks.speed import Bind, opened, openvino_model, race, write
from graphopt.numerics import metrics

COSINE = 0.99
"""Least mean cosine of embeddings to fp32's."""
SPEEDUP = 3.1
"""Least geometric mean of graphopt's better scheme over the baseline."""
CALIBRATION = 512
"""Sentences of STS-B train to calibrate on."""

OURS = {"graphopt dynamic": "dynamic", "graphopt static": "static"}
"""Schemes by row."""
OPENVINO = "NNCF, in OpenVINO"


def run(settings: Settings) -> bool:
    network, tokens = NETWORKS["minilm"](), sentences.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(network, calibration(settings, tokens), Path(folder), settings.threads)
        models: dict[str, Bind | str] = {}
        for name, made in files.items():
            run_by = openvino_model if name == OPENVINO else opened
            models[name] = run_by(made, settings.threads) if isinstance(made, Path) else made
        found = race(models, network.shapes, settings)
        rows, _ = found.speeds("MiniLM: times as fast as torch.onnx.export at its default opset")
        settings.console.print(rows, found.latencies("latency and throughput"))
        best = max(found.found[name].overall.median for name in OURS)
        holds = best >= SPEEDUP
        settings.console.print(checked(f"graphopt's better scheme: {best:.2f}, bound {SPEEDUP}", holds))
        sizes = {name: size(made) for name, made in files.items() if isinstance(made, Path)}
        rows, near = quality(models, sizes, tokens, settings)
        settings.console.print(rows)
    write(settings, "minilm", found.figures())
    return holds and near


def make_files(network: Network, batches: list[Batch], folder: Path, threads: int) -> dict[str, Path | str]:
    """Every file that is compared, by its row's name, or why there is none."""
    exported = exports(network.traceable(), folder)
    files: dict[str, Path | str] = {**exported}
    for name, scheme in OURS.items():
        small = graphopt.optimize(
            network.module, f"quantize{{scheme={scheme}}}", threads=threads, measure=True, **network.options,
            calibration=batches if scheme == "static" else None,
        )  # fmt: skip
        files[name] = small.export(folder / f"{scheme}.onnx")
    source = exported[BASELINE]
    files["onnxruntime quantize_dynamic"] = attempt(partial(quantize_dynamic, source, folder / "dynamic-ort.onnx"))
    make = partial(optimized_transformer, network.module, next(iter(network.shapes.values())), folder)
    files["onnxruntime.transformers, quantize_dynamic"] = attempt(make)
    files["Olive, dynamic"] = attempt(partial(olive_dynamic, source, folder / "olive"))
    files[OPENVINO] = attempt(partial(nncf_openvino, source, batches, folder / "nncf.xml"))
    return files


def calibration(settings: Settings, tokens: Any) -> list[Batch]:
    """Sentences of STS-B train where there is data, the bundled ones elsewhere."""
    path = settings.file("stsb", "sts-train.csv")
    if path is None:
        return sentences.batches(tokens, sentences.BUNDLED, 8)
    pairs = sentences.read_pairs(path)
    return sentences.batches(tokens, sentences.spread(pairs.first, CALIBRATION))


def quality(
    models: Mapping[str, Bind | str], sizes: Mapping[str, int], tokens: Any, settings: Settings
) -> tuple[Table, bool]:
    """Embeddings against the baseline's, Spearman on STS-B dev where there is data, and the files' sizes."""
    path = settings.file("stsb", "sts-dev.csv")
    pairs = None if path is None else sentences.read_pairs(path)
    texts = sentences.BUNDLED if pairs is None else [*pairs.first, *pairs.second]
    batches = sentences.batches(tokens, texts)
    expected = embed(models[BASELINE], batches)
    rows, holds = table(f"{len(texts)} sentences", "", "mean cosine to fp32", "Spearman on STS-B dev", "MB"), True
    for name, model in models.items():
        if isinstance(model, str):
            continue
        found = embed(model, batches)
        cosine = metrics.mean_cosine(expected, found)
        holds = holds and (cosine >= COSINE or name not in OURS)
        rank = "needs --data" if pairs is None else f"{sentences.spearman(pairs, *found.chunk(2)):.2f}"
        rows.add_row(name, at_least(cosine, COSINE), rank, f"{sizes[name] / 1e6:.1f}")
    return rows, holds


def size(path: Path) -> int:
    """Bytes of a file, and of the weights that OpenVINO keeps beside it."""
    files = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return sum(file.stat().st_size for file in files)


def embed(model: Any, batches: list[Batch]) -> Tensor:
    """Embeddings of all sentences, in order."""
    return torch.cat([
        sentences.pooled(torch.as_tensor(model(batch)()[0]), batch["attention_mask"]) for batch in batches
    ])  # fmt: skip
