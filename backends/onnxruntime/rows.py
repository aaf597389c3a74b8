"""Kernels for matrices in graphs with more axes: all axes but the last become rows, and are restored afterwards."""

from __future__ import annotations

import onnx_ir as ir
import torch

from graphopt.dialects.onnx.graph import OnnxValue
from graphopt.dialects.onnx.tensors import onnx_dtype
from graphopt.ir.graph import Shape, Value
from graphopt.ir.rewrite import Builder


def to_rows(op: Builder, x: Value, width: int) -> Value:
    """x as a matrix (rows, width). width: of the last axis of x."""
    return x if x.rank == 2 else op("onnx.Reshape", x, op.constant(torch.tensor([-1, width])))


def from_rows(op: Builder, product: Value, x: Value, width: int) -> Value:
    """A matrix (rows, width) that was computed from `to_rows` of x, with the axes of x before its last one."""
    return product if x.rank == 2 else op("onnx.Reshape", product, _shape(op, x, width))


def open_axes(x: Value) -> int:
    """How many axes of x before its last one have no fixed size."""
    return sum(not isinstance(axis, int) for axis in (x.shape or ())[:-1])


def with_shape(value: Value, shape: Shape | None, dtype: torch.dtype | None = None) -> Value:
    """The value, stated to have a shape, and a dtype, that inference does not find."""
    assert isinstance(value, OnnxValue)
    value.native.shape = None if shape is None else ir.Shape([None if size == "?" else size for size in shape])
    if dtype is not None:
        value.native.type = ir.TensorType(onnx_dtype(dtype))
    return value


def _shape(op: Builder, x: Value, width: int) -> Value:
    """The shape of x with another last axis: a constant where at most one axis is open, else computed once."""
    axes: Shape = (*x.shape[:-1], width)  # type: ignore[index]
    if open_axes(x) < 2:
        return op.constant(torch.tensor([axis if isinstance(axis, int) else -1 for axis in axes]))

    def computed() -> Value:
        leading = op("onnx.Shape", x, start=0, end=len(axes) - 1)
        return op.concat(leading, op.constant(torch.tensor([width])), axis=0)

    return computed() if "?" in axes else op.once(("shape of rows", axes), computed)
