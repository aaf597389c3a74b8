"""graphopt's u8 Q/DQ files in OpenVINO against NNCF's own: speed, and which layers run in int8 there.

Both calibrate on the same batches. Layers are those of OpenVINO's execution graph: every linear and conv of our files
has to run in int8, and our files as fast as NNCF's, within 5%.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

import graphopt
from benchmarks.case import Settings, checked
from benchmarks.cases import minilm
from benchmarks.loading import OpenVinoFile
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import BASELINE, attempt, exports, nncf_openvino
from benchmarks.sentences import tokenizer
from benchmarks.speed import File, distances, race, tables, write
from graphopt.backends.openvino import layers

CHOSEN = ("resnet50", "minilm")
OURS, NNCF, FLOAT = "graphopt, in OpenVINO", "NNCF, in OpenVINO", "fp32, in OpenVINO"
LEAST = 0.95
"""Times as fast as NNCF's own file, at every shape."""
LAYERS: dict[str, type[nn.Module]] = {"FullyConnected": nn.Linear, "Convolution": nn.Conv2d}
"""What OpenVINO calls the layers that have to run in int8, and the modules that they stand for."""


def run(settings: Settings) -> bool:
    if importlib.util.find_spec("openvino") is None:
        settings.console.print("openvino is not installed", style="yellow")
        return True
    return all([measured(name, settings) for name in filter(settings.chosen, CHOSEN)])


def measured(name: str, settings: Settings) -> bool:
    network = NETWORKS[name]()
    batches = list(network.shapes.values()) if network.convolutional else minilm.calibration(settings, tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(network, batches, Path(folder), settings.threads)
        found = race(files, network.shapes, settings)
        columns = [distances(files, found, settings.threads)]
        if not network.convolutional:
            raced = {row: file for row, file in files.items() if row not in found.failed}
            columns += minilm.quality(raced, settings, ours=[OURS])[0]
        int8 = {row: in_int8(file.path, settings.threads) for row, file in files.items()
                if isinstance(file, OpenVinoFile) and row not in found.failed}  # fmt: skip
        wanted = {layer: sum(isinstance(one, module) for one in network.module.modules())
                  for layer, module in LAYERS.items()}  # fmt: skip
        columns += [(f"{layer} in int8", {row: f"{counts[layer]} of {number}" for row, counts in int8.items()})
                    for layer, number in wanted.items()]  # fmt: skip
        tables(f"openvino-{name}", network.name, found, files, settings, columns=columns)
        near = against(name, files, network.shapes, settings)
    folded = OURS in int8 and all(int8[OURS][layer] == number for layer, number in wanted.items())
    settings.console.print(checked(f"every linear and conv of ours runs in int8: {folded}", folded))
    return folded and near


def against(name: str, files: Mapping[str, File | str], shapes: Mapping[str, Batch], settings: Settings) -> bool:
    """Print a race over NNCF's file in place of torch's, and whether ours is fast enough there."""
    if isinstance(files[NNCF], str):
        return True  # its row says why
    found = race({row: files[row] for row in (NNCF, OURS)}, shapes, settings, NNCF)
    bounds = {(OURS, shape): LEAST for shape in shapes}
    rows, holds = found.speeds(f"times as fast as {NNCF}", bounds)
    settings.console.print(rows)
    write(settings, f"openvino-{name}-nncf", found.figures())
    return holds


def make_files(network: Network, batches: list[Batch], folder: Path, threads: int) -> dict[str, File | str]:
    """Every file that is compared, by its row's name, or why there is none."""
    exported = exports(network.traceable(), folder)
    small = graphopt.optimize(
        network.module, "quantize{scheme=static}", target="openvino", threads=threads, measure=True,
        calibration=batches, **network.options,
    )  # fmt: skip
    make = partial(nncf_openvino, exported[BASELINE], batches, folder / "nncf.xml",
                   transformer=not network.convolutional)  # fmt: skip
    return {
        **exported,
        FLOAT: OpenVinoFile(exported[BASELINE]),
        OURS: OpenVinoFile(small.export(folder / "openvino.onnx")),
        NNCF: attempt(make),
    }


def in_int8(path: Path, threads: int) -> Counter[str]:
    """By kind, how many layers of the execution graph multiply integers."""
    openvino = importlib.import_module("openvino")
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return Counter(layer.kind for layer in layers(compiled) if layer.is_int8)
