"""The target `onnxruntime`: ONNX Runtime on the CPU. A file for each group of its operators."""

from graphopt.backends.onnxruntime.target import OnnxRuntime

__all__ = ["OnnxRuntime"]
