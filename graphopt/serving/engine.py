"""A deployed .onnx file -> a session on numpy arrays. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from graphopt.errors import BundleError, first_line
from graphopt.serving.manifest import TensorSpec

NAME = "onnxruntime"

_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip
"""The element types that are served, by ONNX Runtime's names for them: numpy's names."""

_LEAST = {
    15: "1.10", 16: "1.11", 17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23",
}  # fmt: skip
"""The first ONNX Runtime that runs models of an opset, from its table of compatibility. Older opsets run in all of
these versions."""


class Engine:
    """A session of ONNX Runtime on the CPU, which several threads may run at once."""

    def __init__(self, model: bytes, data: Mapping[str, bytes], threads: int | None, *, where: str) -> None:
        """model: the content of an .onnx file. data: the content of the files that its weights lie in, by their names.
        threads: intra-op threads, None for the engine's default. where: for messages.

        Raises BundleError where the engine does not load it, and for inputs and outputs that are no plain tensors.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; no need to log them too
        options.inter_op_num_threads = 1
        # Threads spin for 20 us between the operators of a run, and not at all once no run is left: they would take the
        # CPU from the event loop and from other runs. MiniLM at 1x16 on 2 threads of an EPYC: a run takes 1.1 ms, and
        # 2.2 ms of CPU time; without any spinning 1.5 and 2.6, by the engine's default 1.1 and 3.4. With 32 clients
        # the server answers 3% fewer requests a second than without any spinning, and 8% fewer if it spins for 50 us.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if data:
            names = list(data)
            options.add_external_initializers_from_files_in_memory(
                names, [data[name] for name in names], [len(data[name]) for name in names]
            )
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the engine's own exceptions have no base of theirs
            raise BundleError(f"{where}: {NAME} {version()} cannot load the model: {first_line(error)}") from error
        self.inputs = tuple(_spec(one, where) for one in self._session.get_inputs())
        self.outputs = tuple(_spec(one, where) for one in self._session.get_outputs())
        self._names = [one.name for one in self.outputs]

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name. Raises the engine's own exceptions for inputs that do not fit."""
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))


def version() -> str:
    """Of the engine that is installed."""
    return str(ort.__version__)


def is_older(found: str, least: str) -> bool:
    """Whether a version comes before another one, by their leading numbers."""
    return _numbers(found) < _numbers(least)


def _numbers(version_: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version_)[:3]]


def standards(model: bytes, where: str) -> tuple[int, set[str]]:
    """The opset of the standard operators in an .onnx file, and the domains of its nodes. Raises BundleError."""
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # google.protobuf's DecodeError is no class of onnx
        raise BundleError(f"{where}: the model is no ONNX file") from error
    opsets = {one.domain or "ai.onnx": one.version for one in proto.opset_import}
    if "ai.onnx" not in opsets:
        raise BundleError(f"{where}: the model names no opset of the standard operators")
    return opsets["ai.onnx"], {node.domain or "ai.onnx" for node in proto.graph.node}


def least_version(opset: int, domains: set[str]) -> str:
    """The oldest ONNX Runtime that runs a model; the installed one where that is not known."""
    known = _LEAST.get(max(opset, min(_LEAST)), version())
    return max((known, _LEAST[23]), key=_numbers) if domains - {"ai.onnx", "ai.onnx.ml"} else known


def index_limits(model: bytes) -> dict[str, int]:
    """By input of an .onnx file that is an index, from how many rows: the smallest table that it chooses from."""
    graph = onnx.load_model_from_string(model).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    origin = {value.name: value.name for value in graph.input}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type == "DequantizeLinear" and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
        elif node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in origin and node.input[0] in sizes:
            axis = next((one.i for one in node.attribute if one.name in ("axis", "gather_axis")), 0)
            name, rows = origin[node.input[1]], sizes[node.input[0]][axis]
            found[name] = min(rows, found.get(name, rows))
    return found


def is_quantized(model: bytes) -> bool:
    """Whether nodes of an .onnx file compute in, or store, integers of 8 bits or less."""
    names = {node.op_type for node in onnx.load_model_from_string(model).graph.node}
    return any(re.search(r"Quantize|Integer|^Q[A-Z]|NBits", name) for name in names)


def _spec(value: Any, where: str) -> TensorSpec:
    found = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if found is None or found[1] not in _DTYPES:
        raise BundleError(
            f"{where}: {value.name} is of type {value.type}, and tensors of {', '.join(sorted(_DTYPES))} are served"
        )
    shape = tuple(size if isinstance(size, int | str) else None for size in value.shape)
    return TensorSpec(value.name, _DTYPES[found[1]], shape)


def row(arrays: Mapping[str, NDArray[Any]], number: int) -> dict[str, NDArray[Any]]:
    """One row of a batch, as a batch of one."""
    return {name: array[number : number + 1] for name, array in arrays.items()}


def stacked(rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Batches behind one another, as one batch."""
    return {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}
