"""The passes `quantize` and `smooth` and their parts: weights and activations become integers."""

from graphopt.passes.quantize.quantize import Quantize
from graphopt.passes.quantize.smooth import Smooth

__all__ = ["Quantize", "Smooth"]
