"""Bundles that check themselves, what answers from them, a server for one machine, and other servers' repositories.

What makes a bundle needs torch; what answers from one needs numpy and the engine, so that a server is small and starts
at once. Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.serving.making import bundle
    from graphopt.serving.predictor import Predictor
    from graphopt.serving.verifying import verify

__all__ = ["Predictor", "bundle", "verify"]

_MODULES = {"Predictor": "predictor", "bundle": "making", "verify": "verifying"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'graphopt.serving' has no attribute {name!r}")
    return getattr(import_module(f"graphopt.serving.{_MODULES[name]}"), name)
