"""Seconds and peak memory of each pass on GPT-2 of width 1024, at 6, 12 and 24 layers: both should grow linearly.

Each pass runs in a process of its own, from the captured ONNX graph; the peak is that of the process's resident memory
while the pass runs (VmHWM, reset before it), and what the graph itself took before stands beside it. Linux only.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Settings, checked, table
from benchmarks.models import Batch, seeded

LAYERS = (6, 12, 24)
WIDTH, HEADS, VOCABULARY = 1024, 16, 8192
PASSES = (
    "prune{flops=0.6}",
    "sparsify{pattern=2:4}",
    "sparsify{pattern=2:4 criterion=sparsegpt}",
    "low-rank{params=0.8}",
    "quantize{scheme=dynamic}",
    "quantize{scheme=static}",
)
GROWTH = 1.5
"""Most that seconds or memory per layer may be at the deepest, over those at the shallowest; linear is 1."""


def run(settings: Settings) -> bool:
    rows = table(
        f"GPT-2 of width {WIDTH}: seconds, and GB at the peak (of them the graph before)",
        "pass", *(f"{layers} layers" for layers in LAYERS), "per layer, deepest over shallowest",
    )  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    holds, everything = True, {}
    for text in PASSES:
        if not settings.chosen(text.partition("{")[0]):
            continue
        figures = []
        for layers in LAYERS:
            with spawn.Pool(1) as pool:  # a process of its own, so that one peak does not hide another
                figures.append(pool.apply(measure, (text, layers, settings.threads)))
        everything[text] = figures
        grows = [
            (figures[-1][kind] / LAYERS[-1]) / (figures[0][kind] / LAYERS[0]) for kind in ("seconds", "added")
        ]
        cells = [f"{one['seconds']:.1f} s, {one['peak'] / 1e9:.2f} ({one['before'] / 1e9:.2f})" for one in figures]
        fits = max(grows) <= GROWTH
        rows.add_row(text, *cells, checked(f"time {grows[0]:.2f}, memory {grows[1]:.2f}", fits))
        holds = holds and fits
    settings.console.print(rows)
    if settings.out is not None:
        (settings.out / "growth.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds


def measure(text: str, layers: int, threads: int) -> dict[str, float]:
    """Seconds of one pass, and bytes of resident memory before it and at its peak."""
    from graphopt.backends import target
    from graphopt.capture.sources import capture
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.calibration import Calibration
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.text import parse

    torch.set_num_threads(threads)
    batches = _batches()
    captured = capture(_gpt2(layers), "onnx", example_inputs=batches[0])
    graph = captured.graph
    parse("simplify", REGISTRY).run(graph, Context(target=target("onnxruntime")))
    context = Context(
        target=target("onnxruntime"), feeds=captured.feeds, calibration=Calibration(batches, graph.inputs)
    )
    if "scheme=dynamic" in text:
        context.calibration = None
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = time.perf_counter()
    parse(text, REGISTRY).run(graph, context)
    seconds, peak = time.perf_counter() - start, _memory("VmHWM")
    return {"seconds": seconds, "before": before, "peak": peak, "added": max(peak - before, 1.0)}


def _gpt2(layers: int) -> Any:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=layers, n_head=HEADS, n_positions=256,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return seeded(lambda: GPT2Model(config))


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, VOCABULARY, (4, 64), generator=generator)} for _ in range(4)]


def _memory(field: str) -> float:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
