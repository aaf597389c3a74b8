"""How torch.fx spells each op: one reader of aten nodes and one writer per op.

An operand that is no tensor in aten is not made one: a Python number is a `Literal`, the shape of a reshape is `Sizes`.
Passes see both as constant values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphopt.dialects.fx import custom_operators
from graphopt.dialects.fx.native import meta
from graphopt.errors import GraphError
from graphopt.ir.ops import OPS
from graphopt.ir.ops.quantization import integer_range


@dataclass(frozen=True)
class Literal:
    """A Python number in a node's arguments, with the dtype that it is computed in."""

    number: float | int | bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Sizes:
    """The shape argument of a reshape: integers, and nodes that compute a SymInt."""

    items: tuple[int | fx.Node, ...]


Raw = fx.Node | Literal | Sizes | None
"""An operand as it stands in the graph."""

Arguments = Mapping[str, Any]
"""A node's arguments by their names in the schema, defaults filled in."""


@dataclass(frozen=True)
class Read:
    """A node read as an op."""

    op: str
    operands: tuple[Raw, ...]
    attributes: dict[str, Any]


class Writer(Protocol):
    """What the writer of an op needs to insert nodes."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, its meta inferred."""

    def tensor(self, raw: Raw) -> fx.Node | None:
        """The operand as a tensor node: numbers and sizes become constants."""

    def constant(self, raw: Raw) -> Tensor | None:
        """The tensor of a constant operand."""

    def add(self, tensor: Tensor) -> fx.Node:
        """A new constant."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an OpOverload by name, defaults filled in."""
    names, defaults = _parameters(node.target)
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


@cache
def _parameters(target: Any) -> tuple[list[str], dict[str, Any]]:
    parameters = target._schema.arguments
    return [p.name for p in parameters], {p.name: p.default_value for p in parameters}


# --- reading -------------------------------------------------------------------------------------------------------


def read(node: fx.Node, constant: Callable[[fx.Node], Tensor | None]) -> Read | None:
    """The node as an op, or None where it is opaque. `constant` gives the tensor of a constant node."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    reader = _READERS.get(str(node.target))
    return reader(node, arguments(node), constant) if reader is not None else None


Reader = Callable[[fx.Node, dict[str, Any], Callable[[fx.Node], Tensor | None]], Read | None]


def _reader(op: str, *operands: str, **attributes: str) -> Reader:
    """Reads an op whose operands and attributes are arguments of the call under these names."""
    return lambda node, a, constant: Read(
        op, tuple(a[name] for name in operands), {key: a[name] for key, name in attributes.items()}
    )


def _read_arithmetic(op: str, first: str = "self", second: str = "other") -> Reader:
    """A binary operation; either side may be a Python number."""

    def read_one(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
        if a.get("alpha", 1) != 1 or not isinstance(meta(node), Tensor):
            return None
        return Read(op, (_operand(a[first], node), _operand(a[second], node)), {})

    return read_one


def _operand(argument: Any, node: fx.Node) -> Raw:
    return argument if isinstance(argument, fx.Node) else Literal(argument, meta(node).dtype)


def _read_where(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    if not isinstance(meta(node), Tensor):
        return None
    return Read("where", (a["condition"], _operand(a["self"], node), _operand(a["other"], node)), {})


def _read_conv(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    weight = meta(a["weight"])
    if not isinstance(weight, Tensor) or weight.dim() not in (3, 4, 5):
        return None
    if a.get("transposed", "output_padding" in a):
        return _read_conv_transpose(a)
    rank = weight.dim() - 2

    def per_axis(name: str) -> tuple[int, ...]:
        return tuple(a[name]) * (rank if len(a[name]) == 1 else 1)

    dilation = per_axis("dilation")
    if isinstance(a["padding"], str):
        total = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        total = [0] * rank if a["padding"] == "valid" else total
        padding = (*(n // 2 for n in total), *(n - n // 2 for n in total))
    else:
        padding = per_axis("padding") * 2
    attributes = {"stride": per_axis("stride"), "padding": padding, "dilation": dilation, "groups": a["groups"]}
    return Read("conv", (a["input"], a["weight"], a["bias"]), attributes)


def _read_conv_transpose(a: dict[str, Any]) -> Read | None:
    rank = meta(a["weight"]).dim() - 2
    if meta(a["input"]).dim() != rank + 2:  # without a batch
        return None
    per_axis = {
        name: tuple(a[name]) * (rank if len(a[name]) == 1 else 1)
        for name in ("stride", "padding", "output_padding", "dilation")
    }
    attributes = per_axis | {"padding": per_axis["padding"] * 2, "groups": a["groups"]}
    return Read("conv_transpose", (a["input"], a["weight"], a["bias"]), attributes)


def _read_pool(op: str, given: str = "self") -> Reader:
    def read_one(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
        x, rank = meta(a[given]), int(str(node.target).partition("pool")[2][0])  # of max_pool2d: 2
        if x.dim() != rank + 2 or a.get("divisor_override") is not None:  # without a batch, or no mean
            return None
        if op == "average_pool" and not x.is_floating_point():
            return None

        def per_axis(name: str) -> tuple[int, ...]:
            return tuple(a[name]) * (rank if len(a[name]) == 1 else 1)

        attributes = {"kernel": per_axis("kernel_size"), "padding": per_axis("padding") * 2, "ceil": a["ceil_mode"]}
        attributes["stride"] = per_axis("stride") if a["stride"] else attributes["kernel"]
        own = {"dilation": per_axis("dilation")} if op == "max_pool" else {"include_pad": a["count_include_pad"]}
        return Read(op, (a[given],), attributes | own)

    return read_one


def _read_adaptive(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    """Pooling to one entry along each axis is a mean."""
    x, rank = meta(a["self"]), len(a["output_size"])
    if list(a["output_size"]) != [1] * rank or not x.is_floating_point():
        return None
    return Read("mean", (a["self"],), {"axes": tuple(range(x.dim() - rank, x.dim())), "keepdim": True})


def _read_clip(low: str | float, high: str | float) -> Reader:
    """Reads a clip whose bounds are arguments of these names, or these numbers."""

    def read_one(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
        bounds = [a.get(bound) if isinstance(bound, str) else bound for bound in (low, high)]
        dtype = meta(node).dtype
        if dtype != meta(a["self"]).dtype or not all(bound is None or _fits(bound, dtype) for bound in bounds):
            return None
        found = [None if bound is None else float(bound) for bound in bounds]
        return Read("clip", (a["self"],), {"low": found[0], "high": found[1]})

    return read_one


def _fits(number: Any, dtype: torch.dtype) -> bool:
    """Whether an argument is a number that a float holds, and a value of this dtype."""
    if not isinstance(number, int | float):
        return False
    return dtype.is_floating_point or (float(number).is_integer() and float(number) == number)


def _read_leaky_relu(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    slope = a["negative_slope"]
    return Read("leaky_relu", (a["self"],), {"slope": float(slope)}) if isinstance(slope, int | float) else None


def _read_pad(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    value = a["value"] if a["value"] is not None else 0.0
    sides, x = a["pad"], meta(a["self"])
    if a.get("mode", "constant") != "constant" or not _fits(value, x.dtype):
        return None
    if not all(isinstance(side, int) for side in sides):
        return None
    sides = [*sides, *[0] * (2 * x.dim() - len(sides))]
    return Read("pad", (a["self"],), {"padding": (*sides[-2::-2], *sides[::-2]), "value": float(value)})


def _read_concat(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    """aten promotes dtypes, and passes over values of shape (0,); the op does neither."""
    parts = [meta(part) for part in a["tensors"]]
    same = all(part.dtype == meta(node).dtype and part.dim() == meta(node).dim() for part in parts)
    return Read("concat", tuple(a["tensors"]), {"axis": a["dim"]}) if same else None


def _read_squeeze(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    """aten ignores axes that are not of size 1; the op does not allow them."""
    axes, sizes = a["dim"] if isinstance(a["dim"], list | tuple) else (a["dim"],), meta(a["self"]).shape
    ones = sizes and all(isinstance(sizes[axis], int) and sizes[axis] == 1 for axis in axes)
    return Read("squeeze", (a["self"],), {"axes": tuple(axes)}) if ones else None


def _read_unsqueeze(node: fx.Node, a: dict[str, Any], constant: Any) -> Read:
    return Read("unsqueeze", (a["self"],), {"axes": (a["dim"],)})


def _read_attention(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    query = meta(a["query"])
    if a["dropout_p"] != 0.0 or not isinstance(query, Tensor) or query.dim() != 4:
        return None
    operands = (a["query"], a["key"], a["value"], a["attn_mask"])
    return Read("attention", operands, {"scale": a["scale"], "causal": a["is_causal"], "heads": 0, "kv_heads": 0})


def _read_norm(op: str) -> Reader:
    def read_one(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
        if a["weight"] is None:
            return None
        eps = a["eps"] if a["eps"] is not None else torch.finfo(meta(node).dtype).eps
        operands = (a["input"], a["weight"], a["bias"]) if op == "layer_norm" else (a["input"], a["weight"])
        return Read(op, operands, {"eps": eps})

    return read_one


def _read_batch_norm(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    operands = (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"])
    return None if a["training"] or None in operands else Read("batch_norm", operands, {"eps": a["eps"]})


def _read_softmax(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    changes_dtype = a.get("half_to_float") or a.get("dtype") not in (None, meta(a["self"]).dtype)
    return None if changes_dtype else Read("softmax", (a["self"],), {"axis": a["dim"]})


def _read_mean(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    if a["dtype"] is not None or not a["dim"]:
        return None
    return Read("mean", (a["self"],), {"axes": tuple(a["dim"]), "keepdim": a["keepdim"]})


def _read_clone(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    """A copy changes only strides, on which few operations depend (reshape is written so that it does not)."""
    return None if any(str(user.target) in _STRIDED for user in node.users) else Read("identity", (a["self"],), {})


_STRIDED = {
    "aten.as_strided.default",
    "aten.view.dtype",
    "aten.view_as_complex.default",
    "aten.view_as_real.default",
}


def _read_dropout(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    return None if a["train"] and a["p"] != 0.0 else Read("identity", (a["input"],), {})


def _read_cast(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    before, after = meta(a["self"]), meta(node)
    if before.device != after.device or before.layout != after.layout:
        return None
    if before.dtype == after.dtype:
        return Read("identity", (a["self"],), {})
    return Read("cast", (a["self"],), {"dtype": after.dtype})


def _read_reshape(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    shape = a["size"] if "size" in a else a["shape"]
    return Read("reshape", (a["self"], Sizes(tuple(shape))), {})


def _read_transpose(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    rank = meta(node).dim()
    perm = list(range(rank))
    if "dims" in a:
        perm = [axis % rank for axis in a["dims"]]
    elif rank >= 2:
        first, second = a.get("dim0", 0) % rank, a.get("dim1", 1) % rank
        perm[first], perm[second] = perm[second], perm[first]
    return Read("transpose", (a["self"],), {"perm": tuple(perm)})


def _read_slice(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    x, start, end = a["self"], a["start"] or 0, a["end"]
    if a["step"] != 1 or not isinstance(start, int) or not isinstance(end, int | None):
        return None
    if start == 0 and (end is None or end >= _LAST):
        return Read("identity", (x,), {})
    axis = a["dim"] % meta(x).dim()
    size = meta(x).shape[axis]
    if not isinstance(size, int):
        return None
    start, end, _ = slice(start, end).indices(size)
    return Read("slice", (x,), {"axis": axis, "start": start, "end": max(start, end)})


_LAST = 2**63 - 1
"""The end that aten gives a slice that reaches to the end of its axis."""


_SPELLED_BITS = (8, 4, 2)
"""Of what a quantize makes: those that ONNX has types for."""


def _read_quantize(op: str, per_channel: bool) -> Reader:
    def read_one(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
        dtype, axis, bits = a["dtype"], a.get("axis"), _bits(a)
        whole = bits in _SPELLED_BITS and (a["quant_min"], a["quant_max"]) == integer_range(dtype, bits)
        if (op == "quantize" and not whole) or a.get("out_dtype") not in (None, torch.float32):
            return None
        scale, zero_point = (a["scales"], a["zero_points"]) if per_channel else (a["scale"], a["zero_point"])
        scale = scale if isinstance(scale, fx.Node) else Literal(scale, torch.float32)
        zero_point = _zero_point(op, zero_point, dtype, constant)
        own = {"block": 0} if op == "dequantize" else {}
        attributes = {"axis": axis, "bits": bits} | own
        return None if zero_point is False else Read(op, (a["input"], scale, zero_point), attributes)

    return read_one


def _read_groups(node: fx.Node, a: dict[str, Any], constant: Any) -> Read | None:
    """Groups along the last axis of a matrix; torch takes their scales in any shape, the op as a matrix."""
    x, scale, block = meta(a["input"]), meta(a["scales"]), a["group_size"]
    zero_point = _zero_point("dequantize", a["zero_points"], a["dtype"], constant)
    if a["output_dtype"] != torch.float32 or scale.shape != (x.shape[0], x.shape[1] // block) or zero_point is False:
        return None
    operands = (a["input"], a["scales"], zero_point)
    return Read("dequantize", operands, {"axis": 1, "block": block, "bits": _bits(a)})


def _bits(a: dict[str, Any]) -> int:
    """The bits of the integers, by the range in the arguments; 8 where the dtype has no 8 bits."""
    if a["dtype"] not in (torch.int8, torch.uint8):
        return 8
    low, high = int(a["quant_min"]), int(a["quant_max"])
    return max(high.bit_length() + (a["dtype"] is torch.int8), (-low - 1).bit_length() + 1)


def _zero_point(op: str, raw: Any, dtype: torch.dtype, constant: Callable[[fx.Node], Tensor | None]) -> Any:
    """The op's operand: None where it is 0 and may be left out, False where its dtype is not that of the integers."""
    optional = op == "dequantize" or dtype == torch.int8
    if raw is None:
        return None
    if not isinstance(raw, fx.Node):
        return None if optional and raw == 0 else Literal(raw, dtype)
    tensor = constant(raw)
    if optional and tensor is not None and not bool(tensor.any()):
        return None
    if str(raw.target) == "aten._to_copy.default" and meta(raw).dtype == torch.int64:  # as `write` widens it
        raw = raw.args[0]
    return raw if meta(raw).dtype == dtype else False


def _read_own(op: str) -> Reader:
    def read_one(node: fx.Node, a: dict[str, Any], constant: Any) -> Read:
        attributes = {key: tuple(a[key]) if isinstance(a[key], list) else a[key] for key in OPS[op].attributes}
        return Read(op, tuple(a[name] for name in OPS[op].operands), attributes)

    return read_one


_UNARY = ("relu", "silu", "sqrt", "rsqrt", "reciprocal", "exp", "erf", "tanh", "sigmoid", "isnan")

_READERS: dict[str, Reader] = {
    "aten.linear.default": _reader("linear", "input", "weight", "bias"),
    "aten.conv1d.default": _read_conv,
    "aten.conv2d.default": _read_conv,
    "aten.conv3d.default": _read_conv,
    "aten.conv1d.padding": _read_conv,
    "aten.conv2d.padding": _read_conv,
    "aten.conv3d.padding": _read_conv,
    "aten.convolution.default": _read_conv,
    "aten.conv_transpose1d.default": _read_conv,
    "aten.conv_transpose2d.input": _read_conv,
    "aten.conv_transpose3d.input": _read_conv,
    **{f"aten.max_pool{rank}d.default": _read_pool("max_pool") for rank in (1, 2, 3)},
    "quantized.max_pool2d.default": _read_pool("max_pool", "qx"),
    **{f"aten.avg_pool{rank}d.default": _read_pool("average_pool") for rank in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{rank}d.default": _read_adaptive for rank in (1, 2, 3)},
    "aten.matmul.default": _reader("matmul", "self", "other"),
    "aten.bmm.default": _reader("matmul", "self", "mat2"),
    "aten.mm.default": _reader("matmul", "self", "mat2"),
    "aten.scaled_dot_product_attention.default": _read_attention,
    "aten.layer_norm.default": _read_norm("layer_norm"),
    "aten.rms_norm.default": _read_norm("rms_norm"),
    "aten.batch_norm.default": _read_batch_norm,
    "aten.embedding.default": _reader("embedding", "weight", "indices"),
    "aten.gelu.default": _reader("gelu", "self", approximate="approximate"),
    "aten.clamp.default": _read_clip("min", "max"),
    "aten.clamp_min.default": _read_clip("min", "max"),
    "aten.clamp_max.default": _read_clip("min", "max"),
    "aten.hardtanh.default": _read_clip("min_val", "max_val"),
    "aten.relu6.default": _read_clip(0.0, 6.0),
    "aten.leaky_relu.default": _read_leaky_relu,
    "aten.hardsigmoid.default": _reader("hard_sigmoid", "self"),
    "aten.hardswish.default": _reader("hard_swish", "self"),
    "aten.softmax.int": _read_softmax,
    "aten._softmax.default": _read_softmax,
    "aten.mean.dim": _read_mean,
    "aten.add.Tensor": _read_arithmetic("add"),
    "aten.add.Scalar": _read_arithmetic("add"),
    "aten.mul.Tensor": _read_arithmetic("mul"),
    "aten.mul.Scalar": _read_arithmetic("mul"),
    "aten.sub.Tensor": _read_arithmetic("sub"),
    "aten.sub.Scalar": _read_arithmetic("sub"),
    "aten.rsub.Tensor": _read_arithmetic("sub", "other", "self"),
    "aten.rsub.Scalar": _read_arithmetic("sub", "other", "self"),
    "aten.div.Tensor": _read_arithmetic("div"),
    "aten.div.Scalar": _read_arithmetic("div"),
    "aten.pow.Tensor_Tensor": _read_arithmetic("pow", "self", "exponent"),
    "aten.pow.Tensor_Scalar": _read_arithmetic("pow", "self", "exponent"),
    "aten.pow.Scalar": _read_arithmetic("pow", "self", "exponent"),
    "aten.where.self": _read_where,
    "aten.where.ScalarOther": _read_where,
    "aten.where.ScalarSelf": _read_where,
    "aten.where.Scalar": _read_where,
    "aten.clone.default": _read_clone,
    "aten.alias.default": _reader("identity", "self"),
    "aten.detach.default": _reader("identity", "self"),
    "aten.contiguous.default": _read_clone,
    "aten.lift_fresh_copy.default": _reader("identity", "self"),
    "aten.dropout.default": _read_dropout,
    "aten._to_copy.default": _read_cast,
    "aten.to.dtype": _read_cast,
    "aten.to.dtype_layout": _read_cast,
    "aten.to.device": _read_cast,
    "aten.reshape.default": _read_reshape,
    "aten.view.default": _read_reshape,
    "aten._unsafe_view.default": _read_reshape,
    "aten.permute.default": _read_transpose,
    "aten.transpose.int": _read_transpose,
    "aten.t.default": _read_transpose,
    "aten.slice.Tensor": _read_slice,
    "aten.cat.default": _read_concat,
    "aten.constant_pad_nd.default": _read_pad,
    "aten.pad.default": _read_pad,
    "aten.squeeze.dim": _read_squeeze,
    "aten.squeeze.dims": _read_squeeze,
    "aten.unsqueeze.default": _read_unsqueeze,
    "quantized_decomposed.quantize_per_tensor.default": _read_quantize("quantize", False),
    "quantized_decomposed.quantize_per_tensor.tensor": _read_quantize("quantize", False),
    "quantized_decomposed.quantize_per_channel.default": _read_quantize("quantize", True),
    "quantized_decomposed.dequantize_per_tensor.default": _read_quantize("dequantize", False),
    "quantized_decomposed.dequantize_per_tensor.tensor": _read_quantize("dequantize", False),
    "quantized_decomposed.dequantize_per_channel.default": _read_quantize("dequantize", True),
    "quantized_decomposed.dequantize_per_channel_group.default": _read_groups,
    **{f"aten.{op}.default": _reader(op, "self") for op in _UNARY},
    **{f"graphopt.{op}.default": _read_own(op) for op in custom_operators.NAMES},
}


# --- writing -------------------------------------------------------------------------------------------------------

aten = torch.ops.aten


def write(writer: Writer, op: str, operands: Sequence[Raw], attributes: Mapping[str, Any]) -> fx.Node:
    """Insert nodes that mean `op`; returns the node of its results. Operands and attributes must be complete."""
    spell = _SPELLINGS.get(op)
    if spell is not None:
        return spell(writer, *operands, **attributes)
    nodes = [writer.tensor(raw) for raw in operands]
    if op in custom_operators.NAMES:
        return writer.call(getattr(torch.ops.graphopt, op).default, *nodes, **attributes)
    return writer.call(getattr(aten, op).default, *nodes, **attributes)


def _write_conv(
    writer: Writer, x: Raw, weight: Raw, bias: Raw, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> fx.Node:
    x, weight, bias = writer.tensor(x), writer.tensor(weight), writer.tensor(bias)
    assert x is not None and weight is not None
    rank = meta(weight).dim() - 2
    if rank not in (1, 2, 3):
        raise GraphError(f"conv takes a weight of rank 3 to 5, not {rank + 2}")
    begin, end = tuple(padding[:rank]) or (0,) * rank, tuple(padding[rank:]) or (0,) * rank
    if begin != end:  # aten pads both ends by the same
        x, begin = _write_pad(writer, x, padding=(*begin, *end), value=0.0), (0,) * rank
    target = (aten.conv1d, aten.conv2d, aten.conv3d)[rank - 1].default
    ones = [1] * rank
    return writer.call(
        target, x, weight, bias, list(stride) or ones, list(begin), list(dilation) or ones, groups
    )  # fmt: skip


def _write_conv_transpose(
    writer: Writer, x: Raw, weight: Raw, bias: Raw, *, stride: Any, padding: Any, output_padding: Any, dilation: Any,
    groups: int,
) -> fx.Node:  # fmt: skip
    x, weight, bias = writer.tensor(x), writer.tensor(weight), writer.tensor(bias)
    assert x is not None and weight is not None
    rank = meta(weight).dim() - 2
    if rank not in (1, 2, 3):
        raise GraphError(f"conv_transpose takes a weight of rank 3 to 5, not {rank + 2}")
    ones, zeros = [1] * rank, [0] * rank
    begin, end = list(padding[:rank]) or zeros, list(padding[rank:]) or zeros
    common = list(map(min, begin, end))  # aten cuts off as much at either end
    target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[rank - 1]
    y = writer.call(
        target, x, weight, bias, list(stride) or ones, common, list(output_padding) or zeros, groups,
        list(dilation) or ones,
    )  # fmt: skip
    if begin == end:
        return y
    rest = [least - side for ends in (begin, end) for least, side in zip(common, ends, strict=True)]
    return _write_pad(writer, y, padding=rest, value=0.0)


def _write_pool(op: str) -> Callable[..., fx.Node]:
    """aten pads both ends by the same, at most half the kernel; other pads need a custom operator.

    On the CPU its max_pool2d counts positions in the type of what is pooled, channels last: past 127 of them it refuses
    uint8, which the kernel for quantized tensors takes as well.
    """
    max_pools = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)
    average_pools = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)

    def spell(
        writer: Writer, x: Raw, *, kernel: Any, stride: Any, padding: Any, ceil: bool, dilation: Any = None,
        include_pad: bool = False,
    ) -> fx.Node:  # fmt: skip
        rank = len(kernel)
        if rank not in (1, 2, 3):
            raise GraphError(f"{op} takes a kernel over 1 to 3 axes, not {rank}")
        ones, zeros = [1] * rank, [0] * rank
        begin, end = list(padding[:rank]) or zeros, list(padding[rank:]) or zeros
        own = {"dilation": list(dilation) or ones} if op == "max_pool" else {"include_pad": include_pad}
        if begin != end or any(2 * pad > size for pad, size in zip(begin, kernel, strict=True)):
            target = getattr(torch.ops.graphopt, op).default
            spelled = {"kernel": list(kernel), "stride": list(stride) or ones, "padding": [*begin, *end], "ceil": ceil}
            return writer.call(target, writer.tensor(x), **spelled, **own)
        node = writer.tensor(x)
        assert node is not None
        window = [node, list(kernel), list(stride) or ones, begin]
        if op == "max_pool":
            value = meta(node)
            plain = rank != 2 or value.dtype != torch.uint8 or value.device.type != "cpu"
            target = max_pools[rank - 1].default if plain else torch.ops.quantized.max_pool2d.default
            return writer.call(target, *window, own["dilation"], ceil)
        return writer.call(average_pools[rank - 1].default, *window, ceil, include_pad)

    return spell


def _write_clip(writer: Writer, x: Raw, *, low: float | None, high: float | None) -> fx.Node:
    node = writer.tensor(x)
    assert node is not None
    if low is None and high is None:
        return writer.call(aten.alias.default, node)
    dtype = meta(node).dtype
    if not dtype.is_floating_point:  # a float bound would make the result float
        low, high = (None if bound is None else int(bound) for bound in (low, high))
    return writer.call(aten.clamp.default, node, low, high)


def _write_pad(writer: Writer, x: Raw, *, padding: Any, value: float) -> fx.Node:
    rank = len(padding) // 2
    sides = [side for axis in reversed(range(rank)) for side in (padding[axis], padding[rank + axis])]
    return writer.call(aten.constant_pad_nd.default, writer.tensor(x), sides, value)


def _write_unsqueeze(writer: Writer, x: Raw, *, axes: Any) -> fx.Node:
    """One node per axis, for aten adds one axis at a time."""
    node = writer.tensor(x)
    assert node is not None
    if not axes:
        raise GraphError("unsqueeze needs its axes")
    rank = meta(node).dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes) if len(axes) > 1 else axes:
        node = writer.call(aten.unsqueeze.default, node, axis)
    return node


def _write_attention(
    writer: Writer, query: Raw, key: Raw, value: Raw, mask: Raw, *, scale: Any, causal: bool, heads: int, kv_heads: int
) -> fx.Node:
    parts = [writer.tensor(raw) for raw in (query, key, value)]
    if heads:
        parts = [
            writer.call(aten.transpose.int, writer.call(aten.unflatten.int, part, -1, [count, -1]), 1, 2)
            for part, count in zip(parts, (heads, kv_heads or heads, kv_heads or heads), strict=True)
        ]
    shapes = [meta(part).shape for part in parts if part is not None]
    if any(len(shape) != 4 for shape in shapes):
        raise GraphError(f"attention takes 4-D query, key and value (3-D with heads), not {shapes}")
    grouped = shapes[0][1] != shapes[1][1]
    y = writer.call(
        aten.scaled_dot_product_attention.default, *parts, writer.tensor(mask), 0.0, causal,
        scale=scale, enable_gqa=grouped,
    )  # fmt: skip
    return writer.call(aten.flatten.using_ints, writer.call(aten.transpose.int, y, 1, 2), 2) if heads else y


def _write_norm(target: Any) -> Callable[..., fx.Node]:
    def spell(writer: Writer, x: Raw, weight: Raw, *bias: Raw, eps: float) -> fx.Node:
        weight = writer.tensor(weight)
        assert weight is not None
        shape = list(meta(weight).shape)
        return writer.call(target, writer.tensor(x), shape, weight, *map(writer.tensor, bias), eps)

    return spell


def _write_batch_norm(
    writer: Writer, x: Raw, weight: Raw, bias: Raw, mean: Raw, var: Raw, *, eps: float
) -> fx.Node:  # fmt: skip
    nodes = map(writer.tensor, (x, weight, bias, mean, var))
    return writer.call(aten.batch_norm.default, *nodes, False, 0.0, eps, False)


def _write_embedding(writer: Writer, table: Raw, ids: Raw) -> fx.Node:
    ids = writer.tensor(ids)
    assert ids is not None
    if meta(ids).dtype not in (torch.int32, torch.int64):
        ids = writer.call(aten._to_copy.default, ids, dtype=torch.int64)
    return writer.call(aten.embedding.default, writer.tensor(table), ids)


def _write_arithmetic(target: Any, commutes: bool = False, first_number: Any = None) -> Callable[..., fx.Node]:
    """A binary operation. `first_number` takes (b, number a), as rsub does; without it such a number is a constant."""

    def spell(writer: Writer, a: Raw, b: Raw) -> fx.Node:
        if isinstance(a, Literal) and not isinstance(b, Literal):
            if commutes:
                a, b = b, a
            elif first_number is not None:
                return writer.call(first_number, writer.tensor(b), a.number)
        return writer.call(target, writer.tensor(a), b.number if isinstance(b, Literal) else writer.tensor(b))

    return spell


def _write_pow(writer: Writer, a: Raw, b: Raw) -> fx.Node:
    if isinstance(b, Literal):
        return writer.call(aten.pow.Tensor_Scalar, writer.tensor(a), b.number)
    if isinstance(a, Literal):
        return writer.call(aten.pow.Scalar, a.number, writer.tensor(b))
    return writer.call(aten.pow.Tensor_Tensor, writer.tensor(a), writer.tensor(b))


def _write_reshape(writer: Writer, x: Raw, shape: Raw) -> fx.Node:
    if isinstance(shape, Sizes):
        sizes = list(shape.items)
    else:
        tensor = writer.constant(shape)
        if tensor is None:
            raise GraphError("fx reshapes to a constant shape, or to one that another reshape has")
        sizes = tensor.flatten().tolist()
    return writer.call(aten.reshape.default, writer.tensor(x), sizes)


def _write_quantize(kind: str) -> Callable[..., fx.Node]:
    def spell(
        writer: Writer, x: Raw, scale: Raw, zero_point: Raw, *, axis: int | None, block: int = 0, bits: int = 8
    ) -> fx.Node:
        ops = quantized_decomposed()
        x, scale, zero = writer.tensor(x), writer.tensor(scale), writer.tensor(zero_point)
        assert x is not None and scale is not None
        dtype = meta(x).dtype if kind == "dequantize" else torch.int8 if zero is None else meta(zero).dtype
        if dtype in _FLOAT8 or (axis is None and meta(scale).dim() > 0):  # torch has no operators for these
            own = {"block": block} if kind == "dequantize" else {}
            target = getattr(torch.ops.graphopt, kind).default
            return writer.call(target, x, scale, zero, axis=axis, bits=bits, **own)
        if dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32):
            raise GraphError(f"{kind} knows uint8, int8, int16 and int32, not {dtype}")
        low, high = integer_range(dtype, bits)
        if axis is None or meta(scale).dim() == 0:
            zero = zero if zero is not None else writer.add(torch.zeros((), dtype=dtype))
            return writer.call(getattr(ops, f"{kind}_per_tensor").tensor, x, scale, zero, low, high, dtype)
        if zero is not None:  # aten subtracts in the integers' own dtype, which would wrap around
            zero = writer.call(aten._to_copy.default, zero, dtype=torch.int64)
        elif kind == "quantize":
            zero = writer.add(torch.zeros(meta(scale).shape, dtype=torch.int64))
        if block:
            _require_groups(meta(x).shape, axis, block)
            target = ops.dequantize_per_channel_group.default
            return writer.call(target, x, scale, zero, low, high, dtype, block, torch.float32)
        target = getattr(ops, f"{kind}_per_channel").default
        return writer.call(target, x, scale, zero, axis % meta(x).dim(), low, high, dtype)

    return spell


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _require_groups(shape: Sequence[int], axis: int, block: int) -> None:
    if len(shape) != 2 or axis % 2 != 1 or shape[1] % block or block < 2:
        raise GraphError(f"fx dequantizes blocks of 2 or more that divide axis 1 of a matrix, not {block} along axis "
                         f"{axis} of {list(shape)}")  # fmt: skip


def quantized_decomposed() -> Any:
    """The operators torch.ops.quantized_decomposed, which exist once their module was imported."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


_SPELLINGS: dict[str, Callable[..., fx.Node]] = {
    "conv": _write_conv,
    "conv_transpose": _write_conv_transpose,
    "max_pool": _write_pool("max_pool"),
    "average_pool": _write_pool("average_pool"),
    "attention": _write_attention,
    "layer_norm": _write_norm(aten.layer_norm.default),
    "rms_norm": _write_norm(aten.rms_norm.default),
    "batch_norm": _write_batch_norm,
    "embedding": _write_embedding,
    "add": _write_arithmetic(aten.add.Tensor, commutes=True),
    "mul": _write_arithmetic(aten.mul.Tensor, commutes=True),
    "sub": _write_arithmetic(aten.sub.Tensor, first_number=aten.rsub.Scalar),
    "div": _write_arithmetic(aten.div.Tensor),
    "pow": _write_pow,
    "clip": _write_clip,
    "leaky_relu": lambda writer, x, slope: writer.call(aten.leaky_relu.default, writer.tensor(x), slope),
    "hard_sigmoid": lambda writer, x: writer.call(aten.hardsigmoid.default, writer.tensor(x)),
    "hard_swish": lambda writer, x: writer.call(aten.hardswish.default, writer.tensor(x)),
    "softmax": lambda writer, x, axis: writer.call(aten.softmax.int, writer.tensor(x), axis),
    "mean": lambda writer, x, axes, keepdim: writer.call(aten.mean.dim, writer.tensor(x), list(axes), keepdim),
    "where": lambda writer, *operands: writer.call(aten.where.self, *map(writer.tensor, operands)),
    "identity": lambda writer, x: writer.call(aten.alias.default, writer.tensor(x)),
    "reshape": _write_reshape,
    "transpose": lambda writer, x, perm: writer.call(aten.permute.default, writer.tensor(x), list(perm)),
    "cast": lambda writer, x, dtype: writer.call(aten._to_copy.default, writer.tensor(x), dtype=dtype),
    "slice": lambda writer, x, axis, start, end: writer.call(aten.slice.Tensor, writer.tensor(x), axis, start, end),
    "concat": lambda writer, *values, axis: writer.call(aten.cat.default, [*map(writer.tensor, values)], axis),
    "pad": _write_pad,
    "squeeze": lambda writer, x, axes: writer.call(aten.squeeze.dims, writer.tensor(x), list(axes)),
    "unsqueeze": _write_unsqueeze,
    "quantize": _write_quantize("quantize"),
    "dequantize": _write_quantize("dequantize"),
}
