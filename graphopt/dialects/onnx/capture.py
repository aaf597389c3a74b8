"""Into the ONNX dialect: from an ExportedProgram by torch's exporter, from a model by lifting its opset."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch

from graphopt.analysis.masks import labels
from graphopt.dialects.onnx import quantized as onnx_quantized
from graphopt.dialects.onnx.graph import OPSET, OnnxGraph
from graphopt.dialects.onnx.load import parsed
from graphopt.dialects.silence import quiet
from graphopt.errors import first_line
from graphopt.ir.graph import Graph


def from_program(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    picked: Sequence[int],
) -> OnnxGraph:
    """Export at OPSET without the exporter's own optimizer; inputs, outputs and dynamic axes get their names.

    picked: which of the program's outputs are tensors (the others are constants such as None).
    """
    with quiet("torch.onnx"), contextlib.redirect_stdout(io.StringIO()):
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert exported is not None
    model = exported.model
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    natives = list(model.graph.outputs)
    if len(natives) != len(outputs):
        natives = [natives[index] for index in picked]
        model.graph.outputs.clear()
        model.graph.outputs.extend(natives)
    graph = OnnxGraph.from_model(model)
    _name_axes(graph, dynamic_axes)
    graph.set_outputs(dict(zip(outputs, graph.outputs, strict=True)))
    return graph


def _name_axes(graph: OnnxGraph, dynamic_axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give the symbols of the trace (s18) the names of the axes they stand for (batch), also inside expressions."""
    names = labels(
        (str(size.value), label, value.name)
        for value in graph.model.graph.inputs
        if value.name is not None and value.shape is not None
        for axis, label in dynamic_axes.get(value.name, {}).items()
        if isinstance(size := value.shape[axis], ir.SymbolicDim)
        and size.value is not None and not str(size.value).isdigit()
    )
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else re.compile(r"$^")
    values = [o for node in graph.model.graph for o in node.outputs] + list(graph.model.graph.inputs)
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([
                size if isinstance(size, int) or size.value is None
                else int(str(size.value)) if str(size.value).isdigit()  # a symbol that stands for a number
                else symbol.sub(lambda found: names[found[1]], str(size.value))
                for size in value.shape
            ])  # fmt: skip


def from_model(model: Any) -> OnnxGraph:
    """A graph of a ModelProto or ir.Model."""
    return OnnxGraph.from_model(model)


def untouched(model: ir.Model | onnx.ModelProto) -> Graph:
    """A graph of a model as it is, to be run; nothing is raised in it or put in order."""
    return OnnxGraph(parsed(model) if isinstance(model, onnx.ModelProto) else model.clone())


def refined(graph: Graph) -> Graph:
    """The graph, with the shapes that raising made known."""
    assert isinstance(graph, OnnxGraph)
    graph.refine_shapes()
    return graph


def opset_of(graph: Graph) -> int:
    """The version of the standard operators."""
    assert isinstance(graph, OnnxGraph)
    return graph.opset


def quantized_note(model: ir.Model | onnx.ModelProto, graph: Graph) -> str | None:
    """What the report says of a file that is quantized already; None of any other."""
    assert isinstance(graph, OnnxGraph)
    return onnx_quantized.note(model, graph)


def liftable(graph: Graph) -> bool:
    """Whether the graph is of an older opset than modules are captured at."""
    return opset_of(graph) < OPSET


def lift(model: ir.Model | onnx.ModelProto, graph: Graph, notes: list[str]) -> OnnxGraph | None:
    """The model at OPSET, or None where it is there already or does not convert (with a note)."""
    assert isinstance(graph, OnnxGraph)
    if not liftable(graph):
        return None
    from onnxscript import version_converter

    fresh = parsed(model) if isinstance(model, onnx.ModelProto) else model.clone()
    fresh.graph.sort()
    try:
        with quiet("onnxscript", "onnx_ir"):
            version_converter.convert_version(fresh, OPSET, fallback=True)
        lifted = OnnxGraph.from_model(fresh)
    except Exception as error:
        notes.append(f"stays at opset {graph.opset}: it does not convert to {OPSET} ({first_line(error)})")
        return None
    if lifted.opset < OPSET:
        notes.append(f"stays at opset {graph.opset}: it does not convert to {OPSET}")
        return None
    notes.append(f"lifted from opset {graph.opset} to {OPSET}")
    return lifted
