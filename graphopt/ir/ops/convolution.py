"""Convolutions with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import NodeAxes, Unclear
from graphopt.ir.cutting import Cut
from graphopt.ir.ops.declaration import op
from graphopt.ir.ops.linear import weight_flops
from graphopt.ir.ops.movement import pad

if TYPE_CHECKING:  # graph imports the ops
    from graphopt.ir.graph import Value


def conv_axes(node: NodeAxes, groups: int, *, transposed: bool = False) -> None:
    """Weight (out, in / groups, *kernel), or transposed (in, out / groups, *kernel)."""
    x, weight, *bias = node.given
    y = node.y
    out, into = (1, 0) if transposed else (0, 1)
    if transposed and groups > 1:
        raise Unclear("axis_of_groups")
    if node.rank(x) != node.rank(weight):
        raise Unclear("axis_in_unknown_form")
    rows, columns = node.positions(weight, out), node.positions(weight, into)
    before, after = node.positions(x, 1), node.positions(y, 1)
    if rows is None or columns is None or before is None or after is None:
        raise Unclear("axis_of_unknown_channels")
    node.same(x, 0, y, 0)
    for value in (x, weight, y):
        for axis in range(2, node.rank(value)):
            node.lock(value, axis, "axis_of_space")
    node.link(after, rows)
    if groups == 1:
        node.link(before, columns)
    elif shrinks_inside_groups(node, groups):
        for positions in (before, after):
            blocks = positions.reshape(groups, -1)
            node.link(*np.broadcast_arrays(blocks[:1], blocks))
        node.link(before.reshape(groups, -1)[0], columns)
    else:
        first = after.reshape(groups, -1)[:, :1]  # a group goes whole, with the channels that it reads
        node.link(*np.broadcast_arrays(first, after.reshape(groups, -1)))
        node.link(*np.broadcast_arrays(first, before.reshape(groups, -1)))
        if len(columns) > 1:
            node.lock(weight, into, "axis_inside_a_group")
    for value in bias:
        node.same(value, 0, y, 1)
    inside = groups == 1 or (not transposed and shrinks_inside_groups(node, groups))
    node.has_weight(weight, out, into if inside else None)


def shrinks_inside_groups(node: NodeAxes, groups: int) -> bool:
    """Whether a conv in groups loses the same channels of each group, and not whole groups: where that are more units.

    A unit is then one input of each group, or one output of each. A depthwise conv, whose groups are its channels,
    loses whole groups.
    """
    into, out = node.shape(node.given[1])[1], node.shape(node.y)[1]
    return groups > 1 and isinstance(into, int) and isinstance(out, int) and min(into, out // groups) > groups


def _axes(node: NodeAxes) -> None:
    conv_axes(node, node.attributes["groups"])


def _cut(cut: Cut, node: NodeAxes) -> list[Value]:
    groups = node.attributes["groups"]
    whole = groups > 1 and not shrinks_inside_groups(node, groups)
    return cut.same(node, groups=cut.share(node, node.x, 1, groups) if whole else groups)


@op(flops=weight_flops, axes=_axes, cut=_cut)
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> Tensor:
    """x (N, C, *space), weight (out, C/groups, *kernel); padding is (begin of each axis ..., end of each axis ...)."""
    rank = weight.dim() - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    x = pad(x, padding=padding)
    return function(x, weight, bias, stride or (1,) * rank, 0, dilation or (1,) * rank, groups)


def _transposed_axes(node: NodeAxes) -> None:
    conv_axes(node, node.attributes["groups"], transposed=True)


def _transposed_flops(x: Sequence[int], weight: Sequence[int]) -> int:
    """Each entry of x is multiplied by one input slice of the weight."""
    return 2 * prod(x) * prod(weight[1:])


@op(flops=_transposed_flops, axes=_transposed_axes)
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    output_padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> Tensor:
    """The gradient of conv: x (N, C, *space), weight (C, out/groups, *kernel), of which entries are `stride` apart.

    padding, (begin of each axis ..., end of each axis ...), is cut off the result, and output_padding added at its end.
    """
    rank = weight.dim() - 2
    ones, zeros = (1,) * rank, (0,) * rank
    begin, end = padding[:rank] or zeros, padding[rank:] or zeros
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    common = tuple(map(min, begin, end))  # torch cuts off as much at either end
    y = function(x, weight, bias, stride or ones, common, output_padding or zeros, groups, dilation or ones)
    rest = [least - side for ends in (begin, end) for least, side in zip(common, ends, strict=True)]
    return pad(y, padding=tuple(rest))
