"""What a run does, as lines of the logger `graphopt`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graphopt.ir.graph import Graph
from graphopt.pipeline.instruments.instrument import Instrument

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass

LOGGER = logging.getLogger("graphopt")
"""Silent unless the user, or the command line, gives it or the root logger a handler and a level."""

LOGGER.addHandler(logging.NullHandler())


class Log(Instrument):
    """One line of level INFO for each pass and each other phase of a run: what came of it, and its seconds. Level DEBUG
    has what begins, and each step inside."""

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        LOGGER.debug("%s begins", what)
        yield

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        from graphopt.report import tables

        self.done(context.record.name, tables.sites(context.record), context.record.seconds)

    def done(self, what: str, result: str, seconds: float) -> None:
        LOGGER.info("%s: %s%.1f s", what, f"{result}, " if result else "", seconds)

    @contextmanager
    def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
        number, of = 0, "" if steps is None else f" of {steps}"

        def advance(step: str) -> None:
            nonlocal number
            number += 1
            LOGGER.debug("%s: %d%s, %s", what, number, of, step)

        yield advance
