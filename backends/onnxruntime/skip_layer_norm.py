"""A residual add in front of a LayerNorm on onnxruntime: Sum, or the SkipLayerNormalization that it makes of an Add."""

from __future__ import annotations

from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder


def _residual_add(op: Recorder, x: str, residual: str) -> Pattern:
    return op.add(x, residual)


def _is_normalized(m: Match) -> bool:
    added = m.root.result
    return any(user.kind == "layer_norm" and user.input == added for user in added.users)


def _sum(op: Builder, m: Match) -> Value:
    """onnxruntime's SkipLayerNormalization is 6 times slower than Sum + LayerNormalization, and matches no Sum.

    Another reader of the Add (the next residual add of a pre-norm model) reads the Sum too: it is computed once.
    """
    if m.x.shape is None or m.x.shape != m.residual.shape:
        raise Declined("residual_shapes_differ")
    return op("onnx.Sum", m.x, m.residual)


RESIDUAL = Choice(
    "residual-norm",
    _residual_add,
    {"Sum": _sum, "SkipLayerNormalization": None},  # onnxruntime makes it of the ops as they are
    check=_is_normalized,
    around=lambda m: (m.root, *(user for user in m.root.result.users if user.kind == "layer_norm")),
)
