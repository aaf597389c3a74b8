"""An `OnnxGraph` as a module of torch, to be traced."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.interpreter import (
    canonical,
    contrib,
    elementwise,
    movement,
    normalization,
    reductions,
    windows,
)
from graphopt.dialects.onnx.interpreter.call import Call, Form, Numbers, Traced, numbers_of
from graphopt.dialects.onnx.interpreter.sizes import of_sizes
from graphopt.dialects.onnx.tensors import READABLE, TORCH_DTYPES, to_torch
from graphopt.dialects.onnx.views import holds_graph
from graphopt.errors import GraphError, few, first_line
from graphopt.ir.graph import Value, unique_labels

FORMS: Mapping[str, Form] = (
    canonical.FORMS | elementwise.FORMS | reductions.FORMS | movement.FORMS | normalization.FORMS | windows.FORMS
    | contrib.FORMS
)  # fmt: skip
"""How torch computes each kind of node."""

_OWN = ("onnx.Shape", "onnx.Size", "onnx.If")
"""Kinds of nodes that are computed without a form."""


class OnnxModule(nn.Module):
    """forward(*inputs) computes the graph, and returns a dict of its outputs by name.

    Each node runs in a submodule that is registered under the node's module path, or under its name where it has none,
    so that a trace has the paths; a name that every module has, such as type, gets an underscore. Stored tensors are
    shared with the graph. Parameters are float tensors that a node reads as weight, bias or table, as a factor or term
    for each channel, or as a matrix; all others are buffers.
    Raises GraphError, which lists all nodes that torch has no form of.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        nodes = [node for node in graph.nodes if isinstance(node, OnnxNode)]
        _require_forms(graph, nodes)
        self.inputs = [value.native for value in graph.inputs if isinstance(value, OnnxValue)]
        self.names = [value.name for value in graph.outputs]
        builder = _Builder(graph, self, _learned(nodes))
        self.block = builder.block(nodes, graph.model.graph.outputs, "")

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        found = self.block.run(dict(zip(self.inputs, inputs, strict=True)))
        results: dict[str, Tensor] = {}
        for name, value in zip(self.names, found, strict=True):
            tensor = value.tensor() if isinstance(value, Numbers) else value
            assert tensor is not None  # a result that no form computes is refused
            seen = any(tensor is other for other in (*inputs, *results.values()))
            results[name] = tensor.clone() if seen or isinstance(tensor, nn.Parameter) else tensor
        return results


class _Scope(nn.Module):
    """Where the nodes of one module path run, and what they read is registered."""

    def forward(self, step: _Step, values: dict[ir.Value, Traced]) -> None:
        step.run(values)

    def add(self, name: str, tensor: Tensor) -> str:
        """Register a tensor under the name, or one like it that is free; returns that."""
        name = re.sub(r"\W", "_", re.split(r"[./]", name)[-1]) or "tensor"
        while hasattr(self, name):
            if getattr(self, name) is tensor:
                return name
            name += "_"
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)
        return name


# --- what runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operand:
    """What is read: what a node computes, or a tensor that is stored in a scope."""

    native: ir.Value
    scope: _Scope
    name: str | None
    known: Numbers | None
    transposed: bool

    def read(self, values: Mapping[ir.Value, Traced]) -> Traced:
        if self.name is None:
            return values[self.native]
        tensor: Tensor = getattr(self.scope, self.name)
        return tensor.t() if self.transposed else tensor


@dataclass(frozen=True)
class _Block:
    """The nodes of a graph, or of one branch of an If, and what they return."""

    steps: Sequence[_Step]
    outputs: Sequence[_Operand]

    def run(self, values: dict[ir.Value, Traced]) -> list[Traced]:
        for step in self.steps:
            step.scope(step, values)
        return [output.read(values) for output in self.outputs]


@dataclass(frozen=True)
class _Step:
    """One node: its form (none of an If), what it reads and computes, and the branches of an If."""

    scope: _Scope
    kind: str
    label: str
    opset: int
    attributes: Mapping[str, Any]
    form: Form | None
    operands: Sequence[_Operand | None]
    results: Sequence[ir.Value]
    branches: tuple[_Block, _Block] | None

    def run(self, values: dict[ir.Value, Traced]) -> None:
        call = Call(
            self.kind, self.label, self.attributes, self.opset, len(self.results),
            [None if operand is None else operand.read(values) for operand in self.operands],
            [None if operand is None else operand.known for operand in self.operands],
        )  # fmt: skip
        try:
            found = self._results(call, values)
        except GraphError:
            raise
        except Exception as error:
            raise call.refused(first_line(error)) from error
        values.update(zip(self.results, found, strict=False))

    def _results(self, call: Call, values: dict[ir.Value, Traced]) -> Sequence[Traced]:
        if self.branches is not None:
            return self.branches[0 if call.required_numbers(0)[0] else 1].run(values)
        found = of_sizes(call)
        if found is None:
            assert self.form is not None  # checked when the module was made
            found = self.form.apply(call)
        return found if isinstance(found, tuple) else (found,)


# --- how it is made ------------------------------------------------------------------------------------------------


class _Builder:
    """Makes steps, and registers in the modules under `root` what they read. learned: what becomes a parameter."""

    def __init__(self, graph: OnnxGraph, root: nn.Module, learned: Collection[ir.Value]) -> None:
        self.graph, self.root, self.learned = graph, root, learned
        self.tensors: dict[tuple[ir.Value, _Scope | None], Tensor] = {}
        """Parameters and buffers, each of which may be read by several nodes. A vector that is learned is one
        parameter for each module path: exporters store equal ones once, such as the ones of all norms."""
        self.folded: dict[ir.Value, Tensor] = {}
        """What branches compute of stored tensors; of the graph itself, raising has folded that."""

    def block(self, nodes: Sequence[OnnxNode], outputs: Sequence[ir.Value], path: str) -> _Block:
        """path: of nodes that have none, in place of their names."""
        # All scopes are there before the first tensor, which must not have the name of one.
        scopes = [self._scope(node.path or path or node.name) for node in nodes]
        returned = self._scope(f"{path}.outputs")
        steps = []
        for node, scope in zip(nodes, scopes, strict=True):
            step = self._step(node, scope)
            if not (path and self._fold(step)):
                steps.append(step)
        return _Block(steps, [self._operand(OnnxValue(self.graph, value), returned, "") for value in outputs])

    def _fold(self, step: _Step) -> bool:
        """Compute a node of a branch that reads stored tensors only; returns whether it did."""
        if step.form is None or any(operand is not None and operand.name is None for operand in step.operands):
            return False
        values: dict[ir.Value, Traced] = {}
        step.run(values)
        self.folded |= {native: value.detach() for native, value in values.items() if isinstance(value, Tensor)}
        return True

    def _constant(self, value: OnnxValue) -> Tensor | None:
        return self.folded[value.native] if value.native in self.folded else self.graph.constant(value)

    def _scope(self, path: str) -> _Scope:
        """The submodule of a module path, made where it is not there yet."""
        inner: Any = self.root
        for name in filter(None, path.split(".")):
            name += "_" * hasattr(nn.Module, name)
            if name not in inner._modules:
                inner.add_module(name, _Scope())
            inner = inner._modules[name]
        assert isinstance(inner, _Scope)  # a path has a name in it
        return inner

    def _step(self, node: OnnxNode, scope: _Scope) -> _Step:
        form, attributes = FORMS.get(node.kind), _attributes(node)
        given = [value if isinstance(value, OnnxValue) else None for value in node.operands]
        names = {} if form is None else form.weights
        return _Step(
            scope, node.kind, node.label, self.graph.opset, attributes, form,
            [None if value is None else self._operand(value, scope, names.get(index, ""))
             for index, value in enumerate(given)],
            _read_results(node),
            self._branches(node) if node.kind == _IF else None,
        )  # fmt: skip

    def _branches(self, node: OnnxNode) -> tuple[_Block, _Block]:
        blocks = []
        for name in _BRANCHES:
            branch = node.native.attributes[name].as_graph()
            inner = [OnnxNode(self.graph, native) for native in branch]
            blocks.append(self.block(inner, branch.outputs, node.path or node.name))
        return blocks[0], blocks[1]

    def _operand(self, value: OnnxValue, scope: _Scope, name: str) -> _Operand:
        known = self._constant(value)
        if known is None:
            return _Operand(value.native, scope, None, None, value.transposed)
        learned = value.native in self.learned
        key = value.native, scope if learned and sum(size != 1 for size in known.shape) == 1 else None
        if key not in self.tensors:
            tensor = self._constant(OnnxValue(self.graph, value.native))
            assert tensor is not None  # it is a constant
            stored = tensor if key[1] is None else tensor.clone()
            self.tensors[key] = nn.Parameter(stored) if learned else stored
        own = scope.add(name or value.name, self.tensors[key])
        return _Operand(value.native, scope, own, numbers_of(known), value.transposed)


_IF = "onnx.If"
_BRANCHES = ("then_branch", "else_branch")


def _read_results(node: OnnxNode) -> list[ir.Value]:
    """The results up to the last one that is read; at least the first."""
    outputs = list(node.native.outputs)
    while len(outputs) > 1 and not (outputs[-1].uses() or outputs[-1].is_graph_output()):
        outputs.pop()
    return outputs


def _attributes(node: OnnxNode) -> dict[str, Any]:
    if node.op is not None:
        own = {}
        if node.native.op_type == "Dropout":
            own["dropout"] = _dropout_rate(node)
        return dict(node.attributes) | own
    return {a.name: _plain(a) for a in node.native.attributes.values() if not holds_graph(a)}


def _dropout_rate(node: OnnxNode) -> float:
    ratio = node.native.attributes.get("ratio")
    if ratio is not None:
        return ratio.as_float()
    values = node.owner.values(node.native.inputs[1:2])
    known = None if not values or values[0] is None else node.owner.constant(values[0])
    return 0.5 if known is None else float(known)


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type is ir.AttributeType.TENSOR:
        return numbers_of(to_torch(attribute.as_tensor()))
    if attribute.name in ("dtype", "to") and attribute.type is ir.AttributeType.INT:
        return TORCH_DTYPES.get(ir.DataType(attribute.as_int()))
    value = attribute.value
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


# --- what is learned -----------------------------------------------------------------------------------------------


def _learned(nodes: Iterable[OnnxNode]) -> set[ir.Value]:
    """The stored float tensors that a node reads as a parameter."""
    return {
        value.native
        for node in _with_branches(nodes)
        for index, value in enumerate(node.operands)
        if isinstance(value, OnnxValue) and value.is_constant and value.dtype is not None
        and value.dtype.is_floating_point and _is_parameter(node, index, value)
    }  # fmt: skip


def _is_parameter(node: OnnxNode, index: int, value: OnnxValue) -> bool:
    sizes = [size for size in value.shape or () if size != 1]
    if node.kind in ("add", "mul"):
        return len(sizes) == 1  # one number for each channel; more may be a mask or a table of positions
    if node.kind in ("matmul", "onnx.Einsum", "com.microsoft.FusedMatMul"):
        return len(sizes) > 1  # a vector may be a table of frequencies
    form = FORMS.get(node.kind)
    return bool(sizes) and form is not None and index in form.weights


# --- what has no form ----------------------------------------------------------------------------------------------


def _with_branches(nodes: Iterable[OnnxNode]) -> Iterator[OnnxNode]:
    """The nodes, and those in the branches of an If."""
    for node in nodes:
        yield node
        if node.kind == _IF:
            for name in _BRANCHES:
                inner = (OnnxNode(node.owner, native) for native in node.native.attributes[name].as_graph())
                yield from _with_branches(inner)


def _require_forms(graph: OnnxGraph, nodes: Sequence[OnnxNode]) -> None:
    """Raise GraphError where a node, an input or an output has no form in torch; it lists all of them."""
    refused: dict[str, list[str]] = {}
    every = list(_with_branches(nodes))
    labels = unique_labels(every)
    for node in every:
        form = FORMS.get(node.kind)
        why = None if node.kind in _OWN else "" if form is None else form.refusal(_attributes(node))
        if why is not None:
            refused.setdefault(node.kind + (f" with {why}" if why else ""), []).append(labels[node])
    if refused:
        listed = "; ".join(f"{what} ({few(labels)})" for what, labels in refused.items())
        raise GraphError(
            f"these operators have no torch form: {listed}. Hand over the nn.Module that the file was exported from"
        )
    values: list[Value] = [*graph.inputs, *graph.outputs]
    strange = [value.name for value in values if isinstance(value, OnnxValue) and value.native.dtype not in READABLE]
    if strange:
        raise GraphError(f"{', '.join(strange)}: torch has no values of this type (a sequence, a map, or text)")
