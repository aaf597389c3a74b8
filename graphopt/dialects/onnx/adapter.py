"""The ONNX dialect for capture: programs go through torch's exporter, models are lifted to a new opset."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from graphopt.analysis.masks import labels
from graphopt.dialects.adapter import Adapter
from graphopt.dialects.onnx import custom_operators, stand_ins
from graphopt.dialects.onnx import quantized as onnx_quantized
from graphopt.dialects.onnx.graph import OPSET, OnnxGraph
from graphopt.dialects.onnx.raising import FORMS
from graphopt.dialects.onnx.reading import parsed, read_model
from graphopt.dialects.raising import run_stages
from graphopt.dialects.silence import quiet
from graphopt.errors import GraphError, first_line
from graphopt.ir.graph import Graph
from graphopt.ir.structure import Structure

Model = ir.Model | onnx.ModelProto


class OnnxAdapter:
    """See `Adapter`."""

    graph: type[Graph] = OnnxGraph

    def read(self, path: Path) -> ir.Model:
        return read_model(path)

    def from_program(
        self,
        program: torch.export.ExportedProgram,
        inputs: Sequence[str],
        axes: Mapping[str, Mapping[int, str]],
        returned: Structure,
    ) -> OnnxGraph:
        """Export at OPSET, without the exporter's own optimizer; inputs, outputs and dynamic axes get their names."""
        with quiet("torch.onnx"), contextlib.redirect_stdout(io.StringIO()):
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                custom_translation_table=stand_ins.translations(),
            )  # fmt: skip
        assert exported is not None
        model = exported.model
        for value, name in zip(model.graph.inputs, inputs, strict=True):
            value.name = name
        outputs = list(model.graph.outputs)
        if len(outputs) != len(returned.names):  # the others are constants, such as None
            model.graph.outputs.clear()
            model.graph.outputs.extend(outputs[place] for place in returned.places)
        graph = OnnxGraph.from_model(stand_ins.respelled(model))
        _name_axes(graph, axes)
        graph.set_outputs(dict(zip(returned.names, graph.outputs, strict=True)))
        return graph

    def from_model(self, model: Model) -> OnnxGraph:
        return OnnxGraph.from_model(model)

    def untouched(self, model: Model) -> OnnxGraph:
        return OnnxGraph(_copy(model))

    def version(self, graph: Graph) -> str:
        return f"opset {_onnx(graph).opset}"

    def is_liftable(self, graph: Graph) -> bool:
        return _onnx(graph).opset < OPSET

    def lift(self, model: Model) -> OnnxGraph:
        from onnxscript import version_converter  # takes half a second

        copy = _copy(model)
        copy.graph.sort()
        try:
            with quiet("onnxscript", "onnx_ir"):
                version_converter.convert_version(copy, OPSET, fallback=True)
            lifted = OnnxGraph.from_model(copy)
        except Exception as error:  # whatever the converter raises
            raise GraphError(f"it does not convert to {OPSET} ({first_line(error)})") from error
        if lifted.opset < OPSET:
            raise GraphError(f"it does not convert to {OPSET}")
        return lifted

    def raise_(self, graph: Graph) -> dict[str, int]:
        return run_stages(FORMS, graph)

    def refine(self, graph: Graph) -> None:
        _onnx(graph).refine_shapes()

    def notes(self, model: Model, graph: Graph) -> list[str]:
        note = onnx_quantized.note(model, _onnx(graph))
        return [] if note is None else [note]

    def register(self, custom_ops: Any) -> None:
        custom_operators.register(custom_ops)

    def unknown(self, graph: Graph) -> list[str]:
        nodes = _onnx(graph).model.graph.all_nodes()
        return custom_operators.unknown((node.domain, node.op_type) for node in nodes)


ADAPTER: Adapter = OnnxAdapter()


def _copy(model: Model) -> ir.Model:
    return parsed(model) if isinstance(model, onnx.ModelProto) else model.clone()


def _onnx(graph: Graph) -> OnnxGraph:
    if not isinstance(graph, OnnxGraph):
        raise GraphError(f"a graph of the {graph.dialect} dialect is no ONNX graph")
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
