"""Operators written out in older ones, for opsets that do not have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.dialects.onnx.tensors import FLOATS
from graphopt.errors import SpellingError
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder

Operands = Sequence[Value | None]
Attributes = Mapping[str, Any]
WriteOut = Callable[[Builder, Operands, Attributes, int], Sequence[Value]]
"""Of a node: its operands, its attributes as they stand, and the opset that it is of. Gives its results."""


def _required(operands: Operands, index: int) -> Value:
    value = operands[index]
    assert value is not None  # as the op requires it
    return value


def _number(op: Builder, number: float, like: Value) -> Value:
    return op.constant(torch.tensor(number, dtype=like.dtype or torch.float32))


def _numbers(op: Builder, *numbers: int) -> Value:
    return op.constant(torch.tensor(numbers, dtype=torch.int64))


# --- canonical ops -------------------------------------------------------------------------------------------------


def _gelu(op: Builder, operands: Operands, attributes: Attributes) -> Value:
    x = _required(operands, 0)
    half, one = _number(op, 0.5, x), _number(op, 1.0, x)
    if attributes["approximate"] == "tanh":
        cubic = op.add(x, op.mul(op.mul(x, op.mul(x, x)), _number(op, 0.044715, x)))
        inner = op.tanh(op.mul(cubic, _number(op, math.sqrt(2 / math.pi), x)))
    else:
        inner = op.erf(op.div(x, _number(op, math.sqrt(2), x)))
    return op.mul(op.mul(x, half), op.add(inner, one))


def _rms_norm(op: Builder, operands: Operands, attributes: Attributes) -> Value:
    x, weight = _required(operands, 0), _required(operands, 1)
    axes = tuple(range(-(weight.rank or 1), 0))
    square = op.mean(op.mul(x, x), axes=axes, keepdim=True)
    return op.mul(op.div(x, op.sqrt(op.add(square, _number(op, attributes["eps"], x)))), weight)


def _layer_norm(op: Builder, operands: Operands, attributes: Attributes) -> Value:
    x, weight, bias = (*operands, None)[:3]
    assert x is not None and weight is not None
    axes = tuple(range(-(weight.rank or 1), 0))
    centred = op.sub(x, op.mean(x, axes=axes, keepdim=True))
    variance = op.mean(op.mul(centred, centred), axes=axes, keepdim=True)
    scaled = op.mul(op.div(centred, op.sqrt(op.add(variance, _number(op, attributes["eps"], x)))), weight)
    return scaled if bias is None else op.add(scaled, bias)


def _softmax(op: Builder, operands: Operands, attributes: Attributes) -> Value:
    """Along any axis, by the softmax along the last one."""
    return _along_last(op, _required(operands, 0), attributes["axis"], lambda x: op.softmax(x, axis=-1))


def _along_last(op: Builder, x: Value, axis: int, compute: Callable[[Value], Value]) -> Value:
    perm = list(range(_rank(x, "a softmax")))
    perm[axis], perm[-1] = perm[-1], perm[axis]
    return op.transpose(compute(op.transpose(x, perm=tuple(perm))), perm=tuple(perm))


def _rank(x: Value, reader: str) -> int:
    if x.rank is None:
        raise SpellingError(f"the rank of what {reader} reads is not known")
    return x.rank


def _attention(op: Builder, operands: Operands, attributes: Attributes) -> Value:
    """softmax(q kᵀ · scale + mask) v, heads split and joined where they come together."""
    query, key, value = (_required(operands, index) for index in range(3))
    mask = operands[3] if len(operands) > 3 else None
    heads, kv_heads = attributes["heads"], attributes["kv_heads"]
    if heads:
        query, key, value = _split(op, query, heads), _split(op, key, kv_heads), _split(op, value, kv_heads)
    if query.shape is None:
        raise SpellingError("the heads of attention are not known")
    key, value = (_repeated(op, each, query.shape[1]) for each in (key, value))
    size = query.shape[-1]
    scale = attributes["scale"] or (1 / math.sqrt(size) if isinstance(size, int) else None)
    if scale is None:
        raise SpellingError("the head size of attention is not known, so its scale is not")
    scores = op.matmul(op.mul(query, _number(op, scale, query)), op.transpose(key, perm=(0, 1, 3, 2)))
    if mask is not None and mask.dtype is torch.bool:
        lowest = _number(op, torch.finfo(query.dtype or torch.float32).min, query)
        mask = op.where(mask, _number(op, 0.0, query), lowest)
    for added in (mask, _later_keys(op, scores) if attributes["causal"] else None):
        scores = scores if added is None else op.add(scores, added)
    weights = op.softmax(scores, axis=-1)
    context = op.matmul(weights, value)
    if not heads:
        return context
    joined = op.transpose(context, perm=(0, 2, 1, 3))
    return op("onnx.Reshape", joined, _numbers(op, 0, 0, -1))


def _split(op: Builder, x: Value, heads: int) -> Value:
    width = x.shape[-1] if x.shape is not None else None
    size = width // heads if isinstance(width, int) else -1
    split = op("onnx.Reshape", x, _numbers(op, 0, 0, heads, size))
    return op.transpose(split, perm=(0, 2, 1, 3))


def _repeated(op: Builder, x: Value, heads: int | str) -> Value:
    """Keys or values (batch, kv heads, length, size), each head repeated for the queries that share it."""
    shape = x.shape or ("?",) * 4
    if shape[1] == heads and heads != "?":
        return x
    given, size = shape[1], shape[3]
    if not (isinstance(heads, int) and isinstance(given, int) and isinstance(size, int)):
        raise SpellingError("the heads of attention, or their size, are not known")
    spread = op("onnx.Expand", op.unsqueeze(x, axes=(2,)), _numbers(op, 1, 1, heads // given, 1, 1))
    return op("onnx.Reshape", spread, _numbers(op, 0, heads, -1, size))


def _later_keys(op: Builder, scores: Value) -> Value:
    """(queries, keys): the lowest number for keys after their query, else 0; engines fold it where sizes are fixed."""
    dtype = scores.dtype or torch.float32
    sizes = op("onnx.Slice", op("onnx.Shape", scores), _numbers(op, 2), _numbers(op, 4))
    lowest = op("onnx.ConstantOfShape", sizes, value=torch.tensor([torch.finfo(dtype).min], dtype=dtype))
    one = op.constant(torch.tensor(1))
    try:
        return op("onnx.Trilu", lowest, one, upper=1)
    except SpellingError:
        return _triangle(op, lowest, one, upper=True)


def _rotary(op: Builder, operands: Operands, attributes: Attributes) -> Value:
    """a · cos - b · sin and b · cos + a · sin of the pairs (a, b), heads split and joined where they come together."""
    x, cos, sin = (_required(operands, index) for index in range(3))
    heads, pairs = attributes["heads"], cos.shape[-1] if cos.shape is not None else None
    x = _split(op, x, heads) if heads else x
    size = x.shape[-1] if x.shape is not None else None
    if not isinstance(size, int) or not isinstance(pairs, int):
        raise SpellingError("the size of a head that rotary turns, or how much of it, is not known")
    cos, sin = (op.unsqueeze(value, axes=(1,)) for value in (cos, sin))
    turned = op.slice(x, axis=3, start=0, end=2 * pairs)
    if attributes["interleaved"]:
        apart = op("onnx.Reshape", turned, _numbers(op, 0, 0, 0, pairs, 2))
        a, b = (op.squeeze(op.slice(apart, axis=4, start=i, end=i + 1), axes=(4,)) for i in range(2))
    else:
        a, b = (op.slice(turned, axis=3, start=i * pairs, end=(i + 1) * pairs) for i in range(2))
    parts = [op.sub(op.mul(a, cos), op.mul(b, sin)), op.add(op.mul(b, cos), op.mul(a, sin))]
    if attributes["interleaved"]:
        together = op.concat(*(op.unsqueeze(part, axes=(4,)) for part in parts), axis=4)
        parts = [op("onnx.Reshape", together, _numbers(op, 0, 0, 0, 2 * pairs))]
    rest = [op.slice(x, axis=3, start=2 * pairs, end=size)] if size > 2 * pairs else []
    y = op.concat(*parts, *rest, axis=3)
    if not heads:
        return y
    return op("onnx.Reshape", op.transpose(y, perm=(0, 2, 1, 3)), _numbers(op, 0, 0, heads * size))


OPS: Mapping[str, Callable[[Builder, Operands, Attributes], Value]] = {
    "gelu": _gelu,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "attention": _attention,
    "rotary": _rotary,
}
"""By op, what writes it out where the opset has no operator for it. Each raises SpellingError where it cannot."""


# --- other operators -----------------------------------------------------------------------------------------------


def _mish(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
    """x · tanh(log(1 + exp(x))) (Misra, 2019)."""
    x = _required(operands, 0)
    return (op.mul(x, op.tanh(op("onnx.Softplus", x))),)


def _softmaxes(op_type: str) -> WriteOut:
    """Softmax, LogSoftmax or Hardmax: before opset 13 over all axes from one on, and from 13 on over one."""

    def write_out(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
        x = _required(operands, 0)
        axis = attributes.get("axis", 1 if source < 13 else -1)
        if source >= 13:
            return (_along_last(op, x, axis, lambda value: op(op_type, value, axis=-1)),)
        if axis < 0:
            axis += _rank(x, op_type)
        rows = op(op_type, op("onnx.Flatten", x, axis=axis), axis=-1)
        return (op("onnx.Reshape", rows, op("onnx.Shape", x)),)

    return write_out


def _reduction(op_type: str) -> WriteOut:
    """Axes were attributes before opset 18, those of ReduceSum before 13."""

    def write_out(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
        x, axes = (*operands, None)[:2]
        listed = attributes.get("axes") if axes is None else _integers(op, axes)
        if listed is None and axes is not None:
            raise SpellingError(f"the axes of {op_type} are computed")
        kept = {"keepdims": attributes.get("keepdims", 1)}
        if not listed:
            return (op.identity(x) if attributes.get("noop_with_empty_axes") else op(op_type, x, **kept),)
        try:
            return (op(op_type, x, axes=list(listed), **kept),)
        except SpellingError:
            return (op(op_type, x, _numbers(op, *listed), **kept),)

    return write_out


def _split_axis(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
    """Split: its sizes were an attribute before opset 13; from 18 on it states the number of equal parts."""
    x, sizes = (*operands, None)[:2]
    assert x is not None
    axis, count = attributes.get("axis", 0), len(op.at.results)
    listed = attributes.get("split") if sizes is None else _integers(op, sizes)
    if listed is None and sizes is None:
        listed = _parts((x.shape or ())[axis:][:1], count, "num_outputs" in attributes)
    if listed is None:
        raise SpellingError("the sizes of the parts of Split are not known")
    try:
        return op.graph.emit_all("onnx.Split", x, _numbers(op, *listed), at=op.at, axis=axis, _outputs=count)
    except SpellingError:
        return op.graph.emit_all("onnx.Split", x, at=op.at, axis=axis, split=list(listed), _outputs=count)


def _parts(size: Sequence[int | str], count: int, uneven: bool) -> list[int] | None:
    """The sizes of `count` equal parts of an axis; None where its size is not known, or is no multiple of them.

    uneven: whether the last part may be smaller.
    """
    if not size or not isinstance(size[0], int) or (size[0] % count and not uneven):
        return None
    part = -(-size[0] // count)
    return [*[part] * (count - 1), size[0] - part * (count - 1)]


def _integers(op: Builder, value: Value) -> list[int] | None:
    tensor = op.graph.constant(value)
    return None if tensor is None else tensor.flatten().tolist()


def _resize(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
    """Before opset 13 the region and the scales are no optional inputs: they are empty where they say nothing."""
    if source < 11:
        return _upsample(op, operands, attributes, source)
    x, *others = operands
    empty = op.constant(torch.zeros(0))
    region, scales, *sizes = (*others, None, None)[: max(len(others), 2)]
    return (op("onnx.Resize", x, region or empty, scales or empty, *sizes, **attributes),)


def _upsample(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
    """Before opset 11 places are those of the input, scaled, and the nearest one is that before."""
    x = _required(operands, 0)
    scales = operands[1] if len(operands) > 1 else op.constant(torch.tensor(attributes["scales"]))
    return (op("onnx.Resize", x, op.constant(torch.zeros(0)), scales, mode=attributes.get("mode", "nearest"),
               coordinate_transformation_mode="asymmetric", nearest_mode="floor"),)  # fmt: skip


def _group_norm(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
    """Each group of channels normalized as one channel, then scaled by channels, as from opset 21 on."""
    x, scale, bias = (_required(operands, index) for index in range(3))
    if source < 21:
        raise SpellingError("GroupNormalization has a scale for each group before opset 21, and for each channel since")
    groups, places = attributes["num_groups"], tuple(range(1, _rank(x, "GroupNormalization") - 1))
    grouped = op("onnx.Reshape", x, _numbers(op, 0, groups, -1))
    units = (op.constant(torch.full((groups,), number, dtype=x.dtype)) for number in (1.0, 0.0))
    normal = op("onnx.InstanceNormalization", grouped, *units, epsilon=attributes.get("epsilon", 1e-5))
    back = op("onnx.Reshape", normal, op("onnx.Shape", x))
    scale, bias = (op.unsqueeze(each, axes=places) for each in (scale, bias))
    return (op.add(op.mul(back, scale), bias),)


def _trilu(op: Builder, operands: Operands, attributes: Attributes, source: int) -> Sequence[Value]:
    x, shift = (*operands, None)[:2]
    assert x is not None
    return (_triangle(op, x, shift or op.constant(torch.tensor(0)), upper=bool(attributes.get("upper", 1))),)


def _triangle(op: Builder, x: Value, shift: Value, upper: bool) -> Value:
    """The entries of matrices on and above (or below) a diagonal, and zeros elsewhere. shift: of the diagonal."""
    if x.dtype not in FLOATS:
        raise SpellingError("Trilu is not in this opset, and is written out for floats only")
    rows, columns = (_counted(op, x, axis) for axis in (-2, -1))
    distance = op.sub(op.sub(columns, op.unsqueeze(rows, axes=(1,))), shift)  # of each entry from the diagonal
    zero = op.constant(torch.tensor(0))
    outside = op("onnx.Less", *((distance, zero) if upper else (zero, distance)))
    return op.where(outside, _number(op, 0.0, x), x)


def _counted(op: Builder, x: Value, axis: int) -> Value:
    """0, 1, 2, ... along an axis of x."""
    zero, one = op.constant(torch.tensor(0)), op.constant(torch.tensor(1))
    size = op("onnx.Gather", op("onnx.Shape", x), op.constant(torch.tensor(axis)), axis=0)
    return op("onnx.Range", zero, size, one)


OPERATORS: Mapping[str, WriteOut] = {
    "Mish": _mish,
    "Softmax": _softmaxes("onnx.Softmax"),
    "LogSoftmax": _softmaxes("onnx.LogSoftmax"),
    "Hardmax": _softmaxes("onnx.Hardmax"),
    "Trilu": _trilu,
    "Resize": _resize,
    "Upsample": _upsample,
    "GroupNormalization": _group_norm,
    "Split": _split_axis,
    **{f"Reduce{name}": _reduction(f"onnx.Reduce{name}")
       for name in ("Max", "Min", "Sum", "Prod", "Mean", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")},
}  # fmt: skip
"""By operator, what writes a node of an opset (the last argument) in operators of the graph's own opset."""
