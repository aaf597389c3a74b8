"""Rotary embeddings on onnxruntime: before the heads are split, with the angles of all rows made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.backends.onnxruntime.attention import splits_heads
from graphopt.backends.onnxruntime.rows import with_shape
from graphopt.dialects.onnx.spellings import repeats_over_batch
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule


def _of_split_heads(reshape: str) -> Callable[..., Pattern]:
    """reshape: the op, or ONNX's operator where the shape that it is told copies sizes by 0."""

    def pattern(op: Recorder, x: Any, shape: Any, cos: Any, sin: Any) -> Pattern:
        split = getattr(op, reshape)(x, shape, bind="split")
        return op.rotary(op.transpose(split, perm=(0, 2, 1, 3), bind="heads"), cos, sin, heads=0)

    return pattern


def _before_split(op: Builder, m: Match) -> Value:
    """The kernel takes 3-D values too, and attention then needs no Reshape and Transpose around it."""
    if not splits_heads(m.heads.result.shape, m.x.shape):
        raise Declined("heads_unknown")
    heads, interleaved = m.heads.result.shape[1], m.root.attributes["interleaved"]
    turned = op.rotary(m.x, m.cos, m.sin, heads=heads, interleaved=interleaved)
    turned = op.graph.emit(m.split, turned, m.shape, at=op.at)
    return op.transpose(turned, perm=(0, 2, 1, 3))


def _rotary(op: Recorder, x: str, cos: str, sin: str) -> Pattern:
    return op.rotary(x, cos, sin)


def _read_angles_of_rows(op: Builder, m: Match) -> Mapping[Value, Value]:
    """In the whole group: (1, length, pairs) expanded to the batch, in one node for all layers."""
    batch = op("onnx.Shape", m.x, start=0, end=1)
    rows = []
    for angles in (m.cos, m.sin):
        sizes = op.concat(batch, op("onnx.Shape", angles, start=1), axis=0)
        rows.append(with_shape(op("onnx.Expand", angles, sizes), (m.x.shape[0], *angles.shape[1:])))
    return {one.root.result: op.graph.emit(one.root, one.x, *rows, at=one.root) for one in m.group}


BEFORE_SPLIT = (
    Rule("rotary-3d", _of_split_heads("reshape"), _before_split),
    Rule("rotary-3d-of-copied-sizes", _of_split_heads("onnx.Reshape"), _before_split),
)
ANGLES_ONCE = Rule(
    "rotary-angles-once",
    _rotary,
    _read_angles_of_rows,
    check=lambda m: repeats_over_batch(m.x, m.cos) and m.x.shape[0] != "?",
    group_by=lambda m: (m.cos, m.sin, m.x.shape[0]),
)
