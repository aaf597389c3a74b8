"""What simplifying and lowering alone bring, by measured choices: floats against torch's own export of the model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import graphopt
from benchmarks.case import Settings, checked
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import exports
from benchmarks.speed import Race, race, write

CHOSEN = ("minilm", "resnet50", "mobilenetv2", "vit", "gpt2")
LEAST = {"minilm": {"8x128": 1.15, "32x32": 1.15}}
"""Times as fast as the baseline."""
OURS = "graphopt, float"


def run(settings: Settings) -> bool:
    holds, everything = True, {}
    for name in filter(settings.chosen, CHOSEN):
        network = NETWORKS[name]()
        with tempfile.TemporaryDirectory() as folder:
            found = measured(network, Path(folder), settings)
        bounds = {(OURS, shape): least for shape, least in LEAST.get(name, {}).items()}
        rows, fits = found.speeds(f"{network.name}: times as fast as torch.onnx.export at its default opset", bounds)
        settings.console.print(rows, found.latencies("latency and throughput"))
        slower = found.slower(OURS)
        if slower:
            settings.console.print(checked(f"slower than the export at {', '.join(slower)}", False))
        holds = holds and fits and not slower
        everything[name] = found.figures()
    write(settings, "float", everything)
    return holds


def measured(network: Network, folder: Path, settings: Settings) -> Race:
    files = exports(network.traceable(), folder)
    small = graphopt.optimize(network.module, threads=settings.threads, measure=True, **network.options)
    files[OURS] = small.export(folder / "graphopt.onnx")
    return race(files, network.shapes, settings)
