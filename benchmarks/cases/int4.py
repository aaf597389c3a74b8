"""Weights of 4 bits in blocks of 32, activations in float: what GPTQ loses of what round-to-nearest loses.

"Round to nearest" is what the papers mean by it: scales that cover each block, and nothing else. "Nearest, searched"
has the scales and biases of "GPTQ", and differs from it in `rounding` alone.
"""

from __future__ import annotations

import json

from benchmarks import trained
from benchmarks.case import Settings, checked, table

QUANTIZE = "quantize{scheme=weight-only bits=4 block=32%s}"
PIPELINES = {
    "fp32": "simplify",
    "round to nearest": QUANTIZE % " rounding=nearest clip=false bias_correction=false",
    "nearest, searched": QUANTIZE % " rounding=nearest",
    "GPTQ": QUANTIZE % " rounding=gptq",
}
MOST = 0.5
"""Share of the loss of "nearest, searched" that GPTQ may have: the stricter of the two."""


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
        fits = lost["GPTQ"] < MOST * lost["nearest, searched"]
        title = f"{task.name}, int4 in blocks of 32: {task.metric}"
        rows = table(title, "", "metric", "against fp32", "of nearest's loss", "cosine to fp32")
        for row, metric in metrics.items():
            share = "" if row == "fp32" else f"{lost[row] / lost['round to nearest']:.0%}"
            against = "" if row == "fp32" else checked(f"{-lost[row]:+.4f}", fits or row != "GPTQ")
            rows.add_row(row, f"{metric:.4f}", against, share, f"{cosines[row]:.4f}")
        settings.console.print(rows)
        holds = holds and fits
        everything[name] = {"metric": task.metric, "metrics": metrics, "cosines": cosines}
    if settings.out is not None:
        (settings.out / "int4.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return holds
