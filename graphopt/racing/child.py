"""A process that loads one lowered graph in its engine, and runs and times it as it is told to (`contestant`).

It reads one command a line from stdin, as JSON, and answers each with a line: what was found, or how it failed.
Whatever an engine prints goes to stderr.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.dialects.adapter import adapter
from graphopt.errors import first_line
from graphopt.ir.graph import Feeds
from graphopt.lowering.backend import Backend, Runner
from graphopt.measure.timing import PAUSE, rest, time_calls


class Child:
    """The commands, each a method: what a parent writes is {"name": the method's name, and its arguments}."""

    backend: Backend
    runner: Runner
    feeds: list[Feeds]

    def start(self) -> None:
        """Answer once all is imported."""

    def load(self, backend: str, precision: str, graph: str, feeds: str, threads: int | None) -> None:
        """backend: the target's class, as module:class. graph, feeds: files."""
        if threads is not None:
            torch.set_num_threads(threads)  # once, where a runner of torch would set it before each run
        module, _, name = backend.partition(":")
        target: Backend = getattr(import_module(module), name)()
        self.backend = target.at(precision)
        self.runner = self.backend.compile(adapter(self.backend.dialect).graph.load(graph), threads)
        self.feeds = torch.load(feeds, weights_only=True)

    def run(self, shape: int, to: str) -> None:
        """Write the outputs at one of the feeds, as a first call gives them."""
        outputs = self.runner({name: tensor.clone() for name, tensor in self.feeds[shape].items()})
        write([one if isinstance(one, Tensor) else None for one in outputs], to)

    def time(self, shape: int, calls: int) -> float:
        """Seconds of all calls together; answered once this process rests, so that it slows no other one down."""
        feeds = self.backend.place(self.feeds[shape])
        seconds = time_calls(lambda: self.runner(feeds), calls, self.backend.clock)
        rest(PAUSE)
        return seconds

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """What a command found, or how it failed."""
        arguments = dict(command)
        try:
            return {"found": getattr(self, arguments.pop("name"))(**arguments)}
        except Exception as error:  # exceptions of engines have no class in common
            transient = isinstance(error, MemoryError | OSError) or is_short_of_room(str(error))
            return {"failed": first_line(error), "transient": transient}


def is_short_of_room(message: str) -> bool:
    """Whether an engine says that it found no memory, or no room on the disk: in errors of its own, whose text alone
    tells (std::bad_alloc, DefaultCPUAllocator: can't allocate memory, PytorchStreamWriter failed writing file)."""
    return re.search("bad_?alloc|bad allocation|can't allocate|cannot allocate|failed to allocate|failed writing|"
                     "no space left", message, re.IGNORECASE) is not None  # fmt: skip


def write(tensors: object, path: str | Path) -> None:
    """Write what `torch.save` takes. Raises OSError where the disk is full, where `torch.save` itself raises a
    RuntimeError whose text differs by its version."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    Path(path).write_bytes(buffer.getbuffer())


def main() -> None:
    """Answer commands until stdin ends."""
    child = Child()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(child.answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
