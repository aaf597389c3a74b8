"""`target="fastest"`, with static int8 asked for: what wins, against the peers of each engine.

The peers are those of the case int8, OpenVINO on the fp32 file (in bfloat16 where that is its default), CTranslate2's
int8 (MiniLM), and PyTorch in fp32 and bfloat16. All have the same threads, in one
interleaved run. Ours turns tensors into arrays in each call, and CTranslate2 reads lists of tokens.
"""

from __future__ import annotations

import copy
import tempfile
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
from benchmarks.cases import int8, minilm
from benchmarks.cases.fidelity import ctranslate2_encoder, real_tokens
from benchmarks.cases.torch_cpu import eager
from benchmarks.loading import Bind, OpenVinoFile
from benchmarks.models import Batch
from benchmarks.networks import NETWORKS, Network
from benchmarks.peers import BASELINE, attempt, exports
from benchmarks.speed import CONTROL, File, race, write
from graphopt.capture.decode import DecodeStep
from graphopt.report.tables import race_rows
from graphopt.result import Optimized

CHOSEN = ("minilm", "resnet50", "mobilenetv2", "vit", "gpt2", "gpt2-decode")
OURS, IN_ONNXRUNTIME = "graphopt, fastest", "graphopt, onnxruntime"


def run(settings: Settings) -> bool:
    return all([measured(name, settings) for name in filter(settings.chosen, CHOSEN)])


def measured(name: str, settings: Settings) -> bool:
    network = NETWORKS[name]()
    batches = minilm.calibration(settings, sentences.tokenizer()) if name == "minilm" else int8.calibrating(network)
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        exported = exports(network.traceable(), folder)
        small = optimized(network, batches, "fastest", settings.threads)
        in_onnxruntime = optimized(network, batches, "onnxruntime", settings.threads)
        models: dict[str, File | Bind | str] = {**exported, OURS: lambda batch: partial(small.runner, batch)}
        models[IN_ONNXRUNTIME] = in_onnxruntime.export(folder / "onnxruntime.onnx")
        made = peers(network, exported[BASELINE], folder, settings.threads)
        models |= {row: attempt(make) for row, make in made.items()}
        found = race(models, network.shapes, settings)
    rows, _ = found.speeds(f"{network.name}: times as fast as torch.onnx.export at its default opset")
    settings.console.print(rows, candidates(small))
    if OURS in found.failed:
        return False
    # The winner is the best over all shapes together, so that our own file may be ahead at one of them.
    faster = found.loses(OURS, [row for row in found.found if row not in (CONTROL, OURS, IN_ONNXRUNTIME)])
    faster += [BASELINE] if found.slower(OURS) else []
    settings.console.print(checked(f"slower at some shape than: {', '.join(faster) or 'none'}", not faster))
    write(settings, f"fastest-{name}", found.figures() | {"target": small.report.target})
    return not faster


def optimized(network: Network, batches: list[Batch], target: str, threads: int) -> Optimized:
    """The network in static int8."""
    return graphopt.optimize(
        network.module, "quantize{scheme=static}", target=target, threads=threads, measure=True, calibration=batches,
        **network.options,
    )  # fmt: skip


def candidates(small: Optimized) -> Table:
    """Which candidates there were, and how they fared."""
    raced = small.report.race
    assert raced is not None
    titles, *entrants = race_rows(raced)
    rows = table("the race inside", *titles)
    for one in entrants:
        rows.add_row(*one)
    return rows


def peers(network: Network, source: Path, folder: Path, threads: int) -> dict[str, Callable[[], File | Bind]]:
    """By row, how to make what is timed."""
    module: Any = network.module
    if network.prompt is not None:
        module = DecodeStep.around(module, network.prompt)[0]
    found: dict[str, Callable[[], File | Bind]] = {
        "fp32 file, in OpenVINO": lambda: OpenVinoFile(source),
        "PyTorch, eager": lambda: eager(module),
        "PyTorch, eager bfloat16": lambda: eager(copy.deepcopy(module).bfloat16(), torch.bfloat16),
    }
    if network.name == "MiniLM":
        found["CTranslate2 int8"] = lambda: in_ctranslate2(folder, threads)
    return found | int8.peers(network, source, folder)


def in_ctranslate2(folder: Path, threads: int) -> Bind:
    """Tokens in lists, as its own programs give them; the result as an array."""
    encoder = ctranslate2_encoder(folder, threads)

    def bind(batch: Mapping[str, Any]) -> Callable[[], object]:
        rows = real_tokens(batch)
        return lambda: np.array(encoder.forward_batch(rows).last_hidden_state)

    return bind
