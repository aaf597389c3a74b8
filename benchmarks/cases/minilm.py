"""all-MiniLM-L6-v2 in ONNX Runtime: int8 against the exporter's fp32 files, in speed and in what the embeddings say.

The baseline is torch.onnx.export(dynamo=True) at its default opset, in a session with default options but for the
number of threads; the last column is over the same model at opset 23, which is faster by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked
from benchmarks.cases.int8 import ahead
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import BASELINE, attempt, exports, fused_dynamic, nncf_openvino, olive_dynamic, quantize_dynamic
from benchmarks.speed import Column, File, opened, race, tables
from graphopt.numerics import metrics

COSINE = 0.99
"""Least mean cosine of embeddings to fp32's."""
LOSS = 0.3
"""Most of Spearman x 100 that int8 may lose."""
SPEEDUP = 3.1
"""Least geometric mean of graphopt's better scheme over the baseline."""
CALIBRATION = 512
"""Sentences of STS-B train to calibrate on."""

OURS = {"graphopt dynamic": "dynamic", "graphopt static": "static"}
"""Schemes by row."""
IN_OPENVINO = "NNCF, in OpenVINO"


def run(settings: Settings) -> bool:
    network, tokens = NETWORKS["minilm"](), sentences.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(network, calibration(settings, tokens), Path(folder), settings.threads)
        found = race(files, network.shapes, settings)
        columns, near = quality({name: file for name, file in files.items() if name not in found.failed}, settings)
        tables("minilm", "MiniLM", found, files, settings, columns=columns)
    ours = max(OURS, key=lambda name: found.found[name].overall.median)
    best = found.found[ours].overall.median
    settings.console.print(
        checked(f"graphopt's better scheme is the {OURS[ours]} one: {best:.2f}, bound {SPEEDUP}", best >= SPEEDUP),
        checked(f"mean cosine to fp32 {COSINE} or more, and Spearman within {LOSS} of fp32: {near}", near), sep="\n",
    )  # fmt: skip
    return ahead(found, ours, settings) and best >= SPEEDUP and near


def make_files(network: Network, batches: list[Batch], folder: Path, threads: int) -> dict[str, File | str]:
    """Every file that is compared, by its row's name, or why there is none."""
    exported = exports(network.traceable(), folder)
    files: dict[str, File | str] = {**exported}
    for name, scheme in OURS.items():
        small = graphopt.optimize(
            network.module, f"quantize{{scheme={scheme}}}", threads=threads, measure=True, **network.options,
            calibration=batches if scheme == "static" else None,
        )  # fmt: skip
        files[name] = small.export(folder / f"{scheme}.onnx")
    source = exported[BASELINE]
    files["onnxruntime quantize_dynamic"] = attempt(partial(quantize_dynamic, source, folder / "dynamic-ort.onnx"))
    make = partial(fused_dynamic, network.module, next(iter(network.shapes.values())), folder)
    files["onnxruntime.transformers, quantize_dynamic"] = attempt(make)
    files["Olive, dynamic"] = attempt(partial(olive_dynamic, source, folder / "olive"))
    files[IN_OPENVINO] = attempt(partial(nncf_openvino, source, batches, folder / "nncf.xml", transformer=True))
    return files


def calibration(settings: Settings, tokens: Any) -> list[Batch]:
    """Sentences of STS-B train where there is data, the bundled ones elsewhere."""
    path = settings.file("stsb", "sts-train.csv")
    if path is None:
        return sentences.batches(tokens, sentences.BUNDLED, 8)
    pairs = sentences.read_pairs(path)
    return sentences.batches(tokens, sentences.spread(pairs.first, CALIBRATION))


def quality(
    files: Mapping[str, File | str], settings: Settings, ours: Sequence[str] = tuple(OURS)
) -> tuple[list[Column], bool]:
    """Embeddings against the baseline's, and Spearman on STS-B dev where there is data; whether ours are near."""
    path, tokens = settings.file("stsb", "sts-dev.csv"), sentences.tokenizer()
    pairs = None if path is None else sentences.read_pairs(path)
    batches = sentences.batches(tokens, sentences.BUNDLED if pairs is None else [*pairs.first, *pairs.second])
    found = {name: embed(file, batches, settings.threads) for name, file in files.items() if not isinstance(file, str)}
    near = {name: metrics.mean_cosine(found[BASELINE], one) for name, one in found.items()}
    columns: list[Column] = [("cosine to fp32", {name: f"{cosine:.4f}" for name, cosine in near.items()})]
    holds = all(near[name] >= COSINE for name in ours)
    if pairs is not None:
        ranks = {name: sentences.spearman(pairs, *one.chunk(2)) for name, one in found.items()}
        columns.append(("Spearman on STS-B dev", {name: f"{rank:.2f}" for name, rank in ranks.items()}))
        holds = holds and all(ranks[name] >= ranks[BASELINE] - LOSS for name in ours)
    return columns, holds


def embed(file: File, batches: list[Batch], threads: int) -> Tensor:
    """Embeddings of all sentences, in order."""
    bind = opened(file, threads)
    return torch.cat([
        sentences.pooled(torch.as_tensor(bind(batch)()[0]), batch["attention_mask"]) for batch in batches
    ])  # fmt: skip
