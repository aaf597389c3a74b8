"""What the targets that deploy an ONNX file have in common, and those of them whose engine reads Q/DQ itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from torch import Tensor

from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.quantized import rounds_activations
from graphopt.ir.graph import Feeds, Graph
from graphopt.ir.qdq.regions import require_no_int8_ops
from graphopt.ir.rewrite import Choice, Rule
from graphopt.lowering.backend import Backend


class OnnxTarget(Backend):
    """A target that deploys an ONNX file."""

    dialect: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    levels: ClassVar[tuple[str, ...]] = ("disable", "all")
    """The optimizations of onnxruntime (`run.LEVELS`) at which a file for another opset is compared with the graph."""

    def deployable(self, graph: OnnxGraph, opset: int | None = None) -> ir.Model:
        """The model as it is deployed; see `onnx_export.deployable`."""
        return onnx_export.deployable(graph, opset)

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        assert isinstance(graph, OnnxGraph)
        onnx_export.write(self.deployable(graph, opset), path, metadata, external_data)

    def exported(self, graph: Graph, opset: int | None) -> Mapping[str, Callable[[Feeds], list[Tensor]]]:
        assert isinstance(graph, OnnxGraph)
        model = self.deployable(graph, opset)
        return {level: partial(onnx_run.run, onnx_run.session(model, level=level, exact=True)) for level in self.levels}

    def rounds(self, graph: Graph) -> bool:
        assert isinstance(graph, OnnxGraph)
        return rounds_activations(graph.model)

    def graphsurgeon(self, graph: Graph) -> Any:
        assert isinstance(graph, OnnxGraph)
        return onnx_export.graphsurgeon(self.deployable(graph))


class QdqTarget(OnnxTarget):
    """A target whose engine reads Q/DQ around float ops, and folds them itself."""

    levels: ClassVar[tuple[str, ...]] = ("disable",)

    def pipeline(self) -> str:
        return ""

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        """No rules. Raises LoweringError where a graph has int8 ops in the place of Q/DQ."""
        require_no_int8_ops(graph, self.name)
        return ()
