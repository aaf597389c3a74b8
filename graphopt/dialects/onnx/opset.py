"""A deployable model at another opset: each node as that opset spells it, or refused by name.

An op is spelled again, or written out in others. Any other operator stays where the opset has it with the same meaning,
is written out (`OPERATORS`), or goes through onnx's converter by itself; what that does not know is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch

from graphopt.dialects.onnx import shapes as onnx_shapes
from graphopt.dialects.onnx.graph import PATH, OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.spellings import KEPT, STANDARD
from graphopt.dialects.onnx.versions import changes, misfit, schema
from graphopt.dialects.onnx.written_out import OPERATORS, OPS, Attributes, Operands
from graphopt.errors import GraphError, SpellingError
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder

OLDEST = 11
"""The oldest that files are written at: before it, Clip and Pad had their bounds as attributes."""

_Read = tuple[str, Operands, Attributes]
"""A node as an op at the opset that the graph comes from: its kind, operands and attributes."""


def at_opset(graph: OnnxGraph, opset: int) -> None:
    """Rewrite in place so that every node is an operator of `opset`, and infer all shapes anew there.

    Raises GraphError naming a node that cannot be written at it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise GraphError(f"cannot write opset {opset}; give {OLDEST} to {newest}")
    graph.refine_shapes()  # nodes of inlined function bodies have no types
    source = graph.opset
    opsets = graph.model.graph.opset_imports
    for native in list(graph.model.graph.all_nodes()):
        if native.domain not in STANDARD or not changes(native.op_type, source, opset):
            opsets[""] = opset
            onnx_shapes.infer_node_anew(native, graph.inference.infer)
            continue
        if (meaning := _other_meaning(native, source, opset)) is not None:
            raise refused(native, meaning)
        opsets[""] = source  # by which a node is read
        read = _as_op(OnnxNode(graph, native))
        opsets[""] = opset  # for which it is spelled
        try:
            _spell(graph, native, read, source)
        except SpellingError as error:
            raise refused(native, str(error)) from error
    opsets[""] = opset
    graph.sweep()


def refused(native: ir.Node, reason: str) -> GraphError:
    """The error that names a node which cannot be written at an opset."""
    label = native.metadata_props.get(PATH) or native.name
    return GraphError(f"{reason} ({label}); give another opset, or leave it out")


def _as_op(node: OnnxNode) -> _Read | None:
    return None if node.op is None or node.native.op_type in KEPT else (node.kind, node.operands, node.attributes)


def _spell(graph: OnnxGraph, native: ir.Node, read: _Read | None, source: int) -> None:
    """Put what a node of opset `source` means, as the graph's opset spells it, in its place. Raises SpellingError."""
    node, opset = OnnxNode(graph, native), graph.opset
    op = Builder(graph, node)
    if read is not None:
        kind, operands, attributes = read
        try:
            values = graph.emit_all(kind, *operands, at=node, **attributes)
        except SpellingError:
            if kind not in OPS:
                raise
            values = (OPS[kind](op, operands, attributes),)
        _replace(graph, native, values)
        return
    _drop_defaults(native, source, opset)
    given = graph.values(native.inputs), {name: attribute.value for name, attribute in native.attributes.items()}
    left_out = [place for place, value in enumerate(native.inputs) if value is None]
    dtypes = [None if value is None else value.dtype for value in native.inputs]
    reason = misfit(native.op_type, opset, native.attributes, dtypes, left_out)
    if reason is None and not _means_another(native, source, opset):
        onnx_shapes.infer_node_anew(native, graph.inference.infer)
    elif native.op_type in OPERATORS:
        _replace(graph, native, OPERATORS[native.op_type](op, *given, source))
    else:
        _replace(graph, native, _converted(graph, native, source, opset, reason))


def _replace(graph: OnnxGraph, native: ir.Node, values: Sequence[Value]) -> None:
    """Use values for the results of a node, which may stand in a subgraph, and remove it."""
    for old, value in zip(native.outputs, values, strict=False):
        onnx_shapes.complete(graph.native(value), old.shape)
    if native.graph is graph.model.graph:
        graph.replace(OnnxNode(graph, native), *values)
        return
    for old, value in zip(native.outputs, values, strict=False):
        ir.convenience.replace_all_uses_with(old, graph.native(value), replace_graph_outputs=True)
    assert native.graph is not None
    native.graph.remove(native, safe=True)


# --- what stays, and what an operator means ------------------------------------------------------------------------

_MEANS_ANOTHER = {"Softmax": 13, "LogSoftmax": 13, "Hardmax": 13, "Split": 18, "DFT": 20, "GridSample": 20,
                  "Resize": 11, "GroupNormalization": 21}  # fmt: skip
"""By operator, the opset from which on the same spelling means something else, or is not valid."""

_REFUSED = {"RoiAlign": 16}
"""The same, of operators that nothing here writes for the other side, and that onnx's converter gets wrong."""

_VALUES = {
    ("Pad", "mode", b"wrap"): 19,
    ("Resize", "coordinate_transformation_mode", b"half_pixel_symmetric"): 19,
    **{(op_type, "reduction", value): 18 for op_type in ("ScatterND", "ScatterElements") for value in (b"max", b"min")},
    **{(op_type, "reduction", value): 16 for op_type in ("ScatterND", "ScatterElements") for value in (b"add", b"mul")},
}
"""By operator, attribute and value, the first opset that has the value."""


def _means_another(native: ir.Node, source: int, opset: int) -> bool:
    return _lies_between(_MEANS_ANOTHER.get(native.op_type), source, opset)


def _lies_between(since: int | None, source: int, opset: int) -> bool:
    return since is not None and (source < since) != (opset < since)


def _other_meaning(native: ir.Node, source: int, opset: int) -> str | None:
    """Why a node cannot keep its meaning at an opset, whatever its spelling; None where it may."""
    read = [output for output in native.outputs[1:] if output.uses() or output.is_graph_output()]
    if _lies_between(_REFUSED.get(native.op_type), source, opset):
        return f"{native.op_type} means something else in opset {opset}"
    if native.op_type == "Dropout" and read and _lies_between(12, source, opset):
        return "the mask of Dropout is another one from opset 12 on"
    if native.op_type == "BatchNormalization" and read:
        return f"the statistics of BatchNormalization have another form in opset {opset}"
    for (op_type, name, value), since in _VALUES.items():
        given = native.attributes.get(name) if native.op_type == op_type else None
        if given is not None and given.as_string().encode() == value and opset < since:
            return f"{op_type} has no {name}={value.decode()} in opset {opset}"
    return None


def _drop_defaults(native: ir.Node, source: int, opset: int) -> None:
    """Drop attributes that the opset does not have, where they only spell a default."""
    old, new = schema(native.op_type, opset), schema(native.op_type, source)
    if old is None or new is None:
        return
    for name in [name for name in native.attributes if name not in old.attributes and name in new.attributes]:
        if _is_default(native.attributes[name], new.attributes[name]):
            native.attributes.pop(name)


def _is_default(given: ir.Attr, attribute: onnx.defs.OpSchema.Attribute) -> bool:
    default = attribute.default_value
    if not default.name:
        return given.name == "dilations" and set(given.as_ints()) == {1}  # a default that the schema does not state
    return bool(ir.serde.deserialize_attribute(default).value == given.value)


def _converted(
    graph: OnnxGraph, native: ir.Node, source: int, opset: int, reason: str | None
) -> Sequence[Value]:
    """The results of a node, as onnx converts that by itself. reason: why it cannot stay as it is.

    Raises SpellingError where onnx cannot convert it.
    """
    refusal = reason or f"{native.op_type} means something else in opset {opset}"
    given = [value for value in dict.fromkeys(native.inputs) if value is not None]
    if any(value.type is None for value in given):
        raise SpellingError(refusal)
    stored = [value for value in given if OnnxValue(graph, value).is_constant and value.const_value is not None
              and value.const_value.size <= _SMALL]  # fmt: skip
    proto = onnx.helper.make_graph(
        [ir.serde.serialize_node(native)], "node",
        [ir.serde.serialize_value(value) for value in given if value not in stored],
        [ir.serde.serialize_value(value) for value in native.outputs],
        [_stored_as(value) for value in stored],
    )  # fmt: skip
    model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", source)])
    try:
        found = ir.from_proto(onnx.version_converter.convert_version(model, opset)).graph
    except Exception as error:  # whatever the converter raises
        raise SpellingError(refusal) from error
    values = {value.name: OnnxValue(graph, value) for value in given}
    for name, constant in found.initializers.items():
        if name not in values and constant.const_value is not None:
            values[name] = graph.add_constant(torch.from_numpy(np.array(constant.const_value.numpy())))
    for node in found:
        if node.op_type == "Constant":
            tensor = node.attributes["value"].as_tensor().numpy()
            values[node.outputs[0].name] = graph.add_constant(torch.from_numpy(np.array(tensor)))
            continue
        operands = [None if value is None else values[value.name] for value in node.inputs]
        attributes = {attribute.name: attribute for attribute in node.attributes.values()}
        results = graph.emit_all(f"onnx.{node.op_type}", *operands, at=OnnxNode(graph, native),
                                 _outputs=len(node.outputs), **attributes)  # fmt: skip
        values |= dict(zip([output.name for output in node.outputs], results, strict=True))  # type: ignore[arg-type]
    return [values[output.name] for output in found.outputs]


_SMALL = 64
"""Most elements of a constant that the converter is shown: axes and sizes, which it may make an attribute."""


def _stored_as(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None
    tensor = ir.serde.serialize_tensor(value.const_value)
    tensor.name = value.name or ""
    return tensor
