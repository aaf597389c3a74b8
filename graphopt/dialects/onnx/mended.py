"""Faults of ONNX files: mended where engines load such files too, and else refused with the name of the node or value.

They are looked for here, as the libraries that parse a model report them unclearly, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from graphopt.dialects.onnx.spellings import STANDARD
from graphopt.dialects.onnx.versions import schema
from graphopt.errors import GraphError, few

MAP_TYPE = "graphopt.map_type"
"""The key in `meta` of a value for its type (a TypeProto), where it is an input or output that holds a map."""

_Attribute = onnx.AttributeProto


def mend(proto: onnx.ModelProto) -> list[str]:
    """Put a model in a form that can be read, in place; returns what the user should know of that.

    Raises GraphError for what no engine reads: a value that nothing makes or that two nodes make, an attribute that is
    missing or of another type, no outputs, an input given twice.
    """
    opset = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD), 1)
    if not proto.graph.output:
        raise GraphError("the graph has no outputs: it computes nothing")
    notes = list(_mended(proto.graph, opset))
    _require_values(proto.graph, [])
    return notes


def map_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """The types of inputs and outputs that hold a map, by name; their types and those of inner maps are cleared."""
    found: dict[str, onnx.TypeProto] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if "map_type" in str(value.type):
            found[value.name] = onnx.TypeProto.FromString(value.type.SerializeToString())
            value.ClearField("type")
    return found


def restore_map_types(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Give inputs and outputs that hold a map their types again, which onnx-ir cannot write."""
    values = (*model.graph.inputs, *model.graph.outputs)
    types = {value.name: value.meta[MAP_TYPE] for value in values if MAP_TYPE in value.meta}
    for stated in (*proto.graph.input, *proto.graph.output):
        if stated.name in types:
            stated.type.CopyFrom(types[stated.name])


# --- put right -----------------------------------------------------------------------------------------------------


def _mended(graph: onnx.GraphProto, opset: int) -> Iterator[str]:
    yield from _names(graph)
    for node in graph.node:
        _attributes(node, opset)
        for inner in _subgraphs(node):
            yield from _mended(inner, opset)
    yield from _declarations(graph)
    _stored_last(graph)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Drop node names that are not UTF-8, as nothing refers to them, and tell of those that several nodes have.

    Raises GraphError for any other name that is not UTF-8.
    """
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for node in graph.node:
        if isinstance(node.name, bytes):  # which is how protobuf gives a text that is not UTF-8
            yield f"the name of a node ({_of(node)}) is not UTF-8, and was dropped"
            node.ClearField("name")
        if node.name in seen:
            twice[node.name] = None
        seen |= {node.name} - {""}
        for name in (*node.input, *node.output, node.op_type, node.domain):
            if isinstance(name, bytes):
                raise GraphError(f"a name in {_of(node)} is not UTF-8: {_quoted(name)}")
    for value in (*graph.input, *graph.output, *graph.initializer):
        if isinstance(value.name, bytes):
            raise GraphError(f"the name of an input, output or weight is not UTF-8: {_quoted(value.name)}")
    if twice:
        yield f"several nodes are called {few([_quoted(name) for name in twice])}; they were renamed"


def _attributes(node: onnx.NodeProto, opset: int) -> None:
    """Raise GraphError, naming the node, where a standard operator lacks an attribute or has one of another type."""
    found = schema(node.op_type, opset) if node.domain in STANDARD else None
    if found is None:
        return
    given = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Constant" and (value := given.get("value")) is not None and value.type in _CONSTANTS:
        value.name = _CONSTANTS[value.type]  # as engines read it
        return
    for name, attribute in found.attributes.items():
        if name in given:
            is_, takes = _Attribute.AttributeType.Name(given[name].type), str(attribute.type).split(".")[-1]
            if is_ not in (takes, "UNDEFINED") and not given[name].ref_attr_name:  # undefined in files of IR 1
                raise GraphError(f"{_of(node)} has {is_} as its attribute {name!r}, which takes {takes}")
        elif attribute.required:
            raise GraphError(f"{_of(node)} lacks its attribute {name!r}")


_CONSTANTS = {
    _Attribute.FLOAT: "value_float", _Attribute.INT: "value_int", _Attribute.STRING: "value_string",
    _Attribute.FLOATS: "value_floats", _Attribute.INTS: "value_ints", _Attribute.STRINGS: "value_strings",
}  # fmt: skip
"""By its type, the attribute of Constant."""


def _declarations(graph: onnx.GraphProto) -> Iterator[str]:
    """Correct negative sizes, the types of outputs that are inputs too, and declarations that differ from what an
    initializer holds."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and size.dim_value < 0:
                yield f"a size of {_quoted(value.name)} is {size.dim_value}, and is taken as open"
                size.ClearField("dim_value")
    inputs = {value.name: value for value in graph.input}
    if len(inputs) < len(graph.input):
        raise GraphError(f"the input {_quoted(_repeated([value.name for value in graph.input]))} is given twice")
    for output in graph.output:
        if output.name in inputs:
            output.type.CopyFrom(inputs[output.name].type)
    for tensor in graph.initializer:
        declared = inputs[tensor.name].type.tensor_type if tensor.name in inputs else None
        if declared is None:
            continue
        sizes = [size.dim_value if size.HasField("dim_value") else None for size in declared.shape.dim]
        fits = len(sizes) == len(tensor.dims) and all(a in (None, b) for a, b in zip(sizes, tensor.dims, strict=True))
        if (declared.HasField("shape") and not fits) or declared.elem_type not in (0, tensor.data_type):
            stated = f"{_type(declared.elem_type)} {['?' if size is None else size for size in sizes]}"
            holds = f"{_type(tensor.data_type)} {list(tensor.dims)}"
            yield f"{_quoted(tensor.name)} is declared as {stated}, and holds {holds}, which is used"
            inputs[tensor.name].type.CopyFrom(onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims))


def _stored_last(graph: onnx.GraphProto) -> None:
    """Of constants of one name keep the last, as engines do."""
    constants = [node for node in graph.node if node.op_type == "Constant" and node.domain in STANDARD]
    names = [node.output[0] for node in constants if node.output]
    last = {node.output[0]: node for node in constants if node.output}
    if len(last) < len(names):
        for node in constants:
            if node.output and last[node.output[0]] is not node:
                graph.node.remove(node)
    stored = [tensor.name for tensor in graph.initializer]
    for index in reversed(range(len(stored))):
        if stored[index] in last or stored[index] in stored[index + 1 :]:
            del graph.initializer[index]


# --- refused -------------------------------------------------------------------------------------------------------


def _require_values(graph: onnx.GraphProto, outer: Sequence[set[str]]) -> None:
    """Raise GraphError where a node reads what nothing makes, or makes what another has made."""
    makers = {output: node for node in graph.node for output in node.output if output}
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    scopes = [*outer, given | set(makers)]
    made: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.output:
            if name and (name in made or name in given):
                first = f"{_of(made[name])} has made" if name in made else "is an input or a stored constant"
                raise GraphError(f"{_of(node)} makes {_quoted(name)} again, which {first}")
            made[name] = node
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise GraphError(f"{_of(node)} reads {_quoted(name)}, which nothing makes")
        for inner in _subgraphs(node):
            _require_values(inner, scopes)
    for value in graph.output:
        if not any(value.name in scope for scope in scopes):
            raise GraphError(f"the output {_quoted(value.name)} is made by nothing")


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _of(node: onnx.NodeProto) -> str:
    """A node in a sentence: its operator, with its name or that of its result."""
    name = next((text for text in (node.name, *node.output) if isinstance(text, str) and text), "")
    kind = _named(node.op_type)
    return f"{kind} ({_named(name)})" if name else kind


def _named(name: str | bytes) -> str:
    return name if isinstance(name, str) and len(name) <= _LONGEST else _quoted(name)


def _quoted(name: str | bytes) -> str:
    """A name in a damaged file, cut where it is long: a wrong length makes much of the file a part of the name."""
    text = repr(name)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


_LONGEST = 60
"""Characters of a name in a message."""


def _repeated(names: Sequence[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def _type(number: int) -> str:
    known = number in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(number).lower() if known else f"type {number}"
