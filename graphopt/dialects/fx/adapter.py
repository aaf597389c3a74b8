"""The torch.fx dialect for capture: programs of torch.export become graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.dialects.adapter import Adapter
from graphopt.dialects.fx import archive
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.raising import STAGES
from graphopt.dialects.raising import run_stages
from graphopt.errors import GraphError, UsageError
from graphopt.ir.graph import Graph
from graphopt.ir.structure import Structure, plain_structure


class FxAdapter:
    """See `Adapter`. aten has no versions, so nothing is lifted."""

    graph: type[Graph] = FxGraph

    def read(self, path: Path) -> torch.export.ExportedProgram:
        return archive.read_program(path)

    def from_program(
        self,
        program: torch.export.ExportedProgram,
        inputs: Sequence[str],
        axes: Mapping[str, Mapping[int, str]],
        returned: Structure,
    ) -> FxGraph:
        graph = FxGraph.from_program(program, input_names=inputs, output_names=returned.names, axis_names=axes)
        graph.returns = plain_structure(returned.rebuild, len(returned.names))
        return graph

    def from_model(self, model: Any) -> Graph:
        raise GraphError(
            "an ONNX model cannot go to a target of the fx dialect; use target=onnxruntime, or hand over the nn.Module "
            "(graphopt.to_torch makes one of a file)"
        )

    untouched = lift = from_model

    def version(self, graph: Graph) -> str:
        return f"torch {torch.__version__}"

    def is_liftable(self, graph: Graph) -> bool:
        return False

    def raise_(self, graph: Graph) -> dict[str, int]:
        return run_stages(STAGES, graph)

    def refine(self, graph: Graph) -> None:
        """Nothing: fake tensors have all shapes."""

    def optional(self, graph: Graph) -> tuple[str, ...]:
        return ()

    def rounds(self, model: Any) -> bool:
        return False

    def notes(self, model: Any, graph: Graph) -> list[str]:
        return []

    def register(self, custom_ops: Any) -> None:
        raise UsageError("custom_ops are of ONNX files; operators of torch.library are known once they are imported")

    def unknown(self, graph: Graph) -> list[str]:
        return []


ADAPTER: Adapter = FxAdapter()
