"""Int8 of networks of full size, against fp32 and onnxruntime's own quantization: speed, file, load time and memory.

Convolutional networks go against `quantize_static`, transformers against `quantize_dynamic`, both with weights per
channel. All but MiniLM have seeded weights and calibrate on noise: figures here are of speed, those of accuracy are in
`quantization`.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import graphopt
from benchmarks.case import Settings, checked, table
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import BASELINE, attempt, exports, quantize_dynamic, quantize_static
from benchmarks.speed import Footprint, footprint, loses, race, write

CHOSEN = ("resnet50", "mobilenetv2", "vit", "gpt2", "gpt2-decode")
LEAST = {"resnet50": {"1": 3.4, "8": 3.6}, "mobilenetv2": {"1": 2.2, "8": 2.8}}
"""Times as fast as the baseline, of static int8."""
STATIC, DYNAMIC = "graphopt static", "graphopt dynamic"


def run(settings: Settings) -> bool:
    holds, everything = True, {}
    for name in filter(settings.chosen, CHOSEN):
        network = NETWORKS[name]()
        with tempfile.TemporaryDirectory() as folder:
            files = make_files(network, Path(folder), settings.threads)
            found = race(files, network.shapes, settings)
            batch = next(iter(network.shapes.values()))
            sizes = {row: footprint(path, batch, settings.threads)
                     for row, path in files.items() if isinstance(path, Path) and row not in found.failed}  # fmt: skip
        bounds = {(STATIC, shape): least for shape, least in LEAST.get(name, {}).items()}
        rows, fits = found.speeds(f"{network.name}: times as fast as torch.onnx.export at its default opset", bounds)
        settings.console.print(rows, found.latencies("latency and throughput"), footprints(sizes))
        ours = max((STATIC, DYNAMIC), key=lambda row: found.found[row].overall.median if row in found.found else 0)
        peers = [row for row in found.found if row.startswith("onnxruntime")]
        ahead = [row for row in peers if loses(found.found[ours], found.found[row])]
        settings.console.print(checked(f"{ours} is slower at some shape than: {', '.join(ahead) or 'none'}", not ahead))
        holds = holds and fits and not ahead
        everything[name] = found.figures() | {"files": {row: asdict(one) for row, one in sizes.items()}}
    write(settings, "int8", everything)
    return holds


def make_files(network: Network, folder: Path, threads: int) -> dict[str, Path | str]:
    """Every file that is compared, by its row's name, or why there is none."""
    calibration = calibrating(network)
    files: dict[str, Path | str] = {**exports(network.traceable(), folder)}
    baseline = files[BASELINE]
    assert isinstance(baseline, Path)
    for row in (STATIC,) if network.convolutional else (STATIC, DYNAMIC):
        scheme = row.split()[-1]
        small = graphopt.optimize(
            network.module, f"quantize{{scheme={scheme}}}", threads=threads, measure=True, **network.options,
            calibration=calibration if row == STATIC else None,
        )  # fmt: skip
        files[row] = small.export(folder / f"{scheme}.onnx")
    if network.convolutional:
        make = partial(quantize_static, baseline, calibration, folder / "quantize_static.onnx")
        files["onnxruntime quantize_static"] = attempt(make)
    else:
        make = partial(quantize_dynamic, baseline, folder / "quantize_dynamic.onnx")
        files["onnxruntime quantize_dynamic"] = attempt(make)
    return files


def calibrating(network: Network) -> list[Batch]:
    """What is timed, which is enough to calibrate seeded weights."""
    return list(network.shapes.values())


def footprints(sizes: dict[str, Footprint]) -> object:
    rows = table("the file, and a process of its own that loads it and runs the first shape", "", "file MB",
                 "load s", "peak memory MB")  # fmt: skip
    for row, one in sizes.items():
        rows.add_row(row, f"{one.file / 1e6:.1f}", f"{one.load:.2f}", f"{one.peak / 1e6:.0f}")
    return rows
