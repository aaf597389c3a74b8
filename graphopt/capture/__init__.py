"""From a source of any kind (module, program, ONNX model, file) to a Graph, and how it is called."""

from graphopt.capture.signature import Signature
from graphopt.capture.sources import Captured, capture

__all__ = ["Captured", "Signature", "capture"]
