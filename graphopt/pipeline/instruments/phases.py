"""The phases of a run that are no passes, and long work inside of one: what instruments hear of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from graphopt.pipeline.instruments.instrument import Instrument


@dataclass
class Phase:
    """A phase that runs now."""

    result: str = ""
    """What came of it, in a few words, to be set inside."""


@contextmanager
def phase(instruments: Sequence[Instrument], what: str) -> Iterator[Phase]:
    """A phase of a run, such as capture: instruments see it run, and hear at its end what came of it. One that fails
    is not reported as done."""
    found, start = Phase(), time.perf_counter()
    with ExitStack() as stack:
        for one in instruments:
            stack.enter_context(one.running(what))
        yield found
    for one in instruments:
        one.done(what, found.result, time.perf_counter() - start)


@contextmanager
def watched(instruments: Sequence[Instrument], what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
    """`Instrument.watch` of all of them: what this yields is called after each step, with what it has done."""
    with ExitStack() as stack:
        told = [stack.enter_context(one.watch(what, steps)) for one in instruments]

        def advance(step: str) -> None:
            for tell in told:
                tell(step)

        yield advance
