"""An `FxGraph` as a torch.export archive and back, without tracing it again."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from graphopt.dialects.fx import custom_operators  # noqa: F401  (registered, for an archive may hold them)
from graphopt.dialects.fx.native import meta
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.errors import GraphError
from graphopt.ir.structure import Output

if TYPE_CHECKING:
    from graphopt.dialects.fx.graph import FxGraph

_NAMES = "graphopt.json"


def save(graph: FxGraph, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the graph, its names and the texts in `metadata`, once all is known to be writable.

    Raises GraphError where torch cannot write an operation.
    """
    extra = {f"graphopt.{key}": text for key, text in (metadata or {}).items()}
    names = {"inputs": graph.input_names, "outputs": graph.output_names, "axes": graph.axis_names}
    program, buffer = to_program(graph), io.BytesIO()
    try:
        torch.export.save(program, buffer, extra_files=extra | {_NAMES: json.dumps(names)})
    except Exception as error:
        raise GraphError(f"torch.export cannot write this graph: {error}") from error
    Path(path).write_bytes(buffer.getvalue())


def load(path: str | Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """Read an archive of `save`: the program, and the names in it. Raises GraphError for any other file."""
    extra = {_NAMES: ""}
    program = read_program(path, extra)
    if not extra[_NAMES]:
        raise GraphError(f"{path} is no archive of an fx graph: it holds no {_NAMES}")
    return program, json.loads(extra[_NAMES])


def read_program(path: str | Path, extra: dict[str, str] | None = None) -> ExportedProgram:
    """Read an archive of torch.export.save, and the texts in it whose names are keys of `extra`.

    torch unpickles what an archive declares as a pickle, which can run code: one with a pickle is refused. Still,
    load only files that you trust: torch evaluates sizes as Python expressions. Raises GraphError for other files.
    """
    quantized_decomposed()
    content = Path(path).read_bytes()
    try:
        pickles = _pickles(content)
        if not pickles:
            return torch.export.load(io.BytesIO(content), extra_files=extra)
    except Exception as error:
        raise GraphError(f"{path} is no archive of torch.export: {error}") from error
    raise GraphError(
        f"{path} holds pickles ({', '.join(pickles[:3])}), which can run code and are never loaded; if you trust it, "
        f"hand over torch.export.load({Path(path).name!r})"
    )


def _pickles(archive: bytes) -> list[str]:
    """The entries that torch.export.load would unpickle, except example inputs that are tensors only."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = [name.partition("/")[2] for name in files.namelist()]
        root = files.namelist()[0].partition("/")[0]
        found = [name for name in names if re.match(r"data/(weights|constants)/.*(\.pt$|custom_obj|opaque)", name)]
        # torch reads each model in an archive with its own configs, and the files of older formats
        found += [name for name in names if re.match(r"models/(?!model\.json$).|serialized_", name)]
        if "models/model.json" not in names:  # an older format, which consists of pickles
            return names
        for name in names:
            content = files.read(f"{root}/{name}")
            if re.fullmatch(r"data/(weights|constants)/.*_config\.json", name):
                entries = json.loads(content)["config"]
                found += [key for key, entry in entries.items() if entry["use_pickle"]]
            elif name.startswith("data/sample_inputs/") and content:
                try:
                    torch.load(io.BytesIO(content), weights_only=True)
                except pickle.UnpicklingError:
                    found.append(name)
    return found


def returned(program: ExportedProgram) -> Any:
    """What the program returns, with an `Output` for each of its tensors and sizes, in order."""
    places = itertools.count()
    leaves = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else Output(next(places))
        for spec in program.graph_signature.output_specs
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    return pytree.tree_unflatten(leaves, cast(pytree.TreeSpec, program.call_spec.out_spec))


def to_program(graph: FxGraph, *, keywords: bool = False) -> ExportedProgram:
    """The graph as an ExportedProgram, with constants as lifted inputs.

    It returns what the model does, with a dict in place of any other mapping. keywords: whether inputs are given by
    keyword rather than in order.
    """
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
    writes: list[tuple[OutputSpec, fx.Node]] = []
    for node in graph.native.graph.nodes:
        if node.target is torch.ops.aten.copy_.default:
            writes.append(_write(env, *node.args))
        elif node not in env:
            env[node] = program.node_copy(node, env.__getitem__)
    results = cast(tuple[fx.Node, ...], env[graph.native.output].args[0])
    leaves, returned = pytree.tree_flatten(graph.returns)
    leaves = [results[leaf.index] if isinstance(leaf, Output) else leaf for leaf in leaves]
    env[graph.native.output].args = ((*(value for _, value in writes), *leaves),)
    outputs = [spec for spec, _ in writes]
    outputs += [OutputSpec(OutputKind.USER_OUTPUT, _argument(leaf), None) for leaf in leaves]
    named = {str(node.target): node for node in placeholders}
    given = pytree.tree_structure(((), named) if keywords else (tuple(placeholders), {}))
    call = ModuleCallSignature([], [], given, returned, list(named))
    return ExportedProgram(
        subgraphs,
        program,
        ExportGraphSignature(inputs, outputs),
        state,
        _ranges(program),
        [ModuleCallEntry("", call)],
    )


def _write(env: Mapping[fx.Node, fx.Node], written: Any, value: Any) -> tuple[OutputSpec, fx.Node]:
    """The output of a program that stands for a copy to a stored tensor or an input."""
    of_input = written.op == "placeholder"
    kind = OutputKind.USER_INPUT_MUTATION if of_input else OutputKind.BUFFER_MUTATION
    target = env[written].name if of_input else str(written.target)
    return OutputSpec(kind, TensorArgument(env[value].name), target), env[value]


def _argument(leaf: Any) -> TensorArgument | SymIntArgument | ConstantArgument:
    if not isinstance(leaf, fx.Node):
        return ConstantArgument("", leaf)
    return TensorArgument(leaf.name) if isinstance(meta(leaf), Tensor) else SymIntArgument(leaf.name)


def _ranges(graph: fx.Graph) -> dict[Any, Any]:
    """The range of every symbol in the shapes of the graph's inputs."""
    ranges: dict[Any, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        for size in meta(node).shape:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                ranges |= {symbol: environment.var_to_range[symbol] for symbol in size.node.expr.free_symbols}
    return ranges
