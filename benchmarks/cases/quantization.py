"""Accuracy of int8 without training: graphopt's static and dynamic defaults against onnxruntime's and NNCF's.

All calibrate on the same batches. The peers start from the float file that graphopt exports (opset 20, standard
operators), onnxruntime's static quantization after its own `quant_pre_process` where that runs. A peer that fails says
how in its row.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
from torch import Tensor

import graphopt
from benchmarks import peers, trained
from benchmarks.case import Settings, checked, table
from benchmarks.loading import feeds, session
from benchmarks.trained import Run, Task

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
    plain = session(source, settings.threads)
    expected = task.predict(partial(outputs, plain))
    figures: dict[str, tuple[float, float] | str] = {"fp32": (task.score(expected), 1.0)}

    def judge(row: str, make: Callable[[], Run]) -> None:
        try:
            figures[row] = _figures(task, expected, task.predict(make()))
        except Exception as error:  # a row of the table
            figures[row] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"

    for row, pipeline in OURS.items():
        small = task.optimized(pipeline, settings.threads)  # its failure is no row: it ends the case
        judge(row, lambda small=small: small)  # type: ignore[misc]
    runs = partial(_runs, threads=settings.threads)
    for method in PEERS:
        make = partial(peers.quantize_static, source, task.calibration, folder / f"{method}.onnx", ranges=method)
        judge(f"onnxruntime static {method}", partial(runs, make))
    judge("onnxruntime dynamic", partial(runs, partial(peers.quantize_dynamic, source, folder / "dynamic.onnx")))
    if importlib.util.find_spec("nncf") is None:
        figures["NNCF"] = "not installed"
    else:
        judge("NNCF", partial(runs, partial(peers.nncf_onnx, source, task.calibration, folder / "nncf.onnx")))
    return figures


def _runs(make: Callable[[], Path], threads: int) -> Callable[[Any], list[Any]]:
    """What runs the file that a peer makes."""
    with peers.quiet():
        file = make()
    return partial(outputs, session(file, threads))


def _figures(task: Task, expected: Tensor, found: Tensor) -> tuple[float, float]:
    return task.score(found), trained.cosine(expected, found)


def outputs(one: ort.InferenceSession, batch: Mapping[str, Tensor]) -> list[Any]:
    """The outputs of a session on a batch, whose inputs it may have dropped some of."""
    results: list[Any] = one.run(None, feeds(one, batch))
    return results
