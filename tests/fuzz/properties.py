"""What must hold of every model: each property is a function that raises AssertionError where it does not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import graphopt
from graphopt.errors import GraphoptError
from tests.fuzz.onnx_graphs import Array, session

LONGEST = 300
"""Most characters of a message of graphopt."""
LEVELS = ("DISABLE_ALL", "ENABLE_ALL")

Feeds = Mapping[str, Array]


def simplify_keeps_the_numbers(model: onnx.ModelProto, feeds: Feeds) -> None:
    """What is written after simplify and lowering computes what the engine computes of the model, at every level."""
    expected = session(model).run(None, dict(feeds))
    small = graphopt.optimize(model, "simplify")
    with tempfile.TemporaryDirectory() as folder:
        written = onnx.load(small.export(Path(folder) / "out.onnx"))
    _assert_same(model, written, expected, feeds)


def export_at(opset: int, model: onnx.ModelProto, feeds: Feeds) -> bool:
    """At another opset the file is valid and computes the same, or is refused by name. Whether it was written."""
    expected = session(model).run(None, dict(feeds))
    small = graphopt.optimize(model, "simplify")
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = onnx.load(small.export(Path(folder) / "out.onnx", opset=opset))
        except GraphoptError as error:
            assert len(str(error)) <= LONGEST, error
            names = [*(node.name for node in model.graph.node), *(output.name for output in model.graph.output)]
            assert any(name in str(error) for name in names), f"names no node: {error}"
            return False
    assert [entry.version for entry in written.opset_import if entry.domain == ""] == [opset]
    if all(output.type.tensor_type.HasField("shape") for output in written.graph.output):
        onnx.checker.check_model(written)  # which refuses outputs of unknown rank; engines do not
    _assert_same(model, written, expected, feeds)
    return True


def _assert_same(model: onnx.ModelProto, written: onnx.ModelProto, expected: list[Any], feeds: Feeds) -> None:
    step = _largest_step(model)
    for level in LEVELS:
        found = session(written, level).run(None, dict(feeds))
        for output, a, b in zip(model.graph.output, expected, found, strict=True):
            where = f"{output.name} at {level}"
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{where}: {b.dtype} {b.shape}, not {a.dtype} {a.shape}"
            if a.dtype.kind != "f":
                assert np.abs(a.astype(int) - b.astype(int)).max() <= (step > 0), where
                continue
            largest, distance = float(np.abs(a).max()), float(np.abs(a - b).max())
            assert distance <= 1e-4 * largest + 1e-6 + step * max(1.0, largest), f"{where}: {distance} of {largest}"


def _largest_step(model: onnx.ModelProto) -> float:
    """Of activations that are quantized: results may round to the neighbour, and further nodes make that larger."""
    kinds = [node.op_type for node in model.graph.node]
    return 0.05 * (1 + len(kinds)) if "QuantizeLinear" in kinds else 0.0


os.environ["GRAPHOPT_MEASURE"] = "0"
