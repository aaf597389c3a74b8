"""What a target is: the contract between the core and `graphopt.backends`.

To write a target, derive from `Backend` and `Runner`. A target has to say

- what it is: the class attributes `name`, `dialect`, `summary`, `schemes` and `round_to`;
- `pipeline`: the passes that prepare a graph for it, as text ("fold-int8" where its kernels are the int8 ops);
- `rules`: sets of rules that turn ops into the engine's own operators;
- `compile`: a Runner for the lowered graph, which runs it and counts the kernels that the engine built;
- `check`: that all int8 ops of the folded graph run as int8 kernels;
- `export`: a file that can be deployed.

All else has a default. Where a pattern has several legal forms, `rules` gives a `Choice` in place of a Rule, and
`chooser` says what picks one; `graphopt.lowering.timed_forms.TimedChooser` picks by time. `notes`, `accept`,
`why_float`, `clock`, `place`, `precisions`, `loading` and `graphsurgeon` are for engines that need them. A target of
another package is found through the entry point group `graphopt.backends`.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from graphopt.errors import GraphError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Feeds, Graph, Node
from graphopt.ir.rewrite import Choice, Match, Rule, RuleLog, rewrite
from graphopt.lowering.saturation import CPUS
from graphopt.measure import timing
from graphopt.measure.machine import cpu_saturates, environment
from graphopt.measure.timing import Ratio
from graphopt.pipeline.target import Placement

PRECISIONS = ("float32", "bfloat16", "float16")
"""What a target may compute in where the model says float32."""


class Chooser(Protocol):
    """Picks a form for each match of a choice, and records how."""

    def watch(self, on_site: Callable[[str], object]) -> None:
        """Call `on_site` before each site is measured, with the names of its choice and of the site."""

    @property
    def notes(self) -> list[str]:
        """What the user should know, such as that the machine was too noisy to measure."""

    @property
    def measured(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """By choice, what was measured for each kind of site, as plain data."""

    def decide(self, graph: Graph, choice: Choice, finish: Callable[[Graph], object]) -> Callable[[Match], str]:
        """From a match to the name of its form.

        finish: lowers the rest of a graph in which one form was applied, so that it can be compiled.
        """


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
    """A target: what it lowers, and to which operators. Holds no graph: what belongs to one is in its Runner.

    It fulfils `graphopt.pipeline.target.Target`, which is what passes may ask.
    """

    # --- what every target says ------------------------------------------------------------------------------------

    name: ClassVar[str]
    dialect: ClassVar[str]
    """"onnx" or "fx": what this target deploys, and so what capture makes."""
    summary: ClassVar[str]
    """One line for `graphopt targets`."""
    schemes: ClassVar[Mapping[str, tuple[str, ...]]]
    """By op, the quantization schemes that have a fast kernel here, best first; no entry: the op stays float."""
    round_to: ClassVar[Mapping[str, int]]
    """Sizes that kernels run fast are multiples of these: by kind of axis (neurons, channels, width, rank)."""

    @abstractmethod
    def pipeline(self) -> str:
        """The lowering passes of this target, as text."""

    @abstractmethod
    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        """Sets of rules that turn ops into this engine's own operators, applied one after the other."""

    @abstractmethod
    def compile(self, graph: Graph, threads: int | None = None) -> Runner:
        """Build the engine's program of a lowered graph. threads: intra-op threads, None for the engine's default."""

    @abstractmethod
    def check(self, folded: Graph, runner: Runner) -> None:
        """Raise LoweringError where fewer int8 kernels run than the ops of the folded graph promise."""

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
        """Write a deployable file, checked; see `Optimized.export`.

        `path` lies in an empty folder, whose files are moved to where the user wants them once this returns; for a
        target that writes a folder it is the empty folder itself.
        """

    def exported(self, graph: Graph, opset: int | None) -> Mapping[str, Callable[[Feeds], Sequence[Any]]]:
        """Runs of the file that `export` would write, by how an engine optimizes it; none where it is what ran here."""
        return {}

    def rounds(self, graph: Graph) -> bool:
        """Whether kernels of a lowered graph round activations to 8 bits where its ops compute in floats
        (`Choice.lossy`)."""
        return False

    def written(self, graph: Graph, path: Path) -> Callable[[Feeds], Sequence[Any]] | None:
        """A run of what `export` has written, read again; None where it is not run here. graph: what was written."""
        return None

    # --- what some targets say -------------------------------------------------------------------------------------

    suffix: ClassVar[str] = ""
    """How the name of a file that it writes ends, such as .onnx; empty for any."""
    other_suffixes: ClassVar[tuple[str, ...]] = ()
    """Of files of other forms that it writes too."""
    folder_mark: ClassVar[str] = ""
    """For a target that writes a folder: a file in it. A folder that holds this file was written by the target, and
    `export` may replace it. Empty for a target that writes files."""
    folder_files: ClassVar[tuple[str, ...]] = ()
    """Patterns of the other files in such a folder, in which * matches / too. `export` does not replace a folder that
    holds any other file."""
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """By op, the bits that weights may have in weight-only quantization, best first."""
    placement: ClassVar[Placement | None] = None
    """Where integers are wanted; None: in closed quantized regions, whose results are integers too."""

    @property
    def quantizes(self) -> tuple[str, ...]:
        """Ops whose results a kernel quantizes as it computes them."""
        return ()

    granularities: ClassVar[tuple[str, ...]] = ("tensor",)
    """What may share a scale in dynamic quantization, best first: an activation (tensor), or a row of it (row)."""
    types: ClassVar[tuple[str, ...]] = ("int8",)
    """What it multiplies in 8 bits, best first."""
    floats: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")
    """The floats of 16 bits that it computes in."""
    runs: bool = True
    """Whether its engine runs here; else a reference does, and nothing is timed."""
    zeros: str = "dense kernels multiply zeros like any number: a file is smaller once compressed, no more"
    """What sparsity gains on this target, as a sentence for the user."""
    sparse: tuple[str, ...] = ()
    """The patterns of zeros that kernels skip here, as `sparsify` spells them (2:4)."""

    precision: str = "float32"
    """What floats are computed in, of `precisions`; `at` gives the target at another one."""

    def __init__(self, cpu: str | None = None) -> None:
        """cpu: the CPU that graphs are lowered for, of CPUS; None is this one. Raises UsageError for an unknown one."""
        if cpu is not None and cpu not in CPUS:
            raise UsageError(f"there is no cpu {cpu!r}; give {', '.join(CPUS)}")
        self.cpu = cpu

    @property
    def precisions(self) -> tuple[str, ...]:
        """What float32 of a lossy pipeline may be computed in on this CPU, float32 first (PRECISIONS)."""
        return ("float32",)

    def at(self, precision: str) -> Self:
        """This target, with floats computed in another precision. Raises UsageError where it has no kernels in it."""
        if precision not in self.precisions:
            known = " or ".join(self.precisions)
            raise UsageError(f"{self.name} does not compute in {precision} on this CPU; give precision={known}")
        other = copy.copy(self)
        other.precision = precision
        return other

    def accept(self, model: Any, example_inputs: Any) -> None:  # noqa: B027  (most targets take anything)
        """Raise UsageError where what a user hands over, or what is installed here, cannot run on this target."""

    def notes(self) -> list[str]:
        """What the user should know of any result on this target."""
        return []

    def why_float(self, site: Node, scheme: str, dtype: str) -> Decline | None:
        """Why a site has no kernel in 8 bits, because of its sizes or of this machine; None where it has one."""
        return None

    def loading(self, file: str, threads: int | None = None) -> Mapping[str, Any]:
        """How an exported file is loaded as it was run here, as plain data: the engine, its settings, and one line of
        Python. file: its name."""
        return {"engine": self.engine(), "precision": self.precision, "threads": threads}

    def engine(self) -> str:
        """Name and version of what runs graphs here; a part of the key that timings are cached under."""
        return f"torch {version('torch')}"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> Chooser | None:
        """Picks forms by measuring them here at these inputs; None where no pattern has several."""
        return None

    def clock(self) -> float:
        """Seconds from any origin, once the engine has finished all work that was submitted."""
        return time.perf_counter()

    def place(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Feeds on the engine's device, so that a timing includes no copy."""
        return feeds

    def product_bits(self) -> int:
        """Bits of int8 weights whose products with uint8 never saturate on the CPU: 8, or 7."""
        return 7 if self.saturates() else 8

    def graphsurgeon(self, graph: Graph) -> Any:
        """The deployable model as an onnx_graphsurgeon.Graph. Raises GraphError for targets that deploy no ONNX."""
        raise GraphError(f"target {self.name} deploys no ONNX; use target=onnxruntime")

    # --- what the core calls ---------------------------------------------------------------------------------------

    def lower(
        self, graph: Graph, chooser: Chooser | None = None, *, lossless: bool = False
    ) -> tuple[Graph, dict[str, RuleLog]]:
        """A clone in this engine's own operators, verified, and the log of each rule by its name.

        chooser: picks the form of each choice; without it, each takes its first legal form. lossless: leave out forms
        that round more than the graph says (`Choice.lossy`).
        """
        lowered = graph.clone()
        stages = self.rules(lowered)
        if lossless:
            stages = [[one.exact() if isinstance(one, Choice) else one for one in stage] for stage in stages]
        bodies = lowered.bodies  # without those that rules make
        logs = self._apply(lowered, stages, chooser)
        for body in bodies:  # whose values have no feeds by which a form could be timed
            for name, log in self._apply(body, stages).items():
                logs[name] = logs.get(name, RuleLog()).then(log)
        lowered.sweep()
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
                elif chooser is None or not rule.timed:
                    rules.append(rule.rule())
                else:
                    rest = [[other for other in later if other is not rule] for later in stages[index:]]
                    rules.append(rule.rule(chooser.decide(graph, rule, partial(self._apply, stages=rest))))
            logs |= rewrite(graph, rules)
            graph.sweep()
        return logs

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

        Paired and interleaved (`timing.paired`). On a target of ONNX both may be graphs of fx, which a pipeline that
        trains works on. Raises LoweringError where the engine cannot build one of them, GraphError where one has no
        form in ONNX, and UsageError where the engine does not run here.
        """
        self.require_runs()
        graphs = {name: self._in_own_dialect(one) for name, one in (("baseline", baseline), ("candidate", graph))}
        runners = {name: self.compile(self.lower(one)[0], threads) for name, one in graphs.items()}
        found = []
        for placed in map(self.place, feeds):
            calls = {name: partial(runner, placed) for name, runner in runners.items()}
            ratios = timing.paired(calls, baseline="baseline", rounds=rounds, clock=self.clock)
            found.append(ratios["candidate"])
        return found

    def _in_own_dialect(self, graph: Graph) -> Graph:
        if graph.dialect == self.dialect or self.dialect != "onnx":
            return graph
        from graphopt.capture.onnx_conversion import to_onnx  # which imports both dialects

        return to_onnx(graph)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that it writes."""
        return self.suffix, *self.other_suffixes

    def require_suffix(self, path: Path) -> None:
        """Raise UsageError, with the right name, for a file that this target does not write."""
        if self.suffix and path.suffix not in self.suffixes:
            what = f"{path.name} is no {self.suffix} file" if path.suffix else f"{path.name} has no suffix"
            raise UsageError(f"{what}, and {self.name} writes {self.suffix}: name it {path.stem}{self.suffix}")

    def times(self) -> bool:
        """Whether results are timed by default. Raises UsageError where the engine should run here, and does not."""
        return self.cpu is None and self.runs

    def require_runs(self) -> None:
        """Raise UsageError where the engine does not run here, so that nothing can be timed."""
        if not self.runs:
            raise UsageError(f"{self.name} does not run here: export the file, and time it where it does")

    def in_precision(self, graph: Graph) -> Graph:
        """A graph that computes floats in `precision`: itself, where the engine is told when it compiles."""
        return graph

    def saturates(self) -> bool:
        """Whether sums of uint8 and int8 products saturate on the CPU that graphs are lowered for."""
        return cpu_saturates(environment()["flags"] if self.cpu is None else CPUS[self.cpu])
