"""Whether a mask of attention allows no position after that of its query, as the expression that makes it says."""

from __future__ import annotations

from graphopt.ir.graph import Value
from graphopt.ir.rewrite import scalar

_COPIES = ("identity", "onnx.Expand")
_LOWEST = -1e30


def implies_causal(mask: Value, past: int | str) -> bool:
    """Whether a mask (..., queries, keys) allows query i at most the keys up to number past + i.

    past: the size of the axis of the cached keys, a number or the name of the axis. False where that is not known.
    """
    node = mask.producer
    if node is None:
        return False
    first = node.operands[0] if node.operands else None
    match node.kind:
        case "onnx.And":
            return any(one is not None and implies_causal(one, past) for one in node.operands)
        case "where":
            low = scalar(node.graph, node.operands[2])
            return first is not None and low is not None and low < _LOWEST and implies_causal(first, past)
        case "unsqueeze":
            rank = mask.rank or 0
            leading = all(axis % rank < rank - 2 for axis in node.attributes["axes"]) if rank else False
            return leading and implies_causal(node.input, past)
        case "onnx.LessOrEqual":
            return _is_key(node.operands[0]) and _is_query(node.operands[1], past)
        case "onnx.GreaterOrEqual":
            return _is_key(node.operands[1]) and _is_query(node.operands[0], past)
        case kind if kind in _COPIES:
            return first is not None and implies_causal(first, past)
    return False


def _is_key(value: Value | None) -> bool:
    """Whether the entries of a value are 0, 1, 2, ... along its last axis, and it has no other."""
    counted = _counted(value, axis=-1)
    return counted is not None and counted[1] is None


def _is_query(value: Value | None, past: int | str) -> bool:
    """Whether the entries are past, past + 1, ... along the axis before the last, and there is no other axis."""
    counted = _counted(value, axis=-2)
    return counted is not None and counted[1] is not None and _is_size(counted[1], past)


def _counted(value: Value | None, axis: int) -> tuple[Value, Value | None] | None:
    """The Range along one axis that a value repeats with all other axes of size 1, and what is added to it."""
    shape = value.shape if value is not None else None
    if value is None or not shape or len(shape) < -axis:
        return None
    if any(size != 1 for place, size in enumerate(shape) if place != len(shape) + axis):
        return None
    added: Value | None = None
    while (node := value.producer) is not None:
        match node.kind:
            case "unsqueeze" | "squeeze" | "reshape" | "identity" | "onnx.Reshape":
                value = node.operands[0]
                assert value is not None  # operands of views are not left out
            case "add" if added is None:
                a, b = node.required("a"), node.required("b")
                value, added = (b, a) if not a.rank else (a, b)
                if added.rank:
                    return None
            case "onnx.Range":
                start, _, step = node.operands
                from_zero = scalar(node.graph, start) == 0 and scalar(node.graph, step) == 1
                return (value, added) if from_zero else None
            case _:
                return None
    return None


def _is_size(value: Value, size: int | str) -> bool:
    """Whether a scalar is the size of an axis, read from the shape of a value with such an axis."""
    while (node := value.producer) is not None and node.kind in ("onnx.Squeeze", "squeeze", "reshape", "identity"):
        assert node.operands[0] is not None
        value = node.operands[0]
    x = node.operands[0] if node is not None and node.kind == "onnx.Shape" else None
    if node is None or x is None or x.shape is None:
        return False
    part = x.shape[node.attributes.get("start", 0) : node.attributes.get("end")]
    return list(part) == [size] and size != "?"
