"""Models of opsets 1 to 6, of whose operators ONNX Runtime has few -> opset 7, where the same nodes are in each engine.

Where a node has no equal at opset 7 that is known here, a model stays as it is, and the engine refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx
from onnx import TensorProto, helper

from graphopt.dialects.onnx.versions import changes, misfit, schema

OPSET = 7
"""The oldest that ONNX Runtime runs whole models of."""

_IN_PLACE = "consumed_inputs"
"""The attribute by which nodes told what memory they may write their results to, up to opset 5."""


def respelled(proto: onnx.ModelProto, opset: int) -> str | None:
    """Spell a model of an opset before OPSET in that, in place; returns a note, or None where it stays as it was."""
    nodes = list[onnx.NodeProto]()
    for node in proto.graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            return None
        respelled_ = _respelled(node, opset)
        if respelled_ is None:
            return None
        nodes += respelled_
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = OPSET
    if not proto.opset_import:  # files of IR 1 and 2 name no opset
        proto.opset_import.add(domain="", version=OPSET)
    return f"respelled from opset {opset} to {OPSET}, the first that engines run"


def _respelled(node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto] | None:
    """The nodes that stand for one at OPSET; None where that is not known."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    given = {attribute.name: attribute for attribute in copy.attribute if attribute.name != _IN_PLACE}
    del copy.attribute[:]
    before: list[onnx.NodeProto] = []
    given |= _defaults(node.op_type, opset, given)
    if node.op_type in _SPELLINGS and changes(node.op_type, opset, OPSET):
        found = _SPELLINGS[node.op_type](copy, given)
        if found is None:
            return None
        before = found
    copy.attribute.extend(given.values())
    fits = misfit(node.op_type, OPSET, given, [None] * len(copy.input)) is None
    return [*before, copy] if fits else None


def _defaults(op_type: str, opset: int, given: Collection[str]) -> dict[str, onnx.AttributeProto]:
    """The attributes that are left out, and that would then mean another value at OPSET."""
    old, new = schema(op_type, opset), schema(op_type, OPSET)
    found: dict[str, onnx.AttributeProto] = {}
    if old is None or new is None:
        return found
    for name, attribute in old.attributes.items():
        default, later = attribute.default_value, new.attributes.get(name)
        if name not in given and default.name and later is not None and default != later.default_value:
            found[name] = default
    return found


_Attributes = dict[str, onnx.AttributeProto]


def _without(*names: str) -> Callable[[onnx.NodeProto, _Attributes], list[onnx.NodeProto] | None]:
    """Drop attributes that say what is so at OPSET anyway."""

    def spelled(node: onnx.NodeProto, given: _Attributes) -> list[onnx.NodeProto] | None:
        for name in names:
            given.pop(name, None)
        return []

    return spelled


def _in_test(node: onnx.NodeProto, given: _Attributes) -> list[onnx.NodeProto] | None:
    """One that computes statistics or a mask, as in training, has no equal."""
    given.pop("is_test", None)
    return [] if len(node.output) == 1 else None


def _elementwise(node: onnx.NodeProto, given: _Attributes) -> list[onnx.NodeProto] | None:
    """Shapes are aligned at their ends, unless an axis is named."""
    given.pop("broadcast", None)
    return None if "axis" in given else []


def _reshape(node: onnx.NodeProto, given: _Attributes) -> list[onnx.NodeProto] | None:
    if "shape" not in given:
        return None
    sizes = list(given.pop("shape").ints)
    name = f"{node.output[0]}.sizes"
    node.input.append(name)
    return [helper.make_node("Constant", [], [name],
                             value=helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes))]  # fmt: skip


def _cast(node: onnx.NodeProto, given: _Attributes) -> list[onnx.NodeProto] | None:
    text = given["to"].s.decode() if "to" in given else ""
    if text in dict(TensorProto.DataType.items()):
        given["to"] = helper.make_attribute("to", TensorProto.DataType.Value(text))
        return []
    return None


def _pad(node: onnx.NodeProto, given: _Attributes) -> list[onnx.NodeProto] | None:
    given["pads"] = helper.make_attribute("pads", list(given.pop("paddings").ints))
    return []


def _refused(node: onnx.NodeProto, given: _Attributes) -> None:
    """A slope for each channel, which from 7 on is broadcast along the last axis."""
    return None


_SPELLINGS: Mapping[str, Callable[[onnx.NodeProto, _Attributes], list[onnx.NodeProto] | None]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less"), _elementwise),
    "BatchNormalization": _in_test, "Dropout": _in_test, "Gemm": _without("broadcast"), "Reshape": _reshape,
    "Cast": _cast, "Pad": _pad, "PRelu": _refused,
}  # fmt: skip
"""Operators that changed by more than what `misfit` sees, or whose attributes say what is so at OPSET."""
