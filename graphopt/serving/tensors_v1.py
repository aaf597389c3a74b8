"""The REST form of TensorFlow Serving: instances, row by row, or inputs, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.serving.batches import are_rows
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import Manifest
from graphopt.serving.refusals import Refused


def read(asked: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, Any], bool]:
    """The inputs of a request, as lists of numbers, and whether they came as rows. Raises Refused (400)."""
    signature = asked.get("signature_name", "serving_default")
    if signature != "serving_default":
        raise Refused(400, f"there is no signature {str(signature)[:60]!r}; there is serving_default")
    names = [one.name for one in manifest.inputs]
    if ("instances" in asked) == ("inputs" in asked):
        raise Refused(400, "give either instances, row by row, or inputs, column by column")
    is_rows = "instances" in asked
    columns = _columns(asked["instances"], names) if is_rows else asked["inputs"]
    if not is_rows and not (isinstance(columns, dict) and set(columns) & set(names)) and len(names) == 1:
        columns = {names[0]: columns}
    if not isinstance(columns, dict):
        raise Refused(400, f"inputs must be an object with {', '.join(names)}")
    return columns, is_rows


def written(outputs: Arrays, is_rows: bool) -> dict[str, Any]:
    """The answer: predictions of rows, or outputs by column; of one output without its name.

    Raises Refused (400) for rows of outputs that have none."""
    columns = {name: array.tolist() for name, array in outputs.items()}
    only = next(iter(columns.values())) if len(columns) == 1 else None
    if not is_rows:
        return {"outputs": columns if only is None else only}
    rows = min(len(array) if array.ndim else 0 for array in outputs.values())
    if not are_rows(outputs, rows):
        raise Refused(400, "the outputs of this model are not rows: ask with inputs, column by column")
    if only is not None:
        return {"predictions": only}
    return {"predictions": [{name: column[row] for name, column in columns.items()} for row in range(rows)]}


def status(versions: Sequence[str]) -> dict[str, Any]:
    """Of versions that are loaded: one that cannot be is not there."""
    return {
        "model_version_status": [
            {
                "version": version,
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
            for version in versions
        ]
    }


def metadata(manifest: Manifest, version: str) -> dict[str, Any]:
    """The signature, as the protobufs of TensorFlow Serving are in JSON."""
    kinds = {"float32": "DT_FLOAT", "float64": "DT_DOUBLE", "float16": "DT_HALF", "bool": "DT_BOOL"}

    def tensors(specs: Any) -> dict[str, Any]:
        return {
            one.name: {
                "dtype": kinds.get(one.dtype, f"DT_{one.dtype.upper()}"),
                "tensor_shape": {
                    "dim": [{"size": str(size if isinstance(size, int) else -1), "name": ""} for size in one.shape],
                    "unknown_rank": False,
                },
                "name": f"{one.name}:0",
            }
            for one in specs
        }

    signature = {
        "inputs": tensors(manifest.inputs),
        "outputs": tensors(manifest.outputs),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": manifest.name, "signature_name": "", "version": version},
        "metadata": {"signature_def": {"signature_def": {"serving_default": signature}}},
    }


def _columns(instances: Any, names: list[str]) -> dict[str, Any]:
    """Rows as columns."""
    if not isinstance(instances, list) or not instances:
        raise Refused(400, "instances must be a list of rows, at least one")
    if len(names) == 1 and not (isinstance(instances[0], dict) and names[0] in instances[0]):
        return {names[0]: instances}
    if not all(isinstance(one, dict) and set(one) == set(instances[0]) for one in instances):
        raise Refused(400, f"each instance must be an object with {', '.join(names)}")
    return {name: [one[name] for one in instances] for name in instances[0]}
