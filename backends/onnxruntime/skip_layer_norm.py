"""A residual add in front of a norm on onnxruntime: two kernels, or one that adds and normalizes.

In front of a LayerNorm, a Sum; or the SkipLayerNormalization that the engine makes of an Add. In front of an RMS norm
the engine makes nothing, and SkipSimplifiedLayerNormalization is a form of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.backends.onnxruntime.rows import with_shape
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


def _rms_norm(op: Recorder, x: str, residual: str, weight: str) -> Pattern:
    return op.rms_norm(op.add(x, residual, bind="sum"), weight)


def _skip_rms_norm(op: Builder, m: Match) -> Mapping[Value, Value]:
    """One kernel, whose last result is the sum. For 128 rows of 1024 it takes 158 us, and Add and RMSNormalization 66;
    for one row 2.7 and 2.1 (one thread)."""
    same = m.x.shape is not None and "?" not in m.x.shape and m.x.shape == m.residual.shape
    if not same or m.x.rank not in (2, 3) or m.weight.rank != 1:
        raise Declined("residual_norm_unsupported", x=m.x.shape, residual=m.residual.shape)
    if m.x.dtype is not torch.float32:
        raise Declined("activations_not_float32", dtype=str(m.x.dtype))
    y, *_, added = op.graph.emit_all(
        "com.microsoft.SkipSimplifiedLayerNormalization", m.x, m.residual, m.weight, at=m.sum, _outputs=4,
        epsilon=m.root.attributes["eps"],
    )  # fmt: skip
    return {result: with_shape(value, m.x.shape, m.x.dtype)
            for result, value in ((m.root.result, y), (m.sum.result, added))}  # fmt: skip


RMS_RESIDUAL = Choice(
    "residual-rms-norm",
    _rms_norm,
    {"RMSNormalization": None, "SkipSimplifiedLayerNormalization": _skip_rms_norm},
    check=lambda m: not m.sum.result.is_output and m.weight.is_constant,
    shared=True,
)
