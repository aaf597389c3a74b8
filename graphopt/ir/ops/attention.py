"""Scaled dot-product attention, and the rotation of its queries and keys by their positions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import NodeAxes, Positions, Unclear
from graphopt.ir.cutting import Cut
from graphopt.ir.ops.declaration import op

if TYPE_CHECKING:  # graph imports the ops
    from graphopt.ir.graph import Value


def _flops(query: Sequence[int], key: Sequence[int], y: Sequence[int]) -> int:
    """The product with the keys, and that with the values: each reads as many positions as there are keys."""
    return 2 * key[-2] * (prod(query) + prod(y))


def _axes(node: NodeAxes) -> None:
    """A head goes whole; with grouped queries a key head goes with its queries."""
    query, key, value, *mask = node.given
    heads = int(node.attributes["heads"])
    axis = -1 if heads else 1  # of the heads: 3-D (batch, length, heads · size), or 4-D
    parts = [node.positions(part, axis) for part in (query, key, value, node.y)]
    found = [part for part in parts if part is not None]
    if len(found) < 4:
        raise Unclear("axis_of_unknown_heads")
    groups = int(node.attributes["kv_heads"] or heads) if heads else len(found[1])
    units = [part.reshape(groups, -1) for part in found]
    for positions in units:
        node.link(*np.broadcast_arrays(units[0][:, :1], positions))
    node.relations.heads += found
    for part in (query, key, value, node.y):
        node.same(part, 0, node.y, 0)
        for inner in range(1, node.rank(part)):
            if inner != axis % node.rank(part):
                node.lock(part, inner, "axis_inside_attention")
    for part in mask:
        _mask_axes(node, part, heads or len(found[0]), units[0])


def _mask_axes(node: NodeAxes, mask: Value, heads: int, units: Positions) -> None:
    node.unrelated(mask)
    rank = node.rank(mask)
    for axis in range(rank):
        positions = node.positions(mask, axis)
        if axis == rank - 4:
            node.same(mask, axis, node.y, 0)
        elif axis == rank - 3 and positions is not None and len(positions) == heads > 1:
            node.link(*np.broadcast_arrays(units[:, :1], positions.reshape(len(units), -1)))
        else:
            node.lock(mask, axis, "axis_of_attention_mask")


def _cut(cut: Cut, node: NodeAxes) -> list[Value]:
    counts = {name: node.attributes[name] for name in ("heads", "kv_heads") if node.attributes[name]}
    return cut.same(node, **{name: cut.share(node, node.x, -1, count) for name, count in counts.items()})


@op(flops=_flops, axes=_axes, cut=_cut)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    heads: int = 0,
    kv_heads: int = 0,
) -> Tensor:
    """softmax(query keyᵀ · scale + mask) value.

    4-D (batch, heads, length, head size) when heads is 0, else 3-D (batch, length, heads · head size). A boolean mask
    is True where attention is allowed, a float mask is added. Fewer kv_heads than heads are repeated (grouped query).
    """
    if heads:
        query = query.reshape(*query.shape[:2], heads, -1).transpose(1, 2)
        key, value = (t.reshape(*t.shape[:2], kv_heads or heads, -1).transpose(1, 2) for t in (key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    return y.transpose(1, 2).flatten(2) if heads else y


def _rotary_axes(node: NodeAxes) -> None:
    """A head goes whole; cos and sin are of the entries of any head."""
    x, *angles = node.given
    heads = node.attributes["heads"]
    positions = node.positions(x, -1)
    if heads and positions is not None:
        units = positions.reshape(heads, -1)
        node.link(*np.broadcast_arrays(units[:, :1], units))
    for axis in range(node.rank(x) - (not heads)):
        node.same(x, axis, node.y, axis)
    for value in (x, node.y) if not heads else ():
        node.lock(value, -1, "axis_inside_attention")
    for value in angles:
        for axis in range(node.rank(value)):
            node.lock(value, axis, "axis_inside_attention")


def _rotary_cut(cut: Cut, node: NodeAxes) -> list[Value]:
    heads = node.attributes["heads"]
    return cut.same(node, heads=cut.share(node, node.x, -1, heads) if heads else 0)


@op(flops=0, axes=_rotary_axes, cut=_rotary_cut)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, heads: int = 0) -> Tensor:
    """Queries or keys with pairs of their entries turned by angles, which grow with the position (Su et al., 2021).

    x: 4-D (batch, heads, length, head size) when heads is 0, else 3-D (batch, length, heads · head size). cos, sin:
    (batch or 1, length, pairs), of the angles. Of each head the first 2 · pairs entries are turned, the others stay.
    A pair is entry i and i + pairs, or 2i and 2i + 1 when interleaved.
    """
    if heads:
        x = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    y = torch.cat([turned, rest], -1)
    return y.transpose(1, 2).flatten(2) if heads else y
