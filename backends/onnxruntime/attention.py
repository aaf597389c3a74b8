"""Attention on onnxruntime: whole, with its projections inside, or as two products and a softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule


def attention(op: Recorder, query: str, key: str, value: str, mask: str | None = None) -> Pattern:
    return op.attention(query, key, value, mask)


# --- forms ---------------------------------------------------------------------------------------------------------


def multi_head(op: Builder, m: Match) -> Value:
    """The contrib kernel: key and value of as many heads as the query, and a mask that is added."""
    _require_plain_heads(m)
    _require_whole_mask(m)
    mask = m.mask and float_mask(op, m.mask, m.query.dtype)
    none = (None, None)
    return op("com.microsoft.MultiHeadAttention", m.query, m.key, m.value, *none, mask, **_attributes(m))


def _packed(op: Builder, m: Match) -> Value:
    """One product makes query, key and value, and nothing of them leaves the kernel."""
    _require_plain_heads(m)
    linears = _require_projections(m, "linear")
    _require_whole_mask(m)
    weight, bias = op.constant(_columns(linears)), op.constant(_biases(linears))
    mask = m.mask and float_mask(op, m.mask, m.query.dtype)
    none = (None, None)
    return op("com.microsoft.Attention", linears[0].input, weight, bias, *none, mask, **_attributes(m))


def _packed_int8(op: Builder, m: Match) -> Value:
    """The same of uint8: its mask tells in integers where attention is allowed, for all heads alike."""
    _require_plain_heads(m)
    linears = _require_projections(m, "linear_int8")
    _require_whole_mask(m)
    if m.mask is not None and (m.mask.dtype is not torch.bool or m.mask.shape[:2] != (m.query.shape[0], 1)):
        raise Declined("mask_unsupported", expected="(batch, 1, length, length) of booleans")
    x, scale, zero_point = linears[0].operands[:3]
    stored = [linear.graph.constant(linear.required("weight_scale")) for linear in linears]
    scales = [tensor.expand(size) for tensor, size in zip(stored, _widths(linears), strict=True) if tensor is not None]
    if len(scales) < len(linears):
        raise Declined("scales_computed")
    parameters = (op.constant(tensor) for tensor in (_columns(linears), _biases(linears)))
    zero = op.constant(torch.zeros((), dtype=torch.int8))
    mask = m.mask and _integer_mask(op, m.mask)
    return op(
        "com.microsoft.QAttention", x, *parameters, scale, op.constant(torch.cat(scales)), mask, zero_point, zero,
        **_attributes(m), mask_filter_value=torch.finfo(torch.float32).min,
    )  # fmt: skip


def _two_products(op: Builder, m: Match) -> Value:
    """Scores, softmax and their product with the values, each by the kernel that every model has."""
    given, heads = m.root.attributes, m.root.attributes["heads"]
    size = _head_size(m)
    if given["causal"]:
        raise Declined("attention_causal")
    if m.mask is not None and m.mask.rank is None:
        raise Declined("mask_shape_unknown")
    shared = (given["kv_heads"] or heads) != heads if heads else m.query.shape[1] != m.key.shape[1]
    if shared:
        raise Declined("key_heads_shared")
    operands = [m.query, m.key, m.value]
    if heads:
        split = op.constant(torch.tensor([0, 0, heads, -1]))
        operands = [op.transpose(op("onnx.Reshape", value, split), perm=(0, 2, 1, 3)) for value in operands]
    query, key, value = operands
    scale = size**-0.5 if given["scale"] is None else float(given["scale"])
    scores = op("com.microsoft.FusedMatMul", query, key, transB=1, alpha=scale)
    if m.mask is not None:
        scores = op.add(scores, float_mask(op, m.mask, m.query.dtype))
    mixed = op.matmul(op.softmax(scores, axis=-1), value)
    if not heads:
        return mixed
    joined = op.constant(torch.tensor([0, 0, heads * size]))
    return op("onnx.Reshape", op.transpose(mixed, perm=(0, 2, 1, 3)), joined)


def _attributes(m: Match) -> dict[str, Any]:
    given = m.root.attributes
    scale = {} if given["scale"] is None else {"scale": float(given["scale"])}
    return {"num_heads": given["heads"], "unidirectional": int(given["causal"]), **scale}


def _head_size(m: Match) -> int:
    heads, size = m.root.attributes["heads"], m.query.shape[-1]
    if not isinstance(size, int):
        raise Declined("head_size_unknown")
    return size // heads if heads else size


def _require_plain_heads(m: Match) -> None:
    given = m.root.attributes
    if not given["heads"] or given["kv_heads"] not in (0, given["heads"]):
        raise Declined("heads_split_or_shared")


# --- masks ---------------------------------------------------------------------------------------------------------


def float_mask(op: Builder, mask: Value, dtype: torch.dtype) -> Value:
    """A mask to add, made once for all its readers: 0 where attention is allowed, the lowest number elsewhere."""

    def emit() -> Value:
        zero, lowest = (op.constant(torch.tensor(number, dtype=dtype)) for number in (0.0, torch.finfo(dtype).min))
        return op.where(mask, zero, lowest)

    return op.once(("float mask", mask, dtype), emit) if mask.dtype is torch.bool else mask


def _integer_mask(op: Builder, mask: Value) -> Value:
    """(batch, 1, length, keys) of booleans as (batch, length, keys) of 0 and 1 in int32, made once."""
    return op.once(("integer mask", mask), lambda: op.cast(op.squeeze(mask, axes=(1,)), dtype=torch.int32))


def _require_whole_mask(m: Match) -> None:
    """Raise Declined where a mask has no entry of its own for every query: contrib kernels do not broadcast it."""
    if m.mask is None:
        return
    lengths = m.query.shape[1], m.key.shape[1]
    if "?" in lengths:
        raise Declined("lengths_unnamed")
    if m.mask.dtype not in (torch.bool, m.query.dtype) or m.mask.rank != 4 or m.mask.shape[2:] != lengths:
        raise Declined("mask_unsupported", expected="(batch, heads, length, length) of booleans or floats")


def _masked_attention(op: Recorder, query: str, key: str, value: str, mask: str) -> Pattern:
    return op.attention(query, key, value, mask)


def _read_float_mask(op: Builder, m: Match) -> Mapping[Value, Value]:
    mask = float_mask(op, m.mask, m.query.dtype)
    return {
        one.root.result: op.graph.emit(one.root, one.query, one.key, one.value, mask, at=one.root) for one in m.group
    }


# --- projections that a kernel takes in ----------------------------------------------------------------------------


def _with_projections(m: Match) -> Sequence[Node]:
    """Attention, and the linears that a packed form takes in."""
    try:
        return *_projections(m), m.root
    except Declined:
        return (m.root,)


def _projections(m: Match) -> list[Node]:
    """The linears that make query, key and value of one input. Raises Declined where there are none."""
    producers = [value.producer for value in (m.query, m.key, m.value)]
    found = [node for node in producers if node is not None and node.kind in ("linear", "linear_int8")]
    if len(set(found)) != 3 or len({linear.kind for linear in found}) != 1:
        raise Declined("projections_missing")
    if len({linear.operands[: linear.operands.index(linear.required("weight"))] for linear in found}) != 1:
        raise Declined("projections_of_several_inputs")
    if any(linear.result.only_user is None for linear in found):
        raise Declined("projections_read_elsewhere")
    parameters = [value for linear in found for value in (linear.required("weight"), linear.bias) if value is not None]
    if any(not value.is_constant for value in parameters):
        raise Declined("projections_computed")
    return found


def _require_projections(m: Match, kind: str) -> list[Node]:
    linears = _projections(m)
    if linears[0].kind != kind:
        raise Declined("projections_of_other_kind", found=linears[0].kind, expected=kind)
    if len(set(_widths(linears))) != 1:
        raise Declined("projections_differ_in_width", widths=_widths(linears))
    return linears


def _widths(linears: Sequence[Node]) -> list[int]:
    return [int(linear.required("weight").shape[0]) for linear in linears]  # type: ignore[index]


def _columns(linears: Sequence[Node]) -> Tensor:
    """The weights side by side, (in, out of all), as the kernels read them."""
    weights = [linear.graph.constant(linear.required("weight")) for linear in linears]
    return torch.cat([weight for weight in weights if weight is not None]).t().contiguous()


def _biases(linears: Sequence[Node]) -> Tensor:
    """The biases one after the other, zeros where there is none: float32 (out of all,)."""
    biases = [linear.graph.constant(linear.bias) if linear.bias is not None else None for linear in linears]
    return torch.cat([torch.zeros(width) if bias is None else bias
                      for bias, width in zip(biases, _widths(linears), strict=True)])  # fmt: skip


# --- heads that the graph splits and joins -------------------------------------------------------------------------


def _between_transposes(reshape: str) -> Callable[..., Pattern]:
    """Heads are split before the attention, and joined after it.

    reshape: the op, or ONNX's operator where the shape that it is told copies sizes by 0.
    """

    def split(op: Recorder, name: str) -> Pattern:
        return op.transpose(getattr(op, reshape)(name, f"{name}_shape"), perm=(0, 2, 1, 3))

    def pattern(op: Recorder, query: str, key: str, value: str, query_shape: str, key_shape: str, value_shape: str,
                shape: str, mask: str | None = None) -> Pattern:  # fmt: skip
        operands = (split(op, name) for name in (query, key, value))
        joined = op.transpose(op.attention(*operands, mask, heads=0, bind="attention"), perm=(0, 2, 1, 3))
        reshaped: Pattern = getattr(op, reshape)(joined, shape)
        return reshaped

    return pattern


def _attention_3d(op: Builder, m: Match) -> Value:
    """Attention that splits the heads itself needs no Reshape and Transpose around it."""
    query, key, value = (m.attention.required(name).shape for name in ("query", "key", "value"))
    split = (query, m.query.shape), (key, m.key.shape), (value, m.value.shape)
    joined = m.attention.result.shape, m.root.result.shape
    if not all(splits_heads(*shapes) for shapes in (*split, joined)):
        raise Declined("heads_unknown")
    attributes = dict(m.attention.attributes) | {"heads": query[1], "kv_heads": key[1]}
    return op.attention(m.query, m.key, m.value, m.mask, **attributes)


def splits_heads(split: tuple[int | str, ...] | None, flat: tuple[int | str, ...] | None) -> bool:
    """Whether (batch, heads, length, size) is (batch, length, heads * size) split, with heads and size known.

    A reshape may also cut the batch or the length, as attention within blocks does; unnamed axes could hide that.
    """
    if split is None or flat is None or len(split) != 4 or len(flat) != 3:
        return False
    batch, heads, length, size = split
    if "?" in (batch, length) or (batch, length) != flat[:2]:
        return False
    return isinstance(heads, int) and isinstance(size, int) and flat[2] == heads * size


ATTENTION_3D = (
    Rule("attention-3d", _between_transposes("reshape"), _attention_3d),
    Rule("attention-3d-of-copied-sizes", _between_transposes("onnx.Reshape"), _attention_3d),
)
FORMS = Choice(
    "attention",
    attention,
    {
        "Attention": None,  # ONNX's own comes first: it took every case, and was the fastest in most of them
        "MultiHeadAttention": multi_head,
        "packed Attention": _packed,
        "QAttention": _packed_int8,
        "two products": _two_products,
    },
    around=_with_projections,
)
FLOAT_MASK_ONCE = Rule(
    "float-mask-once",
    _masked_attention,
    _read_float_mask,
    check=lambda m: m.mask.dtype is torch.bool,
    group_by=lambda m: (m.mask, m.query.dtype),
)
"""Applied after FORMS: the kernel of ONNX's Attention turns a boolean mask into floats in each layer; once will do."""
