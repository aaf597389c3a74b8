"""PyTorch on an NVIDIA GPU: 8-bit products by `_int_mm` and `_scaled_mm`, zeros in 2:4, torch.compile around it all.

A graph is captured, changed and checked on the CPU, where the operators of `kernels` compute the same; it goes to the
GPU when it is compiled. Without a GPU it is lowered all the same, in the static order of forms, and written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.backends.cuda import rules
from graphopt.backends.cuda.device import FLOAT8, SPARSE_24, Device
from graphopt.backends.cuda.kernels import MULTIPLE, SPARSE
from graphopt.backends.cuda.runner import CudaRunner
from graphopt.dialects.fx import archive
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.ir.rewrite import Choice, Rule
from graphopt.lowering.backend import Backend, Runner
from graphopt.lowering.timed_forms import TimedChooser
from graphopt.pipeline.target import Placement


class Cuda(Backend):
    """torch.compile on a GPU."""

    name: ClassVar[str] = "cuda"
    dialect: ClassVar[str] = "fx"
    suffix: ClassVar[str] = ".pt2"
    summary: ClassVar[str] = "PyTorch on NVIDIA GPUs: int8, float8, 2:4 under torch.compile and CUDA graphs"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear": ("static", "dynamic", "weight-only")}
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {"linear": (8,)}
    types: ClassVar[tuple[str, ...]] = ("int8", "float8")
    placement: ClassVar[Placement | None] = Placement(signed=True)
    granularities: ClassVar[tuple[str, ...]] = ("row",)
    floats: ClassVar[tuple[str, ...]] = ("bfloat16", "float16")
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 32, "channels": 32, "width": 32, "rank": 32}
    """What weights in 2:4 are multiples of; the kernels of 8 bits take multiples of 8 and 16."""

    def __init__(self, cpu: str | None = None, device: Device | None = None) -> None:
        """device: the GPU to lower for; None is this machine's, if it has one. Raises UsageError where cpu is given."""
        if cpu is not None:
            raise UsageError(f"target cuda runs on a GPU: leave out cpu={cpu}")
        super().__init__()
        self.device = device or Device.here()
        self.runs = self.device is not None
        self.sparse = () if self.device is not None and self.device.capability < SPARSE_24 else ("2:4",)
        self.zeros = (
            f"kernels skip zeros in 2:4, in weights of 16 or 8 bits whose sizes are multiples of "
            f"{SPARSE[torch.float16]} or {SPARSE[torch.int8]}: put cast or quantize after sparsify"
            if self.sparse
            else f"zeros in 2:4 are skipped from compute capability 8.0 on, and this is {self.device}"
        )

    def notes(self) -> list[str]:
        if self.device is not None:
            return [f"captured and checked on the CPU, run on {self.device}"]
        return [
            "lowered for an NVIDIA GPU and not run on one: outputs are those of the same operators on the CPU. float8 "
            "needs compute capability 8.9, zeros in 2:4 need 8.0"
        ]

    def product_bits(self) -> int:
        """8: its sums have 32 bits."""
        return 8

    def times(self) -> bool:
        self.require_runs()
        return True

    def require_runs(self) -> None:
        if not self.runs:
            build = "was built without CUDA" if torch.version.cuda is None else "sees none"
            raise UsageError(
                f"target cuda runs on an NVIDIA GPU, and torch {torch.__version__} {build}: give measure=False to "
                f"lower without running, and export() to write the archive for a machine that has one"
            )

    def clock(self) -> float:
        """Kernels run asynchronously, so the device is waited for. CUDA events have too coarse a resolution."""
        torch.cuda.synchronize()
        return time.perf_counter()

    def place(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor.to("cuda") for name, tensor in feeds.items()}

    def why_float(self, site: Node, scheme: str, dtype: str) -> Decline | None:
        """Raises UsageError where the GPU is too old for a type."""
        if dtype == "float8" and self.device is not None and self.device.capability < FLOAT8:
            needs = "float8 needs a GPU of compute capability 8.9"
            raise UsageError(f"{needs}, and this is {self.device}: give dtype=int8")
        shape = site.required("weight").shape
        if site.kind != "linear" or shape is None or scheme == "weight-only":
            return None
        multiple = MULTIPLE[torch.float8_e4m3fn if dtype == "float8" else torch.int8]
        return rules.why_too_much_padding(int(shape[0]), int(shape[1]), multiple)

    def pipeline(self) -> str:
        return "merge-linear"

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        sparse = (rules.PRODUCT_24, rules.FLOATS_24) if self.sparse else ()
        return ((*sparse, rules.PRODUCT, rules.WEIGHT_ONLY),)

    def engine(self) -> str:
        name = None if self.device is None else self.device.name
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}"

    def chooser(self, feeds: Sequence[Mapping[str, Tensor]], threads: int | None = None) -> TimedChooser:
        return TimedChooser(self.engine(), feeds, self.compile, clock=self.clock, place=self.place)

    def compile(self, graph: Graph, threads: int | None = None) -> CudaRunner:
        """threads: of the CPU, and so without effect here."""
        assert isinstance(graph, FxGraph)
        return CudaRunner(graph, self.device)

    def check(self, folded: Graph, runner: Runner) -> None:
        promised = [site for site in folded.sites("linear") if rules.why_no_kernel(site) is None]
        own = {kind: count for kind, count in runner.kernels().items() if kind.startswith(rules.OWN)}
        built = sum(count for kind, count in own.items() if kind not in rules.FLOAT_OPERATORS)
        if built < len(promised):
            raise LoweringError(
                f"{len(promised)} linears in 8 bits were promised and the program has {built} operators for them, of "
                f"{', '.join(site.label for site in promised)}"
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
        """Write a torch.export archive (.pt2), its weights on the CPU. After `import graphopt.backends.cuda`,
        torch.export.load reads it, and torch.export.passes.move_to_device_pass puts it on a GPU; `FxGraph.load` and
        `compile` do both."""
        assert isinstance(graph, FxGraph)
        if opset is not None or external_data is not None:
            raise UsageError("cuda writes a torch.export archive; opset and external_data are for ONNX targets")
        archive.save(graph, path, metadata)
