"""Which operators ONNX Runtime has a kernel for, found by loading each of them alone.

An opset may be newer than the engine's kernels: of version 1.31, RandomNormalLike has one up to opset 21, none at 22.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
import onnxruntime as ort

_KNOWN: dict[tuple[object, ...], bool] = {}
"""Whether there is a kernel, by operator, version and element types."""


def loads(model: onnx.ModelProto) -> bool:
    """Whether the engine loads a model as it is, without its optimizer; it must hold its weights."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # the engine's exceptions have no base of their own
        return False
    return True


def without_kernel(model: ir.Model) -> list[ir.Node]:
    """The nodes whose operators the engine has no kernel for on the CPU at the model's opset, as far as is known."""
    opset = model.opset_imports.get("", 1)
    return [node for node in model.graph.all_nodes() if not _has_kernel(node, opset)]


def newest_opset(model: ir.Model) -> int:
    """The newest opset, up to the model's own, in which each of its operators has a kernel on the CPU; or 0.

    Operators of other domains, those with subgraphs, and those whose types are not known are taken to have one.
    """
    opset = model.opset_imports[""]
    lacking = without_kernel(model)
    while lacking:
        opset = min(_version(node.op_type, opset) for node in lacking) - 1
        if opset < 1 or not all(onnx.defs.has(node.op_type, opset) for node in lacking):
            return 0
        lacking = [node for node in lacking if not _has_kernel(node, opset)]
    return opset


def _version(op_type: str, opset: int) -> int:
    """The opset that last changed an operator."""
    return int(onnx.defs.get_schema(op_type, opset).since_version)


def _has_kernel(node: ir.Node, opset: int) -> bool:
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset):
        return True
    if any(one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for one in node.attributes.values()):
        return True
    values = [*node.inputs, *node.outputs]
    if any(value is not None and not isinstance(value.type, ir.TensorType) for value in values):
        return True
    types = tuple(None if value is None else value.dtype for value in values)
    key = (node.op_type, _version(node.op_type, opset), len(node.inputs), types)
    if ir.DataType.BFLOAT16 not in types and key not in _KNOWN:  # `run` widens bfloat16
        _KNOWN[key] = _loads(node, opset)
    return _KNOWN.get(key, True)


def _loads(node: ir.Node, opset: int) -> bool:
    names = [None if value is None else f"x{place}" for place, value in enumerate(node.inputs)]
    results = [f"y{place}" for place in range(len(node.outputs))]
    inputs = [_declared(value, name) for value, name in zip(node.inputs, names, strict=True) if value is not None]
    outputs = [_declared(value, name) for value, name in zip(node.outputs, results, strict=True)]
    alone = onnx.helper.make_node(node.op_type, [name or "" for name in names], results)
    alone.attribute.extend(ir.to_proto(one) for one in node.attributes.values())
    graph = onnx.helper.make_graph([alone], "alone", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=onnx.helper.find_min_ir_version_for(opsets)
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # others are about constants and shapes, which stand alone here
        return "NOT_IMPLEMENTED" not in str(error)
    return True


def _declared(value: ir.Value, name: str | None) -> onnx.ValueInfoProto:
    shape: Sequence[None] | None = None if value.shape is None else [None] * len(value.shape)
    assert name is not None and value.dtype is not None
    return onnx.helper.make_tensor_value_info(name, int(value.dtype), shape)
