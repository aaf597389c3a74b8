"""ONNX files as found in the wild: what comes out of graphopt is not slower than the file that went in.

Each file that loads goes through lowering alone and through int8 with calibration on noise, with every choice measured.
A result loses where `measure.slower_than` says so in this run and again in a second one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

import graphopt
from benchmarks.case import Settings, checked, table, times
from benchmarks.cases.corpus import REFUSALS, accepted_feeds, line, plain_session
from benchmarks.models import Batch
from benchmarks.speed import CONTROL, race, write
from graphopt.errors import PassError
from graphopt.report.records import Report

PIPELINES = {
    "lowering alone": None,
    "dynamic int8": "quantize{scheme=dynamic}",
    "static int8": "quantize{scheme=static}",
}
INPUT = "the file"
CRASH = "CRASH"


def run(settings: Settings) -> bool:
    folder = settings.required("onnx_corpus")
    entries = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    rows = table("times as fast as the file that went in", "file", "", "times as fast", "reverted, or why none")
    rows.columns[-1].justify, rows.columns[-1].no_wrap = "left", False
    lost, everything = [], {}
    for entry in entries:
        if entry["ort"] != "ok" or not settings.chosen(entry["file"]):
            continue
        everything[entry["file"]] = found = judged(folder / entry["file"], settings)
        for name, one in found.items():
            rows.add_row(entry["file"], name, checked(one["times"], not one["loses"]), Text(one["said"]))
            lost += [f"{entry['file']}, {name}"] * one["loses"]
    settings.console.print(rows)
    settings.console.print(f"slower than the file that went in, in two runs, or crashed: {', '.join(lost) or 'none'}")
    write(settings, "slowdowns", everything)
    if settings.out is not None:
        plot(everything, settings.out / "slowdowns.png")
    return not lost


def judged(path: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """By pipeline, the ratio of times, whether it loses, and what graphopt reverted, or why there is no result."""
    feeds = accepted_feeds(plain_session(path, settings.threads))
    batches = [{name: torch.from_numpy(array) for name, array in one.items()} for one in feeds]
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Path | str] = {INPUT: path}
        said = {CONTROL: ""}
        for index, name in enumerate(PIPELINES):
            models[name], said[name] = optimized(path, name, batches, Path(folder) / f"{index}.onnx", settings)
        shapes = {"example": batches[0]}
        first = race(models, shapes, settings, INPUT)
        suspects = [name for name in models if name in first.found and first.slower(name)]
        again = {name: models[name] for name in (INPUT, *suspects)}
        second = race(again, shapes, settings, INPUT) if suspects else None
    found: dict[str, dict[str, Any]] = {
        name: {"times": str(times(one.overall)), "ratio": asdict(one.overall), "said": said[name],
               "loses": second is not None and name in suspects and bool(second.slower(name))}
        for name, one in first.found.items()
    }  # fmt: skip
    return found | {name: {"times": "", "said": why, "loses": CRASH in why} for name, why in first.failed.items()}


def optimized(path: Path, name: str, batches: list[Batch], to: Path, settings: Settings) -> tuple[Path | str, str]:
    """The file that a pipeline makes, or why there is none, and what was reverted."""
    try:
        small = graphopt.optimize(
            path, PIPELINES[name], example_inputs=batches[0], threads=settings.threads, measure=True,
            calibration=batches if name == "static int8" else None,
        )  # fmt: skip
    except (*REFUSALS, PassError) as reason:  # such as a file without a site for int8
        return f"refused: {line(reason)}", ""
    except Exception as error:
        return f"{CRASH}: {type(error).__name__}: {line(error)}", ""
    return small.export(to), account(small.report)


def account(report: Report) -> str:
    """What graphopt took back because it was slower."""
    sites = [f"{len(report.reverted)} sites, such as {next(iter(report.reverted))}"] if report.reverted else []
    return "; ".join(sites + [note for note in report.notes if "makes the model slower here" in note])


def plot(everything: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Times as fast as each file with intervals, one mark per pipeline."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.4 * len(everything)))
    names = (CONTROL, *PIPELINES)
    for index, name in enumerate(names):
        ratios = {at: found[name]["ratio"] for at, found in enumerate(everything.values())
                  if "ratio" in found.get(name, {})}  # fmt: skip
        middle = [one["median"] for one in ratios.values()]
        reach = [[one["median"] - one["low"] for one in ratios.values()],
                 [min(one["high"], 2 * one["median"]) - one["median"] for one in ratios.values()]]  # fmt: skip
        axes.errorbar(middle, [at + (index - 1.5) / 6 for at in ratios], xerr=reach, fmt="o", markersize=4, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(everything)), [*everything])
    axes.set(xscale="log", xlabel="times as fast as the file that went in")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
