"""Networks with trained weights on real data: what to calibrate on, what to predict, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt
from benchmarks import models, sentences
from benchmarks.case import Settings
from benchmarks.models import Batch
from graphopt.numerics import metrics

Run = Callable[[Batch], Sequence[Any]]
"""A network: from a batch to its outputs, in order."""


@dataclass(frozen=True)
class Task:
    """A trained network, and its quality on data that was not used to calibrate."""

    name: str
    model: Any
    """A module, or the path of an ONNX file."""
    calibration: list[Batch]
    batches: list[Batch]
    read: Callable[[Tensor, Batch], Tensor]
    """From the first output to a row of figures a sample: embeddings, logits."""
    metric: str
    score: Callable[[Tensor], float]
    """How good all rows are; larger is better."""

    def predict(self, run: Run) -> Tensor:
        """The rows of all samples, in order."""
        return torch.cat([self.read(torch.as_tensor(run(batch)[0]), batch) for batch in self.batches])

    def optimized(self, pipeline: str, threads: int) -> Run:
        """The network after a pipeline, calibrated on the task's own batches."""
        small = graphopt.optimize(
            self.model, pipeline, example_inputs=self.calibration[:1], calibration=self.calibration, threads=threads
        )
        return lambda batch: list(small.runner(batch))

    def run_module(self, batch: Batch) -> list[Tensor]:
        """The network itself, in PyTorch."""
        with torch.inference_mode():
            return models.tensors(self.model(**batch))


def cosine(expected: Tensor, found: Tensor) -> float:
    """Mean cosine of the rows."""
    return metrics.mean_cosine(expected, found)


def minilm(settings: Settings, sentences_of_train: int = 2048) -> Task:
    """Spearman x 100 on STS-B dev; calibration from STS-B train."""
    tokens = sentences.tokenizer()
    train = sentences.read_pairs(settings.required("stsb", "sts-train.csv"))
    dev = sentences.read_pairs(settings.required("stsb", "sts-dev.csv"))
    texts = [*dev.first, *dev.second]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # alike in length: half the padding
    back = torch.tensor(order).argsort()
    return Task(
        "MiniLM",
        models.minilm(),
        sentences.batches(tokens, sentences.spread(train.first, sentences_of_train)),
        sentences.batches(tokens, [texts[index] for index in order]),
        lambda hidden, batch: sentences.pooled(hidden, batch["attention_mask"]),
        "Spearman on STS-B dev",
        lambda rows: sentences.spearman(dev, *rows[back].chunk(2)),
    )


def resnet(settings: Settings, depth: int) -> Task:
    """Accuracy (%) of a CIFAR-10 ResNet; calibration from train images."""
    source = settings.required("models.py")
    file = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}[depth]
    model = models.definitions(source).resnet(source.parent / "resnet_cifar10" / file)
    return _images(f"ResNet-{depth}", model, settings, normalized(settings))


def normalized(settings: Settings) -> Callable[[Tensor], Tensor]:
    """What the CIFAR-10 ResNets are given of pixels from 0 to 255."""
    definitions = models.definitions(settings.required("models.py"))
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (definitions.CIFAR_MEAN, definitions.CIFAR_STD))
    return lambda images: (images / 255 - mean) / std


def resnet8(settings: Settings) -> Task:
    """Accuracy (%) of MLPerf Tiny's ResNet-8 on CIFAR-10; calibration from train images."""
    source = settings.required("models.py")
    model = models.definitions(source).resnet8(source.parent / "mlperf_tiny" / "resnet8_cifar10_fp32.pt")
    return _images("ResNet-8", model, settings, lambda images: images)


def _images(name: str, model: Any, settings: Settings, prepare: Callable[[Tensor], Tensor]) -> Task:
    def load(file: str, most: int | None = None) -> tuple[list[Batch], Tensor]:
        with np.load(settings.required("cifar10", file)) as held:
            x = torch.from_numpy(held["x"][:most]).permute(0, 3, 1, 2).float()
            return _cut("x", prepare(x)), torch.from_numpy(held["y"][:most]).long()

    batches, labels = load("val.npz")
    return Task(
        name, model, load("calibration.npz", 512)[0], batches, lambda logits, batch: logits,
        "accuracy %, CIFAR-10 val", lambda rows: _accuracy(rows, labels),
    )  # fmt: skip


def dscnn(settings: Settings, calibrating: int = 100) -> Task:
    """Accuracy (%) of keyword spotting. There are 500 clips and no others: the first calibrate, the rest judge."""
    source = settings.required("models.py")
    with np.load(settings.required("mlperf_tiny", "kws_val500.npz")) as held:
        x, labels = torch.from_numpy(held["x"]).float(), torch.from_numpy(held["y"]).long()[calibrating:]
    model = models.definitions(source).dscnn(source.parent / "mlperf_tiny" / "dscnn_kws_fp32.pt")
    return Task(
        "DS-CNN", model, _cut("x", x[:calibrating]), _cut("x", x[calibrating:]), lambda logits, batch: logits,
        f"accuracy %, {len(labels)} clips", lambda rows: _accuracy(rows, labels),
    )  # fmt: skip


def magika(settings: Settings, calibrating: int = 115) -> Task:
    """Accuracy (%) of file type detection, an ONNX file. 575 files: the first calibrate, the rest judge."""
    with np.load(settings.required("magika", "val.npz")) as held:
        x, labels = torch.from_numpy(held["x"]).int(), torch.from_numpy(held["y"]).long()[calibrating:]
    return Task(
        "Magika",
        settings.required("onnx_corpus", "magika__standard_v3_3__model.onnx"),
        _cut("bytes", x[:calibrating], 5),
        _cut("bytes", x[calibrating:], 23),
        lambda scores, batch: scores,
        f"accuracy %, {len(labels)} files",
        lambda rows: _accuracy(rows, labels),
    )


def stories(settings: Settings, length: int = 192) -> Task:
    """Minus the cross-entropy (nats a token) of stories260K on samples of its own; calibration from other samples."""
    source = settings.required("models.py")
    model = models.definitions(source).llama(source.parent / "stories260k" / "stories260K.bin")
    first, second = _samples(source, length)
    return Task(
        "stories260K", model, _cut("ids", first, 16), _cut("ids", second, 16), lambda logits, batch: logits,
        "minus cross-entropy, own samples", lambda rows: -_cross_entropy(rows, second),
    )  # fmt: skip


def samples(settings: Settings, number: int, length: int = 192) -> Tensor:
    """Stories to train on, of another seed than those that calibrate and judge: token ids (number, length)."""
    return _sampled(settings.required("models.py"), number, length, models.SEED + 1)


def _samples(source: Path, length: int) -> tuple[Tensor, Tensor]:
    """Two sets of 32 stories."""
    ids = _sampled(source, 64, length, models.SEED)
    return ids[:32], ids[32:]


@cache
def _sampled(source: Path, number: int, length: int, seed: int) -> Tensor:
    """Stories, sampled at temperature 1 from the begin-of-sequence token."""
    model = models.definitions(source).llama(source.parent / "stories260k" / "stories260K.bin")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.ones(number, 1, dtype=torch.int64)
    caches: list[tuple[Tensor, ...]] = [() for _ in model.blocks]
    with torch.inference_mode():
        while ids.shape[1] < length:
            x, place = model.embed(ids[:, -1:]), ids.shape[1] - 1
            cos, sin = model.cos[place : place + 1], model.sin[place : place + 1]
            for index, block in enumerate(model.blocks):
                x, caches[index] = _one_token(block, x, cos, sin, caches[index])
            logits = model.head(model.norm(x))[:, -1]
            ids = torch.cat([ids, torch.multinomial(F.softmax(logits, -1), 1, generator=generator)], 1)
    return ids.clone()  # of inference mode, which cannot be trained on


def _one_token(
    block: Any, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a block of the Llama makes of one more token, and the keys and values so far: x (batch, 1, width)."""
    h = block.attn_norm(x)
    query, key, value = (project(h).unflatten(-1, (-1, block.head_dim)) for project in (block.q, block.k, block.v))
    new = block.rotate(key, cos, sin).transpose(1, 2), value.transpose(1, 2)
    keys, values = (torch.cat(pair, 2) for pair in zip(cache, new, strict=True)) if cache else new
    heads = F.scaled_dot_product_attention(block.rotate(query, cos, sin).transpose(1, 2), keys, values, enable_gqa=True)
    x = x + block.o(heads.transpose(1, 2).flatten(2))
    h = block.ffn_norm(x)
    return x + block.down(F.silu(block.gate(h)) * block.up(h)), (keys, values)


def _cut(name: str, x: Tensor, size: int = 128) -> list[Batch]:
    return [{name: x[start : start + size]} for start in range(0, len(x), size)]


def _accuracy(rows: Tensor, labels: Tensor) -> float:
    return 100 * float((rows.argmax(-1) == labels).double().mean())


def _cross_entropy(logits: Tensor, ids: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


TASKS: dict[str, Callable[[Settings], Task]] = {
    "minilm": minilm,
    "resnet20": lambda settings: resnet(settings, 20),
    "resnet56": lambda settings: resnet(settings, 56),
    "resnet8": resnet8,
    "dscnn": dscnn,
    "magika": magika,
    "stories": stories,
}
"""How to make each task, by what it is called on the command line."""
