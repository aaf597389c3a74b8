"""Reading an ONNX model in: parsing files safely, putting a model in order, and raising its spellings of linear."""

from __future__ import annotations

import ast
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from graphopt.dialects.onnx import quantized as onnx_quantized
from graphopt.dialects.onnx.files import open_weights
from graphopt.dialects.onnx.graph import PATH, OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.ops import DOMAIN, STANDARD, repeats_over_queries
from graphopt.dialects.onnx.tensors import FLOATS, TORCH_DTYPES
from graphopt.errors import GraphError, first_line
from graphopt.ir.graph import Shape

MAP_TYPE = "graphopt.map_type"
"""Where the type of an output that holds a map is kept, as a TypeProto."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def read_model(path: str | Path) -> ir.Model:
    """Parse a file. Raises GraphError when it is unreadable, or when external data lies outside the file's folder."""
    path = Path(path)
    proto = _proto(path)
    try:
        if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
            raise ValueError("it holds no graph")
        check_external_data(proto, path.parent)
        model = parsed(proto)
        model.graph.sort()  # an unsorted graph cannot be cloned
        open_weights(model, path.parent)
    except GraphError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return model


def _proto(path: Path) -> onnx.ModelProto:
    """A file's content, without its external data."""
    if not path.is_file():
        raise GraphError(f"there is no file {path}")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> GraphError:
    return GraphError(f"{path} is not a readable ONNX model (corrupt or truncated?): {first_line(error)}")


def external_files(path: Path) -> set[Path]:
    """The files that a model's weights lie in, besides its own. Raises GraphError where it is unreadable."""
    entries = (entry for tensor in _tensors(_proto(path)) for entry in tensor.external_data)
    return {path.parent / entry.value for entry in entries if entry.key == "location"}


def check_external_data(proto: onnx.ModelProto, folder: Path | None) -> None:
    """Raise GraphError where a tensor's external data leaves the model's folder, or is not there.

    folder: None for a model in memory, which is in no folder.
    """
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        if folder is None:
            raise GraphError(
                f"tensor {tensor.name!r} has its data in the file {entry.get('location')!r}, which was not read; "
                "hand over the model's path"
            )
        root = folder.resolve()
        location = entry.get("location", "")
        target = (root / location).resolve()
        if os.path.isabs(location) or not target.is_relative_to(root):
            raise GraphError(
                f"tensor {tensor.name!r} has its data at {location!r}, outside the model's folder; refused. "
                "Put the data file beside the model"
            )
        if not target.is_file():
            raise GraphError(f"tensor {tensor.name!r} has its data in {location!r}, and there is no such file")
        offset, needed = int(entry.get("offset", 0)), _bytes(tensor)
        if offset < 0 or int(entry.get("length", needed)) < needed:
            raise GraphError(f"tensor {tensor.name!r} names part of {location!r} that does not hold its {needed} bytes")
        end = offset + int(entry.get("length", needed))
        if end > target.stat().st_size:
            raise GraphError(f"tensor {tensor.name!r} needs {end} bytes of {location!r}, which is shorter: truncated?")


def _bytes(tensor: onnx.TensorProto) -> int:
    return math.ceil(math.prod(int(size) for size in tensor.dims) * float(ir.DataType(tensor.data_type).itemsize))


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs: list[Any] = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())
        for node in graph.node:
            for attribute in node.attribute:
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
                graphs.extend(attribute.graphs)
                yield from [attribute.t] if attribute.HasField("t") else []
                yield from attribute.tensors


def parsed(proto: onnx.ModelProto) -> ir.Model:
    """The model in onnx-ir, which knows no maps: the types of outputs that hold one are kept aside in `meta`."""
    maps = {output.name: output.type for output in proto.graph.output if "map_type" in str(output.type)}
    if not maps:
        return ir.from_proto(proto)
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for value in (*plain.graph.output, *plain.graph.value_info):
        if "map_type" in str(value.type):
            value.ClearField("type")
    model = ir.from_proto(plain)
    for output in model.graph.outputs:
        if output.name in maps:
            output.meta[MAP_TYPE] = maps[output.name]
    return model


def in_order(model: ir.Model | onnx.ModelProto) -> ir.Model:
    """A copy of the model, sorted, constants as initializers and not as inputs, functions inlined, shapes inferred."""
    if isinstance(model, onnx.ModelProto):
        check_external_data(model, None)
    model = parsed(model) if isinstance(model, onnx.ModelProto) else model.clone()
    graph = model.graph
    graph.sort()
    if "ai.onnx" in graph.opset_imports:  # the long name of the same domain
        graph.opset_imports.setdefault("", graph.opset_imports.pop("ai.onnx"))
    model.ir_version = max(model.ir_version or 0, 4)  # the first that lets initializers be no inputs
    if any(domain != DOMAIN for domain, _, _ in model.functions):
        ir_passes.InlinePass()(model)
    ir_passes.RemoveInitializersFromInputsPass()(model)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir_passes.NameFixPass()(model)
    for node in graph:
        node.name = node.name or ""
        path = node.metadata_props.get(PATH) or _path_of(node)
        if path:
            node.metadata_props[PATH] = path
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.serde.TensorProtoTensor) and value.const_value.dtype in TORCH_DTYPES:
            # protobuf hands out a new copy of its bytes at every access; this one stays
            tensor = value.const_value
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        if value.const_value is not None and value.shape is None:
            value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    if any(output.shape is None for node in graph for output in node.outputs):
        with contextlib.suppress(ir.serde.SerdeError):  # a value may turn out to be a map
            ir_passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return model


def _path_of(node: ir.Node) -> str:
    """The module path: from the dynamo exporter's scopes, or from a name such as /encoder/layer.0/MatMul."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes:
        listed = _listed(scopes)
        scope = str(listed[-2]) if len(listed) > 1 else ""
        return "" if scope.startswith("_empty_nn_module_stack") else scope
    *path, _ = (node.name or "").strip("/").split("/")  # also graphopt's own names: encoder.layer.0/MatMul
    return ".".join(path)


def _listed(text: str) -> list[Any]:
    """The list that a text spells; empty where it spells none: metadata is nothing to fail on."""
    try:
        listed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return listed if isinstance(listed, list) else []


def raise_spellings(graph: OnnxGraph) -> None:
    """Spellings that one node alone does not show: MatMul with a constant, Gemm, and an Add behind, are linear.

    An attention whose mask has one row for all queries is emitted anew, in a spelling that onnxruntime runs.
    """
    onnx_quantized.raise_quantized(graph)
    for native in list(graph.model.graph):
        node = OnnxNode(graph, native)
        if native.domain in STANDARD and native.op_type in ("MatMul", "Gemm"):
            _raise_linear(graph, node)
        elif native.op_type == "Attention" and node.kind == "attention" and repeats_over_queries(*node.operands):
            graph.replace(node, graph.emit("attention", *node.operands, at=node, **node.attributes))
        elif node.kind == "linear" and node.bias is None:  # of integers, raised before
            weight = node.required("weight")
            if (behind := _bias_behind(graph, node, (weight.shape or ("?",))[:1])) is not None:
                graph.replace(behind[0], graph.emit("linear", node.input, weight, behind[1], at=node))
                graph.erase(node)


def _raise_linear(graph: OnnxGraph, node: OnnxNode) -> None:
    """MatMul(x, W) and Gemm(x, W, b), with a bias added behind, as linear; W stays as it is stored."""
    x, stored, *rest = graph.values(node.native.inputs)
    weight = _constant_view(graph, stored.native if stored is not None else None)
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
        weight = onnx_quantized.dequantized_weight(graph, stored, kn, node)
    elif kn:
        weight = weight.transpose()
    if weight is None or weight.rank != 2 or weight.dtype not in FLOATS:
        return
    width = (weight.shape or ("?",))[:1]
    if bias is not None and bias.shape != width:
        return
    site = node
    if bias is None and (behind := _bias_behind(graph, node, width)) is not None:
        site, bias = behind
    graph.replace(site, graph.emit("linear", x, weight, bias, at=node))
    if site is not node:
        graph.erase(node)


_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def _constant_view(graph: OnnxGraph, native: ir.Value | None) -> OnnxValue | None:
    """A constant, or a constant behind Transpose, as a view."""
    if native is None:
        return None
    producer = native.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.domain in STANDARD:
        inner = producer.inputs[0]
        perm = producer.attributes.get("perm")
        if inner is not None and len(inner.shape or ()) == 2 and (perm is None or list(perm.as_ints()) == [1, 0]):
            view = OnnxValue(graph, inner)
            return view.transpose() if view.is_constant else None
        return None
    view = OnnxValue(graph, native)
    return view if view.is_constant else None


def _bias_behind(graph: OnnxGraph, node: OnnxNode, width: Shape) -> tuple[OnnxNode, OnnxValue] | None:
    """The Add of a constant (width,) that is the only user, and that constant."""
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
