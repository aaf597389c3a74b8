"""A lowered graph in a process of its own, which may fail, crash or hang without harm to this one."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from graphopt.errors import described, first_line
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Graph
from graphopt.lowering.backend import Backend
from graphopt.racing import child

SECONDS = 60.0
"""Least time that a process has for an answer: to start, to load a graph, for one run, for one block of a timing."""

SECONDS_PER_GB = 60.0
"""What it has beside that, for each GB of weights."""

START, TIMES = 10.0, 20.0
"""A first run may take START seconds and, on top of them, TIMES what the first run of another contestant took."""

OWN_FAULTS = (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
"""Signals of a process that fails by itself, and so would fail again; others come from outside."""


class Lost(Exception):
    """A contestant does not run: it failed, its process died, or it gave no answer in time; the text says how."""

    def __init__(self, how: str, *, transient: bool = False) -> None:
        """transient: whether it may run another time, as memory, room on the disk or time was too short."""
        super().__init__(how)
        self.transient = transient


@contextmanager
def room() -> Iterator[None]:
    """For writing files that a contestant reads. Raises Lost where there is no room or no right to write, and where the
    library that writes fails for another reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # a library raises a RuntimeError of its own, at times over an OSError
        disk = _of_disk(error)
        if disk is None:
            how = f"has no file to read, as writing it failed: {described(error)}"
            raise Lost(how, transient=child.is_short_of_room(str(error))) from error
        where = tempfile.gettempdir()
        said = disk.strerror or first_line(disk)
        how = f"has no file to read, as {where} cannot be written ({said}): make room there, or set TMPDIR"
        raise Lost(how, transient=True) from error


def _of_disk(error: BaseException | None) -> OSError | None:
    """The error of the file system that led to an error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@dataclass
class TimedCall:
    """One call of a contestant, for `timing.paired_calls`, which its process times itself."""

    contestant: Contestant
    shape: int

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        """Of so many calls together. Raises Lost."""
        return self.contestant.seconds(self.shape, calls)


class Contestant:
    """Starts the process, loads the graph from a file, and runs it once at each of the feeds. Raises Lost."""

    def __init__(
        self,
        backend: Backend,
        graph: Graph,
        feeds: Sequence[Feeds],
        folder: Path,
        threads: int | None = None,
        limit: float | None = None,
        reference: Sequence[float] = (),
    ) -> None:
        """folder: an empty one for its files. limit: seconds for an answer, by default what the size allows.

        reference: at each of the feeds, the seconds of another contestant's first run, where there is one.
        """
        self.number = len(feeds)
        self._folder = folder
        self._limit = limit or SECONDS + SECONDS_PER_GB * cost.Cost.of(graph).bytes / 1e9
        file = folder / f"graph.{'onnx' if graph.dialect == 'onnx' else 'pt2'}"
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._end: Lost | None = None
        """Why it answers no more; None while it does."""
        with room():
            graph.save(file)
            child.write([dict(one) for one in feeds], folder / "feeds.pt")
            errors = (folder / "stderr").open("w")
        with errors:
            self._process = _started(errors, self._answers)
        try:
            self._ask("start", SECONDS)
            cls = type(backend)
            self._ask(
                "load", backend=f"{cls.__module__}:{cls.__qualname__}", precision=backend.precision, graph=str(file),
                feeds=str(folder / "feeds.pt"), threads=threads,
            )  # fmt: skip
            self.first_seconds = [
                self._first_run(shape, START + TIMES * reference[shape] if reference else math.inf)
                for shape in range(self.number)
            ]
            """Of the first run at each of the feeds."""
        except BaseException:
            self.close()
            raise

    def outputs(self, shape: int) -> list[Any]:
        """What it computed at one of the feeds; None where an output is no tensor."""
        found: list[Any] = torch.load(self._outputs(shape), weights_only=True)
        return found

    def seconds(self, shape: int, calls: int) -> float:
        """Seconds of so many calls together, on the child's own clock. Raises Lost."""
        return float(self._ask("time", shape=shape, calls=calls))

    @property
    def calls(self) -> list[TimedCall]:
        """One call for each of the feeds."""
        return [TimedCall(self, shape) for shape in range(self.number)]

    def close(self) -> None:
        """End the process."""
        self._end = self._end or Lost("has been ended")
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # a command that was written to a process that is gone is flushed again here
                    pipe.close()

    def _first_run(self, shape: int, most: float) -> float:
        """Its seconds. most: with more, it is lost for good, as it cannot win another time either."""
        start, is_short = time.perf_counter(), most < self._limit
        self._ask("run", most if is_short else None, transient=not is_short, shape=shape, to=str(self._outputs(shape)))
        return time.perf_counter() - start

    def _outputs(self, shape: int) -> Path:
        return self._folder / f"outputs{shape}.pt"

    def _ask(self, name: str, limit: float | None = None, *, transient: bool = True, **arguments: Any) -> Any:
        """What the child finds. limit: seconds, by default those of the engine's own work. transient: whether an answer
        that comes too late may come in time another time. Raises Lost; then the process has ended, so that one that
        hangs takes no time of the others, and further questions raise the same."""
        if self._end is not None:
            raise Lost(str(self._end), transient=self._end.transient)
        try:
            return self._answered(name, limit or self._limit, transient, arguments)
        except Lost as lost:
            self._end = lost
            self.close()
            raise

    def _answered(self, name: str, limit: float, transient: bool, arguments: Mapping[str, Any]) -> Any:
        command = json.dumps({"name": name, **arguments}) + "\n"
        assert self._process.stdin is not None  # as it was started with a pipe
        try:
            self._process.stdin.write(command)
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit)
        except OSError:  # the process is gone
            line = ""
        except queue.Empty:
            raise Lost(f"gave no answer in {limit:.0f} s", transient=transient) from None
        if not line:
            raise self._died(limit)
        answer = json.loads(line)
        if "failed" in answer:
            raise Lost(f"failed: {answer['failed']}", transient=answer["transient"])
        return answer["found"]

    def _died(self, limit: float) -> Lost:
        """How the process ended that answers no more."""
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return Lost(f"answers no more, and did not end in {limit:.0f} s", transient=True)
        lines = (self._folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1][:160] if lines else ""
        if code >= 0:
            return Lost(f"its process ended with code {code}" + (f": {said}" if said else ""), transient=True)
        number = signal.Signals(-code)
        memory = ", as where memory runs out" if number == getattr(signal, "SIGKILL", None) else ""
        transient = number not in OWN_FAULTS or child.is_short_of_room(said)
        return Lost(f"its process died of signal {number} ({number.name}{memory})", transient=transient)


def _started(errors: IO[str], answers: queue.SimpleQueue[str]) -> subprocess.Popen[str]:
    """A child that imports from where this process does, with a thread that collects its answers. Raises Lost."""
    paths = [path for path in sys.path if path]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "graphopt.racing.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    except OSError as error:
        raise Lost(f"has no process: {described(error)}", transient=True) from error
    assert process.stdout is not None  # a pipe
    threading.Thread(target=partial(_collect, process.stdout, answers), daemon=True).start()
    return process


def _collect(pipe: IO[str], answers: queue.SimpleQueue[str]) -> None:
    """Each line, and an empty one at the end."""
    try:
        for line in pipe:
            answers.put(line)
    except ValueError:  # `close` has closed the pipe
        return
    answers.put("")
