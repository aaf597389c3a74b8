"""The targets, by name. Importing this module imports no engine; `target("onnxruntime")` does."""

from __future__ import annotations

from importlib import import_module

from graphopt.errors import UsageError, nearest
from graphopt.lowering.backend import Backend

TARGETS = {
    "onnxruntime": ("graphopt.backends.onnxruntime.target", "OnnxRuntime"),
    "onnxruntime-cuda": ("graphopt.backends.onnxruntime_cuda", "OnnxRuntimeCuda"),
    "cuda": ("graphopt.backends.cuda.target", "Cuda"),
    "torch-cpu": ("graphopt.backends.torch_cpu.target", "TorchCpu"),
    "onednn": ("graphopt.backends.torch_cpu.onednn", "OneDnn"),
    "fbgemm": ("graphopt.backends.torch_cpu.fbgemm", "Fbgemm"),
    "openvino": ("graphopt.backends.openvino", "OpenVino"),
    "tensorrt": ("graphopt.backends.tensorrt", "TensorRt"),
}
"""Module and class of each target."""


def target(name: str, cpu: str | None = None) -> Backend:
    """The backend called `name`, for this machine or for another `cpu`.

    Raises UsageError for an unknown one, naming the nearest.
    """
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}{nearest(name, list(TARGETS))}")
    module, cls = TARGETS[name]
    backend: Backend = getattr(import_module(module), cls)(cpu)
    return backend
