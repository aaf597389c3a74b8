"""Runs an onnx-ir model in ONNX Runtime, by default without its optimizer."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from graphopt.dialects.onnx import custom_operators, functions
from graphopt.dialects.onnx.files import append, no_room
from graphopt.dialects.onnx.mended import restore_map_types
from graphopt.dialects.onnx.spellings import DOMAIN
from graphopt.dialects.onnx.tensors import TORCH_DTYPES, array_to_torch, to_numpy
from graphopt.dialects.silence import quiet
from graphopt.errors import GraphError
from graphopt.measure.machine import cpu_saturates, environment

if os.environ.get("ORT_DISABLE_TELEMETRY") != "0":
    ort.disable_telemetry_events()  # where it was imported before graphopt, whose setting then came too late

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
SHAREABLE = {dtype for dtype in TORCH_DTYPES if dtype is not ir.DataType.BFLOAT16}
"""Element types that go in and out of a session as numpy arrays."""
_BY_NUMPY_NAME = {dtype.numpy().name: torch_dtype for dtype, torch_dtype in TORCH_DTYPES.items()}
CPU = "CPUExecutionProvider"
_MICROSOFT = "com.microsoft"
_FLOAT_LEVEL = "1"
"""Of accuracy, at which MatMulNBits multiplies floats; the engine's default is 4, int8."""
_LARGE = 1024
"""Bytes above which a session is given a weight by address, not in the model."""
_IN_FILE = 64e6
"""Bytes of all weights above which an optimizing session reads them from a file: it copies what it is given by address
(onnxruntime 1.31), and then packs that. For 0.8 GB of weights memory grows by 0.8 GB so, in place of 1.6 GB."""


def session(
    model: ir.Model,
    outputs: Sequence[ir.Value] | None = None,
    *,
    level: str = "disable",
    exact: bool = False,
    threads: int | None = None,
    options: ort.SessionOptions | None = None,
    providers: Sequence[str] = (CPU,),
) -> ort.InferenceSession:
    """A session of the model.

    outputs: what it returns in place of the model's own outputs. level: one of LEVELS, the engine's own optimizations.
    exact: keep activations in float32 where the engine computes products with integer weights. By default it may use
    MatMulNBits there, which rounds the activations to int8 by block.
    Custom operators that are registered are known to it. On the CPU alone, ops that have no kernels in 16 bits there
    are computed in float32 between casts. Raises GraphError naming operators that nothing defines.
    """
    if options is None:
        options = ort.SessionOptions()
        if level == "disable":  # a few runs, to know numbers: memory counts more than their time
            # The arena would keep what a run needs for dequantized and transposed weights.
            options.enable_cpu_mem_arena = False
            # Packed weights stand beside the others: 1.7 times the weights in memory, and no gain for few rows.
            options.add_session_config_entry("session.disable_prepacking", "1")
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT_LEVEL)
    custom_operators.add_libraries(options)
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4  # errors are raised; no need to log them too
    if threads is not None:
        options.intra_op_num_threads = threads
    weights, proto = _without_large_weights(model)
    if tuple(providers) == (CPU,):
        _widen(proto.graph)
    if level == "disable":
        _read_rows(proto)
        if cpu_saturates(environment()["flags"]):
            _add_exactly(proto)
    if outputs is not None:
        _keep_only(proto.graph, outputs)
    wide = _widen_ends(proto.graph)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in weights]
    with ExitStack() as stack:
        held: object = None
        if level == "disable" or sum(weights[tensor.name].nbytes for tensor in kept) < _IN_FILE:
            held = _hand_over(kept, weights, options)
        else:
            made = tempfile.TemporaryDirectory(prefix="graphopt-", ignore_cleanup_errors=True)
            _write(kept, weights, Path(stack.enter_context(made)), options)
        try:
            created = ort.InferenceSession(proto.SerializeToString(), options, providers=list(providers))
        except Exception as error:  # the engine's own exceptions have no base of theirs
            if missing := _unknown(proto):
                raise GraphError(custom_operators.why_not_run(missing)) from error
            raise
    created._graphopt_weights = held  # they must live as long as the session
    created._graphopt_wide = wide
    return created


def _hand_over(
    kept: Sequence[onnx.TensorProto], weights: Mapping[str, ir.TensorProtocol], options: ort.SessionOptions
) -> object:
    """Give a session its weights by address; returns what must live as long as it."""
    shared = {tensor.name: np.ascontiguousarray(weights[tensor.name].numpy()) for tensor in kept}
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in shared.values()]
    if values:
        options.add_external_initializers(list(shared), values)
    return shared, values


def _write(
    kept: Sequence[onnx.TensorProto], weights: Mapping[str, ir.TensorProtocol], folder: Path,
    options: ort.SessionOptions,
) -> None:  # fmt: skip
    """Give a session its weights in a file, one after the other, which it maps to pack each."""
    with no_room("the weights of a session"), (folder / "weights").open("wb") as file:
        for tensor in kept:
            weight = weights[tensor.name]
            place = {"location": "weights", "offset": str(append(file, weight)), "length": str(weight.nbytes)}
            del tensor.external_data[:]
            tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=text) for key, text in place.items())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))


def run(session: ort.InferenceSession, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """Run on inputs by name and return every output. Raises GraphError naming inputs that are missing."""
    wide: Mapping[str, str] = session._graphopt_wide
    names = {value.name: wide.get(value.name, value.name) for value in session.get_inputs()}
    missing = [name for name in names.values() if name not in feeds]
    if missing:
        raise GraphError(f"to run the graph, these inputs are missing: {', '.join(missing)}")
    names |= {value.name: value.name for value in session.get_overridable_initializers() if value.name in feeds}
    arrays = {given: to_numpy(feeds[name].float() if given in wide else feeds[name]) for given, name in names.items()}
    results = zip(session.get_outputs(), session.run(None, arrays), strict=True)
    return [
        _from_result(result).to(torch.bfloat16) if value.name in wide else _from_result(result)
        for value, result in results
    ]


def return_memory() -> None:
    """Give what was freed back to the system. glibc keeps blocks of up to 32 MB, as most weights are, for later."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _unknown(model: onnx.ModelProto) -> list[str]:
    """The operators that neither the engine nor the model defines."""
    defined = {(function.domain, function.name) for function in model.functions}
    found: list[tuple[str, str]] = []
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        for node in graphs.pop().node:
            found.append((node.domain, node.op_type))
            graphs += [graph for one in node.attribute for graph in (one.g, *one.graphs) if graph.node]
    return custom_operators.unknown(one for one in found if one not in defined)


def _from_result(result: Any) -> Any:
    if not isinstance(result, np.ndarray):
        return result  # a sequence, map or optional: passed through as the engine gives it
    dtype = _BY_NUMPY_NAME.get(result.dtype.name)
    return array_to_torch(result, dtype) if dtype is not None else result


def _without_large_weights(model: ir.Model) -> tuple[dict[str, ir.TensorProtocol], onnx.ModelProto]:
    """The larger weights by name, not read yet, and the model, which refers to them by name."""
    initializers = model.graph.initializers.values()
    held = {value: value.const_value for value in initializers if value.const_value is not None}
    weights = {}
    try:
        for value, tensor in held.items():
            if tensor.nbytes <= _LARGE or tensor.dtype not in SHAREABLE or value.is_graph_input():
                continue
            weights[value.name or ""] = tensor
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or ""
            )
        with quiet("onnx_ir"):  # which warns of shapes without a type
            proto = ir.to_proto(model)
        restore_map_types(proto, model)
        return weights, proto
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def _keep_only(graph: onnx.GraphProto, outputs: Sequence[ir.Value]) -> None:
    """Reduce a sorted graph to the nodes that compute these values."""
    needed = {value.name or "" for value in outputs}
    kept = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed |= _reads(node)
    cut = onnx.GraphProto(name=graph.name)
    cut.node.extend(reversed(kept))
    cut.input.extend(value for value in graph.input if value.name in needed)
    cut.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    cut.output.extend(ir.serde.serialize_value(value) for value in outputs)
    graph.CopyFrom(cut)


def _widen(graph: onnx.GraphProto) -> None:
    """Let nodes on bfloat16, and contrib nodes on float16, compute in float32 and round their results as before.

    ONNX Runtime does this by itself for standard operators on float16.
    """
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    if not {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16} & set(types.values()):
        return
    nodes: list[onnx.NodeProto] = []
    wide: dict[str, str] = {}
    for node in graph.node:
        narrow = {onnx.TensorProto.BFLOAT16} | ({onnx.TensorProto.FLOAT16} if node.domain == "com.microsoft" else set())
        if node.op_type == "Cast" or not any(types.get(name) in narrow for name in (*node.input, *node.output)):
            nodes.append(node)
            continue
        given = [types[name] for name in node.input if types.get(name) in narrow]
        if node.domain == "com.microsoft" and given:  # shape inference does not know its results
            types.setdefault(node.output[0], given[0])
        for index, name in enumerate(node.input):
            if types.get(name) not in narrow:
                continue
            if name not in wide:
                wide[name] = f"{name}.float32"
                nodes.append(onnx.helper.make_node("Cast", [name], [wide[name]], to=onnx.TensorProto.FLOAT))
            node.input[index] = wide[name]
        nodes.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) in narrow:
                node.output[index] = f"{name}.unrounded"
                nodes.append(onnx.helper.make_node("Cast", [node.output[index]], [name], to=types[name]))
    _replace_nodes(graph, nodes)


def _read_rows(model: onnx.ModelProto) -> None:
    """Let linears of float32 read their weights as stored, row by row, in the product itself.

    Their function has a Transpose and a MatMul: without the engine's optimizations each run would write all weights
    anew, which takes 8 times as long for one row, and twice the memory of the weights.
    """
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        floats = all(types.get(name) == onnx.TensorProto.FLOAT for name in node.input[:2])
        if node.domain != DOMAIN or node.op_type not in ("linear", "linear__bias") or not floats:
            nodes.append(node)
            continue
        operands, y = list(node.input), node.output[0]
        product = f"{y}.product" if len(operands) > 2 else y
        nodes.append(onnx.helper.make_node("FusedMatMul", operands[:2], [product], domain=_MICROSOFT, transB=1))
        if len(operands) > 2:
            nodes.append(onnx.helper.make_node("Add", [product, operands[2]], [y]))
    _replace_nodes(graph, nodes)
    if all(opset.domain != _MICROSOFT for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))


def _add_exactly(model: onnx.ModelProto) -> None:
    """Let products of integers in the bodies of ops be exact on a CPU whose sums saturate."""
    for function in model.functions:
        if function.domain == DOMAIN and any(node.op_type == "MatMulInteger" for node in function.node):
            opset = next(one.version for one in function.opset_import if not one.domain)
            function.CopyFrom(ir.to_proto(functions.function(function.name, opset, in_halves=True)))


def _replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    kept = onnx.GraphProto()
    kept.node.extend(nodes)  # copies, of which those in the graph are no longer part
    del graph.node[:]
    graph.node.extend(kept.node)


def _widen_ends(graph: onnx.GraphProto) -> dict[str, str]:
    """Let inputs and outputs in bfloat16, which numpy does not have, be float32, which holds each of their numbers.

    Returns by their new names what they are called in the model.
    """
    renamed: dict[str, str] = {}
    for values, is_input in ((graph.input, True), (graph.output, False)):
        for value in values:
            kind = value.type.tensor_type
            if kind.elem_type != onnx.TensorProto.BFLOAT16:
                continue
            name, wide = value.name, f"{value.name}.as_float32"
            ends = (wide, name, onnx.TensorProto.BFLOAT16) if is_input else (name, wide, onnx.TensorProto.FLOAT)
            cast = onnx.helper.make_node("Cast", [ends[0]], [ends[1]], to=ends[2])
            graph.node.insert(0 if is_input else len(graph.node), cast)
            value.name, kind.elem_type = wide, onnx.TensorProto.FLOAT
            renamed[wide] = name
    return renamed


def _reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, also inside its subgraphs."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                names |= _reads(inner)
            names |= {value.name for value in graph.output}
    return names
