"""Float words on onnxruntime: forms that its own fusions do not undo, and whichever runs faster here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.graph import Value
from graphopt.rewrite import Builder, Choice, Declined, Match, Pattern, Recorder, Rule


def stages() -> Sequence[Sequence[Rule | Choice]]:
    """For one graph."""
    return (RESIDUAL, ATTENTION_3D), (_float_mask_once(),), (ATTENTION,)


def _residual_add(op: Recorder, x: str, residual: str) -> Pattern:
    return op.add(x, residual)


def _is_normalized(m: Match) -> bool:
    added = m.root.result
    return any(user.kind == "layer_norm" and user.input == added for user in added.users)


def _sum_then_norm(op: Builder, m: Match) -> Value:
    """The SkipLayerNormalization that onnxruntime makes of an Add is 6 times slower; it does not match a Sum.

    Whoever else reads the Add (the next residual add of a pre-norm model) reads the Sum too: it is computed once.
    """
    if m.x.shape is None or m.x.shape != m.residual.shape:
        raise Declined("the two inputs of the residual add differ in shape")
    return op("onnx.Sum", m.x, m.residual)


def _split_heads(op: Recorder, name: str) -> Pattern:
    return op.transpose(op.reshape(name, f"{name}_shape"), perm=(0, 2, 1, 3))


def _attention_4d(op: Recorder, query: str, key: str, value: str, query_shape: str, key_shape: str, value_shape: str,
                  shape: str, mask: str | None = None) -> Pattern:  # fmt: skip
    attention = op.attention(
        _split_heads(op, query), _split_heads(op, key), _split_heads(op, value), mask, heads=0, bind="attention"
    )
    return op.reshape(op.transpose(attention, perm=(0, 2, 1, 3)), shape)


def _attention_3d(op: Builder, m: Match) -> Value:
    """Attention that splits the heads itself needs no Reshape and Transpose around it."""
    query, key, value = (m.attention.required(name).shape for name in ("query", "key", "value"))
    split = (query, m.query.shape), (key, m.key.shape), (value, m.value.shape)
    joined = m.attention.result.shape, m.root.result.shape
    if not all(_known_heads(*one) for one in (*split, joined)):
        raise Declined("heads are not known to be split from, and joined to, the last axis")
    attributes = dict(m.attention.attributes) | {"heads": query[1], "kv_heads": key[1]}
    return op.attention(m.query, m.key, m.value, m.mask, **attributes)


def _known_heads(split: tuple[int | str, ...] | None, flat: tuple[int | str, ...] | None) -> bool:
    """Whether (batch, heads, length, size) is (batch, length, heads · size) split, with heads and size known.

    A reshape may also cut the batch or the length, as attention within blocks does; unnamed axes could hide that.
    """
    if split is None or flat is None or len(split) != 4 or len(flat) != 3:
        return False
    batch, heads, length, size = split
    if "?" in (batch, length) or (batch, length) != flat[:2]:
        return False
    return isinstance(heads, int) and isinstance(size, int) and flat[2] == heads * size


def _masked_attention(op: Recorder, query: str, key: str, value: str, mask: str) -> Pattern:
    return op.attention(query, key, value, mask, bind="attention")


def _float_mask_once() -> Rule:
    """A rule for one graph: it remembers the masks that it made, so that every reader after the first shares them."""
    made: dict[Value, Value] = {}

    def shares_boolean_mask(m: Match) -> bool:
        readers = sum(user.kind == "attention" for user in m.mask.users)
        return m.mask.dtype is torch.bool and (readers > 1 or m.mask in made)

    def read_float_mask(op: Builder, m: Match) -> Value:
        """The kernel turns a boolean mask into floats at every layer; for several layers, once is enough."""
        if m.mask not in made:
            dtype = m.query.dtype
            zero, lowest = (op.constant(torch.tensor(n, dtype=dtype)) for n in (0.0, torch.finfo(dtype).min))
            made[m.mask] = op.where(m.mask, zero, lowest)
        return op.attention(m.query, m.key, m.value, made[m.mask], **m.attention.attributes)

    return Rule("float-mask-once", _masked_attention, read_float_mask, check=shares_boolean_mask)


def _attention(op: Recorder, query: str, key: str, value: str, mask: str | None = None) -> Pattern:
    return op.attention(query, key, value, mask)


def multi_head_attention(op: Builder, m: Match) -> Value:
    """The contrib kernel: key and value of as many heads as the query, and a mask that is added."""
    given = m.root.attributes
    heads = given["heads"]
    if not heads or given["kv_heads"] not in (0, heads):
        raise Declined("its heads are split before it, or shared in groups")
    mask = m.mask
    if mask is not None and (mask.dtype is not m.query.dtype or mask.rank != 4):
        raise Declined("its mask is not (batch, heads, length, length) of floats")
    attributes = {"num_heads": heads, "unidirectional": int(given["causal"])}
    if given["scale"] is not None:
        attributes["scale"] = float(given["scale"])
    none = (None, None)
    return op("com.microsoft.MultiHeadAttention", m.query, m.key, m.value, *none, mask, **attributes)


RESIDUAL = Choice(
    "residual-norm",
    _residual_add,
    {"Sum": _sum_then_norm, "SkipLayerNormalization": None},  # which onnxruntime makes of the words as they are
    check=_is_normalized,
    around=lambda m: (m.root, *(user for user in m.root.result.users if user.kind == "layer_norm")),
)
ATTENTION_3D = Rule("attention-3d", _attention_4d, _attention_3d)
ATTENTION = Choice("attention", _attention, {"Attention": None, "MultiHeadAttention": multi_head_attention})
