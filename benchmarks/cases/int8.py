"""Int8 of networks of full size, against fp32 and what other tools make of them: speed, file, load time and memory.

Convolutional networks go against `quantize_static`, transformers against `quantize_dynamic`, onnxruntime's optimizer of
transformers and Olive, all with weights per channel, and all networks against NNCF in OpenVINO. They have seeded
weights and calibrate on noise: figures here are of speed, those of accuracy are in `quantization` and `minilm`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import graphopt
from benchmarks.case import Settings, checked
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import (
    BASELINE,
    attempt,
    exports,
    fused_dynamic,
    nncf_openvino,
    olive_dynamic,
    quantize_dynamic,
    quantize_static,
)
from benchmarks.speed import File, Race, distances, race, tables

CHOSEN = ("resnet50", "mobilenetv2", "vit", "gpt2", "gpt2-decode")
LEAST = {"resnet50": {"1": 3.4, "8": 3.6}, "mobilenetv2": {"1": 2.2, "8": 2.8}}
"""Times as fast as the baseline, of static int8."""
STATIC, DYNAMIC = "graphopt static", "graphopt dynamic"


def run(settings: Settings) -> bool:
    return all([measured(name, settings) for name in filter(settings.chosen, CHOSEN)])


def measured(name: str, settings: Settings) -> bool:
    network = NETWORKS[name]()
    bounds = {(STATIC, shape): least for shape, least in LEAST.get(name, {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(network, Path(folder), settings.threads)
        found = race(files, network.shapes, settings)
        columns = [distances(files, found, settings.threads)]
        holds = tables(f"int8-{name}", network.name, found, files, settings, bounds=bounds, columns=columns)
    ours = max((STATIC, DYNAMIC), key=lambda row: found.found[row].overall.median if row in found.found else 0)
    return ahead(found, ours, settings) and holds


def ahead(found: Race, ours: str, settings: Settings) -> bool:
    """Print which peers a model is slower than; whether there is none in the same engine."""
    peers = [row for row in found.found if row.startswith(("onnxruntime", "onnxslim", "Olive", "NNCF"))]
    faster = found.loses(ours, peers)
    rivals = [row for row in faster if not row.endswith("OpenVINO")]
    verdict = f"{ours} is slower at some shape than: {', '.join(faster) or 'none of the peers'}"
    settings.console.print(checked(verdict, not rivals))
    return not rivals


def make_files(network: Network, folder: Path, threads: int) -> dict[str, File | str]:
    """Every file that is compared, by its row's name, or why there is none."""
    calibration = calibrating(network)
    exported = exports(network.traceable(), folder)
    files: dict[str, File | str] = {**exported}
    for row in (STATIC,) if network.convolutional else (STATIC, DYNAMIC):
        scheme = row.split()[-1]
        small = graphopt.optimize(
            network.module, f"quantize{{scheme={scheme}}}", threads=threads, measure=True, **network.options,
            calibration=calibration if row == STATIC else None,
        )  # fmt: skip
        files[row] = small.export(folder / f"{scheme}.onnx")
    return files | {row: attempt(make) for row, make in peers(network, exported[BASELINE], folder).items()}


def peers(network: Network, source: Path, folder: Path) -> dict[str, Callable[[], File]]:
    """By row, how to make its file."""
    calibration, example = calibrating(network), next(iter(network.shapes.values()))
    openvino = partial(nncf_openvino, source, calibration, folder / "nncf.xml", transformer=not network.convolutional)
    if network.convolutional:
        return {
            "onnxruntime quantize_static": partial(quantize_static, source, calibration, folder / "ort-static.onnx"),
            "NNCF, in OpenVINO": openvino,
        }
    return {
        "onnxruntime quantize_dynamic": partial(quantize_dynamic, source, folder / "ort-dynamic.onnx"),
        "onnxruntime.transformers, quantize_dynamic": partial(fused_dynamic, network.module, example, folder),
        "Olive, dynamic": partial(olive_dynamic, source, folder / "olive"),
        "NNCF, in OpenVINO": openvino,
    }


def calibrating(network: Network) -> list[Batch]:
    """What is timed, which is enough to calibrate seeded weights."""
    return list(network.shapes.values())
