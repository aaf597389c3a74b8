"""An ExportedProgram -> the flat, functional graph that `FxGraph` works on, with one spelling for each op.

It is one pass over the program's nodes. Parameters become constants of the graph; guards and assertions are dropped.
What the module writes to its buffers and inputs becomes a copy_ at the end (`evaluate` runs none: only a runner keeps
state). Where aten has several spellings of an op, one is used: above all, addmm, mm and matmul with a constant matrix,
as in GPT-2's Conv1D, become linear. No weight is copied: a matrix that aten reads transposed is a `permute` of the
constant.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from graphopt.dialects.fx.native import (
    ORIGIN,
    identifier,
    is_constant,
    meta,
    module_path,
    name_inputs,
    source,
    with_nodes,
)
from graphopt.dialects.fx.spellings import arguments
from graphopt.errors import GraphError

aten = torch.ops.aten

_NOISE = {
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
}
"""Assertions on shapes and dtypes, which the export has checked; they compute nothing."""

_DROPOUT = "graphopt.dropout"
_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place writes; linear, conv, norms, attention and activations are not decomposed.

    A dropout at inference becomes a clone, whose meta keeps the rate for `Loader`.
    """
    dropouts = [node for node in program.graph.find_nodes(op="call_function", target=aten.dropout.default)]
    kept = [node.meta.get("custom") for node in dropouts]
    try:  # torch copies meta["custom"] to the node that replaces a node
        for node, custom in zip(dropouts, kept, strict=True):
            if node.args[1] and not node.args[2]:
                node.meta["custom"] = {**(custom or {}), _DROPOUT: node.args[1]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export copies a deprecated class of torch itself
            decomposed: ExportedProgram = program.run_decompositions({})
            return decomposed
    finally:
        for node, custom in zip(dropouts, kept, strict=True):
            node.meta.pop("custom", None)
            if custom is not None:
                node.meta["custom"] = custom


class Loader:
    """Builds `graph`, and in `stored` what its get_attr nodes name: tensors, and the graphs of control flow."""

    def __init__(self, program: ExportedProgram, input_names: Sequence[str] | None) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.stored: dict[str, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self.output_names: list[str] = []
        self._shared: dict[Any, fx.Node] = {}
        self._views: dict[fx.Node, fx.Node] = {}
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        self._input_names = list(input_names) if input_names is not None else None
        self._state = self._written(OutputKind.BUFFER_MUTATION)
        for node in program.graph.nodes:
            self._copy(node)
        if self._input_names:
            raise GraphError(f"the program has no inputs for the names {self._input_names}")
        name_inputs(self.graph)

    def _written(self, kind: OutputKind) -> set[str | None]:
        """The buffers, or inputs, that the module writes to. Raises GraphError where it writes to something else."""
        specs = self.program.graph_signature.output_specs
        for spec in specs:
            if spec.kind not in (OutputKind.USER_OUTPUT, *_WRITES):
                raise GraphError(f"the module writes to what a graph holds constant: {spec.kind.name} of {spec.target}")
        return {spec.target for spec in specs if spec.kind is kind}

    def _copy(self, node: fx.Node) -> None:
        match node.op:
            case "placeholder":
                self._copy_placeholder(node)
            case "get_attr":
                self.env[node] = self._store(node, getattr(self.program.graph_module, str(node.target)))
            case "output":
                self._copy_output(node)
            case _ if str(node.target) not in _NOISE:
                self.env[node] = self._normalized(node)

    def _copy_placeholder(self, node: fx.Node) -> None:
        spec = self._specs[node.name]
        if spec.kind in _STORED:
            state = self.program.constants if spec.target in self.program.constants else self.program.state_dict
            self.env[node] = self._store(node, state[spec.target])
            if spec.target in self._state:
                self.env[node].meta["state"] = True
        elif spec.kind is not InputKind.USER_INPUT:
            raise GraphError(f"input {node.name} is a {spec.kind.name}, which graphopt cannot hold")
        elif isinstance(spec.arg, ConstantArgument):
            self.env[node] = spec.arg.value
        elif not isinstance(spec.arg, TensorArgument):
            raise GraphError(f"input {node.name} is a number; make it a tensor, or fix it before the export")
        else:
            name = self._next_name(node.name)
            self.env[node] = self._new("placeholder", identifier(name), (), {}, node)
            self.env[node].meta["input_name"] = name

    def _next_name(self, default: str) -> str:
        if self._input_names is None:
            return default
        if not self._input_names:
            raise GraphError(f"input {default} has no name: too few input names were given")
        return self._input_names.pop(0)

    def _copy_output(self, node: fx.Node) -> None:
        """Return the tensors and sizes that the module returns. The caller knows what it returns as constants."""
        specs = self.program.graph_signature.output_specs
        results = list(zip(specs, node.args[0], strict=True))  # type: ignore[arg-type]
        self._copy_writes([(spec, result) for spec, result in results if spec.kind in _WRITES])
        named = [(n.name, self.env[n]) for spec, n in results if spec.kind not in _WRITES and isinstance(n, fx.Node)]
        self.output_names = [name for name, result in named if isinstance(result, fx.Node)]
        self.graph.output(tuple(result for _, result in named if isinstance(result, fx.Node)))

    def _copy_writes(self, writes: Sequence[tuple[Any, Any]]) -> None:
        placeholders = {
            spec.target if spec.kind in _STORED else spec.arg.name: self.env[node]
            for node in self.program.graph.find_nodes(op="placeholder")
            for spec in [self._specs[node.name]]
        }
        for spec, result in writes:
            written = placeholders[spec.target]
            copy = self._new("call_function", aten.copy_.default, (written, self.env[result]), {}, result)
            copy.meta["val"] = meta(written)

    def _store(self, node: fx.Node, thing: Any) -> fx.Node:
        """A get_attr node for a subgraph, or for a tensor: one node for all names of the tensor (tied weights)."""
        identity: Any = id(thing)
        if isinstance(thing, Tensor):
            identity = (thing.data_ptr(), thing.dtype, thing.shape, thing.stride(), thing.device)
            identity = identity if thing.numel() else id(thing)
        if identity not in self._shared:
            spec = self._specs.get(node.name)
            name = str(spec.target if spec is not None else node.target)
            self.stored[name] = thing
            with self.graph.inserting_before(None):
                self._shared[identity] = self._new("get_attr", name, (), {}, node)
        return self._shared[identity]

    def _new(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        """A node with the value and the path of `like`."""
        new = self.graph.create_node(op, target, args, kwargs)
        new.meta = {key: like.meta[key] for key in ("val", *ORIGIN) if key in like.meta}
        if _DROPOUT in like.meta.get("custom", ()):
            new.meta["dropout"] = like.meta["custom"][_DROPOUT], module_path(like)
        return new

    # --- one spelling

    def _normalized(self, node: fx.Node) -> Any:
        args, kwargs = with_nodes((node.args, node.kwargs), self.env.__getitem__)
        target = node.target
        if target is operator.getitem and not isinstance(meta(args[0]), tuple | list):
            return args[0]  # the first result of a norm, which is one node now
        a = dict(arguments(node)) if isinstance(target, torch._ops.OpOverload) else {}
        a |= dict(zip(a, args, strict=False)) | kwargs
        match str(target):
            case "aten.view.default" | "aten._unsafe_view.default":  # reshape holds for any strides
                return self._new("call_function", aten.reshape.default, args, {}, node)
            case "aten._native_batch_norm_legit_no_training.default" if _only_first(node):
                args = (*args[:5], False, *args[5:7], False)
                return self._new("call_function", aten.batch_norm.default, args, {}, _first(node))
            case "aten.native_layer_norm.default" if _only_first(node):
                return self._new("call_function", aten.layer_norm.default, args, {}, _first(node))
            case "aten.t.default" | "aten.transpose.int" | "aten.permute.default" if self._is_matrix(args[0]):
                if _swaps(str(target), a):
                    return self._transposed(args[0])
            case "aten.permute.default" if is_constant(args[0]):
                with self.graph.inserting_after(args[0]):
                    return self._new("call_function", target, args, {}, node)
            case "aten.mm.default" if self._is_matrix(a["mat2"]):
                return self._linear(a["self"], a["mat2"], None, node)
            case "aten.matmul.default" if self._is_matrix(a["other"]):
                return self._linear(a["self"], a["other"], None, node)
            case "aten.addmm.default" if self._is_matrix(a["mat2"]) and (a["alpha"], a["beta"]) == (1, 1):
                if self._is_bias(a["self"], meta(node)):
                    return self._linear(a["mat1"], a["mat2"], a["self"], node)
            case "aten.baddbmm.default" if (a["alpha"], a["beta"]) == (1, 1):
                product = self._new("call_function", aten.bmm.default, (a["batch1"], a["batch2"]), {}, node)
                return self._new("call_function", aten.add.Tensor, (product, a["self"]), {}, node)
            case "aten.add.Tensor" if a["alpha"] == 1:
                for x, bias in ((args[0], args[1]), (args[1], args[0])):
                    if self._is_lone_linear(x, node) and self._is_bias(bias, meta(node)):
                        x.args = (*x.args[:2], bias)
                        return x
        return self._new(node.op, target, args, kwargs, node)

    def _is_matrix(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and is_constant(value) and meta(value).dim() == 2

    def _is_bias(self, value: Any, result: Tensor) -> bool:
        return (
            isinstance(value, fx.Node)
            and is_constant(value)
            and meta(value).dim() == 1
            and result.dim() > 0
            and meta(value).shape[0] == result.shape[-1]
            and meta(value).dtype == result.dtype
        )

    def _is_lone_linear(self, x: Any, add: fx.Node) -> bool:
        """Whether x is a linear without a bias that only this `add` reads, and has the width of the sum."""
        if not isinstance(x, fx.Node) or x.target is not aten.linear.default or len(x.args) != 2:
            return False
        sources = [read for read in add.all_input_nodes if self.env[read] is x]
        return len(sources) == 1 and len(sources[0].users) == 1 and meta(x).shape[-1] == meta(add).shape[-1]

    def _linear(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, node: fx.Node) -> fx.Node:
        args = (x, self._transposed(matrix)) if bias is None else (x, self._transposed(matrix), bias)
        return self._new("call_function", aten.linear.default, args, {}, node)

    def _transposed(self, matrix: fx.Node) -> fx.Node:
        """The matrix with its axes swapped: the constant that it is a view of, or a view next to the constant."""
        if matrix.op == "call_function":
            return source(matrix)
        if matrix not in self._views:
            with self.graph.inserting_after(matrix):
                view = self.graph.call_function(aten.permute.default, (matrix, [1, 0]))
            view.meta["val"] = meta(matrix).detach().permute(1, 0)
            self._views[matrix] = view
        return self._views[matrix]


def _first(node: fx.Node) -> fx.Node:
    return next(iter(node.users))


def _only_first(node: fx.Node) -> bool:
    """Whether only the first result of a node is used."""
    return bool(node.users) and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _swaps(target: str, a: Mapping[str, Any]) -> bool:
    if target == "aten.permute.default":
        return [axis % 2 for axis in a["dims"]] == [1, 0]
    return target == "aten.t.default" or (a["dim0"] - a["dim1"]) % 2 == 1
