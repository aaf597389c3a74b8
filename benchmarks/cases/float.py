"""What simplifying and lowering alone bring, by measured choices: floats against torch's own export of the model, and
against onnxslim and onnxruntime's optimizer of transformers."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import graphopt
from benchmarks.case import Settings, checked
from benchmarks.cases.int8 import ahead
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import BASELINE, attempt, exports, fused_transformer, onnxslim
from benchmarks.speed import File, distances, race, tables

CHOSEN = ("minilm", "resnet50", "mobilenetv2", "vit", "gpt2")
LEAST = {"minilm": {"8x128": 1.15, "32x32": 1.15}}
"""Times as fast as the baseline."""
OURS = "graphopt, float"


def run(settings: Settings) -> bool:
    return all([measured(name, settings) for name in filter(settings.chosen, CHOSEN)])


def measured(name: str, settings: Settings) -> bool:
    network = NETWORKS[name]()
    bounds = {(OURS, shape): least for shape, least in LEAST.get(name, {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(network, Path(folder), settings.threads)
        found = race(files, network.shapes, settings)
        columns = [distances(files, found, settings.threads)]
        holds = tables(f"float-{name}", f"{network.name}, fp32", found, files, settings, bounds=bounds, columns=columns)
    slower = found.slower(OURS)
    settings.console.print(checked(f"slower than the export at: {', '.join(slower) or 'no shape'}", not slower))
    return ahead(found, OURS, settings) and holds and not slower


def make_files(network: Network, folder: Path, threads: int) -> dict[str, File | str]:
    """Every file that is compared, by its row's name, or why there is none."""
    exported = exports(network.traceable(), folder)
    small = graphopt.optimize(network.module, threads=threads, measure=True, **network.options)
    files: dict[str, File | str] = {**exported, OURS: small.export(folder / "graphopt.onnx")}
    files["onnxslim"] = attempt(partial(onnxslim, exported[BASELINE], folder / "slim.onnx"))
    if not network.convolutional:
        make = partial(fused_transformer, network.module, next(iter(network.shapes.values())), folder)
        files["onnxruntime.transformers"] = attempt(make)
    return files
