"""graphopt: a small compiler for shrinking neural networks.

`graphopt.optimize(model, passes=[...])` is the one call; `graphopt.passes` holds the passes, `graphopt.backends` the
targets. Names here are imported when first used, so that `import graphopt` costs nothing.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.capture import CaptureError
    from graphopt.compare import compare
    from graphopt.graph import GraphError
    from graphopt.optimize import Optimized, optimize
    from graphopt.pipeline import PassError, UsageError
    from graphopt.sensitivity import sensitivity

# From 1.29 on onnxruntime reports its sessions to its maker, with names and hashes of models; it looks here once, when
# it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"

__version__ = "0.1.0"
__all__ = [
    "CaptureError", "GraphError", "Optimized", "PassError", "UsageError", "__version__", "compare", "optimize",
    "sensitivity",
]  # fmt: skip

_HOMES = {
    "CaptureError": "capture",
    "GraphError": "graph",
    "Optimized": "optimize",
    "PassError": "pipeline",
    "UsageError": "pipeline",
    "compare": "compare",
    "optimize": "optimize",
    "sensitivity": "sensitivity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    found = getattr(import_module(f"graphopt.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


class _Package(ModuleType):
    """Keeps `graphopt.optimize` the function: the import of a submodule would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
