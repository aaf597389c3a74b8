"""The graph of a branch of a condition, or of a loop's body, as a graph of ops within the one that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from torch import Tensor

from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.sections import needed, reads
from graphopt.errors import GraphError
from graphopt.ir.graph import Graph, Value


class OnnxBody(OnnxGraph):
    """A graph inside a node of another. Opsets, functions and names are those of the whole graph, and so is the room
    for stored tensors; a value from around it has no producer here."""

    def __init__(self, whole: OnnxGraph, native: ir.Graph) -> None:
        super().__init__(ir.Model(native, ir_version=whole.model.ir_version or 10), whole.scratch)
        self._whole = whole
        self.functions, self.opsets, self.inference = whole.functions, whole.opsets, whole.inference
        self._names, self._node_names, self._numbers = whole._names, whole._node_names, whole._numbers

    @property
    def whole(self) -> Graph:
        return self._whole

    @property
    def bodies(self) -> tuple[Graph, ...]:
        return ()  # the whole graph lists them all

    def _is_around(self, native: ir.Value) -> bool:
        return native.graph is not None and native.graph is not self.model.graph

    def is_within(self, native: ir.Node) -> bool:
        return native.graph is self.model.graph

    def _equal(self, tensor: ir.TensorProtocol) -> ir.Value | None:
        return self._whole._equal(tensor)

    def _register(self, native: ir.Value) -> None:
        self._whole._register(native)

    def _sweep_functions(self) -> None:
        """Those of the whole graph are swept with it."""

    def evaluate(self, feeds: Mapping[str, Tensor], fetch: Sequence[Value]) -> list[Tensor]:
        """What is computed of stored tensors. Raises GraphError for any other value."""
        from graphopt.dialects.onnx import run as onnx_run  # which imports onnxruntime

        wanted = [self.native(value) for value in fetch]
        nodes = needed(self.model.graph, wanted)
        inner = {output for node in nodes for output in node.outputs}
        read = {value for node in nodes for value in reads(node)} - inner
        if unknown := next((one for one in [*read, *wanted] if one not in inner and one.const_value is None), None):
            raise GraphError(f"{unknown.name!r} is known only where the graph around this one runs")
        view = ir.GraphView([], wanted, nodes=nodes, initializers=[*read], opset_imports=self.opsets, name="constants")
        functions = [function.clone() for function in self.functions.values()]
        part = ir.Model(view.clone(), ir_version=self.model.ir_version, functions=functions)
        return onnx_run.run(onnx_run.session(part), {})
