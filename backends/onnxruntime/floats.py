"""Float ops on onnxruntime: forms that its own fusions do not undo, and whichever runs faster here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphopt.backends.onnxruntime import attention as onnxruntime_attention
from graphopt.backends.onnxruntime import linear as onnxruntime_linear
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule


def stages() -> Sequence[Sequence[Rule | Choice]]:
    """For one graph."""
    attention = onnxruntime_attention.Forms()
    linears = *onnxruntime_linear.Siblings().stages(), (onnxruntime_linear.Biases().choice(), GELU)
    return (RESIDUAL, *ATTENTION_3D), (attention.choice(),), (attention.float_mask_once(),), *linears


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


def _attention_4d(reshape: str) -> Callable[..., Pattern]:
    """Heads split before, and joined behind. reshape: the op, or the operator where its shape copies sizes by 0."""

    def split(op: Recorder, name: str) -> Pattern:
        return op.transpose(getattr(op, reshape)(name, f"{name}_shape"), perm=(0, 2, 1, 3))

    def pattern(op: Recorder, query: str, key: str, value: str, query_shape: str, key_shape: str, value_shape: str,
                shape: str, mask: str | None = None) -> Pattern:  # fmt: skip
        sides = (split(op, name) for name in (query, key, value))
        joined = op.transpose(op.attention(*sides, mask, heads=0, bind="attention"), perm=(0, 2, 1, 3))
        made: Pattern = getattr(op, reshape)(joined, shape)
        return made

    return pattern


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


def _tanh_gelu(op: Recorder, x: str) -> Pattern:
    return op.gelu(x, approximate="tanh")


def _fast_gelu(op: Builder, m: Match) -> Value:
    """The same formula, in a kernel of the contrib domain."""
    return op("com.microsoft.FastGelu", m.x)


RESIDUAL = Choice(
    "residual-norm",
    _residual_add,
    {"Sum": _sum_then_norm, "SkipLayerNormalization": None},  # which onnxruntime makes of the ops as they are
    check=_is_normalized,
    around=lambda m: (m.root, *(user for user in m.root.result.users if user.kind == "layer_norm")),
)
ATTENTION_3D = (
    Rule("attention-3d", _attention_4d("reshape"), _attention_3d),
    Rule("attention-3d-of-copied-sizes", _attention_4d("onnx.Reshape"), _attention_3d),
)
GELU = Choice("tanh-gelu", _tanh_gelu, {"Gelu": None, "FastGelu": _fast_gelu})
