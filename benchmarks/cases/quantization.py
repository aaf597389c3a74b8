"""Accuracy of int8 without training: graphopt's static and dynamic defaults against onnxruntime's and NNCF's.

All calibrate on the same batches. The peers start from the float file that graphopt exports (opset 20, standard
operators), onnxruntime's static quantization after its own `quant_pre_process` where that runs. A peer that fails says
how in its row.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from torch import Tensor

import graphopt
from benchmarks import trained
from benchmarks.case import Settings, checked, table
from benchmarks.peers import quiet
from benchmarks.trained import Task

MOST_LOST: Mapping[str, float] = {
    "minilm": 0.3, "resnet20": 0.3, "resnet56": 0.3, "resnet8": 0.3, "dscnn": 0.3, "magika": 0.3, "stories": 0.005,
}  # fmt: skip
"""How much of the metric graphopt's static int8 may lose."""
OURS = {"graphopt static": "quantize{scheme=static}", "graphopt dynamic": "quantize{scheme=dynamic}"}
PEERS = ("MinMax", "Percentile", "Entropy")
JUDGED = "graphopt static"


def run(settings: Settings) -> bool:
    holds, everything = True, {}
    for name, make in trained.TASKS.items():
        if not settings.chosen(name):
            continue
        task = make(settings)
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(task, Path(folder), settings)
        fp32, found = figures.pop("fp32"), figures
        judged = found[JUDGED]
        peers = [one[0] for row, one in found.items() if row not in OURS and isinstance(one, tuple)]
        best = max(peers, default=-float("inf"))
        rows = table(f"{task.name}: {task.metric}", "", "metric", "against fp32", "cosine to fp32")
        assert isinstance(fp32, tuple)
        rows.add_row("fp32", f"{fp32[0]:.4f}", "", "")
        for row, figure in found.items():
            if isinstance(figure, str):
                rows.add_row(row, figure, "", "")
                continue
            lost = fp32[0] - figure[0]
            fits = row != JUDGED or (lost <= MOST_LOST[name] and figure[0] >= best)
            rows.add_row(row, f"{figure[0]:.4f}", checked(f"{-lost:+.4f}", fits), f"{figure[1]:.4f}")
            holds = holds and fits
        holds = holds and not isinstance(judged, str)
        rows.columns[1].no_wrap = False
        settings.console.print(rows)
        everything[name] = {"metric": task.metric, "fp32": fp32[0], "rows": found}
    if settings.out is not None:
        (settings.out / "quantization.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds


def measure(task: Task, folder: Path, settings: Settings) -> dict[str, tuple[float, float] | str]:
    """By row, the metric and the cosine to fp32, or why there is none."""
    source = task.model
    if not isinstance(source, Path):
        source = graphopt.optimize(task.model, example_inputs=task.calibration[:1], threads=settings.threads).export(
            folder / "float.onnx", opset=20, portable=True
        )
    plain = session(source, settings)
    expected = task.predict(partial(outputs, plain))
    figures: dict[str, tuple[float, float] | str] = {"fp32": (task.score(expected), 1.0)}

    def judge(row: str, make: Callable[[], Callable[[Any], list[Any]]]) -> None:
        try:
            figures[row] = _figures(task, expected, task.predict(make()))
        except Exception as error:  # a row of the table
            figures[row] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"

    for row, pipeline in OURS.items():
        small = graphopt.optimize(
            task.model,
            pipeline,
            example_inputs=task.calibration[:1],
            calibration=task.calibration,
            threads=settings.threads,
        )
        judge(row, lambda small=small: lambda batch: list(small.runner(batch)))  # type: ignore[misc]
    for method in PEERS:
        judge(f"onnxruntime static {method}", lambda method=method: _ort_static(source, task, method, folder, settings))  # type: ignore[misc]
    judge("onnxruntime dynamic", lambda: _ort_dynamic(source, folder, settings))
    if importlib.util.find_spec("nncf") is None:
        figures["NNCF"] = "not installed"
    else:
        judge("NNCF", lambda: _nncf(source, task, folder, settings))
    return figures


def _figures(task: Task, expected: Tensor, found: Tensor) -> tuple[float, float]:
    return task.score(found), trained.cosine(expected, found)


class Reader:
    """The calibration batches as onnxruntime's quantization reads them."""

    def __init__(self, task: Task) -> None:
        self.feeds: Iterator[dict[str, np.ndarray[Any, Any]]] = (
            {name: tensor.numpy() for name, tensor in batch.items()} for batch in task.calibration
        )

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self.feeds, None)


def _ort_static(
    source: Path, task: Task, method: str, folder: Path, settings: Settings
) -> Callable[[Any], list[Any]]:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, file = folder / "prepared.onnx", folder / f"{method}.onnx"
    with quiet(), contextlib.chdir(folder):  # it leaves files in the working folder where it fails
        try:
            quant_pre_process(str(source), str(prepared))
        except Exception:
            prepared = source
        quantize_static(
            str(prepared), str(file), Reader(task), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )  # fmt: skip
    return partial(outputs, session(file, settings))


def _ort_dynamic(source: Path, folder: Path, settings: Settings) -> Callable[[Any], list[Any]]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "dynamic.onnx"
    with quiet():
        quantize_dynamic(str(source), str(file), per_channel=True, weight_type=QuantType.QInt8)
    return partial(outputs, session(file, settings))


def _nncf(source: Path, task: Task, folder: Path, settings: Settings) -> Callable[[Any], list[Any]]:
    import onnx

    nncf = importlib.import_module("nncf")  # not a dependency, and without types
    file = folder / "nncf.onnx"
    feeds = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in task.calibration]
    with quiet():
        onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=len(feeds)), str(file))
    return partial(outputs, session(file, settings))


def session(file: Path, settings: Settings) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = settings.threads, 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def outputs(one: ort.InferenceSession, batch: Mapping[str, Tensor]) -> list[Any]:
    """The outputs of a session on a batch, whose inputs it may have dropped some of."""
    names = [value.name for value in one.get_inputs()]
    results: list[Any] = one.run(None, {name: batch[name].numpy() for name in names})
    return results
