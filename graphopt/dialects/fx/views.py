"""Nodes and values of an `FxGraph`: views of an fx.Node and of what stands in its arguments."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graphopt.dialects.fx import spellings as fx_spellings
from graphopt.dialects.fx.native import (
    frozen,
    is_constant,
    is_result,
    meta,
    module_path,
    plain_arguments,
    results,
    source,
    target_name,
    tensors_read,
)
from graphopt.dialects.fx.spellings import Literal, Sizes
from graphopt.errors import GraphError
from graphopt.ir.graph import Node, Shape, Value
from graphopt.ir.ops import OPS

if TYPE_CHECKING:
    from graphopt.dialects.fx.graph import FxGraph


@dataclass(frozen=True, eq=False)
class FxValue(Value):
    """A view of an fx.Node, or of a number or a shape in a node's arguments."""

    graph: FxGraph
    native: fx.Node | Literal | Sizes

    def __hash__(self) -> int:
        return hash(self.native)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FxValue) and self.native == other.native

    @property
    def name(self) -> str:
        if isinstance(self.native, fx.Node):
            if "input_name" in self.native.meta:
                return str(self.native.meta["input_name"])
            return self.graph.output_names[self.graph.outputs.index(self)] if self.is_output else self.native.name
        if isinstance(self.native, Literal):
            return str(self.native.number)
        return "(" + ",".join(str(item) for item in self.native.items) + ")"

    @property
    def shape(self) -> Shape | None:
        if isinstance(self.native, Literal):
            return ()
        if isinstance(self.native, Sizes):
            return (len(self.native.items),)
        value = meta(self.native)
        if isinstance(value, Tensor):
            told = self.native.args[1] if self.native.target is torch.ops.aten.reshape.default else ()
            if isinstance(told, list | tuple) and len(told) == value.dim():  # torch may only know it as a quotient
                return tuple(
                    size if isinstance(size, int) and size >= 0 else self.graph.axis(found)
                    for size, found in zip(told, value.shape, strict=True)
                )
            return tuple(self.graph.axis(size) for size in value.shape)
        return () if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float) else None

    @property
    def dtype(self) -> torch.dtype | None:
        if isinstance(self.native, Literal):
            return self.native.dtype
        if isinstance(self.native, Sizes):
            return torch.int64
        value = meta(self.native)
        if isinstance(value, Tensor):
            return value.dtype
        return torch.int64 if isinstance(value, torch.SymInt | int) else None

    @property
    def producer(self) -> Node | None:
        native = self.native
        if not isinstance(native, fx.Node) or native.op in ("placeholder", "get_attr") or is_constant(native):
            return None
        return FxNode(self.graph, source(native) if is_result(native) else native)

    @property
    def users(self) -> tuple[Node, ...]:
        """Of a constant, also those that read it transposed."""
        return tuple(FxNode(self.graph, user) for user in dict.fromkeys(self._readers()))

    def _readers(self) -> Iterator[fx.Node]:
        native = self.native
        if not isinstance(native, fx.Node):
            return
        while is_constant(native) and native.op != "get_attr":
            native = source(native)
        waiting = [native]
        while waiting:
            for user in waiting.pop().users:
                if is_constant(user):
                    waiting.append(user)
                elif user.op != "output":
                    yield user

    @property
    def is_output(self) -> bool:
        return isinstance(self.native, fx.Node) and any(user.op == "output" for user in self.native.users)

    @property
    def is_constant(self) -> bool:
        if isinstance(self.native, fx.Node):
            return is_constant(self.native)
        return isinstance(self.native, Literal) or all(isinstance(item, int) for item in self.native.items)


@dataclass(frozen=True, eq=False)
class FxNode(Node):
    """A view of an fx.Node that computes something."""

    owner: FxGraph
    native: fx.Node

    def __hash__(self) -> int:
        return hash(self.native)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FxNode) and self.native is other.native

    @property
    def graph(self) -> FxGraph:
        return self.owner

    @property
    def name(self) -> str:
        return self.native.name

    @property
    def path(self) -> str:
        return module_path(self.native)

    @property
    def kind(self) -> str:
        read = self._read()
        return read.op if read is not None else target_name(self.native)

    @property
    def operands(self) -> tuple[Value | None, ...]:
        read = self._read()
        raws = read.operands if read is not None else tensors_read(self.native)
        return tuple(None if raw is None else FxValue(self.owner, raw) for raw in raws)

    @property
    def attributes(self) -> Mapping[str, Any]:
        read = self._read()
        if read is not None:
            return MappingProxyType(dict(OPS[read.op].attributes) | read.attributes)
        return MappingProxyType(plain_arguments(self.native))

    @property
    def results(self) -> tuple[Value, ...]:
        return tuple(FxValue(self.owner, result) for result in results(self.native))

    @property
    def signature(self) -> Hashable | None:
        target = self.native.target
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
                return None
        elif self.native.op != "call_function" or getattr(target, "__module__", "") not in ("_operator", "math"):
            return None
        return target, frozen(self.native.args), frozen(self.native.kwargs)

    def _read(self) -> fx_spellings.Read | None:
        return fx_spellings.read(self.native, self.owner.native.tensor)


def raw_of(value: Value) -> fx.Node | Literal | Sizes:
    """What a value views. Raises GraphError for a value of another dialect."""
    if not isinstance(value, FxValue):
        raise GraphError(f"{value!r} is no value of an fx graph")
    return value.native


def native_node(node: Node) -> fx.Node:
    """The fx.Node that a node views. Raises GraphError for a node of another dialect."""
    if not isinstance(node, FxNode):
        raise GraphError(f"{node!r} is no node of an fx graph")
    return node.native
