"""Running an onnx-ir model in ONNX Runtime: the reference (BASIC level), without a copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from torch import Tensor

from graphopt.dialects.onnx_tensors import TORCH_DTYPES, array_to_torch, take_in, to_numpy
from graphopt.graph import GraphError

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_SHAREABLE = {dtype for dtype in TORCH_DTYPES if dtype is not ir.DataType.BFLOAT16}
_BY_NUMPY_NAME = {dtype.numpy().name: torch_dtype for dtype, torch_dtype in TORCH_DTYPES.items()}
_LARGE = 1024
"""Bytes above which a weight is handed over by address."""


def session(
    model: ir.Model,
    outputs: Sequence[ir.Value] | None = None,
    *,
    level: str = "basic",
    threads: int | None = None,
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """A session of the model (returning `outputs` in place of its own, where given) that shares its weights' memory."""
    options = options or ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4  # what fails is raised, and needs no second telling
    if threads is not None:
        options.intra_op_num_threads = threads
    copy = model.clone()
    if outputs is not None:
        _keep_only(copy, [output.name for output in outputs])
    names, arrays = _take_large_weights(copy)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    if names:
        options.add_external_initializers(names, values)
    proto = ir.to_proto(copy)
    made = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made._graphopt_weights = (arrays, values)  # they must live as long as the session
    return made


def run(made: ort.InferenceSession, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """Run on inputs by name and return every output. Raises GraphError naming inputs that are missing."""
    missing = [value.name for value in made.get_inputs() if value.name not in feeds]
    if missing:
        raise GraphError(f"to run the graph, these inputs are missing: {', '.join(missing)}")
    arrays = {value.name: to_numpy(feeds[value.name]) for value in made.get_inputs()}
    results = made.run(None, arrays)
    return [_from_result(result) for result in results]


def _from_result(result: Any) -> Any:
    if not isinstance(result, np.ndarray):
        return result  # a sequence, map or optional: passed through as the engine gives it
    dtype = _BY_NUMPY_NAME.get(result.dtype.name)
    return array_to_torch(result, dtype) if dtype is not None else result


def _take_large_weights(copy: ir.Model) -> tuple[list[str], list[np.ndarray[Any, Any]]]:
    """Names and arrays of the weights that are worth it; in their place the model only names them."""
    names, arrays = [], []
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= _LARGE or tensor.dtype not in _SHAREABLE:
            take_in([value])  # the engine reads no file for a model in memory
            continue
        names.append(name)
        arrays.append(np.ascontiguousarray(tensor.numpy()))
        value.const_value = ir.ExternalTensor(
            "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return names, arrays


def _keep_only(copy: ir.Model, outputs: Sequence[str | None]) -> None:
    """Cut the model down to what computes these values."""
    by_name = {o.name: o for node in copy.graph for o in node.outputs} | {v.name: v for v in copy.graph.inputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(by_name[name] for name in outputs)
    needed = _needed(copy.graph.outputs)
    copy.graph.remove([node for node in copy.graph if not needed.issuperset(node.outputs)])
    for name in [name for name, value in copy.graph.initializers.items() if value not in needed]:
        del copy.graph.initializers[name]
    inputs = [value for value in copy.graph.inputs if value in needed]
    copy.graph.inputs.clear()
    copy.graph.inputs.extend(inputs)


def _needed(values: Sequence[ir.Value]) -> set[ir.Value]:
    """The values that these are computed from, also inside subgraphs, and what their producers return besides."""
    needed: set[ir.Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value in needed:
            continue
        needed.add(value)
        producer = value.producer()
        if producer is not None:
            needed.update(producer.outputs)
            for node in (producer, *_inside(producer)):
                pending += [read for read in node.inputs if read is not None]
    return needed


def _inside(node: ir.Node) -> list[ir.Node]:
    """The nodes of a node's subgraphs, nested ones included."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]
    return [inner for graph in graphs for inner in graph.all_nodes()]
