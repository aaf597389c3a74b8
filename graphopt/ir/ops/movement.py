"""What moves, copies or casts entries, and computes none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.axes import NodeAxes, elementwise, joined, padded, reshaped, taken, trailing_sides
from graphopt.ir.cutting import Cut
from graphopt.ir.ops.declaration import op

if TYPE_CHECKING:  # graph imports the ops
    from graphopt.ir.graph import Value


@op(flops=0, axes=elementwise)
def identity(x: Tensor) -> Tensor:
    """x itself (ONNX Identity; aten clone, detach, dropout at inference)."""
    return x


@op(flops=0, axes=elementwise)
def cast(x: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """x as another dtype."""
    return x.to(dtype)


@op(flops=0, axes=reshaped, cut=Cut.sized)
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """x in another shape; shape follows ONNX with allowzero=1 (an axis of -1 is inferred)."""
    return x.reshape([int(n) for n in shape])


@op(flops=0, axes=reshaped)
def squeeze(x: Tensor, *, axes: tuple[int, ...] = ()) -> Tensor:
    """x without these axes, each of size 1."""
    return x.squeeze(axes)


@op(flops=0, axes=reshaped)
def unsqueeze(x: Tensor, *, axes: tuple[int, ...] = ()) -> Tensor:
    """x with axes of size 1, which have these numbers in the result."""
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose_axes(node: NodeAxes) -> None:
    for axis, source in enumerate(node.attributes["perm"]):
        node.same(node.x, source, node.y, axis)


@op(flops=0, axes=_transpose_axes)
def transpose(x: Tensor, *, perm: tuple[int, ...] = ()) -> Tensor:
    """Axes in the order perm."""
    return x.permute(perm)


def _slice_axes(node: NodeAxes) -> None:
    axis = node.attributes["axis"] % node.rank(node.x)
    positions = node.positions(node.x, axis)
    part = slice(node.attributes["start"], node.attributes["end"])
    taken(node, node.y, axis, None if positions is None else positions[part])


def _slice_cut(cut: Cut, node: NodeAxes) -> list[Value]:
    axis = node.attributes["axis"] % node.rank(node.x)
    return [cut.part(node, node.x, axis, slice(node.attributes["start"], node.attributes["end"]))]


@op(flops=0, axes=_slice_axes, cut=_slice_cut)
def slice_(x: Tensor, *, axis: int = 0, start: int = 0, end: int = 0) -> Tensor:
    """The entries start <= i < end along axis."""
    return x.narrow(axis, start, end - start)


def _concat_axes(node: NodeAxes) -> None:
    joined(node, node.attributes["axis"])


@op(flops=0, axes=_concat_axes)
def concat(*values: Tensor, axis: int = 0) -> Tensor:
    """One or more values of one dtype, joined along axis; their other axes are equal."""
    return torch.cat(values, axis)


def _pad_axes(node: NodeAxes) -> None:
    padded(node, trailing_sides(node, node.attributes["padding"]))


def _pad_cut(cut: Cut, node: NodeAxes) -> list[Value]:
    sides = cut.sides(node, trailing_sides(node, node.attributes["padding"])).values()
    return cut.same(node, padding=(*(begin for begin, _ in sides), *(end for _, end in sides)))


@op(flops=0, axes=_pad_axes, cut=_pad_cut)
def pad(x: Tensor, *, padding: tuple[int, ...] = (), value: float = 0.0) -> Tensor:
    """x with `value` around its trailing axes.

    padding is (begin of each axis ..., end of each axis ...), negative where it crops.
    """
    rank = len(padding) // 2
    sides = [side for axis in reversed(range(rank)) for side in (padding[axis], padding[rank + axis])]
    return F.pad(x, sides, value=value)
