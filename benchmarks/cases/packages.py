"""all-MiniLM-L6-v2 as AOTInductor packages against PyTorch eager in fp32; and the same passes as on the ONNX target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table
from benchmarks.cases.fbgemm import integer_rows
from benchmarks.cases.minilm import calibration
from benchmarks.loading import Bind
from benchmarks.models import Batch, minilm
from benchmarks.networks import SHAPES
from benchmarks.speed import File, race, write
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import scalar
from graphopt.result import Optimized

MEAN, SHORT = 2.5, 4.0
"""Least speed of the better int8 package over eager: in the geometric mean over the shapes, and at 1 x 16."""
SCALES = 1e-4
"""Most that scales of activations differ by between the dialects, relative."""
SPEARMAN = 0.1
"""Most that Spearman differs by between the targets."""
SCHEMES = ("static", "dynamic")
EAGER = "eager fp32"


def run(settings: Settings) -> bool:
    tokens = sentences.tokenizer()
    model, batches = minilm(), calibration(settings, tokens)
    shapes = {f"{batch}x{length}": sentences.filled(tokens, batch, length) for batch, length in SHAPES}

    def optimized(passes: str | None, target: str) -> Optimized:
        data = batches if passes is not None and "static" in passes else None
        return graphopt.optimize(
            model, passes, target=target, example_inputs=list(shapes.values()), calibration=data,
            threads=settings.threads, measure=False,
        )  # fmt: skip

    passes = {scheme: f"quantize{{scheme={scheme}}}" for scheme in SCHEMES}
    ours = {f"package, int8 {scheme}": optimized(text, "fbgemm") for scheme, text in passes.items()}
    ours["package, fp32"] = optimized(None, "fbgemm")
    with tempfile.TemporaryDirectory() as folder:
        packages = {}
        for number, (name, small) in enumerate(ours.items()):
            path = small.export(Path(folder) / f"{number}.pt2", aot=True)
            packages[name] = torch._inductor.aoti_load_package(str(path))
        fast = speeds(model, packages, shapes, settings)
        near = True
        for scheme, text in passes.items():
            near &= twins(scheme, ours[f"package, int8 {scheme}"], optimized(text, "onnxruntime"),
                          packages[f"package, int8 {scheme}"], tokens, settings)  # fmt: skip
    return fast and near


def speeds(model: Any, packages: dict[str, Any], shapes: dict[str, Batch], settings: Settings) -> bool:
    models: dict[str, File | Bind | str] = {EAGER: lambda batch: partial(eager, model, batch)}
    models |= {name: partial(partial, packaged, package) for name, package in packages.items()}
    found = race(models, shapes, settings, EAGER)
    rows, _ = found.speeds(f"MiniLM: times as fast as PyTorch {EAGER}")
    settings.console.print(rows, found.latencies("latency and throughput"))
    write(settings, "packages", found.figures())
    best = max((found.found[f"package, int8 {scheme}"] for scheme in SCHEMES), key=lambda one: one.overall.median)
    mean, short = best.overall.median, best.shapes[0].median
    settings.console.print(
        checked(f"geometric mean {mean:.2f}, bound {MEAN}", mean >= MEAN),
        checked(f"at 1x16 {short:.2f}, bound {SHORT}", short >= SHORT),
    )
    return mean >= MEAN and short >= SHORT


def eager(model: Any, batch: Mapping[str, Any]) -> Tensor:
    with torch.inference_mode():
        hidden: Tensor = model(**batch).last_hidden_state
    return hidden


def packaged(package: Any, batch: Batch) -> Tensor:
    hidden: Tensor = package(**batch)["last_hidden_state"]
    return hidden


def twins(
    scheme: str, fx: Optimized, onnx: Optimized, package: Any, tokens: Any, settings: Settings
) -> bool:
    """Integers, scales and Spearman of the same passes on either dialect."""
    ours, theirs = integer_rows(fx.folded), integer_rows(onnx.folded)
    pairs = list(zip(scales(fx.folded), scales(onnx.folded), strict=True))
    apart = max((abs(a - b) / b for a, b in pairs), default=0.0)
    rows = table(f"int8 {scheme}, on the targets fbgemm and onnxruntime", "", "figure", "bound")
    rows.add_row("rows of integer weights that are equal", f"{(ours & theirs).total()} of {ours.total()}", "all")
    rows.add_row(f"{len(pairs)} scales of activations, furthest apart", f"{apart:.1e}", f"{SCALES:g}")
    holds = ours == theirs and ours.total() > 0 and apart <= SCALES
    path = settings.file("stsb", "sts-dev.csv")
    if path is not None:
        of = sentences.read_pairs(path)
        batches = sentences.batches(tokens, [*of.first, *of.second])
        calls: dict[str, Callable[[Batch], Tensor]] = {
            "fbgemm": lambda batch: torch.as_tensor(fx(**batch).last_hidden_state),
            "onnxruntime": lambda batch: torch.as_tensor(onnx(**batch).last_hidden_state),
            "package": partial(packaged, package),
        }
        found = {}
        for name, call in calls.items():
            embedded = torch.cat([sentences.pooled(call(batch), batch["attention_mask"]) for batch in batches])
            found[name] = sentences.spearman(of, *embedded.chunk(2))
            within = abs(found[name] - found["fbgemm"]) <= SPEARMAN
            rows.add_row(f"Spearman on STS-B dev, {name}", checked(f"{found[name]:.2f}", within), f"+-{SPEARMAN}")
            holds = holds and within
    settings.console.print(rows)
    return holds


def scales(graph: Graph) -> list[float]:
    """Stored scales of activations, in order."""
    found = [scalar(graph, node.required("scale")) for node in graph.sites("quantize")]
    return sorted(float(one) for one in found if one is not None)
