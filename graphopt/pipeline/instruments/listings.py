"""The listing of the graph after each pass: as differences, or in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments.instrument import Instrument
from graphopt.report.diff import GraphDiff

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


class Diff(Instrument):
    """The listing before and after every pass that changed it."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, GraphDiff]] = []
        """The pass as text, and what it changed."""
        self._before = ""

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self._before = graph.text()

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        listing = graph.text()
        if listing != self._before:
            self.steps.append((str(pass_), GraphDiff(self._before, listing)))

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{diff}" for name, diff in self.steps)


class Dump(Instrument):
    """One file for each pass that changed the graph: 007_low-rank.txt; 000_original.txt is the graph before any."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._count = 0
        self._last: str | None = None

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        if self._last is None:
            self._write("original", graph.text())

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self._count += 1
        listing = graph.text()
        if listing != self._last:
            self._write(pass_.name, listing)

    def _write(self, name: str, listing: str) -> None:
        self._last = listing
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self._count:03}_{name}.txt").write_text(listing + "\n", encoding="utf-8")
