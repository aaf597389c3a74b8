"""Attention on onnxruntime: whole, with its projections inside, or as two products and a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule


@dataclass(frozen=True)
class Forms:
    """The forms of one graph: they remember the masks that they made, so that readers after the first share them."""

    made: dict[tuple[Value, str], Value] = field(default_factory=dict)

    def choice(self) -> Choice:
        """Fixed order: the operator of the standard, which took every case and most prizes."""
        forms = {
            "Attention": None, "MultiHeadAttention": self.multi_head, "packed Attention": self.packed,
            "QAttention": self.packed_integers, "two products": self.products,
        }  # fmt: skip
        return Choice("attention", _attention, forms, around=_with_projections)

    def float_mask_once(self) -> Rule:
        """The kernel turns a boolean mask into floats at every layer; for several layers, once is enough."""

        def shares_boolean_mask(m: Match) -> bool:
            readers = sum(user.kind == "attention" for user in m.mask.users)
            return m.mask.dtype is torch.bool and (readers > 1 or (m.mask, "floats") in self.made)

        def read_float_mask(op: Builder, m: Match) -> Value:
            mask = self.floats(op, m.mask, m.query.dtype)
            return op.attention(m.query, m.key, m.value, mask, **m.root.attributes)

        return Rule("float-mask-once", _masked_attention, read_float_mask, check=shares_boolean_mask)

    def floats(self, op: Builder, mask: Value, dtype: torch.dtype) -> Value:
        """A mask to add: 0 where attention is allowed, the lowest number elsewhere."""
        if mask.dtype is not torch.bool:
            return mask
        if (mask, "floats") not in self.made:
            zero, lowest = (op.constant(torch.tensor(n, dtype=dtype)) for n in (0.0, torch.finfo(dtype).min))
            self.made[mask, "floats"] = op.where(mask, zero, lowest)
        return self.made[mask, "floats"]

    def integers(self, op: Builder, mask: Value) -> Value:
        """(batch, 1, length, keys) of booleans as (batch, length, keys) of 0 and 1 in int32."""
        if (mask, "integers") not in self.made:
            self.made[mask, "integers"] = op.cast(op.squeeze(mask, axes=(1,)), dtype=torch.int32)
        return self.made[mask, "integers"]

    def multi_head(self, op: Builder, m: Match) -> Value:
        """The contrib kernel: key and value of as many heads as the query, and a mask that is added."""
        _require_plain_heads(m)
        _require_whole(m)
        mask = m.mask and self.floats(op, m.mask, m.query.dtype)
        none = (None, None)
        return op("com.microsoft.MultiHeadAttention", m.query, m.key, m.value, *none, mask, **_attributes(m))

    def packed(self, op: Builder, m: Match) -> Value:
        """One product makes query, key and value, and nothing of them leaves the kernel."""
        _require_plain_heads(m)
        linears = _require_projections(m, "linear")
        _require_whole(m)
        weight, bias = op.constant(_columns(linears)), op.constant(_biases(linears))
        mask = m.mask and self.floats(op, m.mask, m.query.dtype)
        none = (None, None)
        return op("com.microsoft.Attention", linears[0].input, weight, bias, *none, mask, **_attributes(m))

    def packed_integers(self, op: Builder, m: Match) -> Value:
        """The same of uint8: its mask tells in integers where attention is allowed, for all heads alike."""
        _require_plain_heads(m)
        linears = _require_projections(m, "linear_int8")
        _require_whole(m)
        if m.mask is not None and (m.mask.dtype is not torch.bool or m.mask.shape[:2] != (m.query.shape[0], 1)):
            raise Declined("its mask is not (batch, 1, length, length) of booleans")
        x, scale, zero_point = linears[0].operands[:3]
        rows = [one.graph.constant(one.required("weight_scale")) for one in linears]
        scales = [tensor.expand(size) for tensor, size in zip(rows, _sizes(linears), strict=True) if tensor is not None]
        if len(scales) < len(linears):
            raise Declined("the scales of its projections are not constant")
        sides = (op.constant(tensor) for tensor in (_columns(linears), _biases(linears)))
        zero = op.constant(torch.zeros((), dtype=torch.int8))
        mask = m.mask and self.integers(op, m.mask)
        return op(
            "com.microsoft.QAttention", x, *sides, scale, op.constant(torch.cat(scales)), mask, zero_point, zero,
            **_attributes(m), mask_filter_value=torch.finfo(torch.float32).min,
        )  # fmt: skip

    def products(self, op: Builder, m: Match) -> Value:
        """Scores, softmax and their product with the values, each by the kernel that every model has."""
        given, heads = m.root.attributes, m.root.attributes["heads"]
        size = _head_size(m)
        if given["causal"]:
            raise Declined("it is causal: two products would need a mask of its length")
        if m.mask is not None and m.mask.rank is None:
            raise Declined("the shape of its mask is not known")
        shared = (given["kv_heads"] or heads) != heads if heads else m.query.shape[1] != m.key.shape[1]
        if shared:
            raise Declined("its keys are shared in groups")
        sides = [m.query, m.key, m.value]
        if heads:
            split = op.constant(torch.tensor([0, 0, heads, -1]))
            sides = [op.transpose(op("onnx.Reshape", side, split), perm=(0, 2, 1, 3)) for side in sides]
        query, key, value = sides
        scale = size**-0.5 if given["scale"] is None else float(given["scale"])
        scores = op("com.microsoft.FusedMatMul", query, key, transB=1, alpha=scale)
        if m.mask is not None:
            scores = op.add(scores, self.floats(op, m.mask, m.query.dtype))
        mixed = op.matmul(op.softmax(scores, axis=-1), value)
        if not heads:
            return mixed
        joined = op.constant(torch.tensor([0, 0, heads * size]))
        return op("onnx.Reshape", op.transpose(mixed, perm=(0, 2, 1, 3)), joined)


def _attention(op: Recorder, query: str, key: str, value: str, mask: str | None = None) -> Pattern:
    return op.attention(query, key, value, mask)


def _masked_attention(op: Recorder, query: str, key: str, value: str, mask: str) -> Pattern:
    return op.attention(query, key, value, mask)


def _with_projections(m: Match) -> Sequence[Node]:
    """Attention, and the linears that a packed form takes in."""
    linears = _projections(m)
    return (m.root,) if isinstance(linears, str) else (*linears, m.root)


def _projections(m: Match) -> list[Node] | str:
    """The linears that make query, key and value of one input, in the graph's order; or why there are none."""
    makers = [value.producer for value in (m.query, m.key, m.value)]
    found = [one for one in makers if one is not None and one.kind in ("linear", "linear_int8")]
    if len(set(found)) != 3 or len({one.kind for one in found}) != 1:
        return "its query, key and value are not three linears"
    before = {one.operands[: one.operands.index(one.required("weight"))] for one in found}
    if len(before) != 1:
        return "its query, key and value are not made of one input"
    if any(one.result.only_user is None for one in found):
        return "its query, key or value is read elsewhere"
    if any(not value.is_constant for one in found for value in (one.required("weight"), one.bias) if value is not None):
        return "a weight or a bias of its projections is computed"
    return found


def _require_projections(m: Match, kind: str) -> list[Node]:
    linears = _projections(m)
    if isinstance(linears, str):
        raise Declined(linears)
    if linears[0].kind != kind:
        raise Declined(f"its projections are {linears[0].kind}, not {kind}")
    if len(set(_sizes(linears))) != 1:
        raise Declined("its query, key and value differ in width")
    return linears


def _require_plain_heads(m: Match) -> None:
    given = m.root.attributes
    if not given["heads"] or given["kv_heads"] not in (0, given["heads"]):
        raise Declined("its heads are split before it, or shared in groups")


def _require_whole(m: Match) -> None:
    """Raise Declined where a mask is not spelled out for every query: kernels of the contrib domain repeat none."""
    if m.mask is None:
        return
    lengths = m.query.shape[1], m.key.shape[1]
    if "?" in lengths:
        raise Declined("its lengths have no names, and the mask may have others")
    if m.mask.dtype not in (torch.bool, m.query.dtype) or m.mask.rank != 4 or m.mask.shape[2:] != lengths:
        raise Declined("its mask is not (batch, heads, length, length) of booleans or floats")


def _attributes(m: Match) -> dict[str, Any]:
    given = m.root.attributes
    scale = {} if given["scale"] is None else {"scale": float(given["scale"])}
    return {"num_heads": given["heads"], "unidirectional": int(given["causal"]), **scale}


def _head_size(m: Match) -> int:
    heads, size = m.root.attributes["heads"], m.query.shape[-1]
    if not isinstance(size, int):
        raise Declined("the size of its heads is not known")
    return size // heads if heads else size


def _sizes(linears: Sequence[Node]) -> list[int]:
    return [int(one.required("weight").shape[0]) for one in linears]  # type: ignore[index]


def _columns(linears: Sequence[Node]) -> Tensor:
    """The weights side by side, (in, out of all), as the kernels read them."""
    weights = [one.graph.constant(one.required("weight")) for one in linears]
    return torch.cat([weight for weight in weights if weight is not None]).t().contiguous()


def _biases(linears: Sequence[Node]) -> Tensor:
    """The biases one after the other, zeros where there is none."""
    biases = [one.graph.constant(one.bias) if one.bias is not None else None for one in linears]
    return torch.cat([torch.zeros(size) if bias is None else bias
                      for bias, size in zip(biases, _sizes(linears), strict=True)])  # fmt: skip
