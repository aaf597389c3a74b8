"""The target `cuda`: PyTorch's integer and float8 products under torch.compile. Importing it registers operators."""

from graphopt.backends.cuda.target import Cuda

__all__ = ["Cuda"]
