"""What a run does, on the terminal or in a notebook."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments.instrument import Instrument
from graphopt.pipeline.instruments.log import LOGGER, Log

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


def display(verbose: bool | None, instruments: Sequence[Instrument] = ()) -> list[Instrument]:
    """The instruments, and those that say what a run does.

    verbose: False adds none; True adds `Progress` and `Log`. None adds `Log`, whose lines go where the user sends those
    of the logger `graphopt`; where they go nowhere, and there is a terminal or a notebook, `Progress` too.
    Raises UsageError for what is no instrument.
    """
    for one in instruments:
        if not isinstance(one, Instrument):
            raise UsageError(
                f"instruments: {one!r} is a {type(one).__name__}; give objects of graphopt.pipeline.instruments"
            )
    if verbose is False:
        return list(instruments)
    shows = verbose or (not LOGGER.isEnabledFor(logging.INFO) and _is_watched())
    has_own = any(isinstance(one, Progress) for one in instruments)
    return [*instruments, Log(), *([Progress()] if shows and not has_own else [])]


def _is_watched() -> bool:
    """Whether somebody reads along: on a terminal, or in a notebook."""
    if "IPython" not in sys.modules:
        return sys.stderr.isatty()
    from rich.console import Console

    return sys.stderr.isatty() or Console(stderr=True).is_jupyter


class Progress(Instrument):
    """One line for each pass and each other phase of a run, with its seconds, and bars for what runs now.

    Bars are drawn when something happens, never in between by a thread, which would disturb what is timed.
    """

    def __init__(self, console: Console | None = None) -> None:
        """console: where to; stderr by default."""
        from rich.console import Console as RichConsole

        self.console = console or RichConsole(stderr=True)
        self._bars: Bars | None = None

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        with self._task(what, None):
            yield

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        from graphopt.report import tables

        self.done(context.record.text, tables.sites(context.record), context.record.seconds)

    def done(self, what: str, result: str, seconds: float) -> None:
        from graphopt.report import figures

        self._line(f"{figures.shortened(what, 36):36}  {result:24}  {seconds:7.2f} s")

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
        self._line(f"{pass_} failed")
        return None

    @contextmanager
    def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
        """A bar, which goes away at the end."""
        from rich.markup import escape

        with self._task(what, steps) as (bars, task):

            def advance(step: str) -> None:
                bars.update(task, advance=1, description=f"{escape(what)}: {escape(step)}", refresh=True)

            yield advance

    @contextmanager
    def _task(self, what: str, steps: int | None) -> Iterator[tuple[Bars, TaskID]]:
        """A bar among those that are shown; the first one begins to show them, and ends that."""
        from rich.markup import escape
        from rich.progress import Progress as RichProgress

        first = self._bars is None
        if self._bars is None:
            # What is printed meanwhile is moved above the bars, unless it goes somewhere else.
            self._bars = RichProgress(
                console=self.console, transient=True, auto_refresh=False, disable=not self._can_draw(),
                redirect_stdout=sys.stdout.isatty(),
            )  # fmt: skip
            self._bars.start()
        bars = self._bars
        task = bars.add_task(escape(what), total=steps)
        try:
            bars.refresh()
            yield bars, task
        finally:
            if first:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def _can_draw(self) -> bool:
        """A notebook draws bars with ipywidgets only."""
        return find_spec("ipywidgets") is not None if self.console.is_jupyter else self.console.is_terminal

    def _line(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
