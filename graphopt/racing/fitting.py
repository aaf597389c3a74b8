"""Which candidates of a race fit into memory, since each runs in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphopt.errors import UsageError
from graphopt.lowering.backend import Backend
from graphopt.report import figures

ASKED, UNCOMPRESSED = "as asked", "uncompressed"

PROCESS = 0.5e9
"""Bytes of a process that runs one result, beside the model: torch, the engine and graphopt."""

COPIES = 2.5
"""Of the weights, in a process that loads them: as read, as packed by the engine, and while one becomes the other."""

Key = tuple[str, str, str]
"""A candidate: its engine, ASKED or UNCOMPRESSED, and what its floats are computed in."""


class TooLittleMemory(UsageError):
    """A race needs more memory than is free."""


@dataclass(frozen=True)
class Fitting:
    """The candidates that fit, and those that do not, in the order in which they were taken."""

    taken: tuple[Key, ...]
    left_out: tuple[Key, ...]
    each: int
    """Bytes that one candidate needs."""
    all: int
    """Bytes that all of them need, and this process."""
    free: int | None
    """Bytes that are free; None where that is not known."""

    def has(self, engine: str) -> bool:
        """Whether any candidate of an engine fits."""
        return any(name == engine for name, _, _ in self.taken)

    def require(self, engine: str) -> None:
        """Raise UsageError where no candidate of an engine fits."""
        if not self.has(engine):
            raise UsageError(f"it was left out for want of memory: {self._sizes()}")

    def note(self) -> str | None:
        """A sentence for the user that names the candidates that do not fit, or says that none fits. None where all of
        them fit."""
        if not self.taken:
            return f"nothing was raced for want of memory ({self._sizes()})"
        names = [" ".join(key) for key in self.left_out]
        return f"left out for want of memory: {', '.join(names)} ({self._sizes()})" if names else None

    def _sizes(self) -> str:
        return f"each candidate needs about {figures.size(self.each)}, and {figures.size(self.free or 0)} are free"


def fitting(
    backends: Sequence[Backend], precisions: Mapping[str, str], *, size: float, free: int | None, is_lossy: bool
) -> Fitting:
    """Choose the candidates that fit into memory.

    First each engine in float32 is chosen, in the given order, then the further precisions of these engines. For each
    engine, the result and the uncompressed model in float32 are chosen together or not at all. A precision that was
    asked for by name belongs to that group too.

    precisions: by engine, auto or one of PRECISIONS. size: bytes of the weights. free: bytes of memory.
    """
    each, own = PROCESS + COPIES * size, 2 * COPIES * size  # this process holds the engine's programs of two graphs
    groups = list(_groups(backends, precisions, is_lossy))
    left = math.inf if free is None else (free - own) // each
    taken, left_out = list[Key](), list[Key]()
    for group in groups:
        ((engine, _, precision), *_) = group
        fits = len(group) <= left and (precision == "float32" or any(engine == name for name, _, _ in taken))
        left -= len(group) if fits else 0
        (taken if fits else left_out).extend(group)
    return Fitting(tuple(taken), tuple(left_out), int(each), int(own + each * sum(map(len, groups))), free)


def _groups(backends: Sequence[Backend], precisions: Mapping[str, str], is_lossy: bool) -> Iterator[list[Key]]:
    """What is raced, in the order in which it matters; a group has a place as a whole or not at all."""
    others = {one.name: _others(one, precisions[one.name]) if is_lossy else () for one in backends}
    named = {one.name: precisions[one.name] != "auto" for one in backends}
    for name, found in others.items():
        by_name = [(name, ASKED, precision) for precision in found if named[name]]
        yield [(name, ASKED, "float32"), (name, UNCOMPRESSED, "float32"), *by_name]
    for model in (ASKED, UNCOMPRESSED):
        for name, found in others.items():
            for precision in found:
                if model == UNCOMPRESSED or not named[name]:
                    yield [(name, model, precision)]


def _others(backend: Backend, asked: str) -> Sequence[str]:
    """What it may compute in beside float32."""
    return [one for one in backend.precisions[1:] if asked in ("auto", one)]
