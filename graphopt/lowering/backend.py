"""What a target is: the contract between the core and `graphopt.backends`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from graphopt.errors import GraphError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.ir.rewrite import Choice, Match, Rule, RuleLog, rewrite
from graphopt.pipeline.target import Placement

if TYPE_CHECKING:
    from graphopt.measure.timing import Ratio


CPUS = {"avx2": "avx2", "avx512": "avx2 avx512f", "avx512_vnni": "avx2 avx512f avx512_vnni"}
"""CPUs to lower for without measuring, and their flags as Linux spells them."""


class Chooser(Protocol):
    """Takes the form of each match of a choice, and keeps an account of it."""

    @property
    def notes(self) -> list[str]:
        """What the user should know of how that went."""

    @property
    def found(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """By choice, for each kind of site what was measured, as plain data."""

    def decide(
        self, graph: Graph, choice: Choice, finish: Callable[[Graph], object]
    ) -> Callable[[Match], str]: ...


class Runner(ABC):
    """A graph compiled for its engine."""

    @abstractmethod
    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Run on inputs by name; returns the graph's outputs in order."""

    @abstractmethod
    def kernels(self) -> dict[str, int]:
        """How many kernels of each name the engine really built."""

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Seconds of a run by the name of each node; nothing where the engine doesn't tell."""
        return {}


class Backend(ABC):
    """Owns what is lowered and where; a pass owns how. Knows no graph: all about one is in its Runner."""

    name: ClassVar[str]
    dialect: ClassVar[str]
    """"onnx" or "fx": what this target deploys, and so what capture makes."""
    summary: ClassVar[str]
    """One line for `graphopt targets`."""
    schemes: ClassVar[Mapping[str, tuple[str, ...]]]
    """By op, the quantization schemes that have a fast kernel here, best first; no entry: the op stays float."""
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """By op, the bits that weights may have where they alone are integers (the scheme weight-only), best first."""
    placement: ClassVar[Placement | None] = None
    """Where integers are wanted; None: in closed quantized regions, whose results are integers too."""
    types: ClassVar[tuple[str, ...]] = ("int8",)
    """What it multiplies in 8 bits, best first."""
    floats: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")
    """The floats of 16 bits that it computes in."""
    round_to: ClassVar[Mapping[str, int]]
    """Sizes that kernels run fast are multiples of these: by kind of axis (neurons, channels, width, rank)."""

    runs: bool = True
    """Whether its engine runs here; else a reference does, and nothing is timed."""

    zeros: str = "dense kernels multiply zeros like any number: a file is smaller once compressed, no more"
    """What zeros inside weights bring here, in words for the user."""
    sparse: tuple[str, ...] = ()
    """The patterns of zeros that kernels skip here, as `sparsify` spells them (2:4)."""

    def __init__(self, cpu: str | None = None) -> None:
        """cpu: the CPU that graphs are lowered for, of CPUS; None is this one. Raises UsageError for an unknown one."""
        if cpu is not None and cpu not in CPUS:
            raise UsageError(f"there is no cpu {cpu!r}; give {', '.join(CPUS)}")
        self.cpu = cpu

    def accept(self, model: Any, example_inputs: Any) -> None:  # noqa: B027  (most targets take anything)
        """Raise UsageError where what a user hands over, or what is installed here, cannot run on this target."""

    def notes(self) -> list[str]:
        """What the user should know of any result on this target."""
        return []

    def saturates(self) -> bool:
        """Whether products of uint8 and int8 may saturate on the CPU that graphs are lowered for."""
        from graphopt.measure.machine import environment

        return saturates(environment()["flags"] if self.cpu is None else CPUS[self.cpu])

    def product_bits(self) -> int:
        """Bits of int8 weights whose products with uint8 never saturate on the CPU: 8, or 7."""
        return 7 if self.saturates() else 8

    def why_float(self, site: Node, scheme: str, dtype: str) -> Decline | None:
        """Why a site has no kernel in 8 bits, of its sizes or on this machine; None where it has one."""
        return None

    def clock(self) -> float:
        """Seconds from any origin, when the engine has done all that it was asked for."""
        return time.perf_counter()

    def place(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Feeds where the engine reads them, so that a timing holds no copy."""
        return feeds

    @abstractmethod
    def pipeline(self) -> str:
        """The lowering passes of this target, as text."""

    @abstractmethod
    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        """Rule sets that turn ops into this engine's own operations, applied one after the other."""

    def lower(self, graph: Graph, chooser: Chooser | None = None) -> tuple[Graph, dict[str, RuleLog]]:
        """A clone in this engine's own operations, checked, and the log of each rule by its name.

        chooser: takes the form of each choice by time; without it, each takes its static order.
        """
        lowered = graph.clone()
        logs = self._apply(lowered, self.rules(lowered), chooser)
        lowered.verify()
        return lowered, logs

    def _apply(
        self, graph: Graph, stages: Sequence[Sequence[Rule | Choice]], chooser: Chooser | None = None
    ) -> dict[str, RuleLog]:
        logs: dict[str, RuleLog] = {}
        for index, stage in enumerate(stages):
            rules = []
            for rule in stage:
                if isinstance(rule, Rule):
                    rules.append(rule)
                elif chooser is None:
                    rules.append(rule.rule())
                else:
                    rest = [[one for one in later if one is not rule] for later in stages[index:]]
                    rules.append(rule.rule(chooser.decide(graph, rule, partial(self._apply, stages=rest))))
            logs |= rewrite(graph, rules)
            graph.sweep()
        return logs

    def engine(self) -> str:
        """Name and version of what runs graphs here, for what is kept of timings."""
        return f"torch {version('torch')}"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> Chooser | None:
        """Takes forms by measuring them here at these inputs; None where no pattern has several."""
        return None

    @abstractmethod
    def compile(self, graph: Graph, threads: int | None = None) -> Runner:
        """Build the engine's program. threads: intra-op threads, None for the engine's default."""

    def ratios(
        self,
        graph: Graph,
        baseline: Graph,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        threads: int | None = None,
        rounds: int = 15,
    ) -> list[Ratio]:
        """How many times faster than `baseline` a graph of ops runs here once lowered: one Ratio for each feeds.

        Paired and interleaved (`measure.paired`). Raises LoweringError where the engine cannot build one of them, and
        UsageError where it does not run here.
        """
        self.require_runs()
        from graphopt.measure.timing import paired

        runners = {name: self.compile(self.lower(one)[0], threads)
                   for name, one in {"baseline": baseline, "candidate": graph}.items()}  # fmt: skip
        return [
            paired(
                {name: partial(run, one) for name, run in runners.items()}, baseline="baseline", rounds=rounds,
                clock=self.clock,
            )["candidate"]
            for one in map(self.place, feeds)
        ]  # fmt: skip

    def times(self) -> bool:
        """Whether to time where nobody says. Raises UsageError where it should run here, and does not."""
        return self.cpu is None and self.runs

    def require_runs(self) -> None:
        """Raise UsageError where the engine does not run here, so that nothing can be timed."""
        if not self.runs:
            raise UsageError(f"{self.name} does not run here: export the file, and time it where it does")

    @abstractmethod
    def check(self, folded: Graph, runner: Runner) -> None:
        """Raise LoweringError where fewer int8 kernels run than the ops of `folded` promise."""

    @abstractmethod
    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        """Write a deployable file: complete and checked under its name, or not at all. See `Optimized.export`."""

    def graphsurgeon(self, graph: Graph) -> Any:
        """The deployable model as an onnx_graphsurgeon.Graph."""
        raise GraphError(f"target {self.name} deploys no ONNX; use target=onnxruntime")


SAFE = 64
"""What int8 weights may reach that two products with uint8 fit in 16 bits: 2 * 255 * 64 is 32640."""


def max_abs(weight: Tensor) -> int:
    """The largest magnitude in an int8 weight; of -128 too, which int8 has no 128 for."""
    return int(weight.short().abs().max())


def saturates(flags: str) -> bool:
    """Whether a CPU sums two products of uint8 and int8 in 16 bits: x86 with AVX2 or AVX-512, and without VNNI.

    flags: as Linux spells them, separated by spaces; without any, it is taken not to.
    """
    known = set(flags.split())
    return bool({"avx2", "avx512f"} & known) and not {"avx_vnni", "avx512_vnni", "amx_int8"} & known
