"""Tensors of the Open Inference Protocol, version 2: in JSON, or as bytes behind it (the binary tensor extension)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import TensorSpec
from graphopt.serving.numbers import array_of, json_bytes, reshaped
from graphopt.serving.refusals import Refused

DATATYPES = {
    "bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    **{name: name.upper() for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip
"""The protocol's names, by numpy's."""
DTYPES = {name: np.dtype(dtype) for dtype, name in DATATYPES.items()}
"""numpy's, by the protocol's names."""
LENGTH = b"inference-header-content-length"
_UNKNOWN_OUTPUTS = {"classification", "shared_memory_region"}
"""Parameters of outputs, of extensions that are not here: who sends them does not look for the data in the answer."""


@dataclass(frozen=True)
class Asked:
    """A request."""

    id: str | None
    inputs: Arrays
    outputs: tuple[str, ...] | None
    """In order; None: all of the model's."""
    binary: Mapping[str, bool]
    """By output, whether its data stand behind the JSON."""
    binary_default: bool


def read(body: bytes, header_length: bytes | None) -> Asked:
    """A request. header_length: what the header Inference-Header-Content-Length says; None where there is none.

    Raises Refused (400) for anything that is none.
    """
    head, tail = _parts(body, header_length)
    asked = parse_object(head)
    given = asked.get("inputs")
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise Refused(400, "inputs must be a list of tensors")
    inputs: Arrays = {}
    start = 0
    for one in given:
        name = one.get("name")
        if not isinstance(name, str):
            raise Refused(400, "an input has no name")
        if name in inputs:
            raise Refused(400, f"input {name!r} is given twice")
        inputs[name], start = _tensor(one, name, tail, start)
    if start != len(tail):
        raise Refused(400, f"{len(tail) - start} bytes behind the tensors belong to none of them")
    parameters = _parameters(asked)
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise Refused(400, "there are no sequences here: each request stands alone")
    outputs = asked.get("outputs")
    if outputs is not None and not (
        isinstance(outputs, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in outputs)
    ):
        raise Refused(400, "outputs must be a list of objects with names")
    for one in outputs or ():
        for key in _UNKNOWN_OUTPUTS & set(_parameters(one)):
            raise Refused(400, f"{one['name']}: outputs have no {key} here")
    own = asked.get("id")
    return Asked(
        own if isinstance(own, str) else None,
        inputs,
        tuple(one["name"] for one in outputs) if outputs else None,
        {one["name"]: bool(_parameters(one).get("binary_data", False)) for one in outputs or ()},
        bool(parameters.get("binary_data_output", False)),
    )


def written(asked: Asked, outputs: Arrays, name: str, version: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body of the answer, and its headers. Raises Refused (400) for outputs that the model does not have."""
    described, tails = [], []
    for one in asked.outputs or tuple(outputs):
        if one not in outputs:
            raise Refused(400, f"there is no output {one!r}; there are {', '.join(outputs)}")
        array = outputs[one]
        entry: dict[str, Any] = {"name": one, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
        if asked.binary.get(one, asked.binary_default):
            tails.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    answer = {"model_name": name, "model_version": version, "outputs": described}
    if asked.id is not None:
        answer["id"] = asked.id
    head = json_bytes(answer)
    if not tails:
        return head, [(b"content-type", b"application/json")]
    headers = [(b"content-type", b"application/octet-stream"), (LENGTH, str(len(head)).encode())]
    return b"".join([head, *tails]), headers


def metadata(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Inputs or outputs as the protocol describes them: -1 is an open size."""
    return [
        {
            "name": one.name,
            "datatype": DATATYPES[one.dtype],
            "shape": [size if isinstance(size, int) else -1 for size in one.shape],
        }
        for one in specs
    ]


def parse_object(content: bytes) -> dict[str, Any]:
    """An object of JSON. Raises Refused (400) for anything else."""
    found = parse(content)
    if not isinstance(found, dict):
        raise Refused(400, "the body must be an object of JSON")
    return found


def parse(content: bytes) -> Any:
    """JSON in UTF-8. Raises Refused (400) for anything else."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error)[:120]}") from error


def _parts(body: bytes, header_length: bytes | None) -> tuple[bytes, memoryview]:
    """The JSON, and the bytes behind it."""
    if header_length is None:
        return body, memoryview(b"")
    if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > len(body):
        raise Refused(400, "Inference-Header-Content-Length is no length of a part of the body")
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _tensor(one: Mapping[str, Any], name: str, tail: memoryview, start: int) -> tuple[NDArray[Any], int]:
    """An input, and where the data of the next one begin."""
    shape, datatype, parameters = one.get("shape"), one.get("datatype"), _parameters(one)
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise Refused(400, f"{name}: shape must be a list of sizes")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise Refused(400, f"{name}: datatype must be one of {', '.join(DTYPES)}")
    dtype, count = DTYPES[datatype], math.prod(shape)
    if "shared_memory_region" in parameters:
        raise Refused(400, f"{name}: there is no shared memory here; send the data")
    size = parameters.get("binary_data_size")
    if size is not None:
        if type(size) is not int or size < 0 or start + size > len(tail):
            raise Refused(400, f"{name}: binary_data_size is more than the body holds")
        if size != count * dtype.itemsize:
            raise Refused(400, f"{name}: {shape} of {datatype} has {count * dtype.itemsize} bytes, not {size}")
        return reshaped(_from_bytes(tail[start : start + size], dtype), shape, name), start + size
    if "data" not in one:
        raise Refused(400, f"{name} has no data")
    return reshaped(array_of(one["data"], dtype, name), shape, name), start


def _from_bytes(content: memoryview, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that an engine may read: aligned, and of booleans that are 0 or 1, whatever was sent."""
    if dtype == np.bool_:
        return np.frombuffer(content, np.uint8).astype(np.bool_)
    array = np.frombuffer(content, dtype.newbyteorder("<"))
    return array if array.flags.aligned else array.copy()


def _parameters(one: Mapping[str, Any]) -> Mapping[str, Any]:
    found = one.get("parameters", {})
    if not isinstance(found, dict):
        raise Refused(400, "parameters must be an object")
    return found
