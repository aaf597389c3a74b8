"""Several models in one interleaved run: how many times as fast as the baseline's file, and what else they take."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.case import Settings, checked, table, times
from benchmarks.loading import feeds, session
from benchmarks.models import Batch
from benchmarks.peers import BASELINE, OPSET_23
from graphopt.backends.measure import Contender, contest, slower_than
from graphopt.report import plain

CONTROL = "the baseline again"
Bind = Callable[[Batch], Callable[[], object]]
"""A model that is ready to run: from a batch to a call without arguments."""


def opened(path: Path, threads: int) -> Bind:
    one = session(path, threads)
    return lambda batch: partial(one.run, None, feeds(one, batch))


def openvino_model(path: Path, threads: int) -> Bind:
    """A file in OpenVINO: default options, but for the threads."""
    compiled = importlib.import_module("openvino").compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})

    def bind(batch: Batch) -> Callable[[], object]:
        given = {name: tensor.numpy() for name, tensor in batch.items()}
        return lambda: list(compiled(given).values())

    return bind


@dataclass(frozen=True)
class Race:
    """How models fared at several shapes, over one baseline."""

    shapes: Mapping[str, Batch]
    found: Mapping[str, Contender]
    failed: Mapping[str, str]
    """Models that there is none of, and why."""

    def speeds(self, title: str, bounds: Mapping[tuple[str, str], float] | None = None) -> tuple[Table, bool]:
        """Times as fast as the baseline, a row a model and a column a shape, and whether all bounds hold.

        bounds: (model, shape) -> the least ratio there; the shape "mean" is the geometric mean over all.
        """
        bounds = bounds or {}
        newer = self.found.get(OPSET_23)
        columns = [] if newer is None else [f"over {OPSET_23}"]
        rows = table(title, "", *self.shapes, "geometric mean", *columns)
        holds = True
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
        for name in self.failed:
            rows.add_row(name, "none")
        rows.caption = "\n".join(f"{name}: {why}" for name, why in self.failed.items())
        rows.caption_justify = "left"
        return rows, holds

    def latencies(self, title: str) -> Table:
        """p50 and p90 of a run in ms, and rows of a batch a second at p50."""
        rows = table(title, "", "shape", "p50 ms", "p90 ms", "rows/s")
        for name, one in self.found.items():
            for (shape, batch), ratio in zip(self.shapes.items(), one.shapes, strict=True):
                p50, p90 = ratio.seconds[name]
                rate = len(next(iter(batch.values()))) / p50
                rows.add_row(name, shape, f"{1e3 * p50:.2f}", f"{1e3 * p90:.2f}", f"{rate:.1f}")
        return rows

    def slower(self, name: str) -> list[str]:
        """The shapes at which a model is slower than the baseline."""
        return [shape for shape, ratio in zip(self.shapes, self.found[name].shapes, strict=True) if slower_than(ratio)]

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: {"mean": asdict(one.overall)} | dict(zip(self.shapes, map(asdict, one.shapes), strict=True))
                 for name, one in self.found.items()}  # fmt: skip
        return {"found": found, "failed": dict(self.failed)}


def race(
    models: Mapping[str, Path | Bind | str], shapes: Mapping[str, Batch], settings: Settings, baseline: str = BASELINE
) -> Race:
    """Time files, models that are open already, and the reasons of those that failed, against one of the files."""
    calls: dict[str, list[Callable[[], object]]] = {}
    failed = {}
    for name, model in models.items():
        try:
            if isinstance(model, str):
                raise RuntimeError(model)
            bind = opened(model, settings.threads) if isinstance(model, Path) else model
            calls[name] = [bind(batch) for batch in shapes.values()]
            for call in calls[name]:
                call()
        except Exception as error:  # a row of the table
            calls.pop(name, None)
            failed[name] = " ".join(str(error).split())[:120]
    if baseline not in calls:
        raise RuntimeError(f"the baseline does not run: {failed[baseline]}")
    found = contest(calls | {CONTROL: calls[baseline]}, baseline=baseline, rounds=settings.rounds)
    return Race(shapes, {name: one for name, one in found.items() if name != baseline}, failed)


def loses(ours: Contender, other: Contender) -> bool:
    """Whether a model is slower than another of the same race at some shape, beyond both their intervals."""
    return any(mine.high < theirs.low for mine, theirs in zip(ours.shapes, other.shapes, strict=True))


@dataclass(frozen=True)
class Footprint:
    """What a file takes before and while it runs."""

    file: int
    """Bytes."""
    load: float
    """Seconds until a session is made."""
    peak: int
    """Bytes of resident memory of a process that loads the file and runs it once."""


def footprint(path: Path, batch: Batch, threads: int) -> Footprint:
    """Load and run a file in a process of its own, with onnxruntime and no other library. Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "batch.npz"
        np.savez(given, **{name: tensor.numpy() for name, tensor in batch.items()})  # type: ignore[arg-type]
        command = [sys.executable, "-m", "benchmarks.loading", str(path), str(given), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Footprint(path.stat().st_size, **json.loads(done.stdout.splitlines()[-1]))


def write(settings: Settings, case: str, figures: Mapping[str, Any]) -> None:
    """Figures of a case as JSON, where a folder is given for them."""
    if settings.out is not None:
        (settings.out / f"{case}.json").write_text(json.dumps(plain(figures), indent=2) + "\n", encoding="utf-8")
