"""Shapes and dtypes of one node's results, by ONNX's own inference on that node alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import onnx
import onnx_ir as ir

from graphopt.dialects.onnx.functions import function
from graphopt.dialects.onnx.spellings import DOMAIN, STANDARD
from graphopt.dialects.onnx.views import PATH
from graphopt.errors import GraphError, first_line


def error_at(node: ir.Node, reason: str) -> GraphError:
    """A GraphError that names the node; its attribute `node` is the node's label."""
    label = node.metadata_props.get(PATH) or node.name
    error = GraphError(f"{reason} ({label})")
    error.node = label  # type: ignore[attr-defined]
    return error


class Inference:
    """Infers node after node of a model; function bodies are serialized once each."""

    def __init__(self, model: ir.Model) -> None:
        self._opsets = model.graph.opset_imports
        self._functions: dict[str, onnx.FunctionProto] = {}

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return self._opsets.get("", self._opsets.get("ai.onnx", 1))

    def infer(self, node: ir.Node) -> None:
        """Set the shapes and dtypes of a node's outputs from those of its inputs, where all inputs have a type.

        Raises GraphError naming a node that does not fit its operands.
        """
        first = node.inputs[0] if node.inputs else None
        if (node.domain, node.op_type.partition("__")[0]) == (DOMAIN, "dequantize") and first is not None:
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)  # inference loses shapes between two Reshapes
            node.outputs[0].shape = None if first.shape is None else first.shape.copy()
            return
        inputs = {}
        for value in node.inputs:
            if value is not None and value.type is not None:
                inputs[value.name or ""] = ir.serde.serialize_value(value).type
        if len(inputs) < len({v for v in node.inputs if v is not None}):
            return
        try:
            types = self._types(node, inputs)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
            raise error_at(node, f"{node.op_type} does not fit its operands: {first_line(error)}") from error
        for output, found in zip(node.outputs, types, strict=True):
            if found is not None and found.WhichOneof("value") == "tensor_type":
                output.type = ir.TensorType(ir.DataType(found.tensor_type.elem_type))
                if found.tensor_type.HasField("shape"):
                    output.shape = ir.Shape([
                        d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
                        for d in found.tensor_type.shape.dim
                    ])  # fmt: skip
            elif found is not None:  # a sequence: torch's exporter types that of SplitToSequence as a tensor
                with suppress(ir.serde.SerdeError):  # of maps, for which onnx-ir has no type
                    output.type, output.shape = ir.serde.deserialize_type_proto_for_type(found), None

    def _types(self, node: ir.Node, inputs: Mapping[str, onnx.TypeProto]) -> list[onnx.TypeProto | None]:
        if node.domain == DOMAIN:
            if node.op_type not in self._functions:
                self._functions[node.op_type] = ir.serde.serialize_function(function(node.op_type, self.opset))
            given = [inputs[value.name or ""] for value in node.inputs if value is not None]
            attributes = [ir.serde.serialize_attribute(a) for a in node.attributes.values()]
            body = self._functions[node.op_type]
            return list(onnx.shape_inference.infer_function_output_types(body, given, attributes))
        domain, opset = ("", self.opset) if node.domain in STANDARD else (node.domain, self._opsets.get(node.domain, 1))
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, domain)
        except onnx.defs.SchemaError:  # of another domain, or experimental once; engines may still know it
            return [None] * len(node.outputs)
        if node.op_type == "GroupNormalization" and node.inputs[0] is not None:  # a function, which is not followed
            return [inputs[node.inputs[0].name or ""]]
        if schema.deprecated:  # which inference refuses, and engines run
            return [None] * len(node.outputs)
        small = {
            v.name or "": ir.serde.serialize_tensor(v.const_value)
            for v in node.inputs
            if v is not None and not v.is_graph_input() and v.const_value is not None and v.const_value.size <= 64
        }
        opsets = [onnx.helper.make_opsetid(domain, opset)]
        found = onnx.shape_inference.infer_node_outputs(
            schema, ir.serde.serialize_node(node), dict(inputs), small, opset_imports=opsets
        )
        return [found.get(output.name or "") for output in node.outputs]
