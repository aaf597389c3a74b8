"""Targets for tests of races: engines of PyTorch that do what a broken engine does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from graphopt.backends.torch_cpu.fbgemm import Fbgemm
from graphopt.backends.torch_cpu.runner import EagerRunner
from graphopt.ir.graph import Graph


class _Runner(EagerRunner):
    """Does something before each run."""

    before: Callable[[], object]

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        self.before()
        return super().__call__(feeds)


class Healthy(Fbgemm):
    """Runs."""

    name: ClassVar[str] = "healthy"


class Failing(Fbgemm):
    """Loads no model."""

    name: ClassVar[str] = "failing"

    def compile(self, graph: Graph, threads: int | None = None) -> EagerRunner:
        raise RuntimeError("this engine has no kernel for that")


class Crashing(Fbgemm):
    """Dies of a signal in each run."""

    name: ClassVar[str] = "crashing"

    def compile(self, graph: Graph, threads: int | None = None) -> EagerRunner:
        return _doing(super().compile(graph, threads), lambda: os.kill(os.getpid(), signal.SIGSEGV))


class Hanging(Fbgemm):
    """Never comes back from a run."""

    name: ClassVar[str] = "hanging"

    def compile(self, graph: Graph, threads: int | None = None) -> EagerRunner:
        return _doing(super().compile(graph, threads), lambda: time.sleep(3600))


class Rounding(Fbgemm):
    """Computes floats in bfloat16 too."""

    name: ClassVar[str] = "rounding"

    @property
    def precisions(self) -> tuple[str, ...]:
        return "float32", "bfloat16"


ENGINES = {one.name: f"{__name__}:{one.__name__}" for one in (Healthy, Failing, Crashing, Hanging, Rounding)}
"""By name, as a registry of targets has them."""


def _doing(runner: EagerRunner, before: Callable[[], object]) -> EagerRunner:
    runner.__class__ = _Runner
    assert isinstance(runner, _Runner)  # as its class was set
    runner.before = before
    return runner
