"""The target `onnxruntime`: ONNX Runtime on the CPU, a file a group of its operators."""

from graphopt.backends.onnxruntime.target import OnnxRuntime

__all__ = ["OnnxRuntime"]
