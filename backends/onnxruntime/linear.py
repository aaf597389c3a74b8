"""Linears on onnxruntime: one for several on the same input, and with the bias inside the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Shape, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule


@dataclass(frozen=True)
class Siblings:
    """Linears of one graph that read the same input; where they are merged, what each of them becomes."""

    parts: dict[Node, Value] = field(default_factory=dict)

    def stages(self) -> Sequence[Sequence[Rule | Choice]]:
        """The choice at the first of several, and behind it the rules by which the others read the merged result."""
        kinds: dict[str, Callable[..., Pattern]] = {"siblings": _linear, "int8-siblings": linear_int8}
        choices = [
            Choice(name, pattern, {"separate": None, "merged": self.merge}, check=self._leads, around=self._around)
            for name, pattern in kinds.items()
        ]
        rules = [
            Rule(f"part-of-{name}", pattern, lambda op, m: self.parts[m.root], check=lambda m: m.root in self.parts)
            for name, pattern in kinds.items()
        ]
        return choices, rules

    def merge(self, op: Builder, m: Match) -> Value:
        """One product of all, and a Split: fewer calls, and a copy of the result."""
        linears = _siblings(m.root)
        first, count = m.root, m.root.operands.index(m.root.required("weight"))
        stacked = [
            op.constant(torch.cat([stored_tensor(one, value) for one, value in zip(linears, column, strict=True)]))
            for column in zip(*(_rows(one) for one in linears), strict=True)
        ]
        sizes = [int(stored_tensor(one, one.required("weight")).shape[0]) for one in linears]
        biases = [torch.zeros(size) if one.bias is None else stored_tensor(one, one.bias)
                  for one, size in zip(linears, sizes, strict=True)]  # fmt: skip
        bias = None if all(one.bias is None for one in linears) else op.constant(torch.cat(biases))
        merged = op.graph.emit(first.kind, *first.operands[:count], *stacked, bias, at=op.at)
        split = op.constant(torch.tensor(sizes))
        parts = op.graph.emit_all("onnx.Split", merged, split, at=op.at, axis=-1, _outputs=len(sizes))
        self.parts.update(zip(linears[1:], parts[1:], strict=True))
        return parts[0]

    def _leads(self, m: Match) -> bool:
        """Whether it is the first of several that can be merged, and was not yet."""
        siblings = _siblings(m.root)
        return len(siblings) > 1 and siblings[0] == m.root and m.root not in self.parts

    def _around(self, m: Match) -> Sequence[Node]:
        return _siblings(m.root)


def _linear(op: Recorder, x: str, weight: str, bias: str | None = None) -> Pattern:
    return op.linear(x, weight, bias)


def linear_int8(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str,
                bias: str | None = None) -> Pattern:  # fmt: skip
    return op.linear_int8(x, scale, zero_point, weight, weight_scale, bias)


def _siblings(node: Node) -> list[Node]:
    """The linears of one kind, with stored weights, that read the same as a node, itself among them, in order."""
    before = node.operands[: node.operands.index(node.required("weight"))]
    users = dict.fromkeys(node.input.users)
    found = [user for user in users if user.kind == node.kind
             and user.operands[: len(before)] == before and _is_stored(user)]  # fmt: skip
    return found if node in found else [node]


def _rows(linear: Node) -> list[Value]:
    """What has a row, or an entry, for each output; a bias apart."""
    names = ("weight", "weight_scale") if linear.kind == "linear_int8" else ("weight",)
    return [linear.required(name) for name in names]


def _is_stored(linear: Node) -> bool:
    bias = [] if linear.bias is None else [linear.bias]
    return all(value.is_constant and value.rank for value in [*_rows(linear), *bias])


def stored_tensor(linear: Node, value: Value | None) -> Tensor:
    """A weight, a bias or scales, of a linear that is known to have them stored."""
    tensor = None if value is None else linear.graph.constant(value)
    assert tensor is not None  # as stored
    return tensor


@dataclass(frozen=True)
class Rows:
    """What kernels for matrices read and write, where a graph has more axes.

    For one pass of a rule over a graph: shapes to go back to are made once, and later sites read them.
    """

    made: dict[tuple[Graph, Shape], Value] = field(default_factory=dict)

    def flat(self, op: Builder, x: Value, width: int) -> Value:
        """The last axis of x, which is `width` long, and all others in one."""
        return x if x.rank == 2 else op("onnx.Reshape", x, op.constant(torch.tensor([-1, width])))

    def back(self, op: Builder, product: Value, x: Value, width: int) -> Value:
        """A product of x made flat, with the axes of x but the last, which is `width` long."""
        return product if x.rank == 2 else op("onnx.Reshape", product, self._shape(op, x, width))

    def _shape(self, op: Builder, x: Value, width: int) -> Value:
        """The shape of x with another last axis: a constant where at most one axis is open."""
        axes: Shape = (*x.shape[:-1], width)  # type: ignore[index]
        if _open_axes(x) < 2:
            return op.constant(torch.tensor([axis if isinstance(axis, int) else -1 for axis in axes]))
        if "?" in axes or (op.graph, axes) not in self.made:
            leading = op("onnx.Shape", x, start=0, end=len(axes) - 1)
            self.made[op.graph, axes] = op.concat(leading, op.constant(torch.tensor([width])), axis=0)
        return self.made[op.graph, axes]


@dataclass(frozen=True)
class Biases:
    """Linears of one graph by Gemm, which adds the bias inside."""

    rows: Rows = field(default_factory=Rows)

    def choice(self) -> Choice:
        return Choice("linear-bias", _linear, {"MatMul": None, "Gemm": self.gemm}, check=_has_rows_of_rows)

    def gemm(self, op: Builder, m: Match) -> Value:
        """The kernel begins at the bias, where MatMul has an Add behind that goes over its whole result."""
        readers = {user.kind for user in m.root.result.users}
        if _open_axes(m.x) > 1 and any(kind == "onnx.Split" or "attention" in kind.lower() for kind in readers):
            raise Declined("two axes are open, and the engine would lose the width that a split or attention needs")
        weight = stored_tensor(m.root, m.weight).t().contiguous()
        into, out = weight.shape
        product = op("onnx.Gemm", self.rows.flat(op, m.x, into), op.constant(weight), m.bias)
        return self.rows.back(op, product, m.x, out)


def _open_axes(x: Value) -> int:
    return sum(not isinstance(axis, int) for axis in (x.shape or ())[:-1])


def _has_rows_of_rows(m: Match) -> bool:
    """Whether a stored linear with a bias reads more than two axes: of two, the engine itself makes a Gemm."""
    return m.bias is not None and _is_stored(m.root) and m.x.dtype is torch.float32 and (m.x.rank or 0) > 2
