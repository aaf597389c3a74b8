"""What a run does, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments.instrument import Instrument

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


class Progress(Instrument):
    """One line on the terminal for each pass: its sites and its seconds; a bar while one searches, or calibrates."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole

        self.console = console or RichConsole(stderr=True)

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        from graphopt.report import figures, tables

        record = context.record
        self._line(f"{figures.shortened(record.text, 48):48}  {tables.sites(record):24}  {record.seconds:7.2f} s")

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
        self._line(f"{pass_} failed")
        return None

    @contextmanager
    def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
        """A bar, which goes away at the end."""
        from rich.markup import escape
        from rich.progress import Progress as Bar

        with Bar(console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=steps)

            def advance(step: str) -> None:
                bar.update(task, advance=1, description=f"{what}: {escape(step)}")

            yield advance

    def _line(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
