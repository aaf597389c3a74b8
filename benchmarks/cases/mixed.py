"""Mixed precision: of 50 layers one is planted that int8 destroys; exactly that one should stay float.

Weights are seeded orthogonal matrices after relus; the input of the planted layer has a channel 3,000 times smaller
than the others, which its weight makes up for, so that no single scale fits. Evaluations count samples that ran
through any graph while the pass runs, by those of the calibration: calibrating, the ranking and the bisection.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.case import Settings, checked, table
from benchmarks.models import Batch
from graphopt.backends import target
from graphopt.capture.sources import capture
from graphopt.dialects.fx import run as fx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.graph import Graph
from graphopt.passes import REGISTRY
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.text import parse

LAYERS, WIDTH, BAD = 50, 64, 17
BATCHES, SIZE = 4, 64
GOAL = 15.0
MOST = 12
"""Evaluations of the calibration batches, all counted."""


def run(settings: Settings) -> bool:
    batches = _batches()
    rows = table(
        f"{LAYERS} layers, layer {BAD} planted, quantize{{smooth=false sqnr={GOAL:g}}}",
        "target", "SQNR, all int8", "SQNR", "stay float", "evaluations", "seconds",
    )  # fmt: skip
    holds, everything = True, {}
    for name, scheme in (("onnxruntime", "static"), ("onnxruntime", "dynamic"), ("fbgemm", "static")):
        if not settings.chosen(name):
            continue
        backend = target(name)
        captured = capture(planted(), backend.dialect, example_inputs=batches[0])
        context = Context(target=backend, feeds=captured.feeds, calibration=Calibration(batches, captured.graph.inputs))
        graph = parse("simplify", REGISTRY).apply(captured.graph, context)
        everywhere = parse(f"quantize{{scheme={scheme} smooth=false}}", REGISTRY).apply(graph, context)
        with counted() as samples:
            start = time.perf_counter()
            mixed = parse(f"quantize{{scheme={scheme} smooth=false sqnr={GOAL}}}", REGISTRY).apply(graph, context)
            seconds = time.perf_counter() - start
        record = context.report.passes[-1]
        evaluations = sum(samples) / (BATCHES * SIZE)
        kept = list(record.declined)
        exact, few = kept == [f"layers.{2 * BAD}"], evaluations <= MOST
        figures = [_sqnr(graph, one, batches) for one in (everywhere, mixed)]
        rows.add_row(
            f"{name}, {scheme}", *(f"{one:.1f} dB" for one in figures), checked(", ".join(kept), exact),
            checked(f"{evaluations:.1f}", few), f"{seconds:.1f}",
        )  # fmt: skip
        holds = holds and exact and few and figures[1] >= GOAL
        found = {"kept": kept, "evaluations": evaluations, "sqnr": figures, "notes": record.notes}
        everything[f"{name}, {scheme}"] = found
    settings.console.print(rows)
    if settings.out is not None:
        (settings.out / "mixed.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds


def planted() -> nn.Module:
    """The network, seeded."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(LAYERS):
        drawn = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.qr(drawn).Q * math.sqrt(2))
            if index == BAD - 1:
                layer.weight[3] /= 3000
            if index == BAD:
                layer.weight[:, 3] *= 3000
        layers += [layer, nn.ReLU()]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layers(x)
            return found

    return Chain().eval()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The samples of each run of a graph."""
    samples: list[int] = []
    with (
        mock.patch.object(OnnxGraph, "evaluate", _counting(OnnxGraph.evaluate, samples)),
        mock.patch.object(fx_run, "steps", _counting(fx_run.steps, samples)),
    ):
        yield samples


def _counting(run: Callable[..., Any], samples: list[int]) -> Callable[..., Any]:
    def counted(graph: Any, feeds: Batch, *others: Any) -> Any:
        samples.append(len(next(iter(feeds.values()))))
        return run(graph, feeds, *others)

    return counted


def _sqnr(graph: Graph, other: Graph, batches: Sequence[Batch]) -> float:
    from graphopt.pipeline.damage import Reference

    return Reference(graph, batches).damage(other).sqnr


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(SIZE, WIDTH, generator=generator)} for _ in range(BATCHES)]
