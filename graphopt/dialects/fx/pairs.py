"""Which quantize and dequantize nodes a `Rounded` stands for: those of one scale, stored or chosen from what they read.

A pair is a quantize and one dequantize of what it rounds, or a dequantize of stored integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from graphopt.dialects.fx.native import is_constant, meta, source, with_nodes
from graphopt.dialects.fx.spellings import arguments
from graphopt.ir.ops.quantization import integer_range

Constant = Callable[[fx.Node], Tensor]
"""The tensor of a node for which `is_stored` holds."""

Scale = str | fx.Node
"""A stored scale, by its name; or the node that has it as a number in its arguments."""


@dataclass(frozen=True)
class Form:
    """The arguments of a quantize or a dequantize, whichever operator it calls."""

    x: fx.Node
    scale: fx.Node | float
    zero_point: fx.Node | int | None
    low: float
    high: float
    dtype: torch.dtype
    axis: int | None
    """None: one scale for all of x, or for each row of it."""
    block: int

    @classmethod
    def of(cls, node: fx.Node, kind: str) -> Form | None:
        """kind: quantize or dequantize. None where the node is none of these."""
        target = str(node.target)
        if target.startswith(f"quantized_decomposed.{kind}_per_"):
            given = arguments(node)
            floats = given.get("out_dtype") or given.get("output_dtype") or torch.float32
            if floats != torch.float32 or "_per_token" in target:
                return None
            several = "s" if "scales" in given else ""
            scale, zero_point = given[f"scale{several}"], given[f"zero_point{several}"]
            low, high, block = given["quant_min"], given["quant_max"], given.get("group_size", 0)
            axis = given.get("axis", 1 if block else None)
            axis = axis if axis is None else axis % meta(node).dim()
            return cls(given["input"], scale, zero_point, low, high, given["dtype"], axis, block)
        if target == f"graphopt.{kind}.default":
            given = arguments(node)
            dtype = meta(node if kind == "quantize" else given["x"]).dtype
            most = torch.finfo(dtype).max if dtype.is_floating_point else 0
            low, high = (-most, most) if most else integer_range(dtype, given["bits"])
            x, scale, zero_point, axis = (given[name] for name in ("x", "scale", "zero_point", "axis"))
            return cls(x, scale, zero_point, low, high, dtype, axis, given.get("block", 0))
        return None


@dataclass(frozen=True)
class Pair:
    """A dequantize that becomes a `Rounded`: of what `quantize` rounds, or, without one, of stored integers."""

    dequantize: fx.Node
    form: Form
    quantize: fx.Node | None = None
    rounds: Form | None = None
    """The form of quantize."""
    rows: float | None = None
    """Where each row of the input has the scale at which its largest magnitude becomes this number."""

    @property
    def dynamic(self) -> bool:
        """Whether each run chooses the scale."""
        return isinstance(self.form.scale, fx.Node) and not is_constant(self.form.scale)

    @property
    def learns(self) -> bool:
        """Whether its scale may be learned: one of integers of 8 bits or fewer, which does not depend on the input."""
        return not self.dynamic and self.form.dtype in (torch.int8, torch.uint8)

    def numbers(self) -> list[tuple[fx.Node, fx.Node | float]]:
        """Node and scale, of both; none where each run chooses it."""
        if self.dynamic:
            return []
        forms = (self.dequantize, self.form), (self.quantize, self.rounds)
        return [(node, form.scale) for node, form in forms if node is not None and form is not None]


def scale_of(node: fx.Node, scale: fx.Node | float) -> Scale:
    return layout(scale)[0] if isinstance(scale, fx.Node) else node


def layout(node: fx.Node) -> tuple[str, tuple[int, ...]]:
    """The name of the tensor that a constant node stands for, and how it is permuted."""
    if node.op == "get_attr":
        return str(node.target), tuple(range(meta(node).dim()))
    name, inner = layout(source(node))
    return name, tuple(inner[axis] for axis in cast(Sequence[int], node.args[1]))


def inverse(permutation: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return sorted(range(len(permutation)), key=permutation.__getitem__)


def is_stored(node: fx.Node) -> bool:
    """Whether a node is a constant, or the cast of one (of a zero point to int64)."""
    return is_constant(node) or (node.target is torch.ops.aten._to_copy.default and is_constant(source(node)))


def floats(pair: Pair, constant: Constant) -> Tensor:
    """The floats that a dequantize computes from stored integers, in the layout of these."""
    node = pair.dequantize
    args, kwargs = with_nodes((node.args, node.kwargs), constant)
    tensor: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return tensor.permute(inverse(layout(pair.form.x)[1])).contiguous()


def find(nodes: Iterable[fx.Node], constant: Constant) -> tuple[dict[str, list[Pair]], list[Pair]]:
    """The pairs of stored integers, by name of these, and the others.

    Integers that several nodes dequantize to different floats have the pairs that agree with the first of them.
    """
    weights: dict[str, list[Pair]] = {}
    activations: list[Pair] = []
    for pair in filter(None, (_pair(node, constant) for node in nodes)):
        if pair.quantize is not None:
            activations.append(pair)
            continue
        same = weights.setdefault(layout(pair.form.x)[0], [])
        if not same or _agree(same[0], pair, constant):
            same.append(pair)
    return weights, activations


def _agree(one: Pair, other: Pair, constant: Constant) -> bool:
    """Whether two pairs of the same integers, which may be permuted, have the same scales and floats."""
    return _same(one.form, other.form, constant) and torch.equal(floats(one, constant), floats(other, constant))


def _pair(node: fx.Node, constant: Constant) -> Pair | None:
    """The pair that a node ends."""
    form = Form.of(node, "dequantize")
    if form is None:
        return None
    known = all(not isinstance(one, fx.Node) or is_stored(one) for one in (form.scale, form.zero_point))
    if is_constant(form.x):
        return Pair(node, form) if known else None
    rounds = Form.of(form.x, "quantize")
    if rounds is None or not _same(rounds, form, constant):
        return None
    if known:
        return Pair(node, form, form.x, rounds)
    chooser = form.scale
    if isinstance(chooser, fx.Node) and str(chooser.target) == "graphopt.row_scale.default":
        largest: float = arguments(chooser)["largest"]
        return Pair(node, form, form.x, rounds, rows=largest) if chooser.args[0] is rounds.x else None
    if not isinstance(chooser, fx.Node) or not chooser.args or not isinstance(chooser.args[0], fx.Node):
        return None
    chosen = str(source(chooser).target) == "graphopt.choose_qparams.default"
    return Pair(node, form, form.x, rounds) if chosen and source(source(chooser)) is rounds.x else None


def _same(one: Form, other: Form, constant: Constant) -> bool:
    """Whether two forms have the same scale and zero point: the same value, or equal constants."""

    def equal(a: fx.Node | float | None, b: fx.Node | float | None) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return a is b or (is_stored(a) and is_stored(b) and torch.equal(constant(a), constant(b)))
        return not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b

    def shift(form: Form) -> fx.Node | int | None:
        zero = form.zero_point
        nothing = not zero or (isinstance(zero, fx.Node) and is_stored(zero) and not bool(constant(zero).float().any()))
        return None if nothing else zero

    return equal(one.scale, other.scale) and equal(shift(one), shift(other))
