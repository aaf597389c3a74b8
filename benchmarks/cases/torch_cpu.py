"""Models that stay in PyTorch on the CPU: int8 by graphopt against eager, compiled and bf16 PyTorch, and fbgemm."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import graphopt
from benchmarks.case import Settings, checked
from benchmarks.loading import Bind
from benchmarks.networks import NETWORKS, Network
from benchmarks.speed import File, Race, race, write
from graphopt.capture.decode import DecodeStep
from graphopt.result import Optimized

EAGER, COMPILED, BF16, FBGEMM = "eager fp32", "torch.compile fp32", "eager bf16", "quantize_dynamic"
OURS = "graphopt torch-cpu"
MODELS = ("minilm", "resnet50", "vit", "gpt2", "gpt2-decode")


def run(settings: Settings) -> bool:
    holds = True
    for name in filter(settings.chosen, MODELS):
        network = NETWORKS[name]()
        found, small = _measure(network, settings)
        rows, _ = found.speeds(f"{network.name}: times as fast as PyTorch {EAGER}, with 95% intervals")
        settings.console.print(rows)
        settings.console.print(found.latencies(f"{network.name}: seconds of a run"))
        settings.console.print(f"kernel counts: {small.report.kernels}", highlight=False)
        if FBGEMM in found.found:
            slower = bool(found.loses(OURS, [FBGEMM]))
            verdict = "slower than quantize_dynamic at some shape" if slower else "never slower than quantize_dynamic"
            settings.console.print(checked(verdict, not slower))
            holds = holds and not slower
        write(settings, f"torch-{name}", found.figures() | {"choices": small.report.choices})
    return holds


def _measure(network: Network, settings: Settings) -> tuple[Race, Optimized]:
    module = network.module
    if network.prompt is not None:  # the step alone, its cache in plain tensors
        module = DecodeStep.around(network.module, network.prompt)[0]
    scheme = "static" if network.convolutional else "dynamic"
    calibration = list(network.shapes.values()) if network.convolutional else None
    small = graphopt.optimize(
        network.module, f"quantize{{scheme={scheme}}}", target="torch-cpu", calibration=calibration,
        threads=settings.threads, measure=True, **network.options,
    )  # fmt: skip
    models: dict[str, File | Bind | str] = {EAGER: eager(module), OURS: lambda batch: partial(_run, small, batch)}
    models[COMPILED] = _tried(lambda: eager(torch.compile(module, dynamic=True)))
    models[BF16] = _tried(lambda: eager(copy.deepcopy(module).bfloat16(), torch.bfloat16))
    models[FBGEMM] = _tried(lambda: eager(_quantize_dynamic(module)))
    return race(models, network.shapes, settings, EAGER), small


def _tried(make: Callable[[], Bind]) -> Bind | str:
    try:
        return make()
    except Exception as error:  # a row of the table
        return f"{type(error).__name__}: {error}"


def _run(small: Optimized, batch: Mapping[str, Any]) -> object:
    return small.runner(batch)


def eager(module: Any, dtype: torch.dtype | None = None) -> Bind:
    """Arguments by name; floats in the module's own dtype."""

    def bind(batch: Mapping[str, Any]) -> Callable[[], object]:
        given = {_argument(name): x.to(dtype) if dtype is not None and x.is_floating_point() else x
                 for name, x in batch.items()}  # fmt: skip

        def call() -> object:
            with torch.inference_mode():
                return module(**given)

        return call

    return bind


def _argument(name: str) -> str:
    """The keyword of an input: those of a cache have dots in their names."""
    return name.replace(".", "_")


def _quantize_dynamic(module: nn.Module) -> nn.Module:
    """torch's own entry point, which it deprecates, with fbgemm. transformers' Conv1D is no linear to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "fbgemm"
        quantize: Any = torch.ao.quantization.quantize_dynamic
        quantized: nn.Module = quantize(module, {nn.Linear}, dtype=torch.qint8)
    return quantized
