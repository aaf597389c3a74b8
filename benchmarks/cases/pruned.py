"""What structured pruning buys in time: pruned and then int8, over int8 alone, in one interleaved run."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks import sentences, trained
from benchmarks.case import Settings, checked, table, times
from benchmarks.models import Batch, resnet50
from graphopt.measure.timing import paired
from graphopt.result import Optimized

SHAPES = ((1, 128), (8, 128))
MINILM_YIELD, RESNET_YIELD = 0.65, 0.8
"""Least (1 - ratio of times) over (1 - ratio of FLOPs)."""
MINILM_FLOPS, RESNET_FLOPS = (0.75, 0.55, 0.5), (0.5,)
LOSS_AT, MOST_LOSS = 0.55, 0.5
"""Spearman may fall by so much at this share of the FLOPs."""
INT8 = "quantize"
CALIBRATION = 768
"""Sentences of STS-B train."""


def run(settings: Settings) -> bool:
    cases = {"minilm": minilm, "resnet50": resnet}
    return all([measure(settings) for name, measure in cases.items() if settings.chosen(name)])


def minilm(settings: Settings) -> bool:
    task = trained.minilm(settings, CALIBRATION)
    tokens = sentences.tokenizer()
    shapes = {f"{batch}x{length}": sentences.filled(tokens, batch, length) for batch, length in SHAPES}
    made = variants(task.model, list(shapes.values()), task.calibration, MINILM_FLOPS, settings)
    scores = {share: task.score(task.predict(partial(outputs, one))) for share, one in made.items()}
    holds = speeds("MiniLM", made, shapes, MINILM_YIELD, settings)
    rows = table("Spearman on STS-B dev, int8", "FLOPs that stay", "Spearman", "against int8 alone")
    for share, score in scores.items():
        fits = share != LOSS_AT or score >= scores[1.0] - MOST_LOSS
        rows.add_row(f"{share:g}", f"{score:.2f}", checked(f"{score - scores[1.0]:+.2f}", fits))
        holds = holds and fits
    settings.console.print(rows)
    return holds


def resnet(settings: Settings) -> bool:
    """Seeded weights: for the time only."""
    model, shapes = resnet50(), {f"{batch}": _image(batch) for batch in (1, 8)}
    made = variants(model, list(shapes.values()), [shapes["8"]], RESNET_FLOPS, settings)
    return speeds("ResNet-50", made, shapes, RESNET_YIELD, settings)


def _image(batch: int) -> Batch:
    return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch))}


def variants(
    model: Any, examples: list[Batch], calibration: list[Batch], shares: tuple[float, ...], settings: Settings
) -> dict[float, Optimized]:
    """The network in int8, whole (1.0) and with each share of its FLOPs."""
    with tempfile.TemporaryDirectory() as folder:
        file = graphopt.optimize(model, example_inputs=examples).export(Path(folder) / "float.onnx")
        return {
            share: graphopt.optimize(
                file,
                INT8 if share == 1 else f"prune{{flops={share}}},{INT8}",
                example_inputs=examples,
                calibration=calibration,
                threads=settings.threads,
            )
            for share in (1.0, *shares)
        }


def speeds(
    name: str, made: dict[float, Optimized], shapes: dict[str, Batch], least: float, settings: Settings
) -> bool:
    """How many times as fast as int8 alone, and how much of the FLOPs that went it brings."""
    found = {}
    for shape, feeds in shapes.items():
        calls = {str(share): partial(one.runner, feeds) for share, one in made.items()}
        found[shape] = paired(calls | {"control": calls["1.0"]}, baseline="1.0", rounds=settings.rounds)
    columns = [f"{what} at {shape}" for what in ("times as fast", "yield") for shape in shapes]
    rows = table(f"{name}, pruned and int8, over int8 alone; yield is (1 - time) / (1 - FLOPs)", "FLOPs", *columns)
    flops = {share: cost.flops or 0 for share, one in made.items() if (cost := one.report.cost_after)}
    holds = True
    for share in list(made)[1:]:
        ratios = [found[shape][str(share)] for shape in shapes]
        yields = [(1 - 1 / ratio.median) / (1 - flops[share] / flops[1.0]) for ratio in ratios]
        holds = holds and min(yields) >= least
        cells = [checked(f"{one:.2f} (bound {least:g})", one >= least) for one in yields]
        rows.add_row(f"{flops[share] / flops[1.0]:.3f}", *map(times, ratios), *cells)
    rows.add_row("control", *(times(found[shape]["control"]) for shape in shapes))
    settings.console.print(rows)
    return holds


def outputs(small: Optimized, batch: Batch) -> list[Any]:
    return list(small.runner(batch))
