"""What is called around every pass of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graphopt.ir.graph import Graph

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


class Instrument:
    """Called around every pass that it wants to see; each method does nothing unless overridden."""

    def should_run(self, pass_: Pass) -> bool:
        return True

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        """Called before the pass, with the graph that it will change."""

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        """Called after the pass, whose record is `context.record`. An error raised here fails the pass."""

    def resume(self, graph: Graph) -> None:
        """Called in the place of passes that ran before, on an equal graph, with what they left."""

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
        """Called where the pass, or an instrument after it, failed. May return the folder of a reproducer."""
        return None

    def trained(self, line: Mapping[str, Any]) -> None:
        """Called after each training step with "step", "loss", its terms and "lr", and after each evaluation with
        "step" and "metric"."""

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Entered around the work of each pass, and around each other phase of a run, such as capture or timing."""
        yield

    def done(self, what: str, result: str, seconds: float) -> None:
        """Called after each phase of a run that is no pass, with what came of it."""

    @contextmanager
    def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
        """Entered around long work inside a pass, which calls what this yields after each step, with what it has done.

        steps: how many there will be, None where that is not known.
        """
        yield lambda step: None
