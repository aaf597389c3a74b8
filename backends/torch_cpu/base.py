"""The base class of the targets of PyTorch on the CPU: what they accept, how they are checked, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.backends.torch_cpu import int8
from graphopt.backends.torch_cpu.packing import Pack
from graphopt.backends.torch_cpu.runner import EagerRunner
from graphopt.dialects.fx import archive
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import Choice, Rule
from graphopt.lowering.backend import Backend, Runner
from graphopt.lowering.saturation import SAFE
from graphopt.lowering.timed_forms import TimedChooser

PAUSE = 0.02
"""Most seconds between two forms that are timed. All forms share the threads of one process: one that still spins slows
no other down, as it takes up the work of the next form."""


class EagerTarget(Backend):
    """An fx graph that runs eagerly on the CPU, and calls kernels of some of torch's engines."""

    dialect: ClassVar[str] = "fx"
    suffix: ClassVar[str] = ".pt2"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "linear": ("static", "dynamic"),
        "conv": ("static",),
        "add": ("static",),
    }
    granularities: ClassVar[tuple[str, ...]] = ("tensor", "row")
    floats: ClassVar[tuple[str, ...]] = ("bfloat16",)
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}
    zeros: str = "weights are packed densely, and zeros multiplied: only compressed files gain"

    engines: ClassVar[Sequence[str]]
    """The engines that it calls, as torch.backends.quantized names them."""
    operators: ClassVar[Mapping[str, Pack]]
    """The target's own operators, by name, and what turns each into calls of the engine on a packed weight."""
    int8_kernels: ClassVar[Sequence[str]]
    """The operators of torch that count as int8 kernels."""
    forms: ClassVar[Sequence[int8.Engine]]
    """The forms that int8 ops may take, in their static order."""

    @property
    def quantizes(self) -> tuple[str, ...]:
        fused = (post for post in int8.POSTS if any(form.fuses(post) for form in self.forms))
        return *fused, "linear"

    def accept(self, model: Any, example_inputs: Any) -> None:
        require_engines(self.name, self.engines)
        require_cpu(self.name, model, example_inputs)

    def pipeline(self) -> str:
        return "fold-int8"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        limit = SAFE if self.saturates() else 128
        return int8.stages([replace(engine, max_weight=limit) for engine in self.forms])

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> TimedChooser:
        compiled = partial(self.compile, threads=threads)
        return TimedChooser(f"torch {torch.__version__}", feeds, compiled, threads, pause=PAUSE)

    def compile(self, graph: Graph, threads: int | None = None) -> EagerRunner:
        assert isinstance(graph, FxGraph)
        try:
            require_engines(self.name, self.engines)
        except UsageError as error:
            raise LoweringError(str(error)) from error
        return EagerRunner(graph, self.operators, threads)

    def loading(self, file: str, threads: int | None = None) -> Mapping[str, Any]:
        python = (
            "from graphopt.backends import target; from graphopt.dialects.fx.graph import FxGraph; "
            f"target({self.name!r}).compile(FxGraph.load({file!r}), {threads})"
        )
        return {"engine": self.engine(), "precision": self.precision, "threads": threads, "python": python}

    def check(self, folded: Graph, runner: Runner) -> None:
        """The lowered graph says what is promised: merged linears share a kernel, some sites are faster in float."""
        assert isinstance(runner, EagerRunner)
        if runner.unlowered:
            raise LoweringError(
                f"{self.name} has no kernel for the int8 ops {', '.join(runner.unlowered)}: the report's choices say "
                f"why; leave them out with ignore"
            )
        built = runner.kernels()
        found = sum(built.get(kernel, 0) for kernel in self.int8_kernels)
        if found < len(runner.promised):
            raise LoweringError(
                f"{len(runner.promised)} int8 kernels were promised and {self.name} runs {found} "
                f"({', '.join(self.int8_kernels)}) among {', '.join(runner.promised)}"
            )

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        """Write a torch.export archive (.pt2). `FxGraph.load` and `compile` run it fast; `torch.export.load`, after
        the target's module was imported, runs it anywhere."""
        assert isinstance(graph, FxGraph)
        if opset is not None or external_data is not None:
            raise UsageError(f"{self.name} writes a torch.export archive; opset and external_data are for ONNX targets")
        archive.save(graph, path, metadata)


def require_engines(target: str, engines: Sequence[str]) -> None:
    """Raise UsageError where this build of torch lacks an engine."""
    known = torch.backends.quantized.supported_engines
    for engine in engines:
        if engine not in known or (engine == "onednn" and not torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
            raise UsageError(
                f"target {target} needs torch's engine {engine}, which this build lacks (it has {', '.join(known)}): "
                f"both engines are in torch's x86-64 builds; target=onnxruntime needs neither"
            )


def require_cpu(target: str, model: Any, example_inputs: Any) -> None:
    """Raise UsageError, naming it, where a tensor of a module or of its inputs is on another device than the CPU."""
    tensors: list[tuple[str, Tensor]] = []
    if isinstance(model, nn.Module):
        tensors += [*model.named_parameters(), *model.named_buffers()]
    elif isinstance(model, torch.export.ExportedProgram):
        tensors += [*model.state_dict.items(), *((n, t) for n, t in model.constants.items() if isinstance(t, Tensor))]
    elsewhere = [(name, tensor) for name, tensor in tensors if tensor.device.type != "cpu"]
    if elsewhere:
        devices = {str(tensor.device) for _, tensor in tensors}
        spread = f"the module is spread over {', '.join(sorted(devices))}; " if len(devices) > 1 else ""
        raise UsageError(f"target {target} runs on the CPU, and {elsewhere[0][0]} is on {elsewhere[0][1].device}: "
                         f"{spread}pass model.cpu()")  # fmt: skip
    for leaf in pytree.tree_leaves(example_inputs):
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            raise UsageError(f"target {target} runs on the CPU, and an example input is on {leaf.device}: "
                             f"move it with .cpu()")  # fmt: skip
