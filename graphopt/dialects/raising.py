"""Decomposed forms -> ops, as rules over elementary ops that hold in either dialect. Runs once, at capture.

Exporters, and people, write gelu, silu, the norms and attention out in elementary operators. Each form here is one
pattern; what it becomes is emitted only where its shapes allow, so a rule that declines leaves the graph as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from graphopt.errors import GraphError
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, rewrite, scalar

SQRT2 = math.sqrt(2.0)
GELU_TANH = math.sqrt(2.0 / math.pi)


# --- activations ---------------------------------------------------------------------------------------------------


def gelu_erf_outer(op: Recorder, x: Any) -> Pattern:
    return op.mul(op.mul(x, op.add(op.erf(op.div(x, SQRT2)), 1.0)), 0.5)


def gelu_erf_inner(op: Recorder, x: Any) -> Pattern:
    return op.mul(op.mul(x, 0.5), op.add(op.erf(op.div(x, SQRT2)), 1.0))


def gelu_erf_half(op: Recorder, x: Any) -> Pattern:
    return op.mul(x, op.mul(op.add(op.erf(op.div(x, SQRT2)), 1.0), 0.5))


def gelu_erf_multiplied(op: Recorder, x: Any) -> Pattern:
    return op.mul(op.mul(x, 0.5), op.add(op.erf(op.mul(x, 1 / SQRT2)), 1.0))


def gelu_tanh(op: Recorder, x: Any) -> Pattern:
    cubic = op.add(x, op.mul(op.pow(x, 3.0), 0.044715))
    return op.mul(op.mul(x, 0.5), op.add(op.tanh(op.mul(cubic, GELU_TANH)), 1.0))


def gelu_tanh_products(op: Recorder, x: Any) -> Pattern:
    cubic = op.mul(op.mul(x, GELU_TANH), op.add(op.mul(op.mul(x, 0.044715), x), 1.0))
    return op.mul(op.mul(x, 0.5), op.add(op.tanh(cubic), 1.0))


def silu(op: Recorder, x: Any) -> Pattern:
    return op.mul(x, op.sigmoid(x))


# --- norms ---------------------------------------------------------------------------------------------------------


def _normalized(op: Recorder, x: Any, eps: Any) -> Pattern:
    centred = op.sub(x, op.mean(x, bind="mean"), bind="centred")
    return op.div(centred, op.sqrt(op.add(op.mean(op.pow("centred", 2.0), bind="variance"), eps)))


def layer_norm_affine(op: Recorder, x: Any, weight: Any, bias: Any, eps: Any) -> Pattern:
    return op.add(op.mul(_normalized(op, x, eps), weight), bias)


def _root_mean_square(op: Recorder, x: Any, eps: Any) -> Pattern:
    return op.add(op.mean(op.pow(x, 2.0), bind="mean"), eps)


def rms_norm_rsqrt(op: Recorder, x: Any, weight: Any, eps: Any) -> Pattern:
    return op.mul(op.mul(x, op.rsqrt(_root_mean_square(op, x, eps))), weight)


def rms_norm_reciprocal(op: Recorder, x: Any, weight: Any, eps: Any) -> Pattern:
    return op.mul(op.mul(x, op.reciprocal(op.sqrt(_root_mean_square(op, x, eps)))), weight)


def rms_norm_divided(op: Recorder, x: Any, weight: Any, eps: Any) -> Pattern:
    return op.mul(op.div(x, op.sqrt(_root_mean_square(op, x, eps))), weight)


def _over_last_axis(m: Match, *means: Node) -> float:
    """The epsilon of a norm over the last axis with a constant weight; Declined otherwise."""
    eps = scalar(m.root.graph, m.eps)
    rank = m.x.rank
    if eps is None or rank is None:
        raise Declined("the epsilon is not a constant number, or the rank is unknown")
    if any(tuple(axis % rank for axis in mean.attributes["axes"]) != (rank - 1,) for mean in means):
        raise Declined("the mean is not over the last axis alone")
    if not all(mean.attributes["keepdim"] for mean in means):
        raise Declined("the mean loses its axis, so it lies along another one")
    width = m.x.shape[-1]
    if not m.weight.is_constant or m.weight.shape != (width,):
        raise Declined("the weight is not a constant of the last axis' size")
    return eps


def to_rms_norm(op: Builder, m: Match) -> Value:
    """Zhang & Sennrich, 2019."""
    return _emit(op, "rms_norm", m.x, m.weight, eps=_over_last_axis(m, m.mean))


def to_layer_norm(op: Builder, m: Match) -> Value:
    """Ba, Kiros & Hinton, 2016, with the biased variance."""
    eps = _over_last_axis(m, m.mean, m.variance)
    if not m.bias.is_constant or m.bias.shape != m.weight.shape:
        raise Declined("the bias is not a constant of the weight's shape")
    return _emit(op, "layer_norm", m.x, m.weight, m.bias, eps=eps)


def _emit(op: Builder, kind: str, *operands: Value | None, **attributes: Any) -> Value:
    """Emit, or decline where the dialect cannot spell the op (an ONNX file that stays at an old opset)."""
    try:
        return op(kind, *operands, **attributes)
    except GraphError as error:
        raise Declined(str(error)) from error


# --- attention -----------------------------------------------------------------------------------------------------


def attention_plain(op: Recorder, scores: Any, value: Any) -> Pattern:
    return op.matmul(op.softmax(scores, bind="softmax"), value)


def attention_guarded(op: Recorder, scores: Any, value: Any) -> Pattern:
    """Exporters put zeros where a whole row is masked, as torch does."""
    return op.matmul(op.where(op.isnan(op.softmax(scores, bind="softmax")), 0.0, "softmax"), value)


def to_attention(op: Builder, m: Match) -> Value:
    """softmax(q kᵀ · scale + mask) v (Vaswani et al., 2017), its scale taken from wherever it was multiplied in."""
    axis, rank = m.softmax.attributes["axis"], m.scores.rank
    if rank != 4 or axis not in (-1, 3):
        raise Declined("the scores are not 4-D with a softmax over the keys")
    scores, mask = _peel_mask(m.scores)
    scores, scale = _peel_scale(op.graph, scores)
    product = scores.producer
    if product is None or product.kind != "matmul" or _is_shared(scores, m.scores):
        raise Declined("no product of queries and keys behind the softmax")
    query, query_scale = _peel_scale(op.graph, product.required("a"))
    transposed, key_scale = _peel_scale(op.graph, product.required("b"))
    key = _untranspose(op, transposed)
    if m.value.rank != 4 or query.rank != 4 or key.rank != 4:
        raise Declined("queries, keys or values are not 4-D")
    if _is_spread(query, key, 2) or _is_spread(query, m.value, 2):
        raise Declined("queries, keys and values differ in batch or heads")
    if mask is not None and (mask.rank not in (2, 3, 4) or _is_spread(scores, m.scores, 4)):
        raise Declined("the mask has more entries than the scores, or fewer than two axes")
    scale *= query_scale * key_scale
    return _emit(op, "attention", query, key, m.value, _as_allowed(op.graph, mask), scale=scale)


def _is_spread(value: Value, other: Value, axes: int) -> bool:
    """Whether one of two values is repeated along one of the leading axes to fit the other; names tell nothing."""
    sizes = list(zip(value.shape or (), other.shape or (), strict=False))[:axes]
    return any(a != b and (1 in (a, b) or (isinstance(a, int) and isinstance(b, int))) for a, b in sizes)


def _as_allowed(graph: Graph, mask: Value | None) -> Value | None:
    """The boolean mask behind where(allowed, 0, -infinity), else the mask itself."""
    node = mask.producer if mask is not None else None
    if node is None or node.kind != "where":
        return mask
    zero, low = scalar(graph, node.operands[1]), scalar(graph, node.operands[2])
    return node.operands[0] if zero == 0.0 and low is not None and low < -1e30 else mask


def _is_shared(value: Value, scores: Value) -> bool:
    return value.only_user is None or scores.is_output


def _peel_mask(scores: Value) -> tuple[Value, Value | None]:
    """The scores before an added mask, and the mask: the operand that is no chain of products."""
    node = scores.producer
    if node is None or node.kind != "add":
        return scores, None
    a, b = node.required("a"), node.required("b")
    if _comes_from_product(a):
        return a, b
    return (b, a) if _comes_from_product(b) else (scores, None)


def _comes_from_product(value: Value) -> bool:
    node = value.producer
    while node is not None and node.kind in ("mul", "div"):
        node = node.required("a").producer if node.required("a").producer else node.required("b").producer
    return node is not None and node.kind == "matmul"


def _peel_scale(graph: Graph, value: Value) -> tuple[Value, float]:
    """The value before multiplications and divisions by constant numbers, and their product."""
    scale = 1.0
    while (node := value.producer) is not None and node.kind in ("mul", "div"):
        a, b = node.required("a"), node.required("b")
        number = scalar(graph, b)
        if number is None and node.kind == "mul":
            a, number = b, scalar(graph, a)
        if number is None or number == 0.0:
            break
        scale *= number if node.kind == "mul" else 1.0 / number
        value = a
    return value, scale


def _untranspose(op: Builder, value: Value) -> Value:
    """k of kᵀ = the value, its last two axes swapped: by undoing a transpose, or else by one more."""
    node = value.producer
    if node is None or node.kind != "transpose" or value.rank != 4:
        return op.transpose(value, perm=(0, 1, 3, 2))
    perm = node.attributes["perm"]
    swapped = (perm[0], perm[1], perm[3], perm[2])
    return node.input if swapped == (0, 1, 2, 3) else op.transpose(node.input, perm=swapped)


def softmax_guarded(op: Recorder, scores: Any, allowed: Any, low: Any) -> Pattern:
    masked = op.add(scores, op.where(allowed, 0.0, low))
    return op.where(op.isnan(op.softmax(masked, bind="softmax")), 0.0, "softmax")


def without_guard(op: Builder, m: Match) -> Value:
    """Softmax where the mask is finite: a row that is masked as a whole has equal weights then, and none is NaN."""
    low = scalar(op.graph, m.low)
    if low is None or math.isinf(low):
        raise Declined("a row that is masked as a whole may be NaN")
    result: Value = m.softmax.result
    return result


def transpose_in_batches(op: Recorder, x: Any, flat: Any, shape: Any) -> Pattern:
    return op.reshape(op.transpose(op.reshape(x, flat, bind="flat_x"), perm=(0, 2, 1)), shape)


def to_transpose(op: Builder, m: Match) -> Value:
    """Exporters swap the last two axes of 4-D values in 3-D."""
    before, flat, after = m.x.shape, m.flat_x.result.shape, m.root.result.shape
    if None in (before, flat, after) or len(before) != 4 or "?" in before:
        raise Declined("the shapes are not known as 4-D")
    if flat[1:] != before[2:] or after != (before[0], before[1], before[3], before[2]):
        raise Declined("the reshapes do more than merge the batch axes and split them again")
    return op.transpose(m.x, perm=(0, 1, 3, 2))


def _rule(pattern: Callable[..., Pattern], replace: Callable[[Builder, Match], Value], shared: bool = False) -> Rule:
    return Rule(pattern.__name__.replace("_", "-"), pattern, replace, shared)


def _to_gelu(approximate: str) -> Callable[[Builder, Match], Value]:
    return lambda op, m: _emit(op, "gelu", m.x, approximate=approximate)


LAYER_NORM = (_rule(layer_norm_affine, to_layer_norm, shared=True),)
"""First: a layer norm holds a root mean square of centred values."""

OTHERS = (
    _rule(gelu_erf_outer, _to_gelu("none")),
    _rule(gelu_erf_inner, _to_gelu("none")),
    _rule(gelu_erf_half, _to_gelu("none")),
    _rule(gelu_erf_multiplied, _to_gelu("none")),
    _rule(gelu_tanh, _to_gelu("tanh")),
    _rule(gelu_tanh_products, _to_gelu("tanh")),
    _rule(silu, lambda op, m: op.silu(m.x)),
    _rule(rms_norm_rsqrt, to_rms_norm),
    _rule(rms_norm_reciprocal, to_rms_norm),
    _rule(rms_norm_divided, to_rms_norm),
    _rule(transpose_in_batches, to_transpose),
    _rule(attention_guarded, to_attention, shared=True),
    _rule(attention_plain, to_attention),
)

LEFT = (_rule(softmax_guarded, without_guard, shared=True),)
"""Last: what is no attention, as that between quantized products."""


def raise_ops(graph: Graph) -> dict[str, int]:
    """Apply the rules; returns how often each one did something."""
    logs = rewrite(graph, LAYER_NORM) | rewrite(graph, OTHERS) | rewrite(graph, LEFT)
    return {name: log.hits for name, log in logs.items() if log.hits}
