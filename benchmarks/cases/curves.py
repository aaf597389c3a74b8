"""Quality against amount, without training: networks with trained weights, pruned, factorized and sparsified.

Every row is one pipeline on the float ONNX file of the network: the metric on data that did not calibrate, and the mean
cosine of embeddings or logits to fp32's, which falls much sooner than the metric does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import graphopt
from benchmarks import trained
from benchmarks.case import Settings, checked, table
from benchmarks.trained import Task

NEURONS, HEADS = (0.5, 0.7, 0.8), (0.25,)
RESNET = [
    ("channels, L2 norm", (0.25, 0.5), "prune{{channels={} criterion=l2 compensate=false}}"),
    ("channels, with least squares", (0.25, 0.5), "prune{{channels={}}}"),
    ("2:4 by magnitude", (0.5,), "sparsify{{pattern=2:4}}"),
    ("2:4 by SparseGPT", (0.5,), "sparsify{{pattern=2:4 criterion=sparsegpt}}"),
    ("unstructured, SparseGPT", (0.5, 0.7), "sparsify{{amount={} criterion=sparsegpt}}"),
    ("parameters that stay, low-rank", (0.8, 0.6), "low-rank{{params={}}}"),
]
CURVES: Mapping[str, Sequence[tuple[str, Sequence[float], str]]] = {
    "minilm": [
        ("neurons, activation importance", NEURONS, "prune{{neurons={} compensate=false}}"),
        ("neurons, with least squares", NEURONS, "prune{{neurons={}}}"),
        ("heads, with least squares", (0.25, 0.5), "prune{{heads={}}}"),
        ("FLOPs that stay", (0.75, 0.55, 0.5), "prune{{flops={}}}"),
        ("2:4 by magnitude", (0.5,), "sparsify{{pattern=2:4}}"),
        ("2:4 by WANDA", (0.5,), "sparsify{{pattern=2:4 criterion=wanda}}"),
        ("2:4 by SparseGPT", (0.5,), "sparsify{{pattern=2:4 criterion=sparsegpt}}"),
        ("unstructured, SparseGPT", (0.5, 0.7), "sparsify{{amount={} criterion=sparsegpt}}"),
        ("parameters that stay, plain SVD", (0.9, 0.8), "low-rank{{params={} fit=weights}}"),
        ("parameters that stay, whitened SVD", (0.9, 0.8), "low-rank{{params={}}}"),
    ],
    "resnet20": RESNET,
    "resnet56": RESNET,
    "stories": [
        ("neurons, activation importance", (0.25, 0.5), "prune{{neurons={} compensate=false}}"),
        ("neurons, with least squares", (0.25, 0.5), "prune{{neurons={}}}"),
        ("heads, with least squares", (0.25,), "prune{{heads={}}}"),
        ("2:4 by magnitude", (0.5,), "sparsify{{pattern=2:4}}"),
        ("2:4 by SparseGPT", (0.5,), "sparsify{{pattern=2:4 criterion=sparsegpt}}"),
        ("parameters that stay, low-rank", (0.8,), "low-rank{{params={}}}"),
    ],
}
"""By task: what is done, at which amounts, and the pipeline with a place for the amount."""

BOUNDS = {
    ("minilm", "neurons, activation importance", 0.5): 86.60,
    ("minilm", "neurons, with least squares", 0.5): 86.54,
    ("minilm", "neurons, with least squares", 0.7): 86.58,
    ("minilm", "neurons, with least squares", 0.8): 86.01,
    ("minilm", "heads, with least squares", 0.25): 86.82,
    ("minilm", "2:4 by SparseGPT", 0.5): 86.08,
}
"""Figures of an early prototype, to be reached."""


@dataclass(frozen=True)
class Point:
    """One pipeline on one network."""

    curve: str
    amount: float
    pipeline: str
    metric: float
    cosine: float
    flops: float
    """Share of the FLOPs that is left; 1 where zeros stay in place."""
    parameters: float


def run(settings: Settings) -> bool:
    holds, everything = True, {}
    for name, curves in CURVES.items():
        if not settings.chosen(name):
            continue
        task = trained.TASKS[name](settings)
        with tempfile.TemporaryDirectory() as folder:
            baseline, points = measure(task, curves, Path(folder) / "float.onnx", settings)
        title = f"{task.name}: {task.metric} (fp32: {baseline:.2f})"
        rows = table(title, "", "amount", "metric", "cosine", "FLOPs", "parameters")
        for point in points:
            bound = BOUNDS.get((name, point.curve, point.amount), -float("inf"))
            figure = f"{point.metric:.2f}" + ("" if bound < 0 else f" (bound {bound:.2f})")
            holds = holds and point.metric >= bound
            rows.add_row(
                point.curve, f"{point.amount:g}", checked(figure, point.metric >= bound), f"{point.cosine:.4f}",
                f"{point.flops:.3f}", f"{point.parameters:.3f}",
            )  # fmt: skip
        settings.console.print(rows)
        everything[name] = {"fp32": baseline, "metric": task.metric, "points": [asdict(point) for point in points]}
        if settings.out is not None:
            plot(task, baseline, points, settings.out / f"curves-{name}.png")
    if settings.out is not None:
        (settings.out / "curves.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds


def measure(
    task: Task, curves: Sequence[tuple[str, Sequence[float], str]], file: Path, settings: Settings
) -> tuple[float, list[Point]]:
    """The metric in fp32, and every point of the curves; each starts from the float file."""
    whole = graphopt.optimize(task.model, example_inputs=task.calibration[:1])
    whole.export(file)
    expected = task.predict(lambda batch: list(whole.runner(batch)))
    points = []
    for curve, amounts, text in curves:
        for amount in amounts:
            pipeline = text.format(amount)
            small = graphopt.optimize(file, pipeline, example_inputs=task.calibration[:1], calibration=task.calibration)
            found = task.predict(lambda batch, small=small: list(small.runner(batch)))  # type: ignore[misc]
            before, after = small.report.cost_before, small.report.cost_after
            assert before is not None and after is not None
            points.append(
                Point(
                    curve,
                    amount,
                    pipeline,
                    task.score(found),
                    trained.cosine(expected, found),
                    (after.flops or 0) / (before.flops or 1),
                    after.parameters / before.parameters,
                )
            )
            settings.console.print(f"{pipeline}: {points[-1].metric:.2f}", style="dim", markup=False, highlight=False)
    return task.score(expected), points


def plot(task: Task, baseline: float, points: Sequence[Point], path: Path) -> None:
    """The metric and the cosine against the amount, one line per curve, in two panels over one legend."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    for curve in dict.fromkeys(point.curve for point in points):
        line = [point for point in points if point.curve == curve]
        amounts = [point.amount for point in line]
        left.plot(amounts, [point.metric for point in line], marker="o", label=curve)
        right.plot(amounts, [point.cosine for point in line], marker="o", label=curve)
    left.axhline(baseline, color="black", linewidth=0.8, linestyle="--")
    left.set(title=f"{task.name}: {task.metric}", xlabel="amount", ylabel="metric (dashed: fp32)")
    right.set(title="mean cosine to fp32", xlabel="amount", ylabel="cosine")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
