"""The interface of a graph: all that a pass may ask of one, and the only ways to change one.

`Graph`, `Node` and `Value` are abstract; `graphopt.dialects` holds one implementation over torch.fx and one over
onnx-ir. Nodes and values are views of the dialect's own objects: two are equal when they view the same object, and they
store nothing that a change of the graph could make wrong.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphopt.errors import GraphError
from graphopt.ir.ops import OPS, Op
from graphopt.ir.scaled import Place, Scaled
from graphopt.ir.untouched import Untouched

Shape = tuple[int | str, ...]
"""One entry per axis: a size, or the name of a dynamic axis ("?" when it has none)."""

Feeds = Mapping[str, Tensor]
"""What a graph is run on: a tensor for each input, by name; an `Untouched` where the input is of another type."""

Seen = tuple[int, Feeds, Mapping["Value", Tensor]]
"""The number of a batch, its feeds by input name, and some values computed from it."""


class Value(ABC):
    """A tensor of the graph, known or computed at run time: the result of a node, an input, or a constant."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in the dialect's own graph."""

    @property
    @abstractmethod
    def shape(self) -> Shape | None:
        """The shape, or None where even the rank is unknown."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """The dtype, or None where it is unknown or has no counterpart in torch."""

    @property
    @abstractmethod
    def producer(self) -> Node | None:
        """The node that computes it; None for inputs and constants."""

    @property
    @abstractmethod
    def users(self) -> tuple[Node, ...]:
        """The nodes that read it, once each, in no particular order; a graph output is not a user."""

    @property
    @abstractmethod
    def is_output(self) -> bool:
        """Whether the graph returns it."""

    @property
    @abstractmethod
    def is_constant(self) -> bool:
        """Whether `Graph.constant` has a tensor for it."""

    @property
    def only_user(self) -> Node | None:
        """The one node that reads it; None where several do, none does, or the graph returns it."""
        users = () if self.is_output else self.users
        return users[0] if len(users) == 1 else None

    @property
    def rank(self) -> int | None:
        """The number of axes; None where it is unknown."""
        return None if self.shape is None else len(self.shape)


class Node(ABC):
    """One operation. A node that a pass may change is called a site."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique in its graph."""

    @property
    @abstractmethod
    def path(self) -> str:
        """The module path it came from, such as encoder.layer.0.attention.self.query; "" when unknown."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The op's name, or the dialect's spelling of an opaque operation (such as onnx.Loop, aten.topk.default)."""

    @property
    @abstractmethod
    def operands(self) -> tuple[Value | None, ...]:
        """In the op's order; None where an optional one is left out. Of an opaque node: all values that it reads."""

    @property
    @abstractmethod
    def attributes(self) -> Mapping[str, Any]:
        """The op's attributes, defaults filled in. Of an opaque node: those of the dialect's operation."""

    @property
    @abstractmethod
    def results(self) -> tuple[Value, ...]:
        """The values that it computes."""

    @property
    @abstractmethod
    def signature(self) -> Hashable | None:
        """Equal signatures compute equal results; None when random, stateful, or holding subgraphs."""

    @property
    @abstractmethod
    def graph(self) -> Graph:
        """The graph that it is part of."""

    @property
    def held(self) -> Iterable[tuple[torch.dtype | None, Shape | None]]:
        """The dtype and shape of each constant that its subgraphs read, as far as these are no `Graph.bodies`."""
        return ()

    @property
    def op(self) -> Op | None:
        """The canonical op; None of an opaque node."""
        return OPS.get(self.kind)

    def operand(self, name: str) -> Value | None:
        """The operand that the op calls `name`, or None where it is left out."""
        op = self.op
        if op is None or name not in op.operands:
            raise GraphError(f"{self.kind} has no operand {name!r} ({self.label})")
        if op.variadic:
            raise GraphError(f"{self.kind} has any number of {name}: read its operands ({self.label})")
        index = op.operands.index(name)
        return self.operands[index] if index < len(self.operands) else None

    def required(self, name: str) -> Value:
        """The operand `name`. Raises GraphError where it is left out."""
        value = self.operand(name)
        if value is None:
            raise GraphError(f"the operand {name!r} of {self.kind} is left out ({self.label})")
        return value

    @property
    def result(self) -> Value:
        """Its first (for most ops only) result."""
        return self.results[0]

    @property
    def input(self) -> Value:
        """The operand x of linear, conv, norms and activations."""
        return self.required("x")

    @property
    def bias(self) -> Value | None:
        """The operand bias; None where it is left out."""
        return self.operand("bias")

    @property
    def weight(self) -> Tensor | None:
        """The constant weight as this node reads it, (out, in, ...); None where the graph computes it."""
        op = self.op
        if op is None or "weight" not in op.operands:
            return None
        value = self.operand("weight")
        return self.graph.constant(value) if value is not None and value.is_constant else None

    @property
    def label(self) -> str:
        """Its name in reports and errors: the module path where there is one, else its own name."""
        return self.path or self.name


def every_node(graph: Graph) -> list[Node]:
    """The nodes of a graph, and those of its bodies; of a body, its own."""
    return [node for one in (graph, *graph.bodies) for node in one.nodes]


def unique_labels(nodes: Iterable[Node]) -> dict[Node, str]:
    """How a report names these nodes: by label, with the node's own name where several share it (a module called
    twice)."""
    labels = {node: node.label for node in nodes}
    often = Counter(labels.values())
    return {node: label if often[label] == 1 else f"{label} ({node.name})" for node, label in labels.items()}


class Graph(ABC):
    """A network in one dialect. Only the methods marked [changes] change what it computes or how."""

    dialect: str
    version: int = 0
    """How many calls of `replace`, `erase` and `absorb` have changed the graph."""
    _scaled: Mapping[Place, Scaled] = MappingProxyType({})

    @property
    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """A snapshot in topological order (subgraphs stay inside their node)."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Value, ...]:
        """In the order of the model's signature."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[Value, ...]:
        """The values that the graph returns, in order."""

    @property
    def bodies(self) -> tuple[Graph, ...]:
        """The graphs of branches and loop bodies that its nodes hold, outer ones before those within them: views, made
        at each call. Changing a body changes this graph, but not its `version`. Their values cannot be
        evaluated or fetched by themselves, but for what is computed of constants."""
        return ()

    @property
    def whole(self) -> Graph:
        """The graph that this one is a body of; itself where it is none."""
        return self

    @property
    def scaled(self) -> Mapping[Place, Scaled]:
        """The results that passes have divided, by the place of their node; set it to record more."""
        return self._scaled

    @scaled.setter
    def scaled(self, scaled: Mapping[Place, Scaled]) -> None:
        self._scaled = MappingProxyType(dict(scaled))

    @property
    def stateful(self) -> bool:
        """Whether the compiled graph writes to stored tensors or to its inputs when it runs (`evaluate` never does)."""
        return False

    @abstractmethod
    def constant(self, value: Value) -> Tensor | None:
        """The tensor of a constant value, shared with the graph (do not write to it), or None. Never a copy."""

    @abstractmethod
    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor once, with its name."""

    @abstractmethod
    def add_constant(self, tensor: Tensor, name: str = "") -> Value:
        """Store a tensor. It changes nothing until a node reads it. `name` is a hint, made unique."""

    @abstractmethod
    def emit(self, kind: str | Node, *operands: Value | None, at: Node | None = None, **attributes: Any) -> Value:
        """Insert a node just before `at` (at the end without it), under its module path; returns its first result.

        kind: an op; a dialect's own operation, for lowering; or a node, to compute the same on other operands, with
        its attributes except for those given. It changes nothing until its result is used. Raises GraphError when the
        operands do not fit the op.
        """

    @abstractmethod
    def emit_sized(
        self, node: Node, *operands: Value | None, sizes: Mapping[int, int], at: Node | None = None
    ) -> Value:
        """As `emit`, of a node that is told the shape of its result (reshape, expand, resize), with other sizes.

        sizes: by axis of the result. Sizes that the graph computes are kept, and so are inferred ones (-1).
        """

    def emit_all(self, kind: str | Node, *operands: Value | None, at: Node | None = None, **attributes: Any) -> tuple[
        Value, ...
    ]:
        """As `emit`, but returns all results."""
        producer = self.emit(kind, *operands, at=at, **attributes).producer
        assert producer is not None
        return producer.results

    @abstractmethod
    def replace(self, node: Node, *values: Value) -> None:
        """Use `values` for the node's results everywhere, in the graph's outputs too; erase the node. [changes]"""

    @abstractmethod
    def erase(self, node: Node) -> None:
        """Remove a node whose results nothing reads. Raises GraphError where something does. [changes]"""

    @abstractmethod
    def sweep(self) -> int:
        """Remove nodes and constants that nothing reads; returns how many nodes. `version` stays: no result changes."""

    @abstractmethod
    def evaluate(self, feeds: Mapping[str, Tensor], fetch: Sequence[Value]) -> list[Tensor]:
        """Run the graph on named inputs and return the values asked for (any in the graph, constants included)."""

    def release(self) -> None:  # noqa: B027  (most graphs keep nothing that is large)
        """Drop what `evaluate` keeps for the next call, where that is large, such as a copy of the weights."""

    def gradients(
        self, feeds: Mapping[str, Tensor], loss: Callable[[list[Tensor]], Tensor], values: Sequence[Value]
    ) -> list[Tensor]:
        """d loss(outputs) / d values, on named inputs. Raises GraphError where the dialect cannot train."""
        raise GraphError(f"the {self.dialect} dialect has no gradients: use a target whose dialect is fx")

    def flow(self, batches: Iterable[Mapping[str, Tensor]]) -> Flow:
        """Evaluate values over batches in parts, for values or graphs that do not fit in memory."""
        return Flow(self, batches)

    @abstractmethod
    def clone(self) -> Self:
        """An independent graph that shares the tensors."""

    def extract(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Graph:
        """The part of the graph between some values, under the same names; it shares the weights."""
        raise GraphError(f"the {self.dialect} dialect cannot cut a part out of a graph")

    def module(
        self,
        rebuild: Callable[[list[Any]], Any] | None = None,
        *,
        also: Sequence[Value] = (),
        learn_scales: bool = False,
    ) -> nn.Module:
        """A module that computes the graph, on copies of its tensors, to train and to trace.

        rebuild: makes what the module returns of the outputs in order. also: any values of this graph; the module then
        returns (what it returned before, the list of them). learn_scales: the scales of quantize and dequantize are
        parameters too, where nothing else reads them. A constant is one parameter, whoever reads it. Raises GraphError
        where the dialect has no modules.
        """
        raise GraphError(f"a graph of the {self.dialect} dialect is no module: use a target of PyTorch, such as fbgemm")

    def absorb(self, module: nn.Module) -> None:
        """Take over what a module of this graph, or of a clone, has learned: parameters, statistics of batch norms and
        learned scales become constants; a parameter that stands for integers is rounded as the module rounds it. Then
        `evaluate` computes what the module computes in eval mode. [changes]

        Raises GraphError, and changes nothing, where the module is of another graph, its parameters are not finite, or
        the dialect has no modules.
        """
        raise GraphError(f"a graph of the {self.dialect} dialect is no module: use a target of PyTorch, such as fbgemm")

    def parameter(self, module: nn.Module, value: Value) -> str | None:
        """The name of the parameter of a module of this graph that stands for a value; None where there is none.

        value: a constant (a permuted one, stored integers and learned scales too), or a dequantize of stored integers.
        """
        raise GraphError(f"a graph of the {self.dialect} dialect is no module: use a target of PyTorch, such as fbgemm")

    def unpacked(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """The tensors of the program that capture packed into one constant, by the names that they had: parts of it.

        module: one made of this graph, whose parameters are taken apart in place of the constants; without those that
        are stored in integers.
        """
        return {}

    def package(self, path: Path, feeds: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
        """Compile the graph to a file that its framework runs without graphopt; returns the number of kernels by name.

        feeds: an example, for the compiler. Raises GraphError where the dialect has no such compiler.
        """
        raise GraphError(f"aot=True compiles for PyTorch, and a graph of the {self.dialect} dialect is not compiled")

    @abstractmethod
    def verify(self) -> None:
        """Raise GraphError, naming the node, where the graph breaks a rule of its dialect. Reads no weights."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the graph as it is, canonical ops included, for `load` to read."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""

    def text(self) -> str:
        """The listing that `diff` compares: one line per node with shapes, attributes and path; values are numbered."""
        numbers: dict[Value, str] = {value: value.name for value in self.inputs}
        lines = []
        for node in self.nodes:
            for result in node.results:
                numbers[result] = f"%{len(numbers) - len(self.inputs)}"
            operands = [_operand_text(value, numbers) for value in _given(node.operands)]
            op = node.op
            attributes = [
                f"{key}={_attribute_text(value)}"
                for key, value in node.attributes.items()
                if op is None or value != op.attributes.get(key)
            ]
            results = ", ".join(numbers[result] for result in node.results)
            path = f"  # {node.path}" if node.path else ""
            lines.append(f"{results} = {node.kind}({', '.join(operands + attributes)}){path}")
        lines.append(f"return {', '.join(_operand_text(value, numbers) for value in self.outputs)}")
        return "\n".join(lines)

    def sites(self, *ops: str) -> list[Node]:
        """The nodes of these ops."""
        return [node for node in self.nodes if node.kind in ops]


class Flow:
    """An evaluation of values over batches in parts; the graph must not change meanwhile."""

    memory = 2**30
    """Bytes of statistics that a caller may hold at once."""

    def __init__(self, graph: Graph, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.graph, self.batches = graph, batches

    def through(self, fetch: Sequence[Value]) -> Iterator[Seen]:
        """Each value of `fetch` on each batch, once; those of one value come in the order of the batches.

        The dialect decides how many values it yields together. Where calls ask for values in the order of the graph,
        the dialect need not start again from the inputs.
        """
        for number, feeds in enumerate(self.batches):
            yield number, feeds, dict(zip(fetch, self.graph.evaluate(feeds, fetch), strict=True))


def shapes_text(feeds: Feeds) -> str:
    """The names and shapes of feeds: x [1, 16], mask [1, 16]."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feeds.items())


def digest(graph: Graph) -> str:
    """SHA-256 over what decides a graph's results: its listing, its weights, and which node reads which weight."""
    whole = hashlib.sha256(graph.text().encode())
    for node in graph.nodes:
        read = [value.name for value in node.operands if value is not None and value.is_constant]
        whole.update("\0".join([node.name, *read, ""]).encode())
    # One tensor at a time: together they may not fit memory.
    for name, content in sorted((name, hashlib.sha256(raw_bytes(tensor))) for name, tensor in graph.constants()):
        whole.update(name.encode())
        whole.update(content.digest())
    return whole.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text, and the names, dtypes, shapes and contents of tensors, in the order of their names."""
    found = hashlib.sha256(text.encode())
    update_digest(found, tensors)
    return found.hexdigest()


def update_digest(found: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Take the names, dtypes, shapes and contents of tensors into a hash, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(repr(tensor.held).encode() if isinstance(tensor, Untouched) else raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    flat = flat.as_strided((flat.numel(),), (1,))  # one element may carry any stride
    return flat.view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype as texts for people name it, such as float32."""
    return "of unknown dtype" if dtype is None else str(dtype).removeprefix("torch.")


def _given(operands: Sequence[Value | None]) -> list[Value | None]:
    """Operands without the optional ones left out at the end."""
    given = list(operands)
    while given and given[-1] is None:
        given.pop()
    return given


def _operand_text(value: Value | None, numbers: Mapping[Value, str]) -> str:
    if value is None:
        return "-"
    name = "" if value.is_constant else numbers.get(value, value.name)
    shape = "[?]" if value.shape is None else "[" + ",".join(str(size) for size in value.shape) + "]"
    dtype = "" if value.dtype in (torch.float32, None) else f":{dtype_name(value.dtype)}"
    return name + shape + dtype


def _attribute_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(_attribute_text(item) for item in value) + "]"
    return str(value).removeprefix("torch.")
