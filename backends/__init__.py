"""The targets, by name. Importing this module imports no engine; `target("onnxruntime")` does.

A package adds its own by an entry point of the group `graphopt.backends` (`graphopt.pipeline.registry`).
"""

from __future__ import annotations

from graphopt.lowering.backend import Backend
from graphopt.pipeline import aliases
from graphopt.pipeline.registry import Registry

TARGETS: Registry[Backend] = Registry(
    "graphopt.backends",
    "target",
    Backend,
    {
        "onnxruntime": "graphopt.backends.onnxruntime.target:OnnxRuntime",
        "onnxruntime-cuda": "graphopt.backends.onnxruntime_cuda:OnnxRuntimeCuda",
        "cuda": "graphopt.backends.cuda.target:Cuda",
        "torch-cpu": "graphopt.backends.torch_cpu.target:TorchCpu",
        "onednn": "graphopt.backends.torch_cpu.onednn:OneDnn",
        "fbgemm": "graphopt.backends.torch_cpu.fbgemm:Fbgemm",
        "openvino": "graphopt.backends.openvino:OpenVino",
        "tensorrt": "graphopt.backends.tensorrt:TensorRt",
        "tensorflow": "graphopt.backends.tensorflow.target:TensorFlow",
    },
    aliases.TARGETS,
)
"""The class of each target; `TARGETS["onnxruntime"]` imports it."""


def target(name: str, cpu: str | None = None) -> Backend:
    """The target called `name`, for this machine or for another `cpu` (`Backend`).

    Raises UsageError for an unknown target or CPU, and where the target's engine or package cannot be imported.
    """
    return TARGETS.lookup(name)(cpu)
