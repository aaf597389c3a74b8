"""Weights that stay in files, for models larger than memory.

A weight is mapped again at each reading, and no mapping is kept: when the tensor that was read dies, its pages leave
memory. What a graph adds to such a model goes to a file too.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from graphopt import writing
from graphopt.dialects.silence import quiet
from graphopt.ir import cost

SMALL = 2**16
"""Bytes up to which a weight is held in memory, as a mapping of its own would cost more than it saves."""

INSIDE = 2**31 - 2**24
"""Bytes of weights that fit a model's own file (protobuf's limit, less room for the graph)."""

INLINE = 2**10
"""Bytes up to which a weight is stored in the model's own file, also where the others lie in a file beside it."""

_ALIGNMENT = 64
"""Bytes to which weights are aligned in a file: the widest registers that engines read a mapped weight with."""
_WITHOUT_BYTES = (ir.DataType.STRING, ir.DataType.UNDEFINED)


class WeightFile:
    """A file of weights, held open: it stays readable when it is removed, or another file takes its name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, offset: int, dtype: ir.DataType, shape: ir.Shape) -> ir.TensorProtocol:
        """A tensor over a mapping of its own, which is closed when the array dies."""
        size = int(np.prod(shape.numpy(), dtype=np.int64))
        length = -(-size * dtype.bitwidth // 8)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self.file.fileno(), offset - start + length, access=mmap.ACCESS_READ, offset=start)
        array = np.frombuffer(mapped, np.uint8, length, offset - start)
        if dtype.bitwidth < 8:
            return ir.PackedTensor(array, dtype, shape=shape)
        typed = array.view(dtype.numpy()).reshape(shape.numpy())
        return ir.Tensor(np.require(typed, requirements="A"), dtype=dtype)  # a file may hold it at an odd place


class FileTensor(ir.LazyTensor):
    """A tensor whose bytes lie in a file; each reading is `WeightFile.read`."""

    def __init__(self, source: WeightFile, offset: int, dtype: ir.DataType, shape: ir.Shape, name: str | None) -> None:
        super().__init__(partial(source.read, offset, dtype, shape), dtype, shape, name=name)


class SpilledTensor(FileTensor):
    """A tensor that a graph added, and that was written to a `Scratch`."""


class Scratch(WeightFile):
    """A nameless temporary file for the weights that a graph adds. It is gone with the last graph that reads it, and
    after a crash."""

    def __init__(self) -> None:
        super().__init__(tempfile.TemporaryFile(prefix="graphopt-"))  # noqa: SIM115  # open as long as it is read

    def store(self, tensor: ir.TensorProtocol) -> SpilledTensor:
        """Write a tensor to the file, and return a tensor that reads it from there.

        Raises OSError, naming the folder, where the disk is full.
        """
        with no_room("the weights of a large model"):
            offset = append(self.file, tensor)
            self.file.flush()
        return_freed_memory()
        return SpilledTensor(self, offset, tensor.dtype, ir.Shape(tensor.shape.numpy()), tensor.name)


@contextmanager
def no_room(what: str) -> Iterator[None]:
    """Within the block, an OSError of a full disk says what there is no room for, and names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = tempfile.gettempdir()
        reason = f"no room for {what} in {folder}; set TMPDIR to a folder on a larger disk"
        raise OSError(errno.ENOSPC, reason) from error


def return_freed_memory() -> None:
    """Let the C library return freed memory to the system.

    glibc keeps freed blocks of up to 32 MB that lie below any live one: over many layers, more than a gigabyte.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def append(file: BinaryIO, tensor: ir.TensorProtocol) -> int:
    """Write a tensor's bytes at the end of a file, and return their offset. Only this tensor is in memory."""
    end = file.seek(0, 2)
    offset = file.seek(-(-end // _ALIGNMENT) * _ALIGNMENT)
    array = tensor.numpy() if tensor.dtype.bitwidth >= 8 else None
    file.write(tensor.tobytes() if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return offset


def open_weights(model: ir.Model, folder: Path) -> None:
    """Make a parsed model read its external tensors from the files in its folder; small ones are read now."""
    files: dict[Path, WeightFile] = {}

    def opened(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        path = folder / tensor.location
        if path not in files:
            files[path] = WeightFile(path.open("rb"))
        source, offset = files[path], tensor.offset or 0
        if tensor.size == 0:
            return ir.Tensor(np.empty(tensor.shape.numpy(), tensor.dtype.numpy()), tensor.dtype, name=tensor.name)
        if tensor.nbytes > SMALL:
            return FileTensor(source, offset, tensor.dtype, tensor.shape, tensor.name)
        return ir.Tensor(source.read(offset, tensor.dtype, tensor.shape).numpy().copy(), tensor.dtype, name=tensor.name)

    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = opened(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type is ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, opened(attribute.value))


def scratch_for(model: ir.Model) -> Scratch | None:
    """A file for the weights that will be added, for a model with more than `cost.LARGE` bytes in files; else None."""
    held = (value.const_value for value in model.graph.initializers.values())
    outside = sum(tensor.nbytes for tensor in held if isinstance(tensor, FileTensor))
    return Scratch() if outside > cost.LARGE else None


def size(model: ir.Model) -> int:
    """The bytes of a model's weights."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def is_spilled(model: ir.Model) -> bool:
    """Whether a model holds weights that were added and are too large to be held in memory."""
    return any(isinstance(value.const_value, SpilledTensor) for value in model.graph.initializers.values())


def save(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Write a model. external_data: put its weights in a file beside it, one after the other, which is named by its
    content (`writing.data_name`)."""
    stored = model.graph.initializers.values()
    held = {value: tensor for value in stored if (tensor := value.const_value) is not None}
    outside = [(value, tensor) for value, tensor in held.items() if external_data and _is_outside(tensor)]
    try:
        if outside:
            written = path.with_name(".weights")
            with written.open("wb") as file:
                offsets = [append(file, tensor) for _, tensor in outside]
            data = writing.data_name(path.name, writing.digest_of(written))
            written.replace(path.with_name(data))
            for (value, tensor), offset in zip(outside, offsets, strict=True):
                name, shape = value.name or "", ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(data, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)
        with quiet("onnx_ir"):  # which warns of shapes without a type
            ir.save(model, path)
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def _is_outside(tensor: ir.TensorProtocol) -> bool:
    """Whether a weight goes to the file beside the model, where there is one."""
    return tensor.nbytes > INLINE and tensor.dtype not in _WITHOUT_BYTES
