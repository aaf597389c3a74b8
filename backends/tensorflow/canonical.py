"""How TensorFlow computes each canonical op: one row an op, in the order of the families in `graphopt.ir.ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.backends.tensorflow.call import Call, ChannelsLast, Form, axis_in_last, from_last, to_last
from graphopt.backends.tensorflow.recurrent import gru, lstm, rnn
from graphopt.backends.tensorflow.windows import average_pool, conv, conv_transpose, max_pool, pad, size_of
from graphopt.ir.graph import dtype_name
from graphopt.ir.ops.quantization import integer_range


def each(function: Callable[..., Any]) -> Form:
    """(the package, the operands ...) -> the result, entry by entry."""
    return Form(lambda tf, call: function(tf, *call.tensors()), elementwise=True)


def element_type(tf: Any, dtype: torch.dtype) -> Any:
    """A dtype of torch in TensorFlow."""
    return tf.as_dtype(dtype_name(dtype))


# --- arithmetic and activations --------------------------------------------------------------------------------------


def _div(tf: Any, a: Any, b: Any) -> Any:
    """ONNX divides integers towards zero."""
    return a / b if a.dtype.is_floating else tf.truncatediv(a, b)


def _pow(tf: Any, a: Any, b: Any) -> Any:
    """The result has the type of a."""
    if a.dtype.is_floating or not b.dtype.is_floating:
        return tf.pow(a, tf.cast(b, a.dtype))
    return tf.cast(tf.pow(tf.cast(a, b.dtype), b), a.dtype)


def _clip(tf: Any, call: Call) -> Any:
    x = call[0]
    for bound, function in ((call.attributes["low"], tf.maximum), (call.attributes["high"], tf.minimum)):
        if bound is not None:
            x = function(x, tf.constant(bound if x.dtype.is_floating else int(bound), x.dtype))
    return x


def _hard_sigmoid(tf: Any, x: Any) -> Any:
    return tf.nn.relu6(x + 3) / 6


# --- products --------------------------------------------------------------------------------------------------------


def product(tf: Any, x: Any, weight: Any, bias: Any | None = None) -> Any:
    """x (..., in) by a matrix (in, out), as one product of two matrices."""
    size = weight.shape[0] if weight.shape[0] is not None else tf.shape(weight)[0]
    y = tf.linalg.matmul(x if x.shape.rank == 2 else tf.reshape(x, [-1, size]), weight)
    if bias is not None:
        y = tf.nn.bias_add(y, bias)
    return y if x.shape.rank == 2 else tf.reshape(y, tf.concat([tf.shape(x)[:-1], tf.shape(y)[-1:]], 0))


def _linear(tf: Any, call: Call) -> Any:
    return product(tf, call[0], call.permuted(1, (1, 0)), call.optional(2))


def matmul(tf: Any, a: Any, b: Any) -> Any:
    """As numpy has it: a vector is a row on the left, and a column on the right."""
    rows, columns = a.shape.rank == 1, b.shape.rank == 1
    y = tf.linalg.matmul(a[None, :] if rows else a, b[:, None] if columns else b)
    return tf.squeeze(y, [axis for axis, gone in ((-2, rows), (-1, columns)) if gone]) if rows or columns else y


def indices(tf: Any, ids: Any) -> Any:
    """Integers that TensorFlow picks by."""
    return ids if ids.dtype in (tf.int32, tf.int64) else tf.cast(ids, tf.int64)


def _embedding(tf: Any, call: Call) -> Any:
    return tf.gather(call[0], indices(tf, call[1]))


# --- attention -------------------------------------------------------------------------------------------------------


def _split(tf: Any, x: Any, heads: int) -> Any:
    """(batch, length, heads · size) -> (batch, heads, length, size)."""
    batch, length, width = (size_of(tf, x, axis) for axis in range(3))
    return tf.transpose(tf.reshape(x, [batch, length, heads, width // heads]), [0, 2, 1, 3])


def _heads_joined(tf: Any, x: Any) -> Any:
    """(batch, heads, length, size) -> (batch, length, heads · size)."""
    batch, heads, length, size = (size_of(tf, x, axis) for axis in range(4))
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [batch, length, heads * size])


def _attention(tf: Any, call: Call) -> Any:
    query, key, value, mask = call[0], call[1], call[2], call.optional(3)
    heads = call.attributes["heads"]
    if heads:
        kv_heads = call.attributes["kv_heads"] or heads
        query, key, value = _split(tf, query, heads), _split(tf, key, kv_heads), _split(tf, value, kv_heads)
    groups = size_of(tf, query, 1) // size_of(tf, key, 1)
    if not (isinstance(groups, int) and groups == 1):
        key, value = tf.repeat(key, groups, 1), tf.repeat(value, groups, 1)
    given = call.attributes["scale"]
    scale = tf.cast(given or size_of(tf, query, 3), query.dtype)
    scores = tf.linalg.matmul(query * (scale if given else tf.math.rsqrt(scale)), key, transpose_b=True)
    if call.attributes["causal"]:
        rows, columns = tf.range(tf.shape(query)[2]), tf.range(tf.shape(key)[2])
        scores = tf.where(columns[None, :] <= rows[:, None], scores, scores.dtype.min)
    if mask is not None:
        # The least number, and not -inf: a row without any allowed position gives no NaN.
        scores = tf.where(mask, scores, scores.dtype.min) if mask.dtype == tf.bool else scores + mask
    y = tf.linalg.matmul(tf.nn.softmax(scores), value)
    return _heads_joined(tf, y) if heads else y


def _rotary(tf: Any, call: Call) -> Any:
    heads, interleaved = call.attributes["heads"], call.attributes["interleaved"]
    x = _split(tf, call[0], heads) if heads else call[0]
    cos, sin = call[1][:, None], call[2][:, None]
    pairs = size_of(tf, cos, 3)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    parts = [a * cos - b * sin, b * cos + a * sin]
    turned = tf.reshape(tf.stack(parts, -1), tf.shape(turned)) if interleaved else tf.concat(parts, -1)
    y = tf.concat([turned, rest], -1)
    y.set_shape(x.shape)
    return _heads_joined(tf, y) if heads else y


# --- norms -----------------------------------------------------------------------------------------------------------


def _wide(tf: Any, x: Any) -> Any:
    """What sums of many squares are computed in."""
    return tf.cast(x, tf.float32) if x.dtype in (tf.float16, tf.bfloat16) else x


def normalized(tf: Any, x: Any, axes: Sequence[int], eps: float) -> Any:
    """x with mean 0 and variance 1 along axes, in the type of x."""
    wide = _wide(tf, x)
    mean = tf.reduce_mean(wide, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(wide, mean), axes, keepdims=True)
    return tf.cast((wide - mean) * tf.math.rsqrt(variance + tf.constant(eps, wide.dtype)), x.dtype)


def scaled_by_root(tf: Any, x: Any, axes: Sequence[int], eps: float) -> Any:
    """x by the root of its mean square along axes, in the type of x."""
    wide = _wide(tf, x)
    square = tf.reduce_mean(tf.square(wide), axes, keepdims=True)
    return tf.cast(wide * tf.math.rsqrt(square + tf.constant(eps, wide.dtype)), x.dtype)


def _trailing(weight: Any) -> list[int]:
    return list(range(-weight.shape.rank, 0))


def _layer_norm(tf: Any, call: Call) -> Any:
    x, weight, bias = call[0], call[1], call.optional(2)
    y = normalized(tf, x, _trailing(weight), call.attributes["eps"]) * weight
    return y if bias is None else y + bias


def _rms_norm(tf: Any, call: Call) -> Any:
    return scaled_by_root(tf, call[0], _trailing(call[1]), call.attributes["eps"]) * call[1]


def _batch_norm(tf: Any, call: Call) -> Any:
    """One product and one sum, along the last axis where channels are last."""
    weight, bias, mean, var = (call[index] for index in range(1, 5))
    factor = weight * tf.math.rsqrt(var + tf.constant(call.attributes["eps"], var.dtype))
    shift = bias - mean * factor
    if call.is_channels_last(0):
        return ChannelsLast(call.channels_last(0) * factor + shift)
    x = call[0]
    shape = [-1, *[1] * (x.shape.rank - 2)]
    return x * tf.reshape(factor, shape) + tf.reshape(shift, shape)


# --- movement --------------------------------------------------------------------------------------------------------


def cast(tf: Any, x: Any, dtype: Any) -> Any:
    """Of what small integers cannot hold, the low bits stay, as other engines have it."""
    small = dtype.is_integer and dtype.size < 4 and x.dtype.is_floating
    return tf.cast(tf.cast(x, tf.int32) if small else x, dtype)


def _transpose(tf: Any, call: Call) -> Any:
    """Between the two layouts it costs nothing."""
    perm = list(call.attributes["perm"])
    if len(perm) > 2 and perm == to_last(len(perm)) and call.is_channels_last(0):
        return call.channels_last(0)
    return ChannelsLast(call[0]) if len(perm) > 2 and perm == from_last(len(perm)) else tf.transpose(call[0], perm)


def _slice(tf: Any, call: Call) -> Any:
    part = slice(call.attributes["start"], call.attributes["end"])
    if call.is_channels_last(0):
        axis = axis_in_last(call.attributes["axis"], call.rank(0))
        return ChannelsLast(call.channels_last(0)[(*[slice(None)] * axis, part)])
    axis = call.attributes["axis"] % call[0].shape.rank
    return call[0][(*[slice(None)] * axis, part)]


def _concat(tf: Any, call: Call) -> Any:
    axis, several = call.attributes["axis"], range(len(call))
    if any(map(call.is_channels_last, several)):
        parts = [call.channels_last(index) for index in several]
        return ChannelsLast(tf.concat(parts, axis_in_last(axis, parts[0].shape.rank)))
    return tf.concat(call.tensors(), axis)


def _squeeze(tf: Any, call: Call) -> Any:
    axes = list(call.attributes["axes"])
    return tf.squeeze(call[0], axes) if axes else call[0]  # TensorFlow would take none for all


def _unsqueeze(tf: Any, call: Call) -> Any:
    x = call[0]
    rank = x.shape.rank + len(call.attributes["axes"])
    for axis in sorted(axis % rank for axis in call.attributes["axes"]):
        x = tf.expand_dims(x, axis)
    return x


def _mean(tf: Any, call: Call) -> Any:
    axes, keepdim = call.attributes["axes"], call.attributes["keepdim"]
    if call.is_channels_last(0):
        x = call.channels_last(0)
        rank = x.shape.rank
        inner = sorted(axis_in_last(axis, rank) for axis in axes or range(rank))
        y = tf.reduce_mean(x, inner, keepdims=keepdim)
        if keepdim:
            return ChannelsLast(y)
        if inner == list(range(1, rank - 1)):  # (N, C) is left, in either layout
            return y
    return tf.reduce_mean(call[0], list(axes) or None, keepdims=keepdim)


# --- scales ----------------------------------------------------------------------------------------------------------


def _unless_zero(tf: Any, scale: Any) -> Any:
    return tf.where(scale == 0, tf.ones_like(scale), scale)


def _choose_qparams(tf: Any, call: Call) -> tuple[Any, Any]:
    x = call[0]
    low, high = tf.minimum(tf.reduce_min(x), 0), tf.maximum(tf.reduce_max(x), 0)
    scale = _unless_zero(tf, (high - low) / 255)
    return scale, tf.cast(tf.clip_by_value(tf.round(-low / scale), 0, 255), tf.uint8)


def _row_scale(tf: Any, call: Call) -> Any:
    largest = tf.reduce_max(tf.abs(tf.cast(call[0], tf.float32)), -1, keepdims=True)
    return _unless_zero(tf, largest / call.attributes["largest"])


def _along(tf: Any, parameter: Any, x: Any, axis: int | None, block: int = 0) -> Any:
    """A scale or zero point in a shape that is broadcast to x: one an entry, a slice of axis, or a block along it."""
    if axis is None or parameter.shape.rank == 0:
        return parameter
    if block:
        whole = tf.repeat(parameter, block, axis)
        return whole[(*[slice(None)] * (axis % x.shape.rank), slice(0, tf.shape(x)[axis]))]
    return tf.reshape(parameter, [-1 if i == axis % x.shape.rank else 1 for i in range(x.shape.rank)])


def _quantized(tf: Any, x: Any, scale: Any, zero_point: Any | None, axis: int | None = None, bits: int = 8) -> Any:
    dtype = tf.int8 if zero_point is None else zero_point.dtype
    steps = x / _along(tf, scale, x, axis)
    if dtype.is_floating:
        most = float(dtype.max)
        return tf.cast(tf.clip_by_value(steps, -most, most), dtype)
    steps = tf.round(steps)
    if zero_point is not None:
        steps += tf.cast(_along(tf, zero_point, x, axis), steps.dtype)
    least, most = integer_range(getattr(torch, dtype.name), bits)
    return tf.cast(tf.clip_by_value(steps, least, most), dtype)


def _dequantized(tf: Any, x: Any, scale: Any, zero_point: Any | None, axis: int | None = None, block: int = 0) -> Any:
    steps = tf.cast(x, tf.float32)
    if zero_point is not None:
        steps -= tf.cast(_along(tf, zero_point, x, axis, block), tf.float32)
    return steps * _along(tf, scale, x, axis, block)


def _quantize(tf: Any, call: Call) -> Any:
    return _quantized(tf, call[0], call[1], call.optional(2), call.attributes["axis"], call.attributes["bits"])


def _dequantize(tf: Any, call: Call) -> Any:
    return _dequantized(tf, call[0], call[1], call.optional(2), call.attributes["axis"], call.attributes["block"])


def _linear_int8(tf: Any, call: Call) -> Any:
    """In floats: TensorFlow has no product of integers with these scales."""
    x = tf.cast(call[0], tf.float32) - tf.cast(call[2], tf.float32)
    y = product(tf, x, tf.cast(call.permuted(3, (1, 0)), tf.float32)) * (call[1] * call[4])
    bias = call.optional(5)
    return y if bias is None else y + bias


def _conv_int8(tf: Any, call: Call) -> Any:
    x = _dequantized(tf, call[0], call[1], call[2])
    weight = _dequantized(tf, call[3], call[4], None, 0)
    rank = weight.shape.rank
    y = conv(
        tf, tf.transpose(x, to_last(rank)), tf.transpose(weight, [*range(2, rank), 1, 0]), call.optional(7),
        call.attributes,
    )  # fmt: skip
    return _quantized(tf, tf.transpose(y, from_last(rank)), call[5], call[6])


def _add_int8(tf: Any, call: Call) -> Any:
    total = _dequantized(tf, call[0], call[1], call[2]) + _dequantized(tf, call[3], call[4], call[5])
    return _quantized(tf, total, call[6], call[7])


# --- the table -------------------------------------------------------------------------------------------------------


def _conv(tf: Any, call: Call) -> Any:
    rank = call.rank(1)
    weight = call.permuted(1, (*range(2, rank), 1, 0))
    return ChannelsLast(conv(tf, call.channels_last(0), weight, call.optional(2), call.attributes))


def _conv_transpose(tf: Any, call: Call) -> Any:
    rank = call.rank(1)
    weight = call.permuted(1, (*range(2, rank), 1, 0))
    return ChannelsLast(conv_transpose(tf, call.channels_last(0), weight, call.optional(2), call.attributes))


def _pad(tf: Any, call: Call) -> Any:
    padding, value = call.attributes["padding"], call.attributes["value"]
    rank, count = call.node.input.rank, len(call.attributes["padding"]) // 2
    if call.is_channels_last(0) and rank == count + 2:  # space alone
        sides = [(0, 0), *zip(padding[:count], padding[count:], strict=True), (0, 0)]
        return ChannelsLast(pad(tf, call.channels_last(0), sides, value))
    x = call[0]
    sides = [*[(0, 0)] * (x.shape.rank - count), *zip(padding[:count], padding[count:], strict=True)]
    return pad(tf, x, sides, value)


FORMS: dict[str, Form] = {
    # activations
    "gelu": Form(lambda tf, call: tf.nn.gelu(call[0], call.attributes["approximate"] == "tanh"), elementwise=True),
    "silu": each(lambda tf, x: x * tf.sigmoid(x)),
    "relu": each(lambda tf, x: tf.nn.relu(x)),
    "clip": Form(_clip, elementwise=True),
    "leaky_relu": Form(lambda tf, call: tf.nn.leaky_relu(call[0], call.attributes["slope"]), elementwise=True),
    "hard_sigmoid": each(_hard_sigmoid),
    "hard_swish": each(lambda tf, x: x * _hard_sigmoid(tf, x)),
    # attention
    "attention": Form(_attention),
    "rotary": Form(_rotary),
    # convolution
    "conv": Form(_conv),
    "conv_transpose": Form(_conv_transpose),
    # elementwise
    "add": each(lambda tf, a, b: a + b),
    "sub": each(lambda tf, a, b: a - b),
    "mul": each(lambda tf, a, b: a * b),
    "div": each(_div),
    "pow": each(_pow),
    "sqrt": each(lambda tf, x: tf.sqrt(x)),
    "rsqrt": each(lambda tf, x: tf.math.rsqrt(x)),
    "reciprocal": each(lambda tf, x: tf.math.reciprocal(x)),
    "exp": each(lambda tf, x: tf.exp(x)),
    "erf": each(lambda tf, x: tf.math.erf(x)),
    "tanh": each(lambda tf, x: tf.tanh(x)),
    "sigmoid": each(lambda tf, x: tf.sigmoid(x)),
    "isnan": each(lambda tf, x: tf.math.is_nan(x)),
    "where": each(lambda tf, condition, a, b: tf.where(condition, a, b)),
    # integer
    "linear_int8": Form(_linear_int8),
    "conv_int8": Form(_conv_int8),
    "add_int8": Form(_add_int8),
    # linear
    "linear": Form(_linear),
    "matmul": Form(lambda tf, call: matmul(tf, call[0], call[1])),
    "embedding": Form(_embedding),
    # movement
    "identity": Form(lambda tf, call: tf.identity(call[0]), elementwise=True),
    "cast": Form(lambda tf, call: cast(tf, call[0], element_type(tf, call.attributes["dtype"])), elementwise=True),
    "reshape": Form(lambda tf, call: tf.reshape(call[0], call[1])),
    "squeeze": Form(_squeeze),
    "unsqueeze": Form(_unsqueeze),
    "transpose": Form(_transpose),
    "slice": Form(_slice),
    "concat": Form(_concat),
    "pad": Form(_pad),
    # normalization
    "layer_norm": Form(_layer_norm),
    "rms_norm": Form(_rms_norm),
    "batch_norm": Form(_batch_norm),
    "softmax": Form(lambda tf, call: tf.nn.softmax(call[0], call.attributes["axis"])),
    # pooling
    "max_pool": Form(lambda tf, call: ChannelsLast(max_pool(tf, call.channels_last(0), call.attributes))),
    "average_pool": Form(lambda tf, call: ChannelsLast(average_pool(tf, call.channels_last(0), call.attributes))),
    # quantization
    "choose_qparams": Form(_choose_qparams),
    "row_scale": Form(_row_scale),
    "quantize": Form(_quantize),
    "dequantize": Form(_dequantize),
    # recurrent
    "lstm": Form(lstm),
    "gru": Form(gru),
    "rnn": Form(rnn),
    # reduction
    "mean": Form(_mean),
}
