"""How TensorFlow computes operators of ONNX that are no canonical ops: most compute shapes, masks and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import onnx_ir as ir

from graphopt.backends.tensorflow.call import Call, ChannelsLast, Form, to_last
from graphopt.backends.tensorflow.canonical import cast, each, indices, matmul, normalized, scaled_by_root
from graphopt.backends.tensorflow.windows import average_pool, conv, max_pool, pad, size_of


def _with_attributes(function: Callable[..., Any], **defaults: Any) -> Form:
    """With these attributes, in the order of the function's further parameters."""

    def apply(tf: Any, call: Call) -> Any:
        return function(tf, call[0], *(call.attribute(name, value) for name, value in defaults.items()))

    return Form(apply, elementwise=True)


def _accumulated(function: Callable[[Any], Callable[[Any, Any], Any]]) -> Form:
    """Of any number of operands."""
    return Form(lambda tf, call: reduce(function(tf), call.tensors()), elementwise=True)


def _element_type(tf: Any, number: int) -> Any:
    """A type by its number in ONNX."""
    return tf.as_dtype(ir.DataType(number).numpy())


# --- entry by entry --------------------------------------------------------------------------------------------------


def _selu(tf: Any, x: Any, alpha: float, gamma: float) -> Any:
    return gamma * tf.where(x > 0, x, alpha * tf.math.expm1(x))


def _elu(tf: Any, x: Any, alpha: float) -> Any:
    return tf.where(x > 0, x, alpha * tf.math.expm1(x))


def _celu(tf: Any, x: Any, alpha: float) -> Any:
    return tf.where(x > 0, x, alpha * tf.math.expm1(x / alpha))


def _hard_sigmoid(tf: Any, x: Any, alpha: float, beta: float) -> Any:
    return tf.clip_by_value(x * alpha + beta, 0, 1)


def _is_inf(tf: Any, x: Any, negative: int, positive: int) -> Any:
    wanted = tf.zeros_like(x, tf.bool)
    for number, is_wanted in ((-float("inf"), negative), (float("inf"), positive)):
        wanted = wanted | (x == number) if is_wanted else wanted
    return wanted


def _mod(tf: Any, call: Call) -> Any:
    return (tf.truncatemod if call.attribute("fmod", 0) else tf.math.floormod)(call[0], call[1])


def _clip(tf: Any, call: Call) -> Any:
    """With computed bounds; stored ones make the op clip."""
    x = call[0]
    for index, function in ((1, tf.maximum), (2, tf.minimum)):
        if call.value(index) is not None:
            x = function(x, call[index])
    return x


# --- shapes ----------------------------------------------------------------------------------------------------------


def _shape(tf: Any, call: Call) -> Any:
    if call.is_channels_last(0):
        last = call.channels_last(0)
        rank = last.shape.rank
        whole = tf.gather(tf.shape(last, tf.int64), [to_last(rank).index(axis) for axis in range(rank)])
    else:
        whole = tf.shape(call[0], tf.int64)
    return whole[call.attribute("start", 0) : call.attributes.get("end")]


def _reshape(tf: Any, call: Call) -> Any:
    """Where a size of 0 copies that of x."""
    x, shape = call[0], call[1] if len(call) > 1 else tf.constant(call.attributes["shape"], tf.int64)
    if call.attribute("allowzero", 0):
        return tf.reshape(x, shape)
    own = tf.shape(x, shape.dtype)
    missing = tf.maximum(tf.size(shape) - tf.size(own), 0)
    own = tf.concat([own, tf.ones([missing], shape.dtype)], 0)[: tf.size(shape)]
    return tf.reshape(x, tf.where(shape == 0, own, shape))


def _flatten(tf: Any, call: Call) -> Any:
    x, axis = call[0], call.attribute("axis", 1)
    shape = tf.shape(x)
    axis = axis if axis >= 0 else axis + x.shape.rank
    return tf.reshape(x, [tf.reduce_prod(shape[:axis]), tf.reduce_prod(shape[axis:])])


def _squeeze(tf: Any, call: Call) -> Any:
    return tf.squeeze(call[0], call.listed("axes", 1) or None)


def _unsqueeze(tf: Any, call: Call) -> Any:
    x, axes = call[0], call.listed("axes", 1) or []
    rank = x.shape.rank + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = tf.expand_dims(x, axis)
    return x


def _expand(tf: Any, call: Call) -> Any:
    """Both broadcast: an axis of 1 in either takes the size of the other."""
    x, shape = call[0], call[1]
    return tf.broadcast_to(x, tf.broadcast_dynamic_shape(tf.shape(x, shape.dtype), shape))


def _split(tf: Any, call: Call) -> tuple[Any, ...]:
    x, axis, sizes = call[0], call.attribute("axis", 0), call.listed("split", 1)
    if sizes is None:
        parts = len(call.node.results)
        size = size_of(tf, x, axis)
        whole = -(-size // parts)  # the last may be smaller
        sizes = [whole] * (parts - 1) + [size - whole * (parts - 1)]
    return tuple(tf.split(x, sizes, axis))


def _depth_to_space(tf: Any, call: Call) -> Any:
    size = call.attributes["blocksize"]
    if call.attribute("mode", "DCR") == "DCR":
        return ChannelsLast(tf.nn.depth_to_space(call.channels_last(0), size))
    x = call[0]
    batch, depth, height, width = (size_of(tf, x, axis) for axis in range(4))
    x = tf.transpose(tf.reshape(x, [batch, depth // size**2, size, size, height, width]), [0, 1, 4, 2, 5, 3])
    return tf.reshape(x, [batch, depth // size**2, height * size, width * size])


# --- picking ---------------------------------------------------------------------------------------------------------


def _from_start(tf: Any, found: Any, size: Any) -> Any:
    """Indices without negative ones, which count from the end."""
    found = indices(tf, found)
    return tf.where(found < 0, found + tf.cast(size, found.dtype), found)


def _gather(tf: Any, call: Call) -> Any:
    x, axis, known = call[0], call.attribute("axis", 0), call.array(1)
    if known is not None and (known >= 0).all():
        return tf.gather(x, indices(tf, call[1]), axis=axis)
    return tf.gather(x, _from_start(tf, call[1], size_of(tf, x, axis)), axis=axis)


def _index_grid(tf: Any, found: Any, axis: int) -> Any:
    """For each entry of `found` its place in a tensor, which along `axis` it names itself."""
    axis %= found.shape.rank
    grid = tf.meshgrid(*[tf.range(size, dtype=found.dtype) for size in tf.unstack(tf.shape(found, found.dtype))],
                       indexing="ij")  # fmt: skip
    return tf.stack([found if place == axis else along for place, along in enumerate(grid)], -1)


def _gather_elements(tf: Any, call: Call) -> Any:
    x, axis = call[0], call.attribute("axis", 0)
    return tf.gather_nd(x, _index_grid(tf, _from_start(tf, call[1], size_of(tf, x, axis)), axis))


def _gather_nd(tf: Any, call: Call) -> Any:
    x, shared = call[0], call.attribute("batch_dims", 0)
    depth = call[1].shape[-1]
    sizes = tf.shape(x)[shared : shared + depth]
    return tf.gather_nd(x, _from_start(tf, call[1], sizes), batch_dims=shared)


_LAST = 2**31 - 1
"""From here on, an end is beyond any axis."""


def _slice(tf: Any, call: Call) -> Any:
    x = call[0]
    starts, ends = _bounds(tf, call, "starts", 1), _bounds(tf, call, "ends", 2)
    axes, steps = call.listed("axes", 3) or range(len(starts)), call.numbers(4) or [1] * len(starts)
    parts = [slice(None)] * x.shape.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:  # the first entry is taken where a start lies before it
            start = _not_before(tf, start, size_of(tf, x, axis))
            end = None if isinstance(end, int) and end <= -_LAST else end
        parts[axis] = slice(start, end, step)
    return x[tuple(parts)]


def _not_before(tf: Any, start: Any, size: Any) -> Any:
    if isinstance(start, int) and (start >= 0 or isinstance(size, int)):
        return max(start, -size) if start < 0 else start
    return tf.maximum(start, -size)


def _bounds(tf: Any, call: Call, name: str, index: int) -> list[Any]:
    """Numbers where they are stored, else tensors; none is further than TensorFlow counts."""
    if name not in call.attributes and call.array(index) is None:
        clipped = tf.cast(tf.clip_by_value(tf.cast(call[index], tf.int64), -_LAST, _LAST), tf.int32)
        return list(tf.unstack(clipped))
    return [max(-_LAST, min(_LAST, bound)) for bound in call.listed(name, index) or []]


def _one_hot(tf: Any, call: Call) -> Any:
    values, depth = call[2], tf.reshape(tf.cast(call[1], tf.int32), [])
    found = _from_start(tf, call[0], depth)
    return tf.one_hot(found, depth, values[1], values[0], call.attribute("axis", -1), values.dtype)


# --- placing ---------------------------------------------------------------------------------------------------------


def _scattered(tf: Any, call: Call, places: Any) -> Any:
    how = call.attribute("reduction", "none")
    functions = {
        "none": tf.tensor_scatter_nd_update, "add": tf.tensor_scatter_nd_add, "max": tf.tensor_scatter_nd_max,
        "min": tf.tensor_scatter_nd_min,
    }  # fmt: skip
    if how not in functions:
        raise call.refused(f"reduction={how}")
    return functions[how](call[0], places, call[2])


def _scatter_elements(tf: Any, call: Call) -> Any:
    axis = call.attribute("axis", 0)
    return _scattered(tf, call, _index_grid(tf, _from_start(tf, call[1], size_of(tf, call[0], axis)), axis))


def _scatter_nd(tf: Any, call: Call) -> Any:
    return _scattered(tf, call, _from_start(tf, call[1], tf.shape(call[0])[: call[1].shape[-1]]))


def _triangle(tf: Any, call: Call) -> Any:
    x = call[0]
    offset = tf.cast(0 if call.value(1) is None else tf.reshape(call[1], []), tf.int32)
    rows, columns = tf.range(tf.shape(x)[-2])[:, None], tf.range(tf.shape(x)[-1])[None]
    kept = columns - rows >= offset if call.attribute("upper", 1) else columns - rows <= offset
    return tf.where(kept, x, tf.zeros_like(x))


# --- around ----------------------------------------------------------------------------------------------------------


def _pad(tf: Any, call: Call) -> Any:
    x, mode = call[0], call.attribute("mode", "constant")
    rank = x.shape.rank
    axes = [axis % rank for axis in call.numbers(3) or range(rank)]
    given = _bounds(tf, call, "pads", 1)
    sides = [(0, 0)] * rank
    for place, axis in enumerate(axes):
        sides[axis] = given[place], given[len(axes) + place]
    if mode == "constant":
        value = call.attributes["value"] if "value" in call.attributes else (call.numbers(2) or [0])[0]
        return pad(tf, x, sides, value)
    for axis, (begin, end) in enumerate(sides):
        if isinstance(begin, int) and isinstance(end, int) and begin == end == 0:
            continue
        size = size_of(tf, x, axis)
        x = tf.gather(x, _AROUND[mode](tf, tf.range(-begin, size + end), size), axis=axis)
    return x


_AROUND: dict[str, Callable[[Any, Any, Any], Any]] = {
    "reflect": lambda tf, places, size: (size - 1) - tf.abs((size - 1) - tf.abs(places)),
    "edge": lambda tf, places, size: tf.clip_by_value(places, 0, size - 1),
    "wrap": lambda tf, places, size: tf.math.floormod(places, size),
}
"""By mode, where the entries around an axis come from."""


# --- making ----------------------------------------------------------------------------------------------------------


def _constant(tf: Any, call: Call) -> Any:
    """Of a graph as it was handed in: capture makes stored tensors of them."""
    for name, value in call.attributes.items():
        if name == "value":
            return tf.constant(value.numpy())
        if name in _NUMBERS:
            return tf.constant(list(value) if name.endswith("s") else value, _NUMBERS[name])
    raise call.refused("it holds no numbers")


_NUMBERS = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}


def _constant_of_shape(tf: Any, call: Call) -> Any:
    value = call.attributes.get("value")
    fill = tf.constant(0.0) if value is None else tf.reshape(tf.constant(value.numpy()), [])
    return tf.fill(call[0], fill)


def _range(tf: Any, call: Call) -> Any:
    return tf.range(*(tf.reshape(call[index], []) for index in range(3)))


def _eye_like(tf: Any, call: Call) -> Any:
    x = call[0]
    dtype = _element_type(tf, call.attributes["dtype"]) if "dtype" in call.attributes else x.dtype
    rows, columns = tf.range(tf.shape(x)[0])[:, None], tf.range(tf.shape(x)[1])[None]
    return tf.cast(columns - rows == call.attribute("k", 0), dtype)


# --- along axes ------------------------------------------------------------------------------------------------------


def _reduced(function: Callable[[Any, Any, Any, bool], Any]) -> Form:
    """Along the axes that are an attribute or operand 1; along all where there are none, unless the node says none."""

    def apply(tf: Any, call: Call) -> Any:
        x, axes = call[0], call.listed("axes", 1)
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return function(tf, x[..., None], [-1], False)
        return function(tf, x, axes or None, bool(call.attribute("keepdims", 1)))

    return Form(apply)


def _extreme_index(largest: bool) -> Form:
    """The first place of the extreme, or the last."""

    def apply(tf: Any, call: Call) -> Any:
        x, axis = call[0], call.attribute("axis", 0) % call[0].shape.rank
        function = tf.argmax if largest else tf.argmin
        if call.attribute("select_last_index", 0):
            found = tf.cast(size_of(tf, x, axis) - 1, tf.int64) - function(tf.reverse(x, [axis]), axis)
        else:
            found = function(x, axis)
        return tf.expand_dims(found, axis) if call.attribute("keepdims", 1) else found

    return Form(apply)


def _top(tf: Any, call: Call) -> tuple[Any, Any]:
    x = call[0]
    axis, largest = call.attribute("axis", -1) % x.shape.rank, call.attribute("largest", 1)
    count = call.attributes["k"] if "k" in call.attributes else tf.reshape(tf.cast(call[1], tf.int32), [])
    order = [place for place in range(x.shape.rank) if place != axis] + [axis]
    back = [order.index(place) for place in range(x.shape.rank)]
    values, found = tf.math.top_k(tf.transpose(x if largest else -x, order), count)
    values = tf.transpose(values, back)
    return values if largest else -values, tf.cast(tf.transpose(found, back), tf.int64)


def _running_sum(tf: Any, call: Call) -> Any:
    axis = (call.numbers(1) or [0])[0]
    return tf.cumsum(call[0], axis, bool(call.attribute("exclusive", 0)), bool(call.attribute("reverse", 0)))


def _einsum(tf: Any, call: Call) -> Any:
    return tf.einsum(call.attributes["equation"].replace(" ", ""), *call.tensors())


def _gemm(tf: Any, call: Call) -> Any:
    """What is no linear: with factors, or with a transposed first operand."""
    a, b = (tf.transpose(call[place]) if call.attribute(name, 0) else call[place]
            for place, name in enumerate(("transA", "transB")))  # fmt: skip
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    y = matmul(tf, a, b) * tf.constant(alpha, a.dtype)
    return y if call.value(2) is None else y + call[2] * tf.constant(beta, a.dtype)


def _over_axis(function: Callable[[Any, Any, int], Any]) -> Form:
    """Before opset 13 over all axes from `axis` on, flattened to one."""

    def apply(tf: Any, call: Call) -> Any:
        x = call[0]
        if getattr(call.values.graph, "opset", 13) >= 13:
            return function(tf, x, call.attribute("axis", -1))
        shape, first = tf.shape(x), call.attribute("axis", 1) % max(x.shape.rank, 1)
        flat = tf.reshape(x, tf.concat([shape[:first], [-1]], 0))
        return tf.reshape(function(tf, flat, -1), shape)

    return Form(apply)


# --- norms -----------------------------------------------------------------------------------------------------------


def _layer_norm(tf: Any, call: Call) -> Any:
    """Where the weight has another shape than what is normalized."""
    if any(result.users or result.is_output for result in call.node.results[1:]):
        raise call.refused("its mean or deviation is read")
    x = call[0]
    y = normalized(tf, x, _from_axis(call, x), call.attribute("epsilon", 1e-5)) * call[1]
    return y if call.value(2) is None else y + call[2]


def _rms_norm(tf: Any, call: Call) -> Any:
    return scaled_by_root(tf, call[0], _from_axis(call, call[0]), call.attribute("epsilon", 1e-5)) * call[1]


def _from_axis(call: Call, x: Any) -> list[int]:
    return list(range(call.attribute("axis", -1) % x.shape.rank, x.shape.rank))


def _per_channel(tf: Any, x: Any, vector: Any) -> Any:
    return tf.reshape(vector, [-1, *[1] * (x.shape.rank - 2)])


def _instance_norm(tf: Any, call: Call) -> Any:
    x = call[0]
    y = normalized(tf, x, list(range(2, x.shape.rank)), call.attribute("epsilon", 1e-5))
    return y * _per_channel(tf, x, call[1]) + _per_channel(tf, x, call[2])


def _group_norm(tf: Any, call: Call) -> Any:
    x, groups = call[0], call.attributes["num_groups"]
    shape = tf.shape(x)
    inside = tf.reshape(x, [shape[0], groups, -1])
    y = tf.reshape(normalized(tf, inside, [-1], call.attribute("epsilon", 1e-5)), shape)
    y.set_shape(x.shape)
    weight, bias = call[1], call[2]
    if getattr(call.values.graph, "opset", 21) < 21:  # one for each group
        weight, bias = (tf.repeat(part, shape[1] // groups) for part in (weight, bias))
    return y * _per_channel(tf, x, weight) + _per_channel(tf, x, bias)


def _lp_norm(tf: Any, call: Call) -> Any:
    x, axis = call[0], call.attribute("axis", -1)
    norm = tf.norm(x, ord=call.attribute("p", 2), axis=axis, keepdims=True)
    return tf.math.divide_no_nan(x, norm)


# --- windows that are padded by the size of x ------------------------------------------------------------------------


def _padding(tf: Any, call: Call, x: Any, kernel: Sequence[int]) -> tuple[Any, ...]:
    """The begin of each axis, then the end of each, so that SAME gives ceil(size / stride) windows."""
    rank, how = len(kernel), call.attribute("auto_pad", "NOTSET")
    if how == "VALID":
        return (0,) * (2 * rank)
    if how == "NOTSET":
        return tuple(call.attribute("pads", (0,) * (2 * rank)))
    strides, dilations = call.attribute("strides", (1,) * rank), call.attribute("dilations", (1,) * rank)
    begins, ends = [], []
    for axis, (width, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        size = size_of(tf, x, axis + 1)
        missing = (-(-size // stride) - 1) * stride + dilation * (width - 1) + 1 - size
        missing = max(missing, 0) if isinstance(missing, int) else tf.maximum(missing, 0)
        small = missing // 2
        begins.append(small if how == "SAME_UPPER" else missing - small)
        ends.append(missing - small if how == "SAME_UPPER" else small)
    return (*begins, *ends)


def _window(tf: Any, call: Call, x: Any, kernel: Sequence[int]) -> dict[str, Any]:
    """The attributes of the op, of a conv or a pool."""
    return {
        "padding": _padding(tf, call, x, kernel),
        "kernel": kernel,
        "stride": call.attribute("strides", ()),
        "dilation": call.attribute("dilations", ()),
        "groups": call.attribute("group", 1),
        "ceil": bool(call.attribute("ceil_mode", 0)) and call.attribute("auto_pad", "NOTSET") == "NOTSET",
        "include_pad": bool(call.attribute("count_include_pad", 0)),
    }


def _conv(tf: Any, call: Call) -> Any:
    x, rank = call.channels_last(0), call.rank(1)
    weight = call.permuted(1, (*range(2, rank), 1, 0))
    return ChannelsLast(conv(tf, x, weight, call.optional(2), _window(tf, call, x, weight.shape[:-2])))


def _pool(function: Callable[..., Any]) -> Form:
    def apply(tf: Any, call: Call) -> Any:
        if len(call.node.results) > 1 or (function is average_pool and set(call.attribute("dilations", ())) - {1}):
            raise call.refused("indices are read, or an average is dilated")
        x = call.channels_last(0)
        return ChannelsLast(function(tf, x, _window(tf, call, x, call.attributes["kernel_shape"])))

    return Form(apply)


def _global(function: Callable[[Any, Any, Any], Any]) -> Form:
    def apply(tf: Any, call: Call) -> Any:
        x = call.channels_last(0)
        return ChannelsLast(function(tf, x, list(range(1, x.shape.rank - 1))))

    return Form(apply)


def _resize(tf: Any, call: Call) -> Any:
    """Axis by axis; opset 10 and Upsample read only scales, and count them from the first entry of an axis.

    Integers are interpolated as float32, and cut off to integers once, as ONNX says.
    """
    x, old = call[0], getattr(call.values.graph, "opset", 11) < 11
    mode = call.attribute("mode", "nearest").replace("bilinear", "linear")
    how = "asymmetric" if old else call.attribute("coordinate_transformation_mode", "half_pixel")
    nearest = "floor" if old else call.attribute("nearest_mode", "round_prefer_floor")
    for name, known in (("mode", mode in ("nearest", "linear")), ("how", how in _COORDINATES)):
        if not known:
            raise call.refused(f"{name}={mode if name == 'mode' else how}")
    if call.attribute("antialias", 0) or call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refused("antialias or keep_aspect_ratio_policy")
    dtype = x.dtype
    if mode == "linear" and not dtype.is_floating:
        x = tf.cast(x, tf.float32)
    axes = [axis % x.shape.rank for axis in call.attribute("axes", tuple(range(x.shape.rank)))]
    scales = call.listed("scales", 1 if old else 2)
    sizes = None if old or call.value(3) is None else tf.unstack(tf.cast(call[3], tf.int32))
    for place, axis in enumerate(axes):
        before = size_of(tf, x, axis)
        if sizes is not None:
            size = sizes[place]
            scale = tf.cast(size, tf.float32) / tf.cast(before, tf.float32)
        else:
            assert scales is not None  # one of the two is given
            scale = float(scales[place])
            if scale == 1.0:
                continue
            size = tf.cast(tf.floor(tf.cast(before, tf.float32) * scale), tf.int32)
        places = _COORDINATES[how](tf, tf.range(size), tf.cast(size, tf.float32), tf.cast(before, tf.float32), scale)
        x = _along(tf, x, axis, places, before - 1, None if mode == "linear" else nearest)
    return tf.cast(x, dtype)


def _half_pixel(tf: Any, places: Any, size: Any, before: Any, scale: Any) -> Any:
    return (tf.cast(places, tf.float32) + 0.5) / scale - 0.5


_COORDINATES: dict[str, Callable[..., Any]] = {
    "asymmetric": lambda tf, places, size, before, scale: tf.cast(places, tf.float32) / scale,
    "align_corners": lambda tf, places, size, before, scale: (
        tf.cast(places, tf.float32) * (before - 1) / tf.maximum(size - 1, 1)
    ),
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": lambda tf, places, size, before, scale: tf.where(
        size > 1, _half_pixel(tf, places, size, before, scale), 0.0
    ),
    "half_pixel_symmetric": lambda tf, places, size, before, scale: (
        _half_pixel(tf, places, size, before, scale) + (before / 2) * (1 - size / (scale * before))
    ),
}
"""Where each entry of the result lies on the axis before."""

_NEAREST: dict[str, Callable[[Any, Any], Any]] = {
    "floor": lambda tf, places: tf.floor(places),
    "ceil": lambda tf, places: tf.math.ceil(places),
    "round_prefer_floor": lambda tf, places: tf.math.ceil(places - 0.5),
    "round_prefer_ceil": lambda tf, places: tf.floor(places + 0.5),
}


def _along(tf: Any, x: Any, axis: int, places: Any, last: Any, nearest: str | None) -> Any:
    """Entries of x at these places along an axis, the nearest ones or (None, of floats) interpolated linearly."""
    if nearest is not None:
        return tf.gather(x, tf.clip_by_value(tf.cast(_NEAREST[nearest](tf, places), tf.int32), 0, last), axis=axis)
    places = tf.clip_by_value(places, 0.0, tf.cast(last, tf.float32))
    low = tf.cast(tf.floor(places), tf.int32)
    share = tf.cast(places - tf.floor(places), x.dtype)
    share = tf.reshape(share, [-1 if i == axis else 1 for i in range(x.shape.rank)])
    before, after = tf.gather(x, low, axis=axis), tf.gather(x, tf.minimum(low + 1, last), axis=axis)
    return before + (after - before) * share


def _each_of(*names: str) -> dict[str, Form]:
    """Operators that TensorFlow has under their own names in lower case, for floats."""

    def form(name: str) -> Form:
        return each(lambda tf, x: getattr(tf.math, name)(x))

    return {f"onnx.{name.capitalize()}": form(name) for name in names}


FORMS: dict[str, Form] = {
    **_each_of("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "log", "sign", "sin", "sinh",
               "softplus", "softsign", "tan"),
    "onnx.Ceil": each(lambda tf, x: tf.math.ceil(x)),
    "onnx.Floor": each(lambda tf, x: tf.floor(x)),
    "onnx.Round": each(lambda tf, x: tf.round(x)),
    "onnx.Neg": each(lambda tf, x: -x),
    "onnx.Not": each(lambda tf, x: tf.logical_not(x)),
    "onnx.BitwiseNot": each(lambda tf, x: tf.bitwise.invert(x)),
    "onnx.Mish": each(lambda tf, x: x * tf.tanh(tf.math.softplus(x))),
    "onnx.Celu": _with_attributes(_celu, alpha=1.0),
    "onnx.Elu": _with_attributes(_elu, alpha=1.0),
    "onnx.HardSigmoid": _with_attributes(_hard_sigmoid, alpha=0.2, beta=0.5),
    "onnx.IsInf": _with_attributes(_is_inf, detect_negative=1, detect_positive=1),
    "onnx.PRelu": each(lambda tf, x, slope: tf.where(x < 0, x * slope, x)),
    "onnx.Selu": _with_attributes(_selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "onnx.Swish": _with_attributes(lambda tf, x, alpha: x * tf.sigmoid(x * alpha), alpha=1.0),
    "onnx.ThresholdedRelu": _with_attributes(lambda tf, x, alpha: tf.where(x > alpha, x, tf.zeros_like(x)), alpha=1.0),
    "onnx.Clip": Form(_clip),
    "onnx.CastLike": each(lambda tf, x, like: cast(tf, x, like.dtype)),
    "onnx.And": each(lambda tf, a, b: tf.logical_and(a, b)),
    "onnx.Or": each(lambda tf, a, b: tf.logical_or(a, b)),
    "onnx.Xor": each(lambda tf, a, b: tf.math.logical_xor(a, b)),
    "onnx.BitwiseAnd": each(lambda tf, a, b: tf.bitwise.bitwise_and(a, b)),
    "onnx.BitwiseOr": each(lambda tf, a, b: tf.bitwise.bitwise_or(a, b)),
    "onnx.BitwiseXor": each(lambda tf, a, b: tf.bitwise.bitwise_xor(a, b)),
    "onnx.Equal": each(lambda tf, a, b: tf.equal(a, b)),
    "onnx.Greater": each(lambda tf, a, b: a > b),
    "onnx.GreaterOrEqual": each(lambda tf, a, b: a >= b),
    "onnx.Less": each(lambda tf, a, b: a < b),
    "onnx.LessOrEqual": each(lambda tf, a, b: a <= b),
    "onnx.Mod": Form(_mod),
    "onnx.Max": _accumulated(lambda tf: tf.maximum),
    "onnx.Min": _accumulated(lambda tf: tf.minimum),
    "onnx.Sum": _accumulated(lambda tf: tf.add),
    "onnx.Mean": Form(lambda tf, call: reduce(tf.add, call.tensors()) / len(call), elementwise=True),
    # shapes
    "onnx.Shape": Form(_shape),
    "onnx.Size": Form(lambda tf, call: tf.size(call[0], tf.int64)),
    "onnx.Reshape": Form(_reshape),
    "onnx.Flatten": Form(_flatten),
    "onnx.Squeeze": Form(_squeeze),
    "onnx.Unsqueeze": Form(_unsqueeze),
    "onnx.Transpose": Form(lambda tf, call: tf.transpose(call[0], call.attributes.get("perm"))),
    "onnx.Expand": Form(_expand),
    "onnx.Tile": Form(lambda tf, call: tf.tile(call[0], call[1])),
    "onnx.Concat": Form(lambda tf, call: tf.concat(call.tensors(), call.attribute("axis", 1))),
    "onnx.Split": Form(_split),
    "onnx.DepthToSpace": Form(_depth_to_space),
    "onnx.SpaceToDepth": Form(
        lambda tf, call: ChannelsLast(tf.nn.space_to_depth(call.channels_last(0), call.attributes["blocksize"]))
    ),
    # picking and placing
    "onnx.Gather": Form(_gather),
    "onnx.GatherElements": Form(_gather_elements),
    "onnx.GatherND": Form(_gather_nd),
    "onnx.Slice": Form(_slice),
    "onnx.OneHot": Form(_one_hot),
    "onnx.Scatter": Form(_scatter_elements),
    "onnx.ScatterElements": Form(_scatter_elements),
    "onnx.ScatterND": Form(_scatter_nd),
    "onnx.Trilu": Form(_triangle),
    "onnx.Pad": Form(_pad),
    # making
    "onnx.Constant": Form(_constant),
    "onnx.ConstantOfShape": Form(_constant_of_shape),
    "onnx.Range": Form(_range),
    "onnx.EyeLike": Form(_eye_like),
    # along axes
    "onnx.ReduceL1": _reduced(lambda tf, x, axes, keep: tf.reduce_sum(tf.abs(x), axes, keep)),
    "onnx.ReduceL2": _reduced(lambda tf, x, axes, keep: tf.sqrt(tf.reduce_sum(tf.square(x), axes, keep))),
    "onnx.ReduceLogSum": _reduced(lambda tf, x, axes, keep: tf.math.log(tf.reduce_sum(x, axes, keep))),
    "onnx.ReduceLogSumExp": _reduced(lambda tf, x, axes, keep: tf.reduce_logsumexp(x, axes, keep)),
    "onnx.ReduceMax": _reduced(lambda tf, x, axes, keep: tf.reduce_max(x, axes, keep)),
    "onnx.ReduceMean": _reduced(lambda tf, x, axes, keep: tf.reduce_mean(x, axes, keep)),
    "onnx.ReduceMin": _reduced(lambda tf, x, axes, keep: tf.reduce_min(x, axes, keep)),
    "onnx.ReduceProd": _reduced(lambda tf, x, axes, keep: tf.reduce_prod(x, axes, keep)),
    "onnx.ReduceSum": _reduced(lambda tf, x, axes, keep: tf.reduce_sum(x, axes, keep)),
    "onnx.ReduceSumSquare": _reduced(lambda tf, x, axes, keep: tf.reduce_sum(tf.square(x), axes, keep)),
    "onnx.ArgMax": _extreme_index(largest=True),
    "onnx.ArgMin": _extreme_index(largest=False),
    "onnx.TopK": Form(_top),
    "onnx.CumSum": Form(_running_sum),
    "onnx.Einsum": Form(_einsum),
    "onnx.Gemm": Form(_gemm),
    "onnx.Softmax": _over_axis(lambda tf, x, axis: tf.nn.softmax(x, axis)),
    "onnx.LogSoftmax": _over_axis(lambda tf, x, axis: tf.nn.log_softmax(x, axis)),
    # norms
    "onnx.LayerNormalization": Form(_layer_norm),
    "onnx.RMSNormalization": Form(_rms_norm),
    "onnx.InstanceNormalization": Form(_instance_norm),
    "onnx.GroupNormalization": Form(_group_norm),
    "onnx.LpNormalization": Form(_lp_norm),
    # windows
    "onnx.Conv": Form(_conv),
    "onnx.MaxPool": _pool(max_pool),
    "onnx.AveragePool": _pool(average_pool),
    "onnx.GlobalAveragePool": _global(lambda tf, x, axes: tf.reduce_mean(x, axes, keepdims=True)),
    "onnx.GlobalMaxPool": _global(lambda tf, x, axes: tf.reduce_max(x, axes, keepdims=True)),
    "onnx.Resize": Form(_resize),
    "onnx.Upsample": Form(_resize),
}  # fmt: skip
