"""PyTorch eager on the CPU, each site by whichever is fastest there: oneDNN, fbgemm, or floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from graphopt.backends.torch_cpu import fbgemm, int8, onednn, onednn_floats
from graphopt.backends.torch_cpu.base import EagerTarget
from graphopt.backends.torch_cpu.int8 import Engine
from graphopt.backends.torch_cpu.packing import Pack
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import Choice, Rule


class TorchCpu(EagerTarget):
    """Both engines of torch, in one graph that runs eagerly."""

    name: ClassVar[str] = "torch-cpu"
    summary: ClassVar[str] = "PyTorch eager on CPUs, each site by oneDNN, fbgemm or in floats, as measured"
    engines: ClassVar[Sequence[str]] = ("onednn", "fbgemm")
    operators: ClassVar[Mapping[str, Pack]] = onednn.OPERATORS | fbgemm.OPERATORS
    int8_kernels: ClassVar[Sequence[str]] = tuple(dict.fromkeys(onednn.INT8_KERNELS + fbgemm.INT8_KERNELS))
    forms: ClassVar[Sequence[Engine]] = (onednn.ENGINE, fbgemm.ENGINE, int8.float_engine())

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        return *super().rules(graph), *onednn_floats.stages()
