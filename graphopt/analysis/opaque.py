"""How the axes relate in operations that no canonical op covers: one line per operation, in OPAQUE at the end.

What an ONNX or aten operation has in common with an op is the op's own relation, from `graphopt.ir`; what stands here
reads the operands and attributes by the names that its dialect gives them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.ir.axes import (
    NodeAxes,
    Positions,
    Relation,
    Sides,
    Unclear,
    elementwise,
    joined,
    over_space,
    padded,
    per_channel,
    reduced,
    reshaped,
    taken,
    trailing_sides,
    unrelated,
)
from graphopt.ir.graph import Value
from graphopt.ir.ops.convolution import conv_axes
from graphopt.ir.ops.linear import product_axes
from graphopt.ir.ops.normalization import norm_axes, softmax_axes


def axis_of(node: NodeAxes, default: int = 0) -> int:
    """The axis that the node is told as `axis` (ONNX) or `dim` (aten), counted from the front of x."""
    axis = node.attributes.get("axis", node.attributes.get("dim", default))
    return int(axis) % max(node.rank(node.x), 1)


# --- products --------------------------------------------------------------------------------------------------------


def conv(node: NodeAxes) -> None:
    _conv(node, transposed=False)


def conv_transpose(node: NodeAxes) -> None:
    _conv(node, transposed=True)


def _conv(node: NodeAxes, transposed: bool) -> None:
    if node.attributes.get("transposed", transposed) != transposed:
        raise Unclear("axis_in_unknown_form")
    groups = node.attributes.get("groups", node.attributes.get("group", 1))  # aten's, ONNX's
    conv_axes(node, int(groups), transposed=transposed)


def bmm(node: NodeAxes) -> None:
    product_axes(node, *node.given)


def gemm(node: NodeAxes) -> None:
    """ONNX's, with either factor transposed, and a third operand that is added."""
    a, b, *added = node.given
    a_axes, b_axes = ((-1, -2) if node.attributes.get(name, 0) else (-2, -1) for name in ("transA", "transB"))
    product_axes(node, a, b, a_axes=a_axes, b_axes=b_axes)
    for value in added:
        node.broadcast(value, node.y)


def addmm(node: NodeAxes) -> None:
    """aten's, whose first operand is the one that is added."""
    added, a, b = node.given
    product_axes(node, a, b)
    node.broadcast(added, node.y)


# --- norms and reductions --------------------------------------------------------------------------------------------


def softmax(node: NodeAxes) -> None:
    softmax_axes(node, axis_of(node, default=-1))


def flattened_softmax(node: NodeAxes) -> None:
    """Softmax as it was before opset 13: over an axis and all axes after it."""
    node.broadcast(node.x, node.y)
    for axis in range(axis_of(node, default=1), node.rank(node.x)):
        node.lock(node.x, axis, "axis_mixed")


def cumulative(node: NodeAxes) -> None:
    """Sums along one axis, which is an attribute in aten and an operand in ONNX."""
    axis = [node.attributes["dim"]] if "dim" in node.attributes else node.constant(1)
    if axis is None:
        raise Unclear("axis_that_is_computed")
    node.unrelated(*node.given[1:])
    node.broadcast(node.x, node.y)
    node.lock(node.x, axis[0], "axis_summed_up")


def layer_norm(node: NodeAxes) -> None:
    """aten's without a weight, over as many trailing axes as it is told sizes of."""
    norm_axes(node, len(node.attributes["normalized_shape"]))


def group_norm(node: NodeAxes) -> None:
    """A group goes whole; parameters are (C,), or (groups,) before opset 21."""
    node.broadcast(node.x, node.y)
    channels = node.positions(node.y, 1)
    if channels is None:
        raise Unclear("axis_of_unknown_channels")
    groups = channels.reshape(int(node.attributes["num_groups"]), -1)
    node.link(*np.broadcast_arrays(groups[:, :1], groups))
    for parameter in node.given[1:]:
        positions = node.positions(parameter, 0)
        if positions is not None:
            node.link(positions, channels if len(positions) == len(channels) else groups[:, 0])


def reduction(node: NodeAxes) -> None:
    """Mean, sum, maximum, ... over axes."""
    onnx = node.kind.startswith("onnx.")
    reduced(node, _reduced_axes(node), bool(node.attributes.get("keepdim", node.attributes.get("keepdims", onnx))))


def _reduced_axes(node: NodeAxes) -> Sequence[int]:
    axes = node.attributes.get("axes", node.attributes.get("dim"))
    if axes is None and len(node.given) > 1:
        axes = node.constant(1)
        if axes is None:
            raise Unclear("axis_that_is_computed")
    if isinstance(axes, int):
        return [axes]
    if axes:
        return list(axes)
    return [] if node.attributes.get("noop_with_empty_axes") else range(node.rank(node.x))


def resize(node: NodeAxes) -> None:
    over_space(node)
    node.unrelated(*node.given[1:])


# --- parts of an axis ------------------------------------------------------------------------------------------------


def onnx_slice(node: NodeAxes) -> None:
    """Along several axes. One that is taken in steps stays."""
    bounds = slice_bounds(node)
    for axis in range(node.rank(node.x)):
        positions = node.positions(node.x, axis)
        if axis not in bounds:
            node.same(node.x, axis, node.y, axis)
        elif positions is not None and bounds[axis].step in (None, 1):
            found = node.positions(node.y, axis)
            if found is None:
                raise Unclear("axis_of_unknown_size")
            node.link(positions[bounds[axis]], found)
        else:
            node.lock(node.x, axis, "axis_taken_in_steps")
            node.lock(node.y, axis, "axis_taken_in_steps")
    node.unrelated(*node.given[1:])


def slice_bounds(node: NodeAxes) -> dict[int, slice]:
    """The slice along each axis that an ONNX Slice names. Raises Unclear where they are computed."""
    if "starts" in node.attributes:  # before opset 10
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        axes, steps = node.attributes.get("axes"), None
    else:
        starts, ends, axes, steps = (node.constant(index) for index in range(1, 5))
        absent = [node.operand(index) is None for index in (3, 4)]
        if starts is None or ends is None or (axes is None and not absent[0]) or (steps is None and not absent[1]):
            raise Unclear("axis_with_computed_bounds")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    rank = node.rank(node.x)
    return {axis % rank: slice(*bounds) for axis, *bounds in zip(axes, starts, ends, steps, strict=True)}


def aten_slice(node: NodeAxes) -> None:
    """What is no slice op: one with steps, or with bounds that are computed. Other axes pass."""
    axis = axis_of(node)
    node.lock(node.x, axis, "axis_taken_in_steps")
    node.lock(node.y, axis, "axis_taken_in_steps")
    node.broadcast(node.x, node.y, skip=[axis])


def split(node: NodeAxes) -> None:
    axis = axis_of(node)
    positions, start = node.positions(node.x, axis), 0
    for y in node.results:
        size = node.shape(y)[axis]
        if not isinstance(size, int):
            raise Unclear("axis_of_unknown_size")
        taken(node, y, axis, None if positions is None else positions[start : start + size])
        start += size
    node.unrelated(*node.given[1:])


def split_to_sequence(node: NodeAxes) -> None:
    """ONNX's SplitToSequence: what reads an item of the sequence relates it to x."""
    node.unrelated(*node.given, *node.results)
    if any(user.kind != "onnx.SequenceAt" for user in node.y.users):
        raise Unclear("axis_in_sequence")


def sequence_item(node: NodeAxes) -> None:
    """ONNX's SequenceAt, of what a SplitToSequence made."""
    producer = node.x.producer
    whole = None if producer is None else NodeAxes(node.relations, producer)
    part = None if whole is None else sequence_slice(node, whole)
    if whole is None or part is None:
        raise Unclear("axis_in_sequence")
    node.unrelated(*node.given)
    positions, found = node.positions(whole.x, part[0]), node.positions(node.y, part[0])
    if positions is None or found is None:
        raise Unclear("axis_of_unknown_size")
    node.link(positions[part[1]], found)
    node.broadcast(whole.x, node.y, skip=[part[0]])


def sequence_slice(node: NodeAxes, whole: NodeAxes) -> tuple[int, slice] | None:
    """The axis and the slice along it that an item of a SplitToSequence is; None where that is not known."""
    index = node.constant(1)
    if whole.kind != "onnx.SplitToSequence" or index is None or whole.attributes.get("keepdims", 1) != 1:
        return None
    axis = axis_of(whole)
    size, parts = whole.shape(whole.x)[axis], whole.constant(1)
    if not isinstance(size, int) or parts is None:
        return None
    if len(parts) == 1:
        parts = [min(parts[0], size - start) for start in range(0, size, parts[0])]
    start = sum(parts[: index[0] % len(parts)])
    return axis, slice(start, start + parts[index[0] % len(parts)])


def gather(node: NodeAxes) -> None:
    """By a constant index the positions are followed; by any other the axis stays."""
    axis = axis_of(node)
    index, indices = gather_index(node)
    picked = int(isinstance(index, list))
    positions = node.positions(node.x, axis)
    if isinstance(index, int) and positions is not None:
        node.relations.locks.append((positions[[index]], node.reason("axis_picked_by_index")))
    elif isinstance(index, list) and positions is not None and node.positions(node.y, axis) is not None:
        node.link(positions[index], np.asarray(node.positions(node.y, axis)))
    else:
        node.lock(node.x, axis, "axis_looked_up")
        picked = node.rank(node.y) - node.rank(node.x) + 1
    for before in range(axis):
        node.same(node.x, before, node.y, before)
    for after in range(axis + 1, node.rank(node.x)):
        node.same(node.x, after, node.y, after - 1 + picked)
    if indices is not None and index is None:
        for inner in range(picked):
            node.same(indices, inner, node.y, axis + inner)
    elif indices is not None:
        node.unrelated(indices)


def gather_index(node: NodeAxes) -> tuple[int | list[int] | None, Value | None]:
    """A constant index, a number or a list, else None; and the operand that it is, where it is one."""
    if "index" in node.attributes:  # aten.select.int
        return int(node.attributes["index"]), None
    indices = node.operand(1)
    found = node.constant(1) if indices is not None and node.rank(indices) < 2 else None
    if found is None or indices is None:
        return None, indices
    return found if node.rank(indices) == 1 else found[0], indices


def unbind(node: NodeAxes) -> None:
    axis = axis_of(node)
    node.lock(node.x, axis, "axis_taken_apart")
    for y in node.results:
        for other in range(node.rank(y)):
            node.same(node.x, other + (other >= axis), y, other)


# --- more of an axis -------------------------------------------------------------------------------------------------


def concat(node: NodeAxes) -> None:
    joined(node, axis_of(node))


def stack(node: NodeAxes) -> None:
    axis = int(node.attributes.get("dim", 0)) % node.rank(node.y)
    for value in node.given:
        for other in range(node.rank(value)):
            node.same(value, other, node.y, other + (other >= axis))
    node.lock(node.y, axis, "axis_stacked")


def pad(node: NodeAxes) -> None:
    padded(node, padding(node), node.attributes.get("mode", "constant") == "constant")


def padding(node: NodeAxes) -> Sides:
    """How many entries are added before and after each padded axis. Raises Unclear where it is computed."""
    rank = node.rank(node.x)
    if "pad" in node.attributes:  # aten: from the last axis
        flat = list(node.attributes["pad"])
        return {rank - 1 - i: (int(flat[2 * i]), int(flat[2 * i + 1])) for i in range(len(flat) // 2)}
    amounts = node.attributes.get("pads", node.constant(1))
    axes = node.constant(3) if node.operand(3) is not None else None
    if amounts is None or (node.operand(3) is not None and axes is None):
        raise Unclear("axis_padded_by_computed_amount")
    if axes is None:
        return trailing_sides(node, amounts)
    return {axis % rank: (int(amounts[i]), int(amounts[i + len(axes)])) for i, axis in enumerate(axes)}


def expand(node: NodeAxes) -> None:
    """An axis of 1 becomes any, and relates to nothing."""
    node.unrelated(node.y, *node.given[1:])
    node.broadcast(node.x, node.y)


def repeat(node: NodeAxes) -> None:
    """ONNX's Tile, aten's repeat: axes that are repeated stay."""
    node.unrelated(*node.given[1:])
    offset = node.rank(node.y) - node.rank(node.x)
    for axis in range(node.rank(node.y)):
        size = node.shape(node.x)[axis - offset] if axis >= offset else 1
        if axis >= offset and size == node.shape(node.y)[axis]:
            node.same(node.x, axis - offset, node.y, axis)
        else:
            node.lock(node.y, axis, "axis_repeated")
            if axis >= offset:
                node.lock(node.x, axis - offset, "axis_repeated")


def interleave(node: NodeAxes) -> None:
    """aten's repeat_interleave: each position `repeats` times in a row. Key heads are, for queries in groups."""
    axis, repeats = node.attributes.get("dim"), int(node.attributes["repeats"])
    if axis is None or node.attributes.get("output_size") is not None:
        raise Unclear("axis_in_unknown_form")
    positions, found = node.positions(node.x, axis), node.positions(node.y, axis)
    if positions is not None and found is not None:
        node.link(positions.repeat(repeats), found)
    else:
        node.lock(node.x, axis, "axis_repeated")
    node.broadcast(node.x, node.y, skip=[axis % node.rank(node.y)])


# --- channels in another order ---------------------------------------------------------------------------------------


def glu(node: NodeAxes) -> None:
    """The first half of an axis, gated by the second."""
    axis = axis_of(node, default=-1)
    positions, found = node.positions(node.x, axis), node.positions(node.y, axis)
    if positions is None or found is None:
        raise Unclear("axis_of_unknown_size")
    node.link(*np.broadcast_arrays(positions.reshape(2, -1), found))
    node.broadcast(node.x, node.y, skip=[axis])


def roll(node: NodeAxes) -> None:
    node.broadcast(node.x, node.y)
    for axis in node.attributes.get("dims", range(node.rank(node.x))):
        node.lock(node.x, axis, "axis_rolled")


def depth_to_space(node: NodeAxes) -> None:
    """Channels (C, r²), or (r², C) in ONNX's default mode, become C."""
    blocks_first = node.attributes.get("mode", "DCR") == "DCR" and node.kind.startswith("onnx.")
    _depth(node, node.x, node.y, blocks_first)


def space_to_depth(node: NodeAxes) -> None:
    _depth(node, node.y, node.x, node.kind.startswith("onnx."))


def _depth(node: NodeAxes, deep: Value, wide: Value, blocks_first: bool) -> None:
    many, few = node.positions(deep, 1), node.positions(wide, 1)
    if many is None or few is None:
        raise Unclear("axis_of_unknown_channels")
    positions: Positions = many.reshape(-1, len(few)).T if blocks_first else many.reshape(len(few), -1)
    node.link(*np.broadcast_arrays(few[:, None], positions))
    node.same(deep, 0, wide, 0)
    for value in (deep, wide):
        for axis in range(2, node.rank(value)):
            node.lock(value, axis, "axis_of_space")


# --- the table -------------------------------------------------------------------------------------------------------


def _named(relation: Relation, kinds: str) -> dict[str, Relation]:
    return dict.fromkeys(kinds.split(), relation)


_ONNX = (
    _named(elementwise, "Abs Neg Sign Floor Ceil Round Log Sin Cos Tan Atan Not Softplus Softsign Elu Selu Celu Mish")
    | _named(elementwise, "Clip LeakyRelu PRelu HardSigmoid HardSwish ThresholdedRelu Gelu Dropout Max Min Sum Mean")
    | _named(elementwise, "And Or Xor Mod Equal Greater Less GreaterOrEqual LessOrEqual Swish Sigmoid Relu Identity")
    | _named(reduction, "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd")
    | _named(over_space, "MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool")
    | _named(flattened_softmax, "Softmax LogSoftmax Hardmax")
    | _named(reshaped, "Reshape Flatten Squeeze Unsqueeze")
    | _named(unrelated, "Shape Size")
    | {
        "Conv": conv, "ConvTranspose": conv_transpose, "Gemm": gemm, "BatchNormalization": per_channel,
        "InstanceNormalization": per_channel, "GroupNormalization": group_norm, "Resize": resize, "Upsample": resize,
        "Slice": onnx_slice, "Split": split, "SplitToSequence": split_to_sequence, "SequenceAt": sequence_item,
        "Concat": concat, "Gather": gather, "Pad": pad, "Expand": expand, "Tile": repeat,
        "DepthToSpace": depth_to_space, "SpaceToDepth": space_to_depth, "CumSum": cumulative,
    }
)  # fmt: skip

_ATEN = (
    _named(elementwise, "abs neg sign floor ceil round log log1p expm1 sin cos tan atan logical_not bitwise_not elu")
    | _named(elementwise, "clamp clamp_min clamp_max hardtanh hardswish hardsigmoid leaky_relu relu6 softplus mish")
    | _named(elementwise, "maximum minimum logical_and logical_or zeros_like ones_like full_like native_dropout")
    | _named(reduction, "amax amin any")
    | _named(over_space, "max_pool2d avg_pool2d max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d")
    | _named(over_space, "_adaptive_avg_pool2d avg_pool1d max_pool1d adaptive_max_pool2d")
    | _named(reshaped, "view _unsafe_view reshape unsqueeze squeeze")
    | {"cat": concat, "stack": stack, "index_select": gather, "constant_pad_nd": pad, "expand": expand, "bmm": bmm,
       "repeat": repeat, "addmm": addmm, "baddbmm": addmm, "convolution": conv_transpose, "group_norm": group_norm,
       "instance_norm": per_channel, "pixel_shuffle": depth_to_space, "pixel_unshuffle": space_to_depth,
       "prelu": per_channel, "_prelu_kernel": elementwise, "roll": roll, "split_with_sizes": split,
       "cumsum": cumulative, "glu": glu, "pad": pad, "layer_norm": layer_norm, "linalg_vector_norm": reduction}
)  # fmt: skip

_ATEN_OVERLOADS = (
    _named(elementwise, "masked_fill.Scalar masked_fill.Tensor remainder.Tensor remainder.Scalar floor_divide.default")
    | {f"{name}.{kind}": elementwise for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")}
    | {f"__{name}__.Tensor": elementwise for name in ("and", "or", "xor")}
    | _named(reduction, "sum.dim_IntList var.correction std.correction mean.dim any.dim var.dim std.dim")
    | _named(reshaped, "flatten.using_ints unflatten.int squeeze.dim squeeze.dims")
    | _named(over_space, "upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec")
    | _named(split, "split.Tensor chunk.default unsafe_split.Tensor")
    | {"sym_size.int": unrelated, "select.int": gather, "slice.Tensor": aten_slice, "unbind.int": unbind,
       "_log_softmax.default": softmax, "log_softmax.int": softmax, "conv_transpose2d.input": conv_transpose,
       "conv_transpose1d.default": conv_transpose, "repeat_interleave.self_int": interleave}
)  # fmt: skip

OPAQUE: dict[str, Relation] = {
    **{f"onnx.{kind}": relation for kind, relation in _ONNX.items()},
    **{f"aten.{kind}.default": relation for kind, relation in _ATEN.items()},
    **{f"aten.{kind}": relation for kind, relation in _ATEN_OVERLOADS.items()},
}
"""By kind of node. An operation that is not here locks every axis that reaches it."""
