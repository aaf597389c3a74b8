"""Tensors and element types between ONNX, numpy and torch, without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from graphopt.errors import GraphError
from graphopt.ir.untouched import Untouched
from graphopt.numerics import quantize

TORCH_DTYPES: dict[ir.DataType, torch.dtype] = {
    from_torch_dtype(dtype): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.uint16,
        torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool,
    )
}  # fmt: skip
"""The element types that graphopt reads and writes; onnx-ir knows more (float8, complex)."""

NARROW = {
    ir.DataType.INT4: torch.int8, ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8, ir.DataType.UINT2: torch.uint8,
}  # fmt: skip
"""Integers of less than a byte, which are stored packed, and the dtype that holds each of them unpacked."""
READABLE: dict[ir.DataType, torch.dtype] = TORCH_DTYPES | NARROW


def packed(tensor: Tensor, bits: int, name: str) -> ir.PackedTensor[np.ndarray[Any, Any]]:
    """Integers (int8 or uint8) of 2 or 4 bits as an ONNX tensor: INT2, UINT2, INT4 or UINT4."""
    signed = "" if tensor.dtype is torch.int8 else "U"
    held = quantize.pack(torch.bitwise_and(tensor, 2**bits - 1).to(torch.uint8).flatten(), bits)
    return ir.PackedTensor(to_numpy(held), ir.DataType[f"{signed}INT{bits}"], shape=tensor.shape, name=name)


def transposed(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """A matrix transposed, which is made each time that it is read."""

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name)

    rows, columns = tensor.shape.numpy()
    return ir.LazyTensor(made, tensor.dtype, ir.Shape((columns, rows)), name=name)


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type; GraphError where there is none."""
    if dtype not in TORCH_DTYPES.values():
        raise GraphError(f"{dtype} has no element type in ONNX that graphopt writes")
    return from_torch_dtype(dtype)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def to_torch(tensor: ir.TensorProtocol | None) -> Tensor | None:
    """The tensor, sharing memory but for packed integers; None for element types that torch does not have."""
    if tensor is None or tensor.dtype not in READABLE:
        return None
    if tensor.dtype in NARROW:
        dtype = NARROW[tensor.dtype]
        return torch.from_numpy(tensor.numpy().astype("int8" if dtype is torch.int8 else "uint8"))
    return array_to_torch(tensor.numpy(), TORCH_DTYPES[tensor.dtype])


def array_to_torch(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """A tensor that shares the memory of a numpy array, also of a read-only, memory-mapped one.

    An array of bfloat16 is viewed by its bits, as torch does not read that dtype of numpy.
    """
    if dtype is torch.bfloat16:
        return array_to_torch(array.view(np.int16), torch.int16).view(torch.bfloat16)
    if array.flags.writeable:
        return torch.from_numpy(array)
    if array.size <= 64:
        return torch.from_numpy(array.copy())
    # torch has no read-only tensors, and from_numpy warns of them; `Graph.constant` forbids writing to them.
    return torch.from_numpy(np.asarray(_Writeable(array)))


class _Writeable:
    """A read-only array, shown as writeable by its address. It lives as long as the last tensor over it, as does its
    mapping."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.owner = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def to_numpy(tensor: Tensor) -> Any:
    """The array of a tensor, row by row; a tensor on the CPU that lies so shares its memory. What stands for something
    else is that, as the engine takes it."""
    if isinstance(tensor, Untouched):
        return tensor.held
    return TorchTensor(tensor.contiguous()).numpy()
