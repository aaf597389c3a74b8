"""A file or a model -> an ir.Model in the order that `OnnxGraph` asks for. Files are checked before they are read."""

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

from graphopt.dialects.onnx import custom_operators, oldest
from graphopt.dialects.onnx import shapes as onnx_shapes
from graphopt.dialects.onnx.files import open_weights
from graphopt.dialects.onnx.inference import Inference
from graphopt.dialects.onnx.kernels import loads
from graphopt.dialects.onnx.mended import MAP_TYPE, map_types, mend
from graphopt.dialects.onnx.spellings import DOMAIN, STANDARD
from graphopt.dialects.onnx.tensors import TORCH_DTYPES
from graphopt.dialects.onnx.views import PATH
from graphopt.dialects.silence import quiet
from graphopt.errors import GraphError, few, first_line

NOTES = "graphopt.notes"
"""The key in `meta` of a model for what the user should know of how it was read: a list of sentences."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def read_model(path: str | Path) -> ir.Model:
    """Parse a file. Raises GraphError when it is unreadable, or when external data lies outside the file's folder."""
    path = Path(path)
    proto = _proto(path)
    try:
        if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
            raise ValueError("it holds no graph")
        check_external_data(proto, path.parent)
        model = _mended(proto, path)
        model.graph.sort()  # an unsorted graph cannot be cloned
        open_weights(model, path.parent)
    except GraphError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return model


def _mended(proto: onnx.ModelProto, path: Path) -> ir.Model:
    try:
        return _parsed(proto)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error


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
    """The model in onnx-ir, of a copy that is mended. Raises GraphError naming what cannot be read."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return _parsed(copy)


def _parsed(proto: onnx.ModelProto) -> ir.Model:
    """The model in onnx-ir, which refers to the memory of `proto`. That is mended first.

    onnx-ir has no map types: of an input or output that holds a map, the type is kept in `meta`.
    """
    notes = mend(proto)
    opset = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD), 1)
    if opset < oldest.OPSET and not loads(proto) and (note := oldest.respelled(proto, opset)) is not None:
        notes.append(note)
    maps = map_types(proto.graph)
    with quiet("onnx_ir"):
        model = ir.from_proto(proto)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in maps:
            value.meta[MAP_TYPE] = maps[value.name]
    model.meta[NOTES] = notes
    return model


def in_order(model: ir.Model | onnx.ModelProto) -> ir.Model:
    """A copy of the model as `OnnxGraph` wants it.

    Nodes are sorted; constants become initializers. Of inputs that are stored, those that are read as weights (before
    IR 4, all) become constants; the others stay, with their defaults. Functions, of the model or registered, are
    inlined (by onnx-ir); nodes have module paths in their metadata. Types and shapes are inferred anew; what the file
    says of them counts where inference tells nothing.
    """
    if isinstance(model, onnx.ModelProto):
        check_external_data(model, None)
    given = parsed(model) if isinstance(model, onnx.ModelProto) else model
    model = given if isinstance(model, onnx.ModelProto) else model.clone()
    notes: list[str] = model.meta.setdefault(NOTES, list(given.meta.get(NOTES, ())))
    graph = model.graph
    graph.sort()
    if "ai.onnx" in graph.opset_imports:  # the long name of the same domain
        graph.opset_imports.setdefault("", graph.opset_imports.pop("ai.onnx"))
    # IR 4 is the first that lets initializers be no inputs. The onnx package writes its newest, which engines may not
    # load yet: of those above 10, the least that the opset needs is enough.
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    needed = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    stated_version = model.ir_version or 0
    model.ir_version = min(max(model.ir_version or 0, 4), max(needed, 10))
    custom_operators.add_functions(model)
    if any(domain != DOMAIN for domain, _, _ in model.functions):
        ir_passes.InlinePass()(model)
    if taken := _without_weights_as_inputs(model, stated_version):
        notes.append(f"inputs that the file stores are constants here: {few([*map(repr, taken)])}")
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fix_names(model)
    for node in graph.all_nodes():
        node.name = node.name or ""
        path = node.metadata_props.get(PATH) or _path_of(node)
        if path:
            node.metadata_props[PATH] = path
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.serde.TensorProtoTensor) and value.const_value.dtype in TORCH_DTYPES:
            # protobuf returns a new copy of its bytes at every access; this copy stays
            tensor = value.const_value
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        if value.const_value is not None and value.shape is None:
            value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    if denied := onnx_shapes.infer_anew(model.graph, Inference(model).infer):
        notes.append(f"the file states a type or shape of {few([*map(repr, denied)])} that its nodes do not give: "
                     "these were inferred anew")  # fmt: skip
    typed = all(value.type is not None for value in graph.inputs)  # inference may crash where one is not
    if typed and any(output.shape is None for node in graph for output in node.outputs):
        with contextlib.suppress(ir.serde.SerdeError):  # a value may turn out to be a map
            ir_passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return model


def stored_in_16_bits(model: ir.Model) -> str | None:
    """The first type of 16 bits in which tensors are stored that a Cast makes float32; None where there are none."""
    for node in model.graph.all_nodes():
        stored = node.inputs[0] if node.op_type == "Cast" and node.domain in STANDARD else None
        if stored is None or not stored.is_initializer() or stored.dtype not in TYPES_OF_16_BITS:
            continue
        if node.attributes["to"].as_int() == ir.DataType.FLOAT:
            return stored.dtype.name
    return None


TYPES_OF_16_BITS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _without_weights_as_inputs(model: ir.Model, stated_version: int) -> list[str]:
    """Drop inputs that are stored and read as weights (before IR 4, all that are stored); returns their names."""
    inputs = model.graph.inputs
    taken = [value for value in inputs if value.is_initializer() and (stated_version < 4 or _is_weight(value))]
    for value in taken:
        inputs.remove(value)
    return [value.name or "" for value in taken]


_WEIGHTED = {
    "MatMul": 0, "Gemm": 0, "Conv": 1, "ConvTranspose": 1, "LSTM": 1, "GRU": 1, "RNN": 1, "BatchNormalization": 1,
    "LayerNormalization": 1, "InstanceNormalization": 1, "GroupNormalization": 1, "RMSNormalization": 1, "PRelu": 1,
    "QuantizeLinear": 1, "DequantizeLinear": 0, "QLinearConv": 1, "QLinearMatMul": 1, "MatMulInteger": 0,
    "ConvInteger": 1,
}  # fmt: skip
"""By operator, the index of the first input that is a weight, a bias or a scale where it is stored."""
_THROUGH = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "DequantizeLinear")


def _is_weight(value: ir.Value) -> bool:
    """Whether a node reads a stored value as a weight, also through what moves or casts it."""
    return any(
        (node.op_type in _WEIGHTED and index >= _WEIGHTED[node.op_type])
        or (node.op_type == "Gather" and index == 0 and len(value.shape or ()) > 1)
        or (node.op_type == "Add" and _is_product(node.inputs[1 - index]))
        or (node.op_type in _THROUGH and index == 0 and _is_weight(node.outputs[0]))
        for node, index in value.uses()
    )


def _is_product(value: ir.Value | None) -> bool:
    product = value.producer() if value is not None else None
    return product is not None and product.op_type in ("MatMul", "Conv", "ConvTranspose", "MatMulInteger")


def fix_names(model: ir.Model) -> None:
    """Give each value and node a name of its own. Inputs and outputs of all graphs keep theirs: they mean something."""
    kept = {value: value.name for graph in model.graphs() for value in (*graph.inputs, *graph.outputs) if value.name}
    ir_passes.NameFixPass()(model)
    for value, name in kept.items():
        value.name = name


def _path_of(node: ir.Node) -> str:
    """The module path: from the dynamo exporter's scopes, or from a name such as /encoder/layer.0/MatMul."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes:
        listed = _listed(scopes)
        scope = str(listed[-2]) if len(listed) > 1 else ""
        return "" if scope.startswith("_empty_nn_module_stack") else scope
    *path, _ = (node.name or "").strip("/").split("/")  # also names of graphopt, such as encoder.layer.0/MatMul
    return ".".join(path)


def _listed(text: str) -> list[Any]:
    """The list that a text spells; empty for other text, for metadata must not make a model fail."""
    try:
        listed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return listed if isinstance(listed, list) else []
