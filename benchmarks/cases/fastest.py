"""`target="fastest"`: int8 in the engine that wins the race, against what each engine has without graphopt.

The peers are OpenVINO on the fp32 file (in bfloat16 where that is its default), NNCF's int8 in OpenVINO, onnxruntime's
own quantizers, CTranslate2's int8 (MiniLM), and PyTorch in fp32 and bfloat16. All are called with torch tensors or
numpy arrays that are ready, in one interleaved run.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table
from benchmarks.cases import minilm
from benchmarks.cases.fidelity import ctranslate2_encoder
from benchmarks.cases.int8 import calibrating
from benchmarks.cases.torch_cpu import eager
from benchmarks.loading import Bind, OpenVinoFile
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import (
    BASELINE,
    OPSET_23,
    attempt,
    exports,
    nncf_openvino,
    quantize_dynamic,
    quantize_static,
)
from benchmarks.speed import CONTROL, File, race, write
from graphopt.capture.decode import DecodeStep
from graphopt.result import Optimized

CHOSEN = ("minilm", "resnet50", "mobilenetv2", "vit", "gpt2", "gpt2-decode")
OURS, IN_ONNXRUNTIME = "graphopt, fastest", "graphopt, onnxruntime"
COLD, WARM = 120.0, 30.0
"""Seconds at most that optimizing MiniLM takes, without and with the timings of an earlier run."""


def run(settings: Settings) -> bool:
    return all([measured(name, settings) for name in filter(settings.chosen, CHOSEN)])


def measured(name: str, settings: Settings) -> bool:
    network = NETWORKS[name]()
    batches = minilm.calibration(settings, sentences.tokenizer()) if name == "minilm" else calibrating(network)
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        exported = exports(network.traceable(), folder)
        small, seconds = optimized(network, batches, "fastest", settings.threads)
        again = optimized(network, batches, "fastest", settings.threads)[1]
        in_onnxruntime = optimized(network, batches, "onnxruntime", settings.threads)[0]
        models: dict[str, File | Bind | str] = {**exported, OURS: lambda batch: partial(small.runner, batch)}
        models[IN_ONNXRUNTIME] = in_onnxruntime.export(folder / "onnxruntime.onnx")
        models |= {row: attempt(make) for row, make in peers(network, exported[BASELINE], batches, folder, settings)}
        found = race(models, network.shapes, settings)
    rows, _ = found.speeds(f"{network.name}: times as fast as torch.onnx.export at its default opset")
    settings.console.print(rows, taken(small))
    rivals = [row for row in found.found if row not in (CONTROL, OPSET_23, OURS)]
    faster = found.loses(OURS, rivals)
    settings.console.print(checked(f"slower at some shape than: {', '.join(faster) or 'none'}", not faster))
    in_time = name != "minilm" or (seconds <= COLD and again <= WARM)
    said = f"optimizing took {seconds:.0f} s, and {again:.0f} s with the timings of the first time"
    settings.console.print(checked(said, in_time))
    figures = found.figures() | {"target": small.report.target, "seconds": (seconds, again)}
    write(settings, f"fastest-{name}", figures)
    return not faster and in_time


def optimized(network: Network, batches: list[Batch], target: str, threads: int) -> tuple[Optimized, float]:
    """In static int8, and the seconds it took."""
    start = time.perf_counter()
    small = graphopt.optimize(
        network.module, "quantize{scheme=static}", target=target, threads=threads, measure=True, calibration=batches,
        **network.options,
    )  # fmt: skip
    return small, time.perf_counter() - start


def taken(small: Optimized) -> Table:
    """Which candidates there were, and how they fared."""
    raced = small.report.race
    assert raced is not None
    rows = table("the race inside", "engine", "model", "floats in", "SQNR dB", "times as fast", "")
    for place, one in enumerate(raced.entrants):
        sqnr = "" if one.sqnr is None else f"{one.sqnr:.1f}"
        outcome = one.why_out or ("taken" if place == raced.winner else "")
        rows.add_row(one.engine, one.model, one.precision, sqnr, f"{one.speed[0]:.2f}" if one.speed else "", outcome)
    return rows


def peers(
    network: Network, source: Path, batches: list[Batch], folder: Path, settings: Settings
) -> list[tuple[str, Callable[[], File | Bind]]]:
    """By row, how to make what is timed."""
    module: Any = network.module
    if network.prompt is not None:
        module = DecodeStep.around(module, network.prompt)[0]
    found: list[tuple[str, Callable[[], File | Bind]]] = [
        ("fp32 file, in OpenVINO", lambda: OpenVinoFile(source)),
        ("NNCF, in OpenVINO", partial(nncf_openvino, source, batches, folder / "nncf.xml",
                                      transformer=not network.convolutional)),
        ("PyTorch, eager", lambda: eager(module)),
        ("PyTorch, eager bfloat16", lambda: eager(copy.deepcopy(module).bfloat16(), torch.bfloat16)),
    ]  # fmt: skip
    if network.convolutional:
        found.append(("onnxruntime quantize_static", partial(quantize_static, source, batches, folder / "static.onnx")))
    else:
        found.append(("onnxruntime quantize_dynamic", partial(quantize_dynamic, source, folder / "dynamic.onnx")))
    if network.name == "MiniLM":
        found.append(("CTranslate2 int8", lambda: ctranslate2(folder, settings.threads)))
    return found


def ctranslate2(folder: Path, threads: int) -> Bind:
    """Tokens in lists, as its own programs give them; the result as an array."""
    encoder = ctranslate2_encoder(folder, threads)

    def bind(batch: Mapping[str, Any]) -> Callable[[], object]:
        real = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        rows = [ids[mask].tolist() for ids, mask in real]
        return lambda: np.array(encoder.forward_batch(rows).last_hidden_state)

    return bind
