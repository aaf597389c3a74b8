"""What each version of the standard operators has: which operators, and what inputs and attributes they take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cache

import onnx
import onnx_ir as ir


def schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """The operator as an opset has it; None where it has none of that name, or one that is withdrawn."""
    found = _of_that_name(op_type, opset)
    return None if found is None or found.deprecated else found


@cache
def _of_that_name(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def changes(op_type: str, opset: int, other: int) -> bool:
    """Whether an operator is another one at another opset, or is missing there."""
    one, two = _of_that_name(op_type, opset), _of_that_name(op_type, other)
    return one is None or two is None or one.since_version != two.since_version


def misfit(
    op_type: str, opset: int, attributes: Collection[str], inputs: Sequence[ir.DataType | None],
    left_out: Iterable[int] = (),
) -> str | None:  # fmt: skip
    """Why a node cannot be written at an opset, as the end of a sentence; None where it can.

    attributes: the names of those that are given. inputs: their element types, None where one is left out or unknown.
    left_out: the places of those that are left out.
    """
    found = schema(op_type, opset)
    if found is None:
        return f"{op_type} is not in opset {opset}"
    for name in attributes:
        if name not in found.attributes:
            return f"{op_type} has no attribute {name!r} in opset {opset}"
    for name, attribute in found.attributes.items():
        if attribute.required and name not in attributes:
            return f"{op_type} needs its attribute {name!r} in opset {opset}"
    if not found.min_input <= len(inputs) <= found.max_input:
        takes = f"{found.min_input} to {found.max_input}" if found.min_input < found.max_input else found.max_input
        return f"{op_type} takes {takes} inputs in opset {opset}"
    for index in left_out:
        if index < len(found.inputs) and found.inputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Single:
            return f"{op_type} needs its input {found.inputs[index].name!r} in opset {opset}"
    for index, dtype in enumerate(inputs):
        formal = found.inputs[min(index, len(found.inputs) - 1)]
        tensors = [name for name in formal.types if name.startswith("tensor")]
        if dtype is not None and tensors and (spelled := f"tensor({_name(dtype)})") not in tensors:
            return f"{op_type} takes no {spelled} in opset {opset}"
    return None


def _name(dtype: ir.DataType) -> str:
    """As schemas spell an element type."""
    return {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}.get(dtype, dtype.name.lower())
