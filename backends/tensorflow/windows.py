"""Convs and pools over windows of (N, *space, C), which is how TensorFlow has them on a CPU.

Padding is (begin of each axis of space ..., end of each axis ...), as the ops have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Sides = Sequence[tuple[Any, Any]]
"""What is added at the begin and at the end of each axis; negative where it is cut off."""


def pad(tf: Any, x: Any, sides: Sides, value: float = 0.0) -> Any:
    """x with `value` around it; numbers or tensors may be negative, where they crop."""
    if all(_is_zero(side) for pair in sides for side in pair):
        return x
    added = [[_at_least(tf, side, 0) for side in pair] for pair in sides]
    if not all(_is_zero(side) for pair in added for side in pair):
        fill = tf.constant(value if x.dtype.is_floating else int(value), x.dtype)
        x = tf.pad(x, added, constant_values=fill)
    if all(isinstance(side, int) and side >= 0 for pair in sides for side in pair):
        return x
    parts = []
    for axis, (begin, end) in enumerate(sides):
        first = 0 - _at_most(tf, begin, 0)
        parts.append(slice(None) if _is_zero(first) and isinstance(end, int) and end >= 0
                     else slice(first, tf.shape(x)[axis] + _at_most(tf, end, 0)))  # fmt: skip
    return x[tuple(parts)]


def _is_zero(side: Any) -> bool:
    return isinstance(side, int) and side == 0


def _at_least(tf: Any, side: Any, bound: int) -> Any:
    return max(side, bound) if isinstance(side, int) else tf.maximum(side, bound)


def _at_most(tf: Any, side: Any, bound: int) -> Any:
    return min(side, bound) if isinstance(side, int) else tf.minimum(side, bound)


def _sides(padding: Sequence[Any], rank: int) -> Sides:
    """Of all axes, of which the first and the last are not padded."""
    begin, end = padding[:rank] or (0,) * rank, padding[rank:] or (0,) * rank
    return [(0, 0), *zip(begin, end, strict=True), (0, 0)]


def size_of(tf: Any, x: Any, axis: int) -> Any:
    """The size of an axis: a number where it is known, else a tensor."""
    known = x.shape[axis]
    return tf.shape(x)[axis] if known is None else known


# --- convs -----------------------------------------------------------------------------------------------------------


def conv(tf: Any, x: Any, weight: Any, bias: Any | None, attributes: Mapping[str, Any]) -> Any:
    """x (N, *space, C), weight (*kernel, C / groups, out) -> (N, *space, out)."""
    rank = weight.shape.rank - 2
    stride, dilation = (list(attributes[name] or (1,) * rank) for name in ("stride", "dilation"))
    sides, groups = _sides(attributes["padding"], rank), attributes["groups"]
    if rank == 1:  # a conv over a plane of height 1
        x, weight = x[:, None], weight[None]
        stride, dilation, sides = [1, *stride], [1, *dilation], [(0, 0), *sides]
    if rank == 3:
        y = _conv3d(tf, pad(tf, x, sides), _dilated(tf, weight, dilation), stride, groups)
    else:
        y = _conv2d(tf, x, weight, stride, dilation, sides, groups)
    if rank == 1:
        y = tf.squeeze(y, [1])
    return y if bias is None else tf.nn.bias_add(y, bias)


def _conv2d(tf: Any, x: Any, weight: Any, stride: list[int], dilation: list[int], sides: Sides, groups: int) -> Any:
    """Padding inside the kernel where it allows that."""
    padding: Any = [list(pair) for pair in sides]
    if not all(isinstance(side, int) and side >= 0 for pair in sides for side in pair):
        x, padding = pad(tf, x, sides), "VALID"
    height, width, inside, outputs = weight.shape
    if inside == 1 and groups > 1 and stride[0] == stride[1] and (stride[0] == 1 or dilation == [1, 1]):
        # TensorFlow 2.21 aborts the process where it fuses a bias into a depthwise conv with padding of its own.
        x = x if padding == "VALID" else pad(tf, x, sides)
        kernel = tf.reshape(weight, [height, width, groups, outputs // groups])
        return tf.nn.depthwise_conv2d(x, kernel, [1, *stride, 1], "VALID", dilations=dilation)
    return tf.nn.conv2d(x, weight, [1, *stride, 1], padding, dilations=[1, *dilation, 1])


def _conv3d(tf: Any, x: Any, weight: Any, stride: list[int], groups: int) -> Any:
    """Group by group, as TensorFlow has no others on a CPU."""
    parts = zip(tf.split(x, groups, -1), tf.split(weight, groups, -1), strict=True)
    found = [tf.nn.conv3d(part, kernel, [1, *stride, 1], "VALID") for part, kernel in parts]
    return found[0] if groups == 1 else tf.concat(found, -1)


def _dilated(tf: Any, weight: Any, dilation: Sequence[int]) -> Any:
    """A kernel with zeros between its entries."""
    for axis, apart in enumerate(dilation):
        if apart > 1:
            size = weight.shape[axis]
            gaps = [[0, apart - 1] if place == axis + 1 else [0, 0] for place in range(weight.shape.rank + 1)]
            spread = tf.pad(tf.expand_dims(weight, axis + 1), gaps)
            shape = [*weight.shape[:axis], size * apart, *weight.shape[axis + 1 :]]
            weight = tf.reshape(spread, shape)[(*[slice(None)] * axis, slice(0, (size - 1) * apart + 1))]
    return weight


def conv_transpose(tf: Any, x: Any, weight: Any, bias: Any | None, attributes: Mapping[str, Any]) -> Any:
    """x (N, *space, C), weight (*kernel, out / groups, C) -> (N, *space, out)."""
    rank = weight.shape.rank - 2
    stride, dilation = (list(attributes[name] or (1,) * rank) for name in ("stride", "dilation"))
    further = list(attributes["output_padding"] or (0,) * rank)
    sides, weight = _sides(attributes["padding"], rank), _dilated(tf, weight, dilation)
    if rank == 1:
        x, weight = x[:, None], weight[None]
        stride, further, sides = [1, *stride], [0, *further], [(0, 0), *sides]
    parts = zip(tf.split(x, attributes["groups"], -1), tf.split(weight, attributes["groups"], -1), strict=True)
    y = tf.concat([_spread(tf, part, kernel, stride) for part, kernel in parts], -1)
    # The padding is cut off, and the further entries at the end are zeros where no window reaches.
    cut = [(-begin, more - end) for (begin, end), more in zip(sides, [0, *further, 0], strict=True)]
    y = pad(tf, y, cut)
    if rank == 1:
        y = tf.squeeze(y, [1])
    return y if bias is None else tf.nn.bias_add(y, bias)


def _spread(tf: Any, x: Any, weight: Any, stride: Sequence[int]) -> Any:
    """All that the windows of a transposed conv reach."""
    shape = tf.shape(x)
    kernel = weight.shape[:-2]
    space = [
        (shape[axis + 1] - 1) * step + width for axis, (step, width) in enumerate(zip(stride, kernel, strict=True))
    ]
    function = tf.nn.conv2d_transpose if len(stride) == 2 else tf.nn.conv3d_transpose
    return function(x, weight, tf.stack([shape[0], *space, weight.shape[-2]]), [1, *stride, 1], "VALID")


# --- pools -----------------------------------------------------------------------------------------------------------


def max_pool(tf: Any, x: Any, attributes: Mapping[str, Any]) -> Any:
    kernel = list(attributes["kernel"])
    rank = len(kernel)
    stride, dilation = (list(attributes[name] or (1,) * rank) for name in ("stride", "dilation"))
    lowest = -float("inf") if x.dtype.is_floating else x.dtype.min
    x = pad(tf, x, _sides(attributes["padding"], rank), lowest)
    x = pad(tf, x, _beyond(tf, x, attributes, dilation), lowest)
    if dilation == [1] * rank:
        return tf.nn.max_pool(x, kernel, stride, "VALID")
    y = tf.nn.pool(x, kernel, "MAX", padding="VALID", dilations=dilation)  # which takes no strides beside dilations
    return y[(slice(None), *[slice(None, None, step) for step in stride])]


def average_pool(tf: Any, x: Any, attributes: Mapping[str, Any]) -> Any:
    """The sum of each window by the number of its entries that count."""
    kernel = list(attributes["kernel"])
    rank = len(kernel)
    stride, sides = list(attributes["stride"] or (1,) * rank), _sides(attributes["padding"], rank)
    padded = pad(tf, x, sides)
    beyond = _beyond(tf, padded, attributes, [1] * rank)
    y = tf.nn.avg_pool(pad(tf, padded, beyond), kernel, stride, "VALID")
    around = not all(_is_zero(side) for pair in sides for side in pair) and not attributes["include_pad"]
    if not (around or attributes["ceil"]):
        return y
    ones = tf.ones_like(x[:1, ..., :1])
    counted = pad(tf, pad(tf, ones, sides, float(attributes["include_pad"])), beyond)
    return y / tf.nn.avg_pool(counted, kernel, stride, "VALID")


def _beyond(tf: Any, padded: Any, attributes: Mapping[str, Any], dilation: Sequence[int]) -> Sides:
    """How far the last window reaches beyond the padding where `ceil` keeps it; negative where it ends before.

    The number of windows is that of the op's reference.
    """
    kernel = attributes["kernel"]
    rank = len(kernel)
    ends = list[Any]([0] * rank)
    padding = attributes["padding"] or (0,) * (2 * rank)
    for axis in range(rank if attributes["ceil"] else 0):
        whole = size_of(tf, padded, axis + 1)
        size = whole - padding[rank + axis]  # a window that begins at or behind it would see no entry
        width, step = dilation[axis] * (kernel[axis] - 1) + 1, (attributes["stride"] or (1,) * rank)[axis]
        start = -((width - whole) // step) * step
        kept = (
            (start if start < size else start - step)
            if isinstance(whole, int)
            else tf.where(start < size, start, start - step)
        )
        ends[axis] = kept + width - whole
    return [(0, 0), *((0, end) for end in ends), (0, 0)]
