"""Weights of 4 bits in blocks of 32, activations in float: what second-order rounding loses of what nearest loses.

The two differ in `rounding` alone; both search scales and correct biases.
"""

from __future__ import annotations

import json

from benchmarks import trained
from benchmarks.case import Settings, checked, table

QUANTIZE = "quantize{scheme=weight-only bits=4 block=32%s}"
PIPELINES = {
    "fp32": "simplify",
    "nearest": QUANTIZE % " rounding=nearest",
    "second order": QUANTIZE % " rounding=second-order",
}
MOST = 0.5
"""Share of nearest's loss that second order may have."""


def run(settings: Settings) -> bool:
    holds, everything = True, {}
    for name in ("stories", "minilm"):
        if not settings.chosen(name):
            continue
        task = trained.TASKS[name](settings)
        predicted = {}
        for row, pipeline in PIPELINES.items():
            predicted[row] = task.predict(task.optimized(pipeline, settings.threads))
        metrics = {row: task.score(rows) for row, rows in predicted.items()}
        lost = {row: metrics["fp32"] - metric for row, metric in metrics.items()}
        cosines = {row: trained.cosine(predicted["fp32"], rows) for row, rows in predicted.items()}
        fits = lost["second order"] < MOST * lost["nearest"]
        title = f"{task.name}, int4 in blocks of 32: {task.metric}"
        rows = table(title, "", "metric", "against fp32", "cosine to fp32")
        for row, metric in metrics.items():
            share = "" if row != "second order" else f" ({lost[row] / lost['nearest']:.0%} of nearest)"
            against = checked(f"{-lost[row]:+.4f}{share}", fits or not share)
            rows.add_row(row, f"{metric:.4f}", "" if row == "fp32" else against, f"{cosines[row]:.4f}")
        settings.console.print(rows)
        holds = holds and fits
        everything[name] = {"metric": task.metric, "metrics": metrics, "cosines": cosines}
    if settings.out is not None:
        (settings.out / "int4.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds
