"""Operators of ONNX -> linear: MatMul and Gemm with a stored weight, and an Add of a stored bias after them."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.quantized import dequantized_weight
from graphopt.dialects.onnx.spellings import STANDARD, repeats_over_queries
from graphopt.dialects.onnx.tensors import FLOATS
from graphopt.ir.graph import Shape


def raise_linears(graph: OnnxGraph) -> None:
    """Put a linear in place of each MatMul or Gemm with a stored weight, with the bias of an Add that follows."""
    for native in list(graph.model.graph):
        node = OnnxNode(graph, native)
        if native.domain in STANDARD and native.op_type in ("MatMul", "Gemm"):
            _raise_linear(graph, node)
        elif node.kind == "linear" and node.bias is None:  # out of an operator on integers
            weight = node.required("weight")
            if (added := _bias_behind(graph, node, (weight.shape or ("?",))[:1])) is not None:
                graph.replace(added[0], graph.emit("linear", node.input, weight, added[1], at=node))
                graph.erase(node)


def respell_attention(graph: OnnxGraph) -> None:
    """Emit each attention whose mask has one row for all queries again, in a spelling that ONNX Runtime can run."""
    for node in graph.sites("attention"):
        if isinstance(node, OnnxNode) and node.native.op_type == "Attention" and repeats_over_queries(*node.operands):
            graph.replace(node, graph.emit("attention", *node.operands, at=node, **node.attributes))


def _raise_linear(graph: OnnxGraph, node: OnnxNode) -> None:
    """MatMul(x, W) and Gemm(x, W, b), with a bias that is added after it, as linear; W stays as it is stored.

    kn: whether the operator takes W as (in, out).
    """
    x, stored, *rest = graph.values(node.native.inputs)
    weight = _stored_weight(graph, stored.native if stored is not None else None)
    bias, kn = rest[0] if rest else None, True
    if x is None or x.is_constant:
        return
    if node.native.op_type == "MatMul":
        if x.rank is None or x.rank < 2:
            return
    else:
        attributes = _GEMM | {a.name: a.value for a in node.native.attributes.values()}
        if attributes["alpha"] != 1 or attributes["beta"] != 1 or attributes["transA"]:
            return
        kn = not attributes["transB"]
    if weight is None:
        weight = dequantized_weight(graph, stored, kn, node)
    elif kn:
        weight = weight.transpose()
    if weight is None or weight.rank != 2 or weight.dtype not in FLOATS:
        return
    width = (weight.shape or ("?",))[:1]
    if bias is not None and bias.shape != width:
        return
    site = node
    if bias is None and (added := _bias_behind(graph, node, width)) is not None:
        site, bias = added
    graph.replace(site, graph.emit("linear", x, weight, bias, at=node))
    if site is not node:
        graph.erase(node)


_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def _stored_weight(graph: OnnxGraph, native: ir.Value | None) -> OnnxValue | None:
    """A stored matrix, or the transposed view of one, as it is read through Transposes; None for other values."""
    transposed = False
    while native is not None and (producer := native.producer()) is not None:
        perm = producer.attributes.get("perm")
        if producer.op_type != "Transpose" or producer.domain not in STANDARD or len(native.shape or ()) != 2:
            return None
        if perm is None or list(perm.as_ints()) == [1, 0]:
            transposed = not transposed
        native = producer.inputs[0]
    view = OnnxValue(graph, native) if native is not None else None
    return None if view is None or not view.is_constant else view.transpose() if transposed else view


def _bias_behind(graph: OnnxGraph, node: OnnxNode, width: Shape) -> tuple[OnnxNode, OnnxValue] | None:
    """The Add that alone reads a node and adds a constant of shape `width`, and that constant."""
    user = node.result.only_user
    if not isinstance(user, OnnxNode):
        return None
    native = user.native
    if native.graph is not graph.model.graph or native.op_type != "Add" or native.domain not in STANDARD:
        return None
    for value in graph.values(native.inputs):
        if value is not None and value.is_constant and value.shape == width:
            return user, value
    return None
