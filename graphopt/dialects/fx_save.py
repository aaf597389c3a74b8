"""An `FxGraph` as a torch.export archive and back, without tracing it again."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from graphopt.dialects import fx_ops  # noqa: F401  (an archive may hold its operators)
from graphopt.dialects.fx_native import meta
from graphopt.dialects.fx_words import quantized_decomposed
from graphopt.graph import GraphError

if TYPE_CHECKING:
    from graphopt.dialects.fx import FxGraph

_NAMES = "graphopt.json"


def save(graph: FxGraph, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the graph, its names, and texts about it. Raises GraphError where torch cannot write an operation."""
    extra = {f"graphopt.{key}": text for key, text in (metadata or {}).items()}
    names = {"inputs": graph.input_names, "outputs": graph.output_names, "axes": graph.axis_names}
    program, buffer = to_program(graph), io.BytesIO()
    try:
        torch.export.save(program, buffer, extra_files=extra | {_NAMES: json.dumps(names)})
    except Exception as error:
        raise GraphError(f"torch.export cannot write this graph: {error}") from error
    Path(path).write_bytes(buffer.getvalue())


def load(path: str | Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """Read an archive of `save`: the program, and the names in it. Raises GraphError for any other file.

    torch.export reads parts of its archives as pickles, which can run code: only for files that one trusts.
    """
    quantized_decomposed()
    extra = {_NAMES: ""}
    try:
        program = torch.export.load(io.BytesIO(Path(path).read_bytes()), extra_files=extra)
        return program, json.loads(extra[_NAMES])
    except OSError:
        raise
    except Exception as error:
        raise GraphError(f"{path} is no archive of an fx graph: {error}") from error


def to_program(graph: FxGraph) -> ExportedProgram:
    """The graph as an ExportedProgram: constants become lifted inputs, everything else stays as it is."""
    program, env = fx.Graph(), dict[fx.Node, fx.Node]()
    state: dict[str, Tensor] = {}
    subgraphs: dict[str, Any] = {}
    inputs: list[InputSpec] = []
    for node in graph.native.graph.find_nodes(op="get_attr"):
        stored = graph.native.stored[str(node.target)]
        if not isinstance(stored, Tensor):
            subgraphs[str(node.target)] = stored
            continue
        env[node] = program.placeholder(f"c_{node.name}")
        env[node].meta = dict(node.meta)
        kind = InputKind.PARAMETER if isinstance(stored, torch.nn.Parameter) else InputKind.BUFFER
        persistent = None if kind is InputKind.PARAMETER else True
        inputs.append(InputSpec(kind, TensorArgument(env[node].name), str(node.target), persistent))
        state[str(node.target)] = stored
    placeholders = graph.native.graph.find_nodes(op="placeholder")
    for node in placeholders:
        env[node] = program.node_copy(node)
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(env[node].name), None))
    for node in graph.native.graph.nodes:
        if node not in env:
            env[node] = program.node_copy(node, env.__getitem__)
    results = [result for result in env[graph.native.output].args[0]]  # type: ignore[union-attr]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(result), None) for result in results]  # type: ignore[arg-type]
    trees = pytree.tree_structure((tuple(placeholders), {})), pytree.tree_structure(tuple(results))
    call = ModuleCallSignature([], [], *trees, [node.name for node in placeholders])
    return ExportedProgram(
        subgraphs,
        program,
        ExportGraphSignature(inputs, outputs),
        state,
        _ranges(program),
        [ModuleCallEntry("", call)],
    )


def _argument(node: fx.Node) -> TensorArgument | SymIntArgument:
    return TensorArgument(node.name) if isinstance(meta(node), Tensor) else SymIntArgument(node.name)


def _ranges(graph: fx.Graph) -> dict[Any, Any]:
    """The range of every symbol that a shape in the graph depends on."""
    ranges: dict[Any, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        for size in meta(node).shape:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                ranges |= {symbol: environment.var_to_range[symbol] for symbol in size.node.expr.free_symbols}
    return ranges
