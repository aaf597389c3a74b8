"""graphopt: a small compiler for shrinking neural networks.

`graphopt.optimize(model, passes=[...])` is the one call; `graphopt.passes` holds the passes, `graphopt.backends` the
targets. Names here are imported when first used, so that `import graphopt` imports neither torch nor an engine.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.api import optimize
    from graphopt.capture.fx_conversion import to_torch
    from graphopt.comparing import compare
    from graphopt.errors import (
        BundleError,
        CaptureError,
        GraphError,
        GraphoptError,
        LoweringError,
        PassError,
        RankError,
        UsageError,
    )
    from graphopt.result import Optimized
    from graphopt.sensitivities import sensitivity
    from graphopt.serving.making import bundle
    from graphopt.serving.verifying import verify

# From 1.29 on, onnxruntime reports its sessions to Microsoft, with names and hashes of models. It reads this variable
# once, when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"

__version__ = "0.1.0"
__all__ = [
    "BundleError", "CaptureError", "GraphError", "GraphoptError", "LoweringError", "Optimized", "PassError",
    "RankError", "UsageError", "__version__", "bundle", "compare", "optimize", "sensitivity", "to_torch", "verify",
]  # fmt: skip

_MODULES = {  # where each public name is defined
    "BundleError": "errors",
    "CaptureError": "errors",
    "GraphError": "errors",
    "GraphoptError": "errors",
    "LoweringError": "errors",
    "Optimized": "result",
    "PassError": "errors",
    "RankError": "errors",
    "UsageError": "errors",
    "bundle": "serving.making",
    "compare": "comparing",
    "optimize": "api",
    "sensitivity": "sensitivities",
    "to_torch": "capture.fx_conversion",
    "verify": "serving.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    found = getattr(import_module(f"graphopt.{_MODULES[name]}"), name)
    globals()[name] = found
    return found
