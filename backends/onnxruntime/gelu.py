"""The tanh approximation of Gelu on onnxruntime: the standard operator, or FastGelu of the contrib domain."""

from __future__ import annotations

from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder


def _tanh_gelu(op: Recorder, x: str) -> Pattern:
    return op.gelu(x, approximate="tanh")


def _fast_gelu(op: Builder, m: Match) -> Value:
    """The same formula in another kernel."""
    return op("com.microsoft.FastGelu", m.x)


TANH = Choice("tanh-gelu", _tanh_gelu, {"Gelu": None, "FastGelu": _fast_gelu})
