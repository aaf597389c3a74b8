"""One interface to both dialects: how a program, a model or a file becomes a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from graphopt.errors import GraphError, nearest
from graphopt.ir.graph import Graph
from graphopt.ir.structure import Structure

DIALECTS = ("fx", "onnx")


class Adapter(Protocol):
    """What a dialect does for capture. A graph that is passed in must be of the dialect."""

    graph: type[Graph]
    """The graphs of the dialect, which `load` what they `save`."""

    def read(self, path: Path) -> Any:
        """What a file of the dialect's framework holds: an ExportedProgram (.pt2) or a model (.onnx).

        Raises GraphError for a file that cannot be read, or is not safe to read.
        """

    def from_program(
        self,
        program: torch.export.ExportedProgram,
        inputs: Sequence[str],
        axes: Mapping[str, Mapping[int, str]],
        returned: Structure,
    ) -> Graph:
        """The graph of an exported program.

        inputs: names of the inputs, in order. axes: by input, the names of its dynamic axes. returned: what the
        program returns. Raises GraphError for what the dialect cannot hold.
        """

    def from_model(self, model: Any) -> Graph:
        """The graph of a model in the framework's own form (ModelProto), its operators read as ops.

        Raises GraphError for what is no valid model, and where the framework has no models but programs.
        """

    def untouched(self, model: Any) -> Graph:
        """The graph of a model as it is, to be run and timed: nothing is put in order or raised."""

    def version(self, graph: Graph) -> str:
        """The version of the framework's operators that a graph is written in, such as `opset 17`."""

    def is_liftable(self, graph: Graph) -> bool:
        """Whether a graph is written in an older version than the one that has all ops."""

    def lift(self, model: Any) -> Graph:
        """The graph of a model, converted to the version that has all ops.

        Raises GraphError where it does not convert.
        """

    def raise_(self, graph: Graph) -> dict[str, int]:
        """Find ops in what exporters wrote out in several operators; returns, by rule, how often it did. [changes]"""

    def refine(self, graph: Graph) -> None:
        """Infer the shapes that a model left open again, as ops that were raised tell more. [changes]"""

    def optional(self, graph: Graph) -> tuple[str, ...]:
        """The inputs of a model that have a default, and need not be given."""

    def rounds(self, model: Any) -> bool:
        """Whether a model has operators that round activations as they multiply, beside those that quantize."""

    def notes(self, model: Any, graph: Graph) -> list[str]:
        """What a report says of a model that was handed in: how it is quantized, where it is."""

    def register(self, custom_ops: Any) -> None:
        """Let the framework know custom operators (`optimize` says which), as long as the process lives.

        Raises UsageError for what it cannot know.
        """

    def unknown(self, graph: Graph) -> list[str]:
        """The custom operators of a model, which run only where they were registered; none where the framework itself
        knows all of them."""


def adapter(dialect: str) -> Adapter:
    """The adapter of a dialect, whose framework is imported now. Raises GraphError for an unknown name."""
    if dialect not in DIALECTS:
        raise GraphError(f"there is no dialect {dialect!r}{nearest(dialect, DIALECTS)}")
    found: Adapter = import_module(f"graphopt.dialects.{dialect}.adapter").ADAPTER
    return found
