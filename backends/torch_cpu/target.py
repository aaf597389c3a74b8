"""PyTorch eager on the CPU, each site by whichever is fastest there: oneDNN, fbgemm, or floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from graphopt.backends.torch_cpu import fbgemm, int8, onednn
from graphopt.backends.torch_cpu.int8 import Engine
from graphopt.backends.torch_cpu.onednn import OneDnn
from graphopt.backends.torch_cpu.packing import Pack


class TorchCpu(OneDnn):
    """Both engines of torch, in one graph that runs eagerly."""

    name: ClassVar[str] = "torch-cpu"
    summary: ClassVar[str] = "PyTorch eager on CPUs, each site by oneDNN, fbgemm or in floats, as measured"
    engines: ClassVar[Sequence[str]] = ("onednn", "fbgemm")
    operators: ClassVar[Mapping[str, Pack]] = onednn.OPERATORS | fbgemm.OPERATORS
    int8_kernels: ClassVar[Sequence[str]] = tuple(dict.fromkeys(onednn.INT8_KERNELS + fbgemm.INT8_KERNELS))
    forms: ClassVar[Sequence[Engine]] = (onednn.ENGINE, fbgemm.ENGINE, int8.float_engine())
