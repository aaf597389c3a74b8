"""Stages of raising, and those that both dialects share: decomposed forms -> ops, as rules over elementary ops.

Exporters, and people, write gelu, silu, the norms and attention out in elementary operators. Each form here is one
pattern. A rule emits the op only where the shapes allow it; where it declines, the graph stays as it was.

All stages of a dialect, in order, are listed in its own folder: `dialects/onnx/raising.py`, `dialects/fx/raising.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, RuleLog, rewrite, scalar

# --- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One step of raising: a function that changes a graph in place and keeps what it computes."""

    name: str
    apply: Callable[[Any], Mapping[str, RuleLog] | None]
    """Takes a graph of the dialect; returns the log of each rule where the stage consists of rules."""
    rules: tuple[Rule, ...] = ()

    @classmethod
    def of_rules(cls, name: str, *rules: Rule) -> Stage:
        """The stage that applies these rules until none of them matches."""
        return cls(name, lambda graph: rewrite(graph, rules), rules)


def run_stages(stages: Iterable[Stage], graph: Graph) -> dict[str, int]:
    """Apply stages to a graph in order; returns, by rule, how often a rule changed something."""
    hits: dict[str, int] = {}
    for stage in stages:
        logs = stage.apply(graph) or {}
        hits |= {name: log.hits for name, log in logs.items() if log.hits}
    return hits


def sweep(graph: Graph) -> None:
    """Remove what nobody uses, as a stage."""
    graph.sweep()


SQRT2 = math.sqrt(2.0)
GELU_TANH = math.sqrt(2.0 / math.pi)


# --- linears -------------------------------------------------------------------------------------------------------


def raise_flattened_linears(graph: Graph) -> dict[str, RuleLog]:
    """Let linears read values whose rows were flattened for them, and drop the two reshapes."""
    return rewrite(graph, [Rule("flattened-linear", _flattened, _of_rows_as_they_are, shared=True, check=_only_reader)])


def _flattened(op: Recorder, x: Any, flat: Any, weight: Any, shape: Any, bias: Any = None) -> Pattern:
    return op.reshape(op.linear(op.reshape(x, flat), weight, bias, bind="linear"), shape)


def _only_reader(m: Match) -> bool:
    return m.linear.result.only_user is not None


def _of_rows_as_they_are(op: Builder, m: Match) -> Value:
    """A linear on x itself where only leading axes were joined, else on x with the leading axes of the result."""
    x, rows, y = m.x.shape, m.linear.input.shape, m.root.result.shape
    if x is None or y is None or rows is None or not isinstance(rows[-1], int) or "?" in (*x, *y):
        raise Declined("linear_shapes_unknown")
    if y[-1] != m.linear.result.shape[-1]:
        raise Declined("linear_rows_regrouped", before=list(x), after=list(y))
    leading, trailing = x[: len(y) - 1], x[len(y) - 1 :]
    if leading == y[:-1] and trailing == (rows[-1],):
        return op.linear(m.x, m.weight, m.bias)
    joined = trailing and all(isinstance(size, int) for size in trailing) and math.prod(map(int, trailing)) == rows[-1]
    if op.graph.dialect == "onnx" and leading == y[:-1] and joined:  # sizes that are copied need no operators
        shape = op.constant(torch.tensor([*[0] * len(leading), rows[-1]]))
        return op.linear(op("onnx.Reshape", m.x, shape), m.weight, m.bias)
    value = op.graph.emit_sized(m.root, m.x, m.shape, sizes={len(y) - 1: rows[-1]}, at=m.root)
    return op.linear(value, m.weight, m.bias)


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
        raise Declined("norm_epsilon_or_rank_unknown")
    if any(tuple(axis % rank for axis in mean.attributes["axes"]) != (rank - 1,) for mean in means):
        raise Declined("norm_not_over_last_axis")
    if not all(mean.attributes["keepdim"] for mean in means):
        raise Declined("norm_mean_without_axis")
    width = m.x.shape[-1]
    if not m.weight.is_constant or m.weight.shape != (width,):
        raise Declined("norm_weight_unfit", width=width)
    return eps


def to_rms_norm(op: Builder, m: Match) -> Value:
    """Zhang & Sennrich, 2019."""
    return op.rms_norm(m.x, m.weight, eps=_over_last_axis(m, m.mean))


def to_layer_norm(op: Builder, m: Match) -> Value:
    """Ba, Kiros & Hinton, 2016, with the biased variance."""
    eps = _over_last_axis(m, m.mean, m.variance)
    if not m.bias.is_constant or m.bias.shape != m.weight.shape:
        raise Declined("norm_bias_unfit", shape=list(m.weight.shape))
    return op.layer_norm(m.x, m.weight, m.bias, eps=eps)


# --- attention -----------------------------------------------------------------------------------------------------


def attention_plain(op: Recorder, scores: Any, value: Any) -> Pattern:
    return op.matmul(op.softmax(scores, bind="softmax"), value)


def attention_guarded(op: Recorder, scores: Any, value: Any) -> Pattern:
    """With zeros in place of NaN where a whole row is masked, as torch computes it and its exporter writes it out."""
    return op.matmul(op.where(op.isnan(op.softmax(scores, bind="softmax")), 0.0, "softmax"), value)


def to_attention(op: Builder, m: Match) -> Value:
    """softmax(q kᵀ · scale + mask) v (Vaswani et al., 2017); queries, keys or scores may be what is scaled."""
    axis, rank = m.softmax.attributes["axis"], m.scores.rank
    if rank != 4 or axis not in (-1, 3):
        raise Declined("attention_scores_unfit", rank=rank, axis=axis)
    scores, mask = peel_mask(m.scores)
    scores, scale = peel_scale(op.graph, scores)
    product = scores.producer
    if product is None or product.kind != "matmul" or _is_shared(scores, m.scores):
        raise Declined("attention_without_product")
    query, query_scale = peel_scale(op.graph, product.required("a"))
    transposed, key_scale = peel_scale(op.graph, product.required("b"))
    key = _untranspose(op, transposed)
    if m.value.rank != 4 or query.rank != 4 or key.rank != 4:
        raise Declined("attention_operands_not_4d")
    if _broadcasts(query, key, 2) or _broadcasts(query, m.value, 2):
        raise Declined("attention_operands_broadcast")
    if mask is not None and (mask.rank not in (2, 3, 4) or _broadcasts(scores, m.scores, 4)):
        raise Declined("attention_mask_unfit", rank=mask.rank)
    scale *= query_scale * key_scale
    return op.attention(query, key, m.value, _as_allowed(op.graph, mask), scale=scale)


def _broadcasts(value: Value, other: Value, axes: int) -> bool:
    """Whether broadcasting repeats one of two values along a leading axis; two axes with names are taken as equal."""
    sizes = list(zip(value.shape or (), other.shape or (), strict=False))[:axes]
    return any(a != b and (1 in (a, b) or (isinstance(a, int) and isinstance(b, int))) for a, b in sizes)


def _as_allowed(graph: Graph, mask: Value | None) -> Value | None:
    """The boolean mask inside where(allowed, 0, -infinity), else the mask itself."""
    node = mask.producer if mask is not None else None
    if node is None or node.kind != "where":
        return mask
    zero, low = scalar(graph, node.operands[1]), scalar(graph, node.operands[2])
    return node.operands[0] if zero == 0.0 and low is not None and low < -1e30 else mask


def _is_shared(value: Value, scores: Value) -> bool:
    return value.only_user is None or scores.is_output


def peel_mask(scores: Value) -> tuple[Value, Value | None]:
    """The scores before a mask is added, and the mask: the operand that does not come from a product."""
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


def peel_scale(graph: Graph, value: Value) -> tuple[Value, float]:
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
    """k, where the value is kᵀ: without the transpose that made the value, or else with one more transpose."""
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
    """The softmax alone, where the mask is finite: then a row that is wholly masked has equal weights and no NaN."""
    low = scalar(op.graph, m.low)
    if low is None or math.isinf(low):
        raise Declined("softmax_row_may_be_nan")
    result: Value = m.softmax.result
    return result


def transpose_in_batches(op: Recorder, x: Any, flat: Any, shape: Any) -> Pattern:
    return op.reshape(op.transpose(op.reshape(x, flat, bind="flat_x"), perm=(0, 2, 1)), shape)


def to_transpose(op: Builder, m: Match) -> Value:
    """One transpose of the last two axes of a 4-D value, which exporters write as a transpose in 3-D."""
    before, flat, after = m.x.shape, m.flat_x.result.shape, m.root.result.shape
    if None in (before, flat, after) or len(before) != 4 or "?" in before:
        raise Declined("transpose_shapes_unknown")
    if flat[1:] != before[2:] or after != (before[0], before[1], before[3], before[2]):
        raise Declined("transpose_reshapes_differ")
    return op.transpose(m.x, perm=(0, 1, 3, 2))


def _rule(pattern: Callable[..., Pattern], replace: Callable[[Builder, Match], Value], shared: bool = False) -> Rule:
    return Rule(pattern.__name__.replace("_", "-"), pattern, replace, shared)


def _to_gelu(approximate: str) -> Callable[[Builder, Match], Value]:
    return lambda op, m: op.gelu(m.x, approximate=approximate)


FORMS = (
    # First: a layer norm holds the root mean square of centred values, which is an rms norm by itself.
    Stage.of_rules("layer norms", _rule(layer_norm_affine, to_layer_norm, shared=True)),
    Stage.of_rules(
        "activations, rms norms, attention",
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
    ),
    # Last: a guarded softmax that no attention took in, such as one between quantized products.
    Stage.of_rules("guarded softmax", _rule(softmax_guarded, without_guard, shared=True)),
)
"""Decomposed forms of ops, in both dialects."""
