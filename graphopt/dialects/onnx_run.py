"""Running an onnx-ir model in ONNX Runtime: the reference (BASIC level), without a copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from torch import Tensor

from graphopt.dialects.onnx import _to_numpy, array_to_torch
from graphopt.dialects.onnx_words import TORCH_DTYPES

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
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
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    proto = ir.to_proto(_without_large_weights(model, outputs))
    names, arrays = _large_weights(model)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    if names:
        options.add_external_initializers(names, values)
    made = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made._graphopt_weights = (arrays, values)  # they must live as long as the session
    return made


def run(made: ort.InferenceSession, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """Run on inputs by name and return every output."""
    arrays = {value.name: _to_numpy(feeds[value.name]) for value in made.get_inputs()}
    results = made.run(None, arrays)
    return [_from_result(result) for result in results]


def _from_result(result: Any) -> Any:
    if not isinstance(result, np.ndarray):
        return result  # a sequence, map or optional: passed through as the engine gives it
    dtype = next((torch_dtype for onnx_dtype, torch_dtype in TORCH_DTYPES.items() if _numpy_name(onnx_dtype) == result.dtype.name), None)
    return array_to_torch(result, dtype) if dtype is not None else result


def _numpy_name(dtype: ir.DataType) -> str:
    return str(dtype.numpy().name)


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes > _LARGE and tensor.dtype in TORCH_DTYPES and tensor.dtype is not ir.DataType.BFLOAT16


def _large_weights(model: ir.Model) -> tuple[list[str], list[np.ndarray[Any, Any]]]:
    large = [(name, v.const_value) for name, v in model.graph.initializers.items() if _is_large(v.const_value)]
    return [name for name, _ in large], [np.ascontiguousarray(t.numpy()) for _, t in large if t is not None]


def _without_large_weights(model: ir.Model, outputs: Sequence[ir.Value] | None) -> ir.Model:
    """A copy whose large weights are named but not held, returning `outputs` where given."""
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and _is_large(tensor):
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.dims), name=name
            )
    if outputs is not None:
        by_name = {o.name: o for node in copy.graph for o in node.outputs} | {v.name: v for v in copy.graph.inputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(by_name[output.name] for output in outputs)
    return copy
