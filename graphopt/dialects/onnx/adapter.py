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

from graphopt.dialects.adapter import Adapter
from graphopt.dialects.onnx import custom_operators, stand_ins, torch_layers
from graphopt.dialects.onnx import quantized as onnx_quantized
from graphopt.dialects.onnx.graph import OPSET, OnnxGraph
from graphopt.dialects.onnx.kernels import newest_opset
from graphopt.dialects.onnx.raising import FORMS
from graphopt.dialects.onnx.reading import NOTES, parsed, read_model
from graphopt.dialects.raising import run_stages
from graphopt.dialects.silence import quiet
from graphopt.errors import GraphError, first_line
from graphopt.ir.graph import Graph
from graphopt.ir.structure import Structure

Model = ir.Model | onnx.ModelProto

_OLDEST = 18
"""The oldest opset that torch's exporter writes."""


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
        """Export at OPSET, or at the newest before it that the engine runs, without the exporter's own optimizer;
        inputs, outputs and dynamic axes get their names."""
        graph = _from_program(program, inputs, returned, OPSET)
        newest = newest_opset(graph.model)
        if _OLDEST <= newest < OPSET:
            graph = _from_program(program, inputs, returned, newest)
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

        def converted(opset: int) -> OnnxGraph:
            copy = _copy(model)
            copy.graph.sort()
            if (untyped := next((value for value in copy.graph.inputs if value.type is None), None)) is not None:
                raise GraphError(f"the input {untyped.name!r} is no tensor, and the converter knows no other")
            try:
                with quiet("onnxscript", "onnx_ir"):
                    version_converter.convert_version(copy, opset, fallback=True)
                found = OnnxGraph.from_model(copy)
            except Exception as error:  # whatever the converter raises
                raise GraphError(f"it does not convert to {opset} ({first_line(error)})") from error
            if found.opset < opset:
                raise GraphError(f"it does not convert to {opset}")
            return found

        lifted = converted(OPSET)
        newest = newest_opset(lifted.model)
        if newest == OPSET:
            return lifted
        if newest <= _opset(model):
            raise GraphError("the engine has no kernel for some of its operators in a newer opset")
        return converted(newest)

    def raise_(self, graph: Graph) -> dict[str, int]:
        return run_stages(FORMS, graph)

    def refine(self, graph: Graph) -> None:
        _onnx(graph).refine_shapes()

    def optional(self, graph: Graph) -> tuple[str, ...]:
        return tuple(_onnx(graph).defaults)

    def rounds(self, model: Model) -> bool:
        return onnx_quantized.rounds_activations(model)

    def notes(self, model: Model, graph: Graph) -> list[str]:
        note = onnx_quantized.note(model, _onnx(graph))
        return [*_onnx(graph).model.meta.get(NOTES, ()), *([] if note is None else [note])]

    def register(self, custom_ops: Any) -> None:
        custom_operators.register(custom_ops)

    def unknown(self, graph: Graph) -> list[str]:
        nodes = _onnx(graph).model.graph.all_nodes()
        return custom_operators.unknown((node.domain, node.op_type) for node in nodes)


ADAPTER: Adapter = OnnxAdapter()


def _from_program(
    program: torch.export.ExportedProgram, inputs: Sequence[str], returned: Structure, opset: int
) -> OnnxGraph:
    try:
        with quiet("torch.onnx"), contextlib.redirect_stdout(io.StringIO()):
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, optimize=False, verbose=False,
                custom_translation_table=stand_ins.translations() | torch_layers.translations(),
            )  # fmt: skip
    except Exception as error:  # of the exporter's own, around that of a translation
        own: BaseException | None = error
        while own is not None and not isinstance(own, GraphError):
            own = own.__cause__
        if own is None:
            raise
        raise own from own.__cause__  # not from `error`, which was raised from it: causes would go in a circle
    assert exported is not None
    model = exported.model
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    outputs = list(model.graph.outputs)
    if len(outputs) != len(returned.names):  # the others are constants, such as None
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs[place] for place in returned.places)
    return OnnxGraph.from_model(stand_ins.respelled(model))


def _opset(model: Model) -> int:
    if isinstance(model, onnx.ModelProto):
        return next((int(one.version) for one in model.opset_import if not one.domain), 1)
    return model.opset_imports.get("", 1)


def _copy(model: Model) -> ir.Model:
    return parsed(model) if isinstance(model, onnx.ModelProto) else model.clone()


def _onnx(graph: Graph) -> OnnxGraph:
    if not isinstance(graph, OnnxGraph):
        raise GraphError(f"a graph of the {graph.dialect} dialect is no ONNX graph")
    return graph


def _name_axes(graph: OnnxGraph, dynamic_axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give the symbols of the trace (s18) the names of the axes they stand for (batch), also inside expressions."""
    names: dict[str, str] = {}
    for value in graph.model.graph.inputs:
        for axis, label in dynamic_axes.get(value.name or "", {}).items():
            size = None if value.shape is None else value.shape[axis]
            if isinstance(size, ir.SymbolicDim) and size.value is not None and not str(size.value).isdigit():
                names.setdefault(str(size.value), label)
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
