"""x · cos + turned(x) · sin, as exporters write it out  ->  rotary(x, cos, sin).

`turned` swaps the halves of a head and negates one of them. The angles stand twice in a row for that, once for each
half; the op reads them once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from graphopt.dialects.raising import Stage
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Shape, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, scalar


def _written_out(op: Recorder, x: Any, cos: Any, sin: Any) -> Pattern:
    negated = getattr(op, "onnx.Neg")(op.slice(x, bind="second"))
    turned = op.concat(negated, op.slice(x, bind="first"), bind="turned")
    return op.add(op.mul(x, cos), op.mul(turned, sin))


def _to_rotary(op: Builder, m: Match) -> Value:
    """Su et al., 2021, in the order of pairs that GPT-NeoX has."""
    if m.x.rank != 4 or not isinstance(m.x.shape[3], int):
        raise Declined("rotary_heads_unknown")
    pairs = m.x.shape[3] // 2
    if _part(m.first) != (3, 0, pairs) or _part(m.second) != (3, pairs, 2 * pairs) or not _is_last(m.turned):
        raise Declined("rotary_halves_differ")
    cos, sin = (op.once(("half of angles", value), partial(_half, op, value)) for value in (m.cos, m.sin))
    axes = [axis for axis in (1, 2) if all(_same_for_heads(m.x.shape, half.shape, axis) for half in (cos, sin))]
    if not axes:
        raise Declined("rotary_angles_by_head", shape=cos.shape)
    head_axis, to_heads = axes[0], (0, 2, 1, 3)
    x = m.x if head_axis == 1 else op.transpose(m.x, perm=to_heads)
    turned = op.rotary(x, _of_positions(op, cos, head_axis), _of_positions(op, sin, head_axis))
    return turned if head_axis == 1 else op.transpose(turned, perm=to_heads)


def _of_a_part(op: Recorder, x: Any, cos: Any, sin: Any) -> Pattern:
    turned = op.rotary(op.slice(x, bind="turned"), cos, sin, heads=0, interleaved=False)
    return op.concat(turned, op.slice(x, bind="rest"), bind="joined")


def _to_partial_rotary(op: Builder, m: Match) -> Value:
    """The op leaves the last entries of a head as they are by itself."""
    size = m.x.shape[3] if m.x.rank == 4 else None
    turned = 2 * m.cos.shape[-1] if m.cos.shape is not None else 0
    if _part(m.turned) != (3, 0, turned) or _part(m.rest) != (3, turned, size) or not _is_last(m.joined):
        raise Declined("rotary_halves_differ")
    return op.rotary(m.x, m.cos, m.sin)


def _part(node: Node) -> tuple[int, int, int]:
    """The axis, start and end of a slice."""
    given = node.attributes
    return given["axis"] % (node.input.rank or 1), given["start"], given["end"]


def _is_last(concat: Node) -> bool:
    return bool(concat.attributes["axis"] in (-1, (concat.result.rank or 0) - 1))


# --- angles ----------------------------------------------------------------------------------------------------------


def _same_for_heads(x: Shape | None, half: Shape | None, head_axis: int) -> bool:
    """Whether angles that are broadcast to x are the same for all heads, and one for each position.

    x: (batch, heads, length, size), or (batch, length, heads, size) where `head_axis` is 2.
    """
    if x is None or half is None or not 0 < len(half) <= 4:
        return False
    angles = (1,) * (4 - len(half)) + tuple(half)
    positions = 3 - head_axis
    differ = [one != own and (1 in (one, own) or (isinstance(one, int) and isinstance(own, int)))
              for one, own in zip(angles, x, strict=True)]  # fmt: skip
    return angles[head_axis] == 1 and not differ[positions] and (angles[0] == 1 or not differ[0])


def _of_positions(op: Builder, half: Value, head_axis: int) -> Value:
    """(batch or 1, length, pairs) of angles that are the same for all heads. head_axis: the axis of x that holds the
    heads."""
    missing = 4 - (half.rank or 0)
    node, axis = half.producer, head_axis - missing

    def emit() -> Value:
        if axis < 0:  # which broadcasting adds
            return op.unsqueeze(half, axes=tuple(range(missing - 1))) if missing > 1 else half
        added = node is not None and node.kind == "unsqueeze" and node.attributes["axes"] == (axis,)
        bare = node.input if added and node is not None else op.squeeze(half, axes=(axis,))
        return op.unsqueeze(bare, axes=tuple(range(missing))) if missing else bare

    return op.once(("rotary angles", half, head_axis), emit)


def _half(op: Builder, value: Value) -> Value:
    """The first half of the last axis of a value whose two halves are equal: what repeats them is left out."""
    node, tensor = value.producer, op.graph.constant(value)
    if tensor is not None:
        if not tensor.dim() or tensor.shape[-1] % 2:
            raise Declined("rotary_angles_differ")
        first, second = tensor.chunk(2, -1)
        if not torch.equal(first, second):
            raise Declined("rotary_angles_differ")
        return op.constant(first.contiguous())
    if node is None or value.rank is None:
        raise Declined("rotary_angles_unknown", found="an input")
    match node.kind:
        case "concat":
            if len(set(node.operands)) == 1 and len(node.operands) == 2 and _is_last(node):
                return node.operands[0]  # type: ignore[return-value]  # a concat leaves none out
        case "onnx.Cos" | "onnx.Sin" | "cast" | "identity":
            return op.graph.emit(node, _half(op, _first(node)), at=op.at)
        case "embedding":
            return op.embedding(_half(op, node.required("table")), node.required("ids"))
        case "unsqueeze":
            axes = tuple(axis % value.rank for axis in node.attributes["axes"])
            if value.rank - 1 not in axes:
                return op.unsqueeze(_half(op, node.input), axes=axes)
        case "mul":
            a, b = node.required("a"), node.required("b")
            if scalar(op.graph, a) is not None:
                a, b = b, a
            if scalar(op.graph, b) is not None:
                return op.mul(_half(op, a), b)
    raise Declined("rotary_angles_unknown", found=node.kind)


def _first(node: Node) -> Value:
    assert node.operands[0] is not None
    return node.operands[0]


STAGE = Stage.of_rules(
    "rotary embeddings",
    Rule("rotary", _written_out, _to_rotary),
    Rule("partial-rotary", _of_a_part, _to_partial_rotary),
)
