"""Operators of ONNX that move, pick, place or make entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.onnx.interpreter.call import Call, Form, Size, numbers

# --- shapes --------------------------------------------------------------------------------------------------------


def _reshape(call: Call) -> Tensor:
    """Where a size of 0 copies that of x."""
    x, sizes = call[0], call.listed("shape", 1) or []
    if not call.attribute("allowzero", 0):
        sizes = [x.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: Call) -> Tensor:
    x, axis = call[0], call.attribute("axis", 1)
    axis = axis if axis >= 0 else axis + x.dim()
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(axis).flatten(0, axis - 1) if axis < x.dim() else x.reshape(-1, 1)


def squeeze(call: Call) -> Tensor:
    x, axes = call[0], call.listed("axes", 1)
    if not axes:
        return x.squeeze()
    for axis in axes:
        if x.shape[axis] != 1:  # torch would leave it
            raise call.refused(f"axis {axis} is not of size 1")
    return x.squeeze(axes)


def _unsqueeze(call: Call) -> Tensor:
    x, axes = call[0], call.listed("axes", 1) or []
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call) -> Tensor:
    x = call[0]
    return x.permute(call.attribute("perm", tuple(reversed(range(x.dim())))))


def _expand(call: Call) -> Tensor:
    """Both broadcast: an axis of 1 in either takes the size of the other."""
    x, sizes = call[0], call.required_numbers(1)
    missing = len(sizes) - x.dim()
    if missing < 0:
        sizes, missing = [1] * -missing + sizes, 0
    own = [1] * missing + list(x.shape)
    return x.expand([known if isinstance(size, int) and size == 1 else size
                     for known, size in zip(own, sizes, strict=True)])  # fmt: skip


def _tile(call: Call) -> Tensor:
    return call[0].repeat(call.required_numbers(1))


def _concat(call: Call) -> Tensor:
    return torch.cat(call.tensors(), call.attribute("axis", 1))


def _split(call: Call) -> tuple[Tensor, ...]:
    x, axis, sizes = call[0], call.attribute("axis", 0), call.listed("split", 1)
    if sizes is None:
        parts = call.attribute("num_outputs", call.results)
        whole = -(-x.shape[axis] // parts)  # the last may be smaller
        sizes = [whole] * (parts - 1) + [x.shape[axis] - whole * (parts - 1)]
    return tuple(torch.split(x, sizes, axis))


def _depth_to_space(call: Call) -> Tensor:
    x, size = call[0], call.attributes["blocksize"]
    batch, depth, height, width = x.shape
    if call.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    x = x.reshape(batch, size, size, depth // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, depth // size**2, height * size, width * size)


def _space_to_depth(call: Call) -> Tensor:
    x, size = call[0], call.attributes["blocksize"]
    batch, depth, height, width = x.shape
    x = x.reshape(batch, depth, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, depth * size**2, height // size, width // size)


# --- picking -------------------------------------------------------------------------------------------------------


def _gather(call: Call) -> Tensor:
    x, axis = call[0], call.attribute("axis", 0) % call[0].dim()
    known = call.stored[1]
    if known is not None and known.array.ndim == 0:
        return x.select(axis, known.array.item())
    return _picked(x, [None] * axis + [call[1].long()])


def _picked(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """The entries at these indices along the leading axes, None taking all: as indexing, without its full slices."""
    picked: Tensor = torch.ops.aten.index.Tensor(x, indices)
    return picked


def part(x: Tensor, axis: int, start: Size, end: Size, step: int = 1) -> Tensor:
    """x[start:end:step] along an axis, without the full slices along others."""
    sliced: Tensor = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return sliced


def _from_start(indices: Tensor, size: Size) -> Tensor:
    """Indices without negative ones, which count from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather_elements(call: Call) -> Tensor:
    x, axis = call[0], call.attribute("axis", 0)
    return x.gather(axis, _from_start(call[1], x.shape[axis]))


def _gather_nd(call: Call) -> Tensor:
    x, indices, shared = call[0], call[1].long(), call.attribute("batch_dims", 0)
    rows = []
    for axis in range(shared):
        places = torch.arange(x.shape[axis])
        rows.append(places.reshape([-1 if i == axis else 1 for i in range(indices.dim() - 1)]))
    return _picked(x, [*rows, *indices.unbind(-1)])


def _slice(call: Call) -> Tensor:
    x = call[0]
    starts, ends = call.listed("starts", 1) or [], call.listed("ends", 2) or []
    axes = call.listed("axes", 3) or list(range(len(starts)))
    steps = call.numbers(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.dim()
        if step > 0:
            x = part(x, axis, start, end, step)
            continue
        size = x.shape[axis]
        if not isinstance(size, int):
            if start not in (-1, _LAST) or end > -_LAST or step != -1:
                raise call.refused("it goes backwards along a dynamic axis, and not over the whole of it")
            x = x.flip(axis)
            continue
        places = list(range(size))[max(start, -size) : end : step]
        x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


_LAST = 2**31 - 1
"""From here on, an end is beyond any axis."""


def _one_hot(call: Call) -> Tensor:
    indices, depth, values = call[0].long(), call.required_numbers(1)[0], call[2]
    axis = call.attribute("axis", -1) % (indices.dim() + 1)
    places = torch.arange(int(depth)).reshape([-1 if i == axis else 1 for i in range(indices.dim() + 1)])
    return torch.where(_from_start(indices, int(depth)).unsqueeze(axis) == places, values[1], values[0])


def _reverse_sequence(call: Call) -> Tensor:
    x, lengths = call[0], call[1]
    batch, time = call.attribute("batch_axis", 1), call.attribute("time_axis", 0)

    def along(values: Tensor, axis: int) -> Tensor:
        return values.reshape([-1 if i == axis else 1 for i in range(x.dim())])

    places, ends = along(torch.arange(x.shape[time]), time), along(lengths, batch)
    return x.gather(time, torch.where(places < ends, ends - 1 - places, places).expand(x.shape))


# --- placing -------------------------------------------------------------------------------------------------------


def _scatter_elements(call: Call) -> Tensor:
    x, updates, axis = call[0], call[2], call.attribute("axis", 0)
    indices, how = _from_start(call[1], x.shape[axis]), call.attribute("reduction", "none")
    if how == "none":
        return x.scatter(axis, indices, updates)
    name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[how]
    return x.scatter_reduce(axis, indices, updates, name)


def _scatter_nd(call: Call) -> Tensor:
    places = call[1].long().unbind(-1)
    return call[0].index_put(places, call[2], accumulate=call.attribute("reduction", "none") == "add")


def _triangle(call: Call) -> Tensor:
    offset = (call.numbers(1) or [0])[0]
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call[0], offset)


# --- around --------------------------------------------------------------------------------------------------------


def _pad(call: Call) -> Tensor:
    x, sides = call[0], call.listed("pads", 1) or []
    axes = [axis % x.dim() for axis in call.numbers(3) or range(x.dim())]
    around = {axis: (sides[index], sides[index + len(axes)]) for index, axis in enumerate(axes)}
    around = {axis: pads for axis, pads in around.items() if pads != (0, 0)}
    mode = call.attribute("mode", "constant")
    if mode == "constant":
        value = call.attributes["value"] if "value" in call.attributes else (call.numbers(2) or [0])[0]
        return F.pad(x, _in_order_of_torch(x, around, 0), value=value)
    first = min(around, default=x.dim())
    if around and x.dim() - first <= 3 and first in (1, 2) and all(side >= 0 for pads in around.values()
                                                                  for side in pads):  # fmt: skip
        names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
        return F.pad(x, _in_order_of_torch(x, around, first), names[mode])
    for axis, (begin, end) in around.items():
        size = x.shape[axis]
        places = torch.arange(-begin, size + end)
        x = x.index_select(axis, _PLACES[mode](places, size))
    return x


def _in_order_of_torch(x: Tensor, around: dict[int, tuple[Size, Size]], first: int) -> list[Size]:
    """Pads of the axes from `first` on, the last one first."""
    return [side for axis in reversed(range(first, x.dim())) for side in around.get(axis, (0, 0))]


_PLACES: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "reflect": lambda places, size: (size - 1) - ((size - 1) - places.abs()).abs(),
    "edge": lambda places, size: places.clamp(min=0).clamp(max=size - 1),
    "wrap": lambda places, size: places % size,
}
"""By mode, where the entries around an axis come from."""


# --- making --------------------------------------------------------------------------------------------------------


def _constant_of_shape(call: Call) -> Tensor:
    value = call.attribute("value", numbers(0.0, torch.float32))
    return torch.full(call.required_numbers(0), value.array.item(), dtype=value.dtype)


def _range(call: Call) -> Tensor:
    start, limit, step = (call.required_numbers(index)[0] for index in range(3))
    value = call.given[0]
    assert value is not None  # required_numbers has read it
    return torch.arange(start, limit, step, dtype=value.dtype)


def _eye_like(call: Call) -> Tensor:
    rows, columns = call[0].shape
    dtype = call.attributes.get("dtype", call[0].dtype)
    places = torch.arange(columns) - torch.arange(rows).unsqueeze(1)
    return (places == call.attribute("k", 0)).to(dtype)


FORMS: dict[str, Form] = {
    "onnx.Concat": Form(_concat),
    "onnx.ConstantOfShape": Form(_constant_of_shape),
    "onnx.DepthToSpace": Form(_depth_to_space),
    "onnx.Expand": Form(_expand),
    "onnx.EyeLike": Form(_eye_like),
    "onnx.Flatten": Form(_flatten),
    "onnx.Gather": Form(_gather, weights={0: "weight"}),
    "onnx.GatherElements": Form(_gather_elements),
    "onnx.GatherND": Form(_gather_nd),
    "onnx.OneHot": Form(_one_hot),
    "onnx.Pad": Form(_pad),
    "onnx.Range": Form(_range),
    "onnx.Reshape": Form(_reshape),
    "onnx.ReverseSequence": Form(_reverse_sequence),
    "onnx.Scatter": Form(_scatter_elements),
    "onnx.ScatterElements": Form(_scatter_elements),
    "onnx.ScatterND": Form(_scatter_nd, only={"reduction": ("none", "add")}),
    "onnx.Slice": Form(_slice),
    "onnx.SpaceToDepth": Form(_space_to_depth),
    "onnx.Split": Form(_split),
    "onnx.Squeeze": Form(squeeze),
    "onnx.Tile": Form(_tile),
    "onnx.Transpose": Form(_transpose),
    "onnx.Trilu": Form(_triangle),
    "onnx.Unsqueeze": Form(_unsqueeze),
}
