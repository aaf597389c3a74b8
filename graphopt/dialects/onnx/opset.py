"""Write a deployable model at an older opset: a newer operator is written out in older ones, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import onnx_ir as ir
import torch

from graphopt.dialects.onnx.graph import PATH, OnnxGraph
from graphopt.dialects.onnx.spellings import STANDARD
from graphopt.errors import GraphError
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder

OLDEST = 13
"""Before it, axes of Squeeze and the like were attributes and quantization had no axis."""


def lower_opset(graph: OnnxGraph, opset: int) -> None:
    """Rewrite in place so that every node is an operator of `opset`. Raises GraphError naming a node that cannot be."""
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise GraphError(f"cannot write opset {opset}; give {OLDEST} to {newest}")
    graph.refine_shapes()  # nodes of inlined function bodies have no types
    source = graph.opset
    graph.model.graph.opset_imports[""] = opset  # what is emitted from here on is spelled for it
    for node in graph.nodes:
        write_out = _WRITE_OUT.get(node.kind)
        if write_out is not None and opset < write_out[0]:
            graph.replace(node, write_out[1](Builder(graph, node), node))
    graph.sweep()
    for native in graph.model.graph.all_nodes():
        if native.domain in STANDARD:
            _fit(native, source, opset)


def _fit(native: ir.Node, source: int, opset: int) -> None:
    """Raise GraphError unless a node, of `source` or written for `opset`, means the same at `opset`.

    Attributes that only spell a default are dropped.
    """
    label = native.metadata_props.get(PATH) or native.name
    try:
        old = onnx.defs.get_schema(native.op_type, opset)
    except onnx.defs.SchemaError:
        raise GraphError(f"{native.op_type} is not in opset {opset} ({label}); give a newer one") from None
    new = onnx.defs.get_schema(native.op_type, source)
    if old.since_version == new.since_version:
        return
    for name in [name for name in native.attributes if name not in old.attributes]:
        if not _is_default(native.attributes[name], new.attributes[name]):
            raise GraphError(f"{native.op_type} has no attribute {name!r} in opset {opset} ({label}); give a newer one")
        native.attributes.pop(name)
    if len(native.inputs) > old.max_input:
        raise GraphError(f"{native.op_type} takes {old.max_input} inputs in opset {opset} ({label}); give a newer one")
    for value, formal in zip(native.inputs, old.inputs, strict=False):
        if value is not None and value.dtype is not None and formal.types:
            spelled = f"tensor({_TYPE_NAMES.get(value.dtype, value.dtype.name.lower())})"
            if formal.types and spelled not in formal.types and any(t.startswith("tensor") for t in formal.types):
                raise GraphError(f"{native.op_type} takes no {spelled} in opset {opset} ({label}); give a newer one")


_TYPE_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


def _is_default(given: ir.Attr, attribute: onnx.defs.OpSchema.Attribute) -> bool:
    default = attribute.default_value
    if not default.name:
        return given.name == "dilations" and set(given.as_ints()) == {1}  # a default that the schema does not state
    return bool(ir.serde.deserialize_attribute(default).value == given.value)


# --- written out ---------------------------------------------------------------------------------------------------


def _number(op: Builder, number: float, like: Value) -> Value:
    return op.constant(torch.tensor(number, dtype=like.dtype or torch.float32))


def _gelu(op: Builder, node: Node) -> Value:
    x = node.input
    half, one = _number(op, 0.5, x), _number(op, 1.0, x)
    if node.attributes["approximate"] == "tanh":
        cubic = op.add(x, op.mul(op.mul(x, op.mul(x, x)), _number(op, 0.044715, x)))
        inner = op.tanh(op.mul(cubic, _number(op, math.sqrt(2 / math.pi), x)))
    else:
        inner = op.erf(op.div(x, _number(op, math.sqrt(2), x)))
    return op.mul(op.mul(x, half), op.add(inner, one))


def _rms_norm(op: Builder, node: Node) -> Value:
    x, weight = node.input, node.required("weight")
    axes = tuple(range(-(weight.rank or 1), 0))
    square = op.mean(op.mul(x, x), axes=axes, keepdim=True)
    return op.mul(op.div(x, op.sqrt(op.add(square, _number(op, node.attributes["eps"], x)))), weight)


def _attention(op: Builder, node: Node) -> Value:
    """softmax(q kᵀ · scale + mask) v, heads split and joined where they come together."""
    query, key, value = (node.required(name) for name in ("query", "key", "value"))
    mask, heads, kv_heads = node.operand("mask"), node.attributes["heads"], node.attributes["kv_heads"]
    if heads:
        query, key, value = _split(op, query, heads), _split(op, key, kv_heads), _split(op, value, kv_heads)
    if query.shape is None:
        raise GraphError(f"the heads of attention are not known ({node.label})")
    key, value = (_repeated(op, each, query.shape[1], node) for each in (key, value))
    size = query.shape[-1]
    scale = node.attributes["scale"] or (1 / math.sqrt(size) if isinstance(size, int) else None)
    if scale is None:
        raise GraphError(f"the head size of attention is not known, so its scale is not ({node.label})")
    scores = op.matmul(op.mul(query, _number(op, scale, query)), op.transpose(key, perm=(0, 1, 3, 2)))
    if mask is not None and mask.dtype is torch.bool:
        lowest = _number(op, torch.finfo(query.dtype or torch.float32).min, query)
        mask = op.where(mask, _number(op, 0.0, query), lowest)
    for added in (mask, _later_keys(op, scores) if node.attributes["causal"] else None):
        scores = scores if added is None else op.add(scores, added)
    weights = op.softmax(scores, axis=-1)
    context = op.matmul(weights, value)
    if not heads:
        return context
    joined = op.transpose(context, perm=(0, 2, 1, 3))
    return op("onnx.Reshape", joined, op.constant(torch.tensor([0, 0, -1])))


def _split(op: Builder, x: Value, heads: int) -> Value:
    width = x.shape[-1] if x.shape is not None else None
    size = width // heads if isinstance(width, int) else -1
    split = op("onnx.Reshape", x, op.constant(torch.tensor([0, 0, heads, size])))
    return op.transpose(split, perm=(0, 2, 1, 3))


def _repeated(op: Builder, x: Value, heads: int | str, node: Node) -> Value:
    """Keys or values (batch, kv heads, length, size), each head repeated for the queries that share it."""
    shape = x.shape or ("?",) * 4
    if shape[1] == heads and heads != "?":
        return x
    given, size = shape[1], shape[3]
    if not (isinstance(heads, int) and isinstance(given, int) and isinstance(size, int)):
        raise GraphError(f"the heads of attention, or their size, are not known ({node.label})")
    apart = op("onnx.Unsqueeze", x, op.constant(torch.tensor([2])))
    spread = op("onnx.Expand", apart, op.constant(torch.tensor([1, 1, heads // given, 1, 1])))
    return op("onnx.Reshape", spread, op.constant(torch.tensor([0, heads, -1, size])))


def _later_keys(op: Builder, scores: Value) -> Value:
    """(queries, keys): the lowest number for keys after their query, else 0; engines fold it where sizes are fixed."""
    two, four = (op.constant(torch.tensor([n])) for n in (2, 4))
    sizes = op("onnx.Slice", op("onnx.Shape", scores), two, four)
    dtype = scores.dtype or torch.float32
    lowest = op("onnx.ConstantOfShape", sizes, value=torch.tensor([torch.finfo(dtype).min], dtype=dtype))
    return op("onnx.Trilu", lowest, op.constant(torch.tensor(1)), upper=1)


def _hard_swish(op: Builder, node: Node) -> Value:
    return op.mul(node.input, op.hard_sigmoid(node.input))


def _mean(op: Builder, node: Node) -> Value:
    """The same op: its axes are written as the opset has them, as an attribute."""
    return op.graph.emit(node, node.input, at=node)


_WRITE_OUT: dict[str, tuple[int, Callable[[Builder, Node], Value]]] = {
    "gelu": (20, _gelu),
    "rms_norm": (23, _rms_norm),
    "attention": (23, _attention),
    "hard_swish": (14, _hard_swish),
    "mean": (18, _mean),
}
"""By op: the first opset that has its operator, and what writes it out for older ones."""
