"""Nodes and values of an `OnnxGraph`: views of an ir.Node and an ir.Value, which read an operator as an op."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from graphopt.dialects.onnx import spellings as onnx_spellings
from graphopt.dialects.onnx.spellings import DOMAIN, STANDARD
from graphopt.dialects.onnx.tensors import NARROW, READABLE
from graphopt.ir.graph import Node, Shape, Value
from graphopt.ir.ops import OPS

if TYPE_CHECKING:
    from graphopt.dialects.onnx.graph import OnnxGraph

PATH = "graphopt.path"
"""The metadata key that carries a node's module path."""
_RANDOM = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
}  # fmt: skip
_KNOWN_DOMAINS = (*STANDARD, "ai.onnx.ml", "com.microsoft", DOMAIN)


@dataclass(frozen=True)
class OnnxValue(Value):
    """A view of an ir.Value. `transposed`: the view of a matrix has its axes swapped, without a copy."""

    graph: OnnxGraph
    native: ir.Value
    transposed: bool = False

    def __hash__(self) -> int:
        return hash((self.native, self.transposed))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnnxValue) and self.native is other.native and self.transposed == other.transposed

    def transpose(self) -> OnnxValue:
        return OnnxValue(self.graph, self.native, not self.transposed)

    @property
    def name(self) -> str:
        return self.native.name or ""

    @property
    def shape(self) -> Shape | None:
        shape = self.native.shape
        if shape is None:
            return None
        sizes = tuple(size if isinstance(size, int) else (size.value or "?") for size in shape)
        return sizes[::-1] if self.transposed else sizes

    @property
    def dtype(self) -> torch.dtype | None:
        type_ = self.native.type
        return READABLE.get(type_.dtype) if isinstance(type_, ir.TensorType) else None  # else a sequence or an optional

    @property
    def producer(self) -> Node | None:
        producer = self.native.producer()
        if producer is None or self.transposed or not self.graph.is_within(producer):
            return None
        return OnnxNode(self.graph, producer)

    @property
    def users(self) -> tuple[Node, ...]:
        holders = (self.graph.holder(use.node) for use in self.native.uses())
        return tuple(OnnxNode(self.graph, node) for node in dict.fromkeys(holders) if node is not None)

    @property
    def is_output(self) -> bool:
        return self.native.is_graph_output()

    @property
    def is_constant(self) -> bool:
        native = self.native
        stored = native.const_value is not None and native.is_initializer() and native.dtype in READABLE
        return stored and not native.is_graph_input()  # else it is the default of an input


@dataclass(frozen=True)
class OnnxNode(Node):
    """A view of an ir.Node."""

    owner: OnnxGraph
    native: ir.Node

    def __hash__(self) -> int:
        return hash(self.native)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnnxNode) and self.native is other.native

    @property
    def graph(self) -> OnnxGraph:
        return self.owner

    @property
    def name(self) -> str:
        return self.native.name or ""

    @property
    def path(self) -> str:
        return self.native.metadata_props.get(PATH, "")

    @property
    def kind(self) -> str:
        op = onnx_spellings.read(self.owner, self.native)
        if op is not None:
            return op[0]
        domain = "onnx" if self.native.domain in STANDARD else self.native.domain
        return f"{domain}.{self.native.op_type}"

    @property
    def operands(self) -> tuple[Value | None, ...]:
        op = onnx_spellings.read(self.owner, self.native)
        return op[1] if op is not None else self.owner.values(self.native.inputs)

    @property
    def attributes(self) -> Mapping[str, Any]:
        op = onnx_spellings.read(self.owner, self.native)
        if op is not None:
            return op[2]
        return {a.name: a.value for a in self.native.attributes.values() if not holds_graph(a)}

    @property
    def results(self) -> tuple[Value, ...]:
        op = onnx_spellings.read(self.owner, self.native)
        count = len(OPS[op[0]].results) if op is not None else len(self.native.outputs)
        return tuple(OnnxValue(self.owner, output) for output in self.native.outputs[:count])

    @property
    def held(self) -> Iterable[tuple[torch.dtype | None, Shape | None]]:
        for attribute in self.native.attributes.values() if self.native.domain not in STANDARD else ():
            if holds_graph(attribute):
                several = attribute.type is ir.AttributeType.GRAPHS
                for graph in attribute.as_graphs() if several else [attribute.as_graph()]:
                    yield from self._stored_in(graph)

    def _stored_in(self, graph: ir.Graph) -> Iterable[tuple[torch.dtype | None, Shape | None]]:
        for inner in graph.all_nodes():
            tensor = inner.attributes.get("value") if inner.op_type == "Constant" else None
            if tensor is not None:
                stored = tensor.as_tensor()
                yield READABLE.get(stored.dtype), tuple(stored.shape.numpy())
            for value in self.owner.values(inner.inputs):
                if value is not None and value.is_constant:
                    yield value.dtype, value.shape

    @property
    def signature(self) -> Hashable | None:
        native = self.native
        if native.op_type in _RANDOM or native.domain not in _KNOWN_DOMAINS:
            return None
        if any(holds_graph(attribute) for attribute in native.attributes.values()):
            return None
        if any(output.dtype in NARROW for output in native.outputs):  # the engine does not return values of this type
            return None
        attributes = tuple(sorted((a.name, _frozen(a)) for a in native.attributes.values()))
        # The op may have attributes where the operator has inputs, such as the bounds of a slice.
        read = repr(sorted(self.attributes.items())) if self.op is not None else ""
        return native.domain, native.op_type, len(native.outputs), attributes, read


def holds_graph(attribute: ir.Attr) -> bool:
    """Whether an attribute is a subgraph, or several."""
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _frozen(attribute: ir.Attr) -> Hashable:
    value = attribute.value
    if attribute.type is ir.AttributeType.TENSOR:
        return str(value.dtype), tuple(value.shape), value.tobytes()
    return repr(value)
