"""The files that graphopt's are compared with: torch's own exports, and what other tools make of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from benchmarks.models import Batch

Made = TypeVar("Made")

BASELINE, OPSET_23 = "fp32, default opset", "fp32, opset 23"
"""What every ratio is over, and the newest form, which is faster by itself."""


def attempt(make: Callable[[], Made]) -> Made | str:
    """What a peer makes, or how it failed in a line: that is a row of a table, not the end of it."""
    try:
        with quiet():
            return make()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:90]}"


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

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self.feeds, None)


def arrays(batches: Sequence[Batch]) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]


def quantize_static(source: Path, batches: Sequence[Batch], path: Path, *, activations: str = "QUInt8") -> Path:
    """Q/DQ, int8 weights per channel, ranges from minimum to maximum, after onnxruntime's own preparation."""
    from onnxruntime import quantization

    quantization.quantize_static(
        str(_prepared(source, path)), str(path), Reader(batches), quant_format=quantization.QuantFormat.QDQ,
        per_channel=True, activation_type=getattr(quantization.QuantType, activations),
        weight_type=quantization.QuantType.QInt8,
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
    nncf = importlib.import_module("nncf")  # not a dependency, and without types
    import onnx

    kind = nncf.ModelType.TRANSFORMER if transformer else None
    feeds = arrays(batches)
    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(feeds), model_type=kind, subset_size=len(feeds)), path)
    return path
