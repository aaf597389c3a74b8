"""Several models in one interleaved run: how many times as fast as the baseline's file, and what else they take."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from benchmarks.case import Settings, checked, table, times
from benchmarks.loading import ENGINES, Bind, OpenVinoFile
from benchmarks.models import Batch
from benchmarks.peers import BASELINE, OPSET_23, versions
from graphopt.measure.machine import environment
from graphopt.measure.timing import Ratios, paired_calls, slower_than
from graphopt.numerics import metrics
from graphopt.report.records import plain

CONTROL = "the baseline again"
File = Path | OpenVinoFile
Column = tuple[str, Mapping[str, str]]
"""A column of a table: its title, and what stands in it by row."""


def opened(file: File, threads: int) -> Bind:
    engine, path = _engine(file)
    return ENGINES[engine](path, threads)


def _engine(file: File) -> tuple[str, Path]:
    return ("openvino", file.path) if isinstance(file, OpenVinoFile) else ("onnxruntime", file)


@dataclass(frozen=True)
class Race:
    """How models fared at several shapes, over one baseline."""

    shapes: Mapping[str, Batch]
    found: Mapping[str, Ratios]
    failed: Mapping[str, str]
    """Models that there is none of, and why."""
    baseline: str

    def speeds(self, title: str, bounds: Mapping[tuple[str, str], float] | None = None) -> tuple[Table, bool]:
        """Times as fast as the baseline, one row per model and one column per shape, and whether all bounds hold.

        bounds: (model, shape) -> the least ratio there; the shape "mean" is the geometric mean over all.
        """
        bounds = bounds or {}
        newer = self.found.get(OPSET_23)
        columns = [] if newer is None else [f"over {OPSET_23}"]
        rows = table(title, "", *self.shapes, "geometric mean", *columns)
        holds = not any(name in self.failed for name, _ in bounds)
        for name, one in self.found.items():
            cells = []
            for shape, ratio in zip((*self.shapes, "mean"), (*one.shapes, one.overall), strict=True):
                least = bounds.get((name, shape), 0.0)
                cell = times(ratio)
                if least:
                    holds = holds and ratio.median >= least
                    cell = checked(f"{cell} (bound {least:g})", ratio.median >= least)
                cells.append(cell)
            over = [] if newer is None else [f"{one.overall.median / newer.overall.median:.2f}"]
            rows.add_row(name, *cells, *over)
        for name, why in self.failed.items():
            rows.add_row(name, "not installed" if why.endswith("not installed") else "failed")
        rows.caption = Text("\n".join(f"{name}: {why}" for name, why in self.failed.items()))
        rows.caption_justify = "left"
        return rows, holds

    def latencies(self, title: str) -> Table:
        """p50 and p90 of a run in ms, and rows of a batch a second at p50."""
        rows = table(title, "", "shape", "p50 ms", "p90 ms", "rows/s")
        for name, seconds in self.seconds().items():
            for shape, (p50, p90) in seconds.items():
                rate = len(next(iter(self.shapes[shape].values()))) / p50
                rows.add_row(name, shape, f"{1e3 * p50:.2f}", f"{1e3 * p90:.2f}", f"{rate:.1f}")
        return rows

    def seconds(self) -> dict[str, dict[str, tuple[float, float]]]:
        """By model and shape, p50 and p90 of a run; the baseline's own are those beside its control."""
        of = {name: one for name, one in self.found.items() if name != CONTROL}
        return {
            name: {shape: ratio.seconds[name] for shape, ratio in zip(self.shapes, one.shapes, strict=True)}
            for name, one in ({self.baseline: self.found[CONTROL]} | of).items()
        }

    def slower(self, name: str) -> list[str]:
        """The shapes at which a model is slower than the baseline."""
        return [shape for shape, ratio in zip(self.shapes, self.found[name].shapes, strict=True) if slower_than(ratio)]

    def loses(self, name: str, others: Iterable[str]) -> list[str]:
        """The others that a model is slower than at some shape, beyond both their intervals."""
        ours = self.found[name].shapes
        return [
            other for other in others if other in self.found
            and any(mine.high < theirs.low for mine, theirs in zip(ours, self.found[other].shapes, strict=True))
        ]  # fmt: skip

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: {"mean": asdict(one.overall)} | dict(zip(self.shapes, map(asdict, one.shapes), strict=True))
                 for name, one in self.found.items()}  # fmt: skip
        return {"baseline": self.baseline, "found": found, "failed": dict(self.failed)}

    def plot(self, title: str, path: Path) -> None:
        """Times as fast as the baseline with intervals, a group of bars a shape."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(2 + 2.2 * len(self.shapes), 5))
        width = 0.85 / len(self.found)
        for index, (name, one) in enumerate(self.found.items()):
            at = [place + index * width for place in range(len(self.shapes))]
            middle = [ratio.median for ratio in one.shapes]
            reach = [[ratio.median - ratio.low for ratio in one.shapes],
                     [min(ratio.high, 2 * ratio.median) - ratio.median for ratio in one.shapes]]  # fmt: skip
            axes.bar(at, middle, width, yerr=reach, label=name, color=f"C{index % 10}", alpha=1 if index < 10 else 0.5)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks([place + 0.425 - width / 2 for place in range(len(self.shapes))], [*self.shapes])
        axes.set(title=title, ylabel=f"times as fast as {self.baseline}")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)


def race(
    models: Mapping[str, File | Bind | str], shapes: Mapping[str, Batch], settings: Settings, baseline: str = BASELINE
) -> Race:
    """Time files, models that are open already, and the reasons of those that failed, against one of the files."""
    calls: dict[str, list[Callable[[], object]]] = {}
    failed = {}
    for name, model in models.items():
        try:
            if isinstance(model, str):
                raise RuntimeError(model)
            bind = opened(model, settings.threads) if isinstance(model, File) else model
            calls[name] = [bind(batch) for batch in shapes.values()]
            for call in calls[name]:
                call()
        except Exception as error:  # a row of the table
            calls.pop(name, None)
            failed[name] = " ".join(str(error).split())[:120]
    if baseline not in calls:
        raise RuntimeError(f"the baseline does not run: {failed[baseline]}")
    found = paired_calls(calls | {CONTROL: calls[baseline]}, baseline=baseline, rounds=settings.rounds)
    return Race(shapes, {name: one for name, one in found.items() if name != baseline}, failed, baseline)


def tables(
    case: str,
    title: str,
    found: Race,
    files: Mapping[str, File | str],
    settings: Settings,
    *,
    bounds: Mapping[tuple[str, str], float] | None = None,
    columns: Iterable[Column] = (),
) -> bool:
    """Print all that is known of models raced over torch's export, and write it with a plot; whether the bounds hold.

    files: as they were raced. columns: what is known beside file, time to load and memory, such as accuracy.
    """
    first = next(iter(found.shapes.values()))
    sizes = {name: footprint(file, first, settings.threads) for name, file in files.items()
             if not isinstance(file, str) and name not in found.failed}  # fmt: skip
    columns = list(columns)
    rest = table("the file, and a process of its own that loads it and runs the first shape", "", "file MB", "load s",
                 "peak memory MB", *(title for title, _ in columns))  # fmt: skip
    for name, one in sizes.items():
        rest.add_row(name, f"{one.file / 1e6:.1f}", f"{one.load:.2f}", f"{one.peak / 1e6:.0f}",
                     *(cells.get(name, "") for _, cells in columns))  # fmt: skip
    rows, holds = found.speeds(f"{title}: times as fast as torch.onnx.export at its default opset", bounds)
    settings.console.print(rows, found.latencies("latency and throughput"), rest)
    figures = found.figures() | {
        "seconds": found.seconds(), "files": sizes, **{title: dict(cells) for title, cells in columns},
    }  # fmt: skip
    write(settings, case, figures)
    if settings.out is not None:
        found.plot(title, settings.out / f"{case}.png")
    return holds


@dataclass(frozen=True)
class Footprint:
    """What a file takes before and while it runs."""

    file: int
    """Bytes, with those of weights that lie beside it."""
    load: float
    """Seconds until a session is made."""
    peak: int
    """Bytes of resident memory of a process that loads the file and runs it once."""


def footprint(file: File, batch: Batch, threads: int) -> Footprint:
    """Load and run a file in a process of its own, with its engine and no other library. Linux only."""
    engine, path = _engine(file)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "batch.npz"
        np.savez(given, **{name: tensor.numpy() for name, tensor in batch.items()})  # type: ignore[arg-type]
        command = [sys.executable, "-m", "benchmarks.loading", engine, str(path), str(given), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    beside = path.parent.glob(f"{path.stem}.bin" if path.suffix == ".xml" else f"{path.name}*.data")
    size = sum(part.stat().st_size for part in (path, *beside))
    return Footprint(size, **json.loads(done.stdout.splitlines()[-1]))


def distances(files: Mapping[str, File | str], found: Race, threads: int) -> Column:
    """The SQNR of the worst output to the baseline's, over all shapes: a column for `tables`. Some files lack the last
    outputs of the baseline, and are judged by those that they have."""

    def outputs(file: File) -> list[list[torch.Tensor]]:
        bind = opened(file, threads)
        return [[torch.as_tensor(one) for one in bind(batch)()] for batch in found.shapes.values()]

    baseline = files[found.baseline]
    assert not isinstance(baseline, str)
    expected = outputs(baseline)
    cells = {}
    for name, file in files.items():
        if isinstance(file, str) or name in (found.baseline, *found.failed):
            continue
        pairs = [pair for several in zip(expected, outputs(file), strict=True) for pair in zip(*several, strict=False)]
        cells[name] = f"{min(metrics.sqnr(a.float(), b.float()) for a, b in pairs):.1f}"
    return "SQNR dB to fp32", cells


def write(settings: Settings, case: str, figures: Mapping[str, Any]) -> None:
    """Figures of a case as JSON with what they depend on, where a folder is given for them."""
    if settings.out is not None:
        machine = environment() | versions()
        about = {"machine": machine, "threads": settings.threads, "rounds": settings.rounds}
        text = json.dumps(plain(about | dict(figures)), indent=2) + "\n"
        (settings.out / f"{case}.json").write_text(text, encoding="utf-8")
