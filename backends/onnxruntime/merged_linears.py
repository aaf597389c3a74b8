"""Linears on onnxruntime that read one input: separate, or one product and a Split of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from graphopt.backends.onnxruntime import weight_only
from graphopt.backends.onnxruntime.linear import linear
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder
from graphopt.lowering.merging import has_stored_bias, merge, merge_key
from graphopt.lowering.row_scales import linear_int8


def _merged(op: Builder, m: Match) -> Mapping[Value, Value]:
    """Fewer calls, and a copy of the result."""
    return merge([one.root for one in m.group], _split)


def _split(product: Value, linears: Sequence[Node], widths: Sequence[int]) -> Sequence[Value]:
    graph, sizes = linears[0].graph, linears[0].graph.add_constant(torch.tensor(widths))
    return graph.emit_all("onnx.Split", product, sizes, at=linears[0], axis=-1, _outputs=len(widths))


def _weight_only(op: Recorder, x: str, q: str, scale: str, zero_point: str | None = None,
                 bias: str | None = None) -> Pattern:  # fmt: skip
    return op.linear(x, op.dequantize(q, scale, zero_point, bind="maker"), bias)


def _choice(name: str, pattern: Callable[..., Pattern], is_stored: Callable[[Match], bool]) -> Choice:
    return Choice(
        name,
        pattern,
        {"separate": None, "merged": _merged},
        check=lambda m: is_stored(m) and has_stored_bias(m.root),
        group_by=lambda m: merge_key(m.root),
    )


FLOAT = _choice("linears-on-one-input", linear, lambda m: bool(m.weight.is_constant))
INT8 = _choice("int8-linears-on-one-input", linear_int8, lambda m: bool(m.weight.is_constant))
WEIGHT_ONLY = _choice(
    "weight-only-linears-on-one-input",
    _weight_only,
    lambda m: weight_only.why_not(m.root) is None and m.maker.result.only_user is not None,
)
