"""From a graph of ops to a deployable ONNX model and file: each op in operators that engines know."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch

from graphopt.dialects.onnx import crashing
from graphopt.dialects.onnx import files as onnx_files
from graphopt.dialects.onnx.graph import PATH, SCALED, STORED_IN_16_BITS, OnnxGraph, OnnxValue
from graphopt.dialects.onnx.mended import MAP_TYPE, restore_map_types
from graphopt.dialects.onnx.opset import at_opset
from graphopt.dialects.onnx.reading import fix_names
from graphopt.dialects.onnx.spellings import DOMAIN, STANDARD
from graphopt.dialects.onnx.tensors import TORCH_DTYPES, to_numpy, to_torch
from graphopt.errors import GraphError, first_line
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, rewrite

_EXPORTERS = ("pkg.torch.onnx.", "pkg.torch.export.")


def deployable(graph: OnnxGraph, opset: int | None = None) -> ir.Model:
    """The model, its ops in standard operators and in the contrib operators that a backend put in.

    opset: the version of the standard operators, the graph's own by default. Raises GraphError naming a node that
    has no spelling in it. No node of domain `graphopt` is left.
    """
    graph = graph.clone()
    for part in (*graph.bodies, graph):
        assert isinstance(part, OnnxGraph)
        rewrite(part, [DYNAMIC_QUANTIZE])
        rewrite(part, crashing.RULES)
        for node in part.sites("linear"):
            _spell_linear(part, node)
        for node in part.sites("embedding"):
            if (rows := gathered(part, node)) is not None:
                part.replace(node, rows)
        part.sweep()
    model = graph.model
    if model.functions:
        _inline(model)
    if opset is not None and opset != graph.opset:
        at_opset(graph, opset)
        if model.functions:  # of ops that the other opset has no operator for
            _inline(model)
    _spell_zero_points(model)
    crashing.let_bodies_read_sums(model)
    _store_in_16_bits(model)
    ir_passes.RemoveUnusedOpsetsPass()(model)
    model.producer_name = "graphopt"
    _strip(model)
    _name_by_path(model)
    return model


def _spell_zero_points(model: ir.Model) -> None:
    """Give int8 activations that leave out their zero point a stored one of 0.

    ONNX Runtime rewrites such activations to uint8, and fails where only `output_dtype` states their type.
    """
    zero: ir.Value | None = None
    for native in model.graph.all_nodes():
        if native.op_type == "QuantizeLinear" and len(native.inputs) == 3:
            native.attributes.pop("output_dtype", None)
        first, scale = (*native.inputs, None, None)[:2]
        signed = [v for v in (first, native.outputs[0]) if v is not None and v.dtype is ir.DataType.INT8]
        moves = native.op_type in ("QuantizeLinear", "DequantizeLinear") and len(native.inputs) == 2
        one_scale = scale is not None and scale.shape is not None and len(scale.shape) == 0
        if not (moves and one_scale and signed and signed[0].const_value is None):
            continue
        if zero is None:
            tensor = ir.tensor(np.zeros((), np.int8), name=_free_name(model, "zero_point_of_int8"))
            zero = ir.Value(name=tensor.name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT8))
            zero.const_value = tensor
            model.graph.register_initializer(zero)
        native.resize_inputs(3)
        native.replace_input_with(2, zero)
        native.attributes.pop("output_dtype", None)


def _store_in_16_bits(model: ir.Model) -> None:
    """Store float32 weights in 16 bits and cast them to float32, where the file that came in did so.

    Weights that 16 bits do not hold exactly stay as they are. Engines compute the casts once, as they load the file.
    """
    name = model.metadata_props.get(STORED_IN_16_BITS)
    if name is None or (name == "BFLOAT16" and model.graph.opset_imports[""] < _BFLOAT16_SINCE):
        return
    graph, dtype = model.graph, TORCH_DTYPES[ir.DataType[name]]
    taken = {output.name for native in graph.all_nodes() for output in native.outputs} | set(graph.initializers)
    for value in list(graph.initializers.values()):
        wide = to_torch(value.const_value) if value.dtype is ir.DataType.FLOAT else None
        if wide is None or wide.numel() < _WORTH_A_CAST or value.is_graph_input() or value.is_graph_output():
            continue
        short = wide.to(dtype)
        if any(node.domain not in STANDARD for node, _ in value.uses()) or not torch.equal(short.float(), wide):
            continue
        label = next(one for one in _names(f"{value.name}.{name.lower()}") if one not in taken)
        taken.add(label)
        held = ir.Tensor(to_numpy(short), dtype=ir.DataType[name], name=label)
        stored = ir.Value(name=label, shape=ir.Shape(wide.shape), type=ir.TensorType(held.dtype), const_value=held)
        cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{value.name}/Cast")
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[value.name or ""]
        cast.outputs[0].name = value.name
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


_BFLOAT16_SINCE = 13
"""The opset from which on Cast takes bfloat16."""
_WORTH_A_CAST = 256
"""Least numbers of a tensor that is stored in 16 bits."""


def _names(hint: str) -> Iterator[str]:
    yield hint
    yield from (f"{hint}_{number}" for number in itertools.count())


def _free_name(model: ir.Model, hint: str) -> str:
    taken = {value.name for native in model.graph.all_nodes() for value in native.outputs}
    taken |= set(model.graph.initializers) | {value.name for value in model.graph.inputs}
    return next(name for name in _names(hint) if name not in taken)


def _strip(model: ir.Model) -> None:
    """Drop the metadata of the exporter: scopes, and stack traces, which hold paths of the user's files."""
    nodes = list(model.graph.all_nodes())
    graphs = dict.fromkeys([model.graph, *(native.graph for native in nodes if isinstance(native.graph, ir.Graph))])
    stored = [value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())]
    computed = [output for native in nodes for output in native.outputs]
    for native in nodes:
        native.doc_string = None
    parts: list[ir.Node | ir.Graph | ir.Value] = [*nodes, *graphs, *stored, *computed]
    for part in parts:
        for key in [key for key in part.metadata_props if key == "namespace" or key.startswith(_EXPORTERS)]:
            del part.metadata_props[key]


def _name_by_path(model: ir.Model) -> None:
    """Name each node PATH/LAST, by its module path and the last part of its name: engines show names, not metadata."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    for native in model.graph.all_nodes():
        path, last = native.metadata_props.get(PATH), (native.name or native.op_type).rsplit("/", 1)[-1]
        hint = f"{path}/{last}" if path else native.name or native.op_type
        name = hint
        while name in taken:
            counts[hint] += 1
            name = f"{hint}_{counts[hint]}"
        taken.add(name)
        native.name = name


def _inline(model: ir.Model) -> None:
    calls = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    names = {node.outputs[0].name: (node.name, dict(node.metadata_props)) for node in calls}
    before = set(model.graph.all_nodes())
    ir_passes.InlinePass()(model)
    owner: tuple[str | None, dict[str, str]] = ("", {})
    # onnx-ir names inlined nodes by the function. They stand in order; the last one of a call defines its output.
    for node in reversed(list(model.graph.all_nodes())):
        if node in before:
            continue
        owner = names.get(node.outputs[0].name, owner)
        node.metadata_props.update(owner[1])
        node.name = f"{owner[0]}/{node.op_type}" if owner[0] else node.name
    fix_names(model)
    model.functions.clear()


def _spell_linear(graph: OnnxGraph, node: Node) -> None:
    """MatMul (+ Add): a weight that only this node reads is stored (in, out); a shared one gets a Transpose."""
    x, weight, bias = node.required("x"), node.required("weight"), node.operand("bias")
    assert isinstance(weight, OnnxValue)
    view = _dequantized_kn(graph, weight, node) or weight.transpose()
    if graph.constant(weight) is not None and not weight.transposed and len(weight.users) == 1:
        view = graph.add_transposed(weight, weight.name + ".T")
    product = graph.emit("matmul", x, view, at=node)
    graph.replace(node, product if bias is None else graph.emit("add", product, bias, at=node))


def _dequantized_kn(graph: OnnxGraph, weight: OnnxValue, node: Node) -> Value | None:
    """A weight (out, in) that is dequantized, as (in, out): its integers are stored transposed."""
    maker = weight.producer
    if maker is None or maker.kind != "dequantize" or not all(v is None or v.is_constant for v in maker.operands):
        return None
    transposed = [None if value is None else _transposed(graph, value) for value in maker.operands]
    axis = maker.attributes["axis"]
    return graph.emit(maker, *transposed, at=node, axis=None if axis is None else 1 - axis)


def _transposed(graph: OnnxGraph, value: Value) -> Value:
    """A constant matrix, stored transposed; anything else as it is."""
    tensor = graph.constant(value) if value.rank == 2 else None
    return value if tensor is None else graph.add_constant(tensor.t().contiguous(), f"{value.name}.T")


def gathered(graph: Graph, node: Node) -> Value | None:
    """An embedding of a quantized table that gathers rows of integers and dequantizes these, not the whole table.

    None where the table is not stored in integers, or these are of less than a byte, which ONNX cannot gather.
    """
    maker, ids = node.required("table").producer, node.required("ids")
    if maker is None or maker.kind != "dequantize" or maker.attributes["bits"] < 8 or ids.rank is None:
        return None
    if not all(value is None or value.is_constant for value in maker.operands):
        return None
    integers, scale, zero_point = (*maker.operands, None)[:3]
    block, axis = maker.attributes["block"], maker.attributes["axis"]
    if integers is None or scale is None or axis not in (None, 1 if block else 0):
        return None
    rows = graph.emit("onnx.Gather", integers, ids, at=node)
    if axis is None:
        result = graph.emit("dequantize", rows, scale, zero_point, at=node)
    elif block:
        parts = [part and graph.emit("onnx.Gather", part, ids, at=node) for part in (scale, zero_point)]
        result = graph.emit("dequantize", rows, *parts, at=node, axis=ids.rank, block=block)
    else:  # DequantizeLinear has no scales per row where ids have several axes
        result = graph.emit("cast", rows, at=node, dtype=torch.float32)
        if zero_point is not None:
            shift = graph.emit("cast", _gather_column(graph, zero_point, ids, node), at=node, dtype=torch.float32)
            result = graph.emit("sub", result, shift, at=node)
        result = graph.emit("mul", result, _gather_column(graph, scale, ids, node), at=node)
    return result


def _gather_column(graph: Graph, vector: Value, ids: Value, node: Node) -> Value:
    """Entries of a stored vector, gathered, with an axis of size 1 after those of the ids."""
    tensor = graph.constant(vector)
    assert tensor is not None
    return graph.emit("onnx.Gather", graph.add_constant(tensor.unsqueeze(1), vector.name), ids, at=node)


def _quantized_at_run_time(op: Recorder, x: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(x, scale, zero_point)


def _dynamic_quantize_linear(op: Builder, m: Match) -> Mapping[Value, Value]:
    """choose_qparams and quantize of one value are one standard operator."""
    at = m.scale.producer
    steps, scale, zero_point = op.graph.emit_all("onnx.DynamicQuantizeLinear", m.x, at=at, _outputs=3)
    return {m.scale: scale, m.zero_point: zero_point, m.root.result: steps}


def _is_chosen_from_x(m: Match) -> bool:
    ranges = m.scale.producer
    known = ranges is not None and ranges.kind == "choose_qparams" and ranges.input == m.x
    return known and m.zero_point is not None and m.zero_point.producer == ranges


DYNAMIC_QUANTIZE = Rule(
    "dynamic-quantize-linear", _quantized_at_run_time, _dynamic_quantize_linear, check=_is_chosen_from_x
)


def write(model: ir.Model, path: Path, metadata: Mapping[str, str], external_data: bool | None = None) -> None:
    """Write the file and check it; both lie in a folder of their own (`writing.together`).

    external_data: whether weights go to a file beside it, one at a time in memory; None does so where they do not fit
    one file, or were not held in memory before. Raises GraphError where the model is not valid, and OSError where the
    disk is full.
    """
    size = onnx_files.size(model)
    needed = size > onnx_files.INSIDE
    external = needed or onnx_files.is_spilled(model) if external_data is None else external_data
    if needed and not external:
        raise GraphError(f"{size / 2**30:.1f} GiB of weights do not fit one ONNX file: leave external_data to graphopt")
    scaled = model.metadata_props.get(SCALED)
    model.metadata_props.clear()
    model.metadata_props.update(metadata if scaled is None else {**metadata, SCALED: scaled})
    onnx_files.save(model, path, external_data=external)
    _restore_maps(model, path)
    _check(model, path)


def _check(model: ir.Model, written: Path) -> None:
    """Raise GraphError where the file is not valid ONNX. Outputs of unknown rank are allowed: engines load them."""
    if any(output.shape is None for output in model.graph.outputs):
        return
    try:
        onnx.checker.check_model(str(written))
    except onnx.checker.ValidationError as error:
        raise GraphError(f"the model to be written is not valid ONNX: {first_line(error)}") from error


def graphsurgeon(model: ir.Model) -> Any:
    """A deployable model as an onnx_graphsurgeon.Graph. That drops metadata; node names still hold the module paths."""
    import onnx_graphsurgeon

    return onnx_graphsurgeon.import_onnx(ir.to_proto(model))


def _restore_maps(model: ir.Model, written: Path) -> None:
    """Write the types of inputs and outputs that hold a map, which onnx-ir cannot write."""
    if any(MAP_TYPE in value.meta for value in (*model.graph.inputs, *model.graph.outputs)):
        proto = onnx.load(written, load_external_data=False)
        restore_map_types(proto, model)
        onnx.save(proto, written)
