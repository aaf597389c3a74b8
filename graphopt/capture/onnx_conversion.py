"""An FxGraph, at any point of a pipeline -> the OnnxGraph that computes the same."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.dialects.adapter import adapter
from graphopt.dialects.fx import archive
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import GraphError
from graphopt.ir.graph import Feeds, Graph
from graphopt.ir.structure import Output, Structure


def to_onnx(graph: Graph, feeds: Sequence[Feeds] = ()) -> Graph:
    if not isinstance(graph, FxGraph):
        raise GraphError(f"a graph of the {graph.dialect} dialect is no fx graph")
    prepared = graph.clone()
    prepared.returns = tuple(map(Output, range(len(graph.output_names))))
    for node in prepared.sites("quantize", "dequantize"):
        value = prepared.emit(f"graphopt.{node.kind}.default", *node.operands, at=node, **node.attributes)
        prepared.replace(node, value)
    prepared.sweep()
    axes = {
        value.name: {axis: size for axis, size in enumerate(value.shape or ()) if isinstance(size, str)}
        for value in graph.inputs
    }
    returned = Structure(tuple(graph.output_names), tuple, list(range(len(graph.output_names))))
    onnx = adapter("onnx")
    converted = onnx.from_program(archive.to_program(prepared), graph.input_names, axes, returned)
    onnx.raise_(converted)
    return converted
