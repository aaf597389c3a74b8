"""Files that other tools quantized, made fast: speed over fp32 as they came and re-lowered by graphopt.

onnxruntime's `quantize_static` with int8 activations (its kernels want uint8), and NNCF's Q/DQ. What a file computes is
what it computes without any optimization of the engine: a table says how far the outputs are from that, where flipped
roundings of all layers add up, and how far each site is by itself, given the same integers
(`graphopt.lowering.relower`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from rich.table import Table

import graphopt
from benchmarks.case import Settings, table
from benchmarks.cases.corpus import plain_session
from benchmarks.loading import feeds, session
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import BASELINE, attempt, exports, nncf_onnx, quantize_static
from benchmarks.speed import File, distances, race, tables, write
from graphopt.numerics import metrics
from graphopt.report.records import Relowering

STATIC, NNCF = "onnxruntime, int8 activations", "NNCF"
LEAST = {
    "resnet50": {STATIC: 3.0},
    "mobilenetv2": {STATIC: 1.9, NNCF: 1.9},
    "minilm": {NNCF: 2.5},
}  # fmt: skip
"""Speed of a re-lowered file over the baseline, by the tool that quantized it: geometric mean over shapes."""


def run(settings: Settings) -> bool:
    holds = []
    for name in filter(settings.chosen, LEAST):
        with tempfile.TemporaryDirectory() as folder:
            holds.append(measured(name, LEAST[name], Path(folder), settings))
    return all(holds)


def measured(name: str, bounds: Mapping[str, float], folder: Path, settings: Settings) -> bool:
    """Print the tables of one network; whether each re-lowered file is as fast as its bound."""
    network = NETWORKS[name]()
    exported = exports(network.traceable(), folder)
    models: dict[str, File | str] = {**exported}
    pairs: dict[str, tuple[Path, Path]] = {}
    held: dict[str, Relowering] = {}
    for tool, given in quantized(network, exported[BASELINE], folder, bounds).items():
        models[f"{tool}, as it came"] = given
        if isinstance(given, Path):
            relowered = attempt(partial(relower, given, network, settings.threads, held, tool))
            models[f"{tool}, re-lowered"] = relowered
            if isinstance(relowered, Path):
                pairs[tool] = given, relowered
    found = race(models, network.shapes, settings)
    least = {(f"{tool}, re-lowered", "mean"): bound for tool, bound in bounds.items()}
    columns = [distances(models, found, settings.threads)]
    holds = tables(f"relower-{name}", network.name, found, models, settings, bounds=least, columns=columns)
    rounding = {tool: roundings(*pair, list(network.shapes.values()), settings.threads) for tool, pair in pairs.items()}
    settings.console.print(rounding_table(rounding), site_table(held))
    write(settings, f"relower-{name}-outputs", rounding)
    write(settings, f"relower-{name}-sites", {tool: asdict(one) for tool, one in held.items()})
    return holds


def quantized(network: Network, source: Path, folder: Path, tools: Mapping[str, Any]) -> dict[str, Path | str]:
    """By tool, the file that it quantized, or why there is none."""
    batches = list(network.shapes.values())
    make: dict[str, Callable[[], Path]] = {
        STATIC: partial(quantize_static, source, batches, folder / "s8.onnx", activations="QInt8"),
        NNCF: partial(nncf_onnx, source, batches, folder / "nncf.onnx", transformer=not network.convolutional),
    }
    return {tool: attempt(make[tool]) for tool in tools}


def relower(path: Path, network: Network, threads: int, held: dict[str, Relowering], tool: str) -> Path:
    """The file through graphopt, without any pass: what is quantized already is re-lowered in the engine's form.

    A site that is further than a step from what it was is an error; how far each is goes to `held`, under `tool`.
    """
    examples = list(network.shapes.values())
    made = graphopt.optimize(path, example_inputs=examples, threads=threads, measure=True)
    if made.report.relowering is not None:
        held[tool] = made.report.relowering
    return made.export(path.with_name(f"relowered-{path.name}"))


def roundings(path: Path, relowered: Path, batches: Sequence[Batch], threads: int) -> dict[str, dict[str, Any]]:
    """By output, how far the re-lowered file, as it runs, is from the given one without optimizations."""
    plain, fast, steps = plain_session(path, threads), session(relowered, threads), output_steps(path)
    found = {}
    for index, output in enumerate(plain.get_outputs()):
        wanted, made = (
            torch.cat([torch.as_tensor(one.run(None, feeds(one, batch))[index]).flatten() for batch in batches])
            for one in (plain, fast)
        )
        step = steps.get(output.name)
        found[output.name] = {
            "steps": None if step is None else metrics.max_error(wanted, made) / step,
            "differs": float((wanted != made).double().mean()),
            "sqnr": metrics.sqnr(wanted, made),
        }
    return found


def rounding_table(rounding: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    rows = table("re-lowered against the file as it is written", "", "output", "most steps apart", "share that differs",
                 "SQNR dB")  # fmt: skip
    for tool, outputs in rounding.items():
        for output, one in outputs.items():
            steps = "not in steps" if one["steps"] is None else f"{one['steps']:.1f}"
            rows.add_row(tool, output, steps, f"{one['differs']:.4f}", f"{one['sqnr']:.1f}")
    return rows


def site_table(held: Mapping[str, Relowering]) -> Table:
    rows = table("each site of the re-lowered file against itself in the file, for the same integers", "", "sites",
                 "furthest", "steps", "share that differs", "not compared")  # fmt: skip
    for tool, one in held.items():
        site, steps = one.furthest or ("none", 0.0)
        rows.add_row(tool, str(len(one.distances)), site, f"{steps:.3g}", f"{one.differs:.5f}", str(len(one.left_out)))
    return rows


def output_steps(path: Path) -> dict[str, float]:
    """The scales of the outputs that a DequantizeLinear writes."""
    graph = onnx.load(path).graph
    made = {result: node for node in graph.node for result in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    return {
        output.name: float(numpy_helper.to_array(stored[node.input[1]]))
        for output in graph.output
        if (node := made.get(output.name)) is not None and node.op_type == "DequantizeLinear"
    }
