"""The targets `torch-cpu`, `onednn` and `fbgemm`: PyTorch eager on the CPU."""

from graphopt.backends.torch_cpu.target import TorchCpu

__all__ = ["TorchCpu"]
