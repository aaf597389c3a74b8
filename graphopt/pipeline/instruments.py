"""What watches a pipeline: checks and records around every pass. A pass never knows of them."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.errors import GraphError
from graphopt.ir.graph import Graph
from graphopt.numerics import metrics
from graphopt.pipeline.target import AnyTarget
from graphopt.report.agreements import Agreement, agreement, worst
from graphopt.report.diff import GraphDiff

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass

Feeds = Mapping[str, Tensor]

QUANTIZED_RTOL = 2 / 255
"""What a lossless pass is held to in a quantized graph: one step of an 8-bit range, which is at most 2 max|a| wide.

An output moves by about that much when the last bit of a float decides a rounding the other way.
"""

QUANTIZED_MARGIN = 6.0
"""Or to this many dB of SQNR against the original, which is at most twice as far from it: over many layers, roundings
that fall the other way add up to as much as the quantization noise itself.
"""

QUANTIZED_SQNR = 30.0
"""Or to this many dB where the original rounds activations already: its output without that noise is not known.

Or to QUANTIZED_MARGIN below what the network itself makes of the last bits: roundings that flip in one layer make more
flip in the next. A quantized transformer of 6 layers agrees to 27 dB with what the engine's optimizer makes of it, an
untrained MobileNetV2 to 20 dB with itself, for an input that is NUDGE away.
"""

QUANTIZED_FLOOR = 10.0
"""Least SQNR (dB) all the same: noise of a third of the signal is no rounding."""

NUDGE = 8
"""Steps of its type's last bit at 1 by which an input is moved, in proportion, to see what such bits do."""


class Instrument:
    """Called around every pass that it wants to see; each method does nothing unless overridden."""

    def should_run(self, pass_: Pass) -> bool:
        return True

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        """The graph is as the pass will find it."""

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        """The pass is done, `context.record` holds its account; an error raised here fails the pass."""

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
        """The pass (or an instrument after it) failed; may return the folder of a reproducer."""
        return None

    @contextmanager
    def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
        """Around long work inside a pass, which calls what this yields once a step, with what it has just done.

        steps: how many there will be, None where that is not known.
        """
        yield lambda step: None


class Verify(Instrument):
    """The graph keeps the rules of its dialect after every pass."""

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        graph.verify()


class Agree(Instrument):
    """The outputs on the example inputs, against the original's after every pass that changed something.

    The worst figure over the examples goes to the record; padding is left out where an input is a mask. A lossless pass
    must not move an output beyond the tolerance (`numerics.metrics.tolerance`; QUANTIZED_RTOL, QUANTIZED_MARGIN or
    QUANTIZED_SQNR in a quantized graph; integers stay equal) from where the last lossy pass, or the original, left it:
    GraphError otherwise. No pass may change an output's shape.
    """

    def __init__(
        self,
        original: Graph,
        feeds: Sequence[Feeds],
        names: Sequence[str] | None = None,
        engine: Callable[[], Callable[[Feeds], Sequence[Any]] | None] | None = None,
    ) -> None:
        """names: what the user calls the outputs, in order; the graph's own names without it.

        engine: gives what runs the original as it would be deployed; asked where that rounds activations.
        """
        self._engine = engine
        self.feeds = list(feeds)
        self.names = list(names) if names is not None else [value.name for value in original.outputs]
        self._shapes = [value.shape for value in original.outputs]
        self._masks = mask_inputs(original.inputs)
        self._rounds = any(node.kind == "quantize" for node in original.nodes)
        self._given = original.clone() if self._rounds else None
        self.original = self._outputs(original)
        self._accepted = self._latest = self.original

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        if not context.record.changes:
            return
        outputs = self._outputs(graph)
        context.record.agreement = self._agreements(outputs)
        if not pass_.lossless:
            self._accepted = outputs
        elif (moved := self._moved(self._accepted, outputs, graph)) is not None:
            raise GraphError(f"this pass loses nothing by its own account, and {moved}")
        self._latest = outputs

    def compare(self, run: Callable[[Feeds], Sequence[Any]]) -> list[Agreement]:
        """The original's outputs against what `run` gives for the same feeds."""
        return self._agreements([list(run(feeds)) for feeds in self.feeds])

    def hold(self, lowered: Graph, graph: Graph) -> None:
        """GraphError where a lowered graph moves an output of `graph`, left by the last pass, as no lossless pass may.

        A graph that does not agree with itself is random, and held to nothing.
        """
        moved = self._moved(self._latest, self._outputs(lowered), graph)
        if moved is not None and self._moved(self._latest, self._outputs(graph), graph) is None:
            raise GraphError(moved)

    def _outputs(self, graph: Graph) -> list[list[Any]]:
        return [graph.evaluate(feeds, graph.outputs) for feeds in self.feeds]

    def _agreements(self, outputs: list[list[Any]]) -> list[Agreement]:
        """One for each output that is a tensor (an ONNX model may also return sequences)."""
        by_output: dict[str, list[Agreement]] = {}
        for feeds, expected, found in zip(self.feeds, self.original, outputs, strict=True):
            for name, shape, a, b in zip(self.names, self._shapes, expected, found, strict=True):
                if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
                    continue
                if a.shape != b.shape:
                    raise GraphError(f"the shape of output {name!r} went from {list(a.shape)} to {list(b.shape)}")
                real = real_positions(shape, a, self._masks, feeds)
                kept = (a, b) if real is None else (a[real], b[real])
                by_output.setdefault(name, []).append(agreement(name, *kept))
        return [worst(several) for several in by_output.values()]

    def _moved(self, before: list[list[Any]], after: list[list[Any]], graph: Graph) -> str | None:
        """The first output of `graph` that goes further than rounding explains, and by how much; None where none."""
        rtol = QUANTIZED_RTOL if _is_quantized(graph) else None
        for number, (expected, found) in enumerate(zip(before, after, strict=True)):
            for name, a, b, first in zip(self.names, expected, found, self.original[number], strict=True):
                if not isinstance(a, Tensor) or metrics.within_tolerance(a, b, rtol=rtol):
                    continue
                if rtol is not None and metrics.sqnr(first, b) > metrics.sqnr(first, a) - QUANTIZED_MARGIN:
                    continue
                if self._rounds and a.is_floating_point() and metrics.sqnr(a, b) > self._least:
                    continue
                allowed = f"{rtol or metrics.tolerance(a.dtype)[0]:.2g}" if a.is_floating_point() else "equal values"
                largest = float(torch.nan_to_num(a.double()).abs().max())
                return (
                    f"on example {number} it moves output {name!r} by {metrics.max_error(a, b):.3g}, "
                    f"of at most {largest:.3g} (relative tolerance: {allowed})"
                )
        return None

    @cached_property
    def _least(self) -> float:
        """Least SQNR (dB) of an output in floats, where the original rounds activations."""
        return max(QUANTIZED_FLOOR, min(QUANTIZED_SQNR, self._noise_floor() - QUANTIZED_MARGIN))

    def _noise_floor(self) -> float:
        """Least SQNR (dB) between the original and its engine's optimized run, and for inputs perturbed either way."""
        run = self._engine() if self._engine is not None else None
        runs = [] if run is None else [[list(run(feeds)) for feeds in self.feeds]]
        if self._given is not None and any(one.is_floating_point() for feeds in self.feeds for one in feeds.values()):
            for steps in (NUDGE, -NUDGE):
                given = self._given.clone()  # what a run writes to is its own
                runs.append([given.evaluate(_perturbed(feeds, steps), given.outputs) for feeds in self.feeds])
        found = [metrics.sqnr(a, b) for one in runs for before, after in zip(self.original, one, strict=True)
                 for a, b in zip(before, after, strict=True)
                 if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape]  # fmt: skip
        return min(found, default=math.inf)


def _perturbed(feeds: Feeds, steps: int) -> Feeds:
    """Inputs in floats moved by so many last bits of 1 in proportion; the others as they are."""
    return {name: tensor * (1 + steps * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor
            for name, tensor in feeds.items()}  # fmt: skip


def _is_quantized(graph: Graph) -> bool:
    """Whether a graph rounds what it computes: weights of 16 bits do, as of 8."""
    return any(tensor.dtype.itemsize < 4 and tensor.dtype is not torch.bool for _, tensor in graph.constants())


class Timing(Instrument):
    """Seconds of each pass, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self.seconds.append((str(pass_), context.record.seconds))

    def __str__(self) -> str:
        rows = [*self.seconds, ("total", sum(seconds for _, seconds in self.seconds))]
        return "\n".join(f"{seconds:8.3f} s  {name}" for name, seconds in rows)


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


class Reproduce(Instrument):
    """What a failed pass was given, in a folder: the pass as text, the graph before, feeds and calibration batches."""

    BATCHES = 8
    """Most calibration batches to keep."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """folder: where to write; None makes a temporary one, and only on failure."""
        self.folder = folder
        self._before: Graph | None = None

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self._before = graph.clone()  # shares the weights

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
        if self._before is None:
            return None
        folder = Path(self.folder or tempfile.mkdtemp(prefix="graphopt-"))
        folder.mkdir(parents=True, exist_ok=True)
        self._before.save(folder / f"graph.{graph.dialect}")
        _save_feeds(folder / "feeds", context.feeds)
        if context.calibration is not None and not context.calibration.once:
            _save_feeds(folder / "calibration", list(itertools.islice(context.calibration, self.BATCHES)))
        account = {
            "pass": str(pass_),
            "dialect": graph.dialect,
            "target": None if isinstance(context.target, AnyTarget) else context.target.name,
            "error": f"{type(error).__name__}: {error}",
        }
        (folder / "pass.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
        command = shlex.join([sys.executable, "-m", "graphopt.cli", "reproduce", str(folder)])
        readme = (
            f"{pass_} failed on this graph.\n{account['error']}\n\nTo run it again, in a folder that you trust (a "
            f"graph.fx can run code when it is loaded):\n\n    {command}\n"
        )
        (folder / "README").write_text(readme, encoding="utf-8")
        return str(folder)


def _save_feeds(folder: Path, batches: Sequence[Feeds]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    for number, feeds in enumerate(batches):
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in feeds.items()}  # no shared memory
        save_file(copies, str(folder / f"{number:03}.safetensors"))
