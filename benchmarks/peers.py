"""The files that graphopt's are compared with: torch's own exports, and what other tools make of them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.loading import Arrays, OpenVinoFile
from benchmarks.models import Batch
from graphopt.measure.machine import version

Made = TypeVar("Made")

BASELINE, OPSET_23 = "fp32, default opset", "fp32, opset 23"
"""What every ratio is over, and the newest form, which is faster by itself."""

PACKAGES = ("openvino", "nncf", "olive-ai", "onnxslim", "ctranslate2", "onnxruntime-genai", "llama-cpp-python")
"""Peers beside onnxruntime's own tools, by what pip calls them."""


def versions() -> dict[str, str]:
    """Of each peer, or that it is not installed."""
    return {package: version(package) for package in PACKAGES}


def attempt(make: Callable[[], Made]) -> Made | str:
    """What a peer makes, or how it failed in a line: that is a row of a table, not the end of it."""
    try:
        with quiet():
            return make()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:90]}"


def apart(make: Callable[..., Made], *given: Any) -> Made:
    """What a peer makes in a process of its own, for peers that change the one that imports them: loggers, hooks in
    torch, settings of threads. Raises what it raises there, and RuntimeError where the process dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _silence) as pool:
        return pool.submit(make, *given).result()


def _silence() -> None:
    """Progress and warnings of this process go nowhere, those of its libraries in C++ too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress of exporters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def exports(traceable: tuple[nn.Module, Batch, dict[str, Any]], folder: Path) -> dict[str, Path]:
    """The baseline, and the same at opset 23."""
    module, example, axes = traceable
    files = {}
    for name, opset in ((BASELINE, None), (OPSET_23, 23)):
        with quiet():
            program = torch.onnx.export(
                module, (), kwargs=example, dynamo=True, dynamic_shapes=axes, opset_version=opset, verbose=False
            )
        assert program is not None
        files[name] = folder / f"opset-{opset or 'default'}.onnx"
        program.save(str(files[name]), external_data=False)
    return files


class Reader:
    """Batches as onnxruntime's calibration reads them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.feeds = iter(arrays(batches))

    def get_next(self) -> Arrays | None:
        return next(self.feeds, None)


def arrays(batches: Sequence[Batch]) -> list[Arrays]:
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]


def quantize_static(
    source: Path, batches: Sequence[Batch], path: Path, *, activations: str = "QUInt8", ranges: str = "MinMax"
) -> Path:
    """Q/DQ, int8 weights per channel, after onnxruntime's own preparation where that runs."""
    from onnxruntime import quantization

    with contextlib.suppress(Exception):  # files that its shape inference does not get through are taken as they are
        source = _prepared(source, path)
    quantization.quantize_static(
        str(source), str(path), Reader(batches), quant_format=quantization.QuantFormat.QDQ,
        per_channel=True, activation_type=getattr(quantization.QuantType, activations),
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, ranges),
    )  # fmt: skip
    return path


def quantize_dynamic(source: Path, path: Path) -> Path:
    """Activations quantized in each run, int8 weights per channel."""
    from onnxruntime import quantization

    make = partial(
        quantization.quantize_dynamic, model_output=str(path), per_channel=True,
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    try:
        make(str(source))
    except Exception:  # shapes that torch's exporter notes, and this tool does not expect: preparation drops them
        make(str(_prepared(source, path)))
    return path


def _prepared(source: Path, path: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name(f"prepared-{path.name}")
    with contextlib.chdir(path.parent):  # it leaves files in the working folder where it fails
        quant_pre_process(str(source), str(prepared))
    return prepared


def nncf_onnx(source: Path, batches: Sequence[Batch], path: Path, *, transformer: bool = False) -> Path:
    """Q/DQ by NNCF's ONNX backend."""
    return apart(_nncf_onnx, source, arrays(batches), path, transformer)


def _nncf_onnx(source: Path, feeds: list[Arrays], path: Path, transformer: bool) -> Path:
    nncf = importlib.import_module("nncf")  # not a dependency, and without types
    import onnx

    kind = nncf.ModelType.TRANSFORMER if transformer else None
    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(feeds), model_type=kind, subset_size=len(feeds)), path)
    return path


def nncf_openvino(source: Path, batches: Sequence[Batch], path: Path, *, transformer: bool = False) -> OpenVinoFile:
    """By NNCF, in OpenVINO's own format (.xml)."""
    return apart(_nncf_openvino, source, arrays(batches), path, transformer)


def _nncf_openvino(source: Path, feeds: list[Arrays], path: Path, transformer: bool) -> OpenVinoFile:
    openvino, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    made = nncf.quantize(
        openvino.convert_model(source), nncf.Dataset(feeds), model_type=kind, subset_size=len(feeds)
    )  # fmt: skip
    openvino.save_model(made, path, compress_to_fp16=False)
    return OpenVinoFile(path)


def olive_dynamic(source: Path, folder: Path) -> Path:
    """By Olive's dynamic quantization, int8 weights per channel."""
    return apart(_olive_dynamic, source, folder)


def _olive_dynamic(source: Path, folder: Path) -> Path:
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"  # read when it is imported
    olive = importlib.import_module("olive")  # not a dependency, and without types
    done = olive.run({
        "input_model": {"type": "ONNXModel", "model_path": str(source)},
        "passes": {"int8": {"type": "OnnxDynamicQuantization", "per_channel": True, "precision": "int8"}},
        "output_dir": str(folder), "cache_dir": str(folder / "cache"), "log_severity_level": 4,
    })  # fmt: skip
    return Path(done.get_best_candidate().model_path)


def onnxslim(source: Path, path: Path) -> Path:
    """Simplified by onnxslim, in floats."""
    slim = importlib.import_module("onnxslim")  # not a dependency, and without types
    slim.slim(str(source), str(path))
    return path


def fused_transformer(module: nn.Module, example: Batch, folder: Path) -> Path:
    """By onnxruntime's optimizer of transformers, in floats.

    Its fusions know TorchScript's export of attention written out: of torch.export's they find none.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    config: Any = module.config
    eager: Any = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    source, fused = folder / "torchscript.onnx", folder / "fused.onnx"
    axes = {name: {0: "batch"} if x.is_floating_point() else {0: "batch", 1: "length"} for name, x in example.items()}
    torch.onnx.export(
        _FirstOutput(eager, list(example)), tuple(example.values()), str(source), input_names=list(example),
        dynamic_axes=axes, dynamo=False, opset_version=17,
    )  # fmt: skip
    kind = config.model_type if config.model_type in ("gpt2", "vit") else "bert"
    heads, width = config.num_attention_heads, config.hidden_size
    made = optimize_model(str(source), model_type=kind, num_heads=heads, hidden_size=width, opt_level=0)
    made.save_model_to_file(str(fused))
    return fused


def fused_dynamic(module: nn.Module, example: Batch, folder: Path) -> Path:
    """By onnxruntime's optimizer of transformers, then `quantize_dynamic`."""
    return quantize_dynamic(fused_transformer(module, example, folder), folder / "fused-dynamic.onnx")


class _FirstOutput(nn.Module):
    """A module called by position, as TorchScript's tracing does: arguments of these names."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> Tensor:
        first: Tensor = self.module(**dict(zip(self.names, tensors, strict=True)))[0]
        return first
