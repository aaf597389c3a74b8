"""Graph over onnx-ir. Weights stay where they are: external data is memory-mapped."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt import writing
from graphopt.dialects.onnx import files as onnx_files
from graphopt.dialects.onnx import functions as onnx_functions
from graphopt.dialects.onnx import reading as onnx_reading
from graphopt.dialects.onnx import shapes as onnx_shapes
from graphopt.dialects.onnx import spellings as onnx_spellings
from graphopt.dialects.onnx.inference import Inference, error_at
from graphopt.dialects.onnx.spellings import DOMAIN
from graphopt.dialects.onnx.tensors import NARROW, READABLE, onnx_dtype, packed, to_numpy, to_torch, transposed
from graphopt.dialects.onnx.views import PATH, OnnxNode, OnnxValue, holds_graph
from graphopt.dialects.raising import run_stages
from graphopt.errors import GraphError, SpellingError
from graphopt.ir.graph import Flow, Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.scaled import Place, Scaled, dumps, loads

__all__ = ["OPSET", "PATH", "OnnxGraph", "OnnxNode", "OnnxValue"]

OPSET = 23
"""The opset that modules are captured at and files are lifted to: the first with an Attention operator."""

_LARGE = 2**28
"""Bytes of weights from which on a session, which holds a copy of them, is not kept longer than it is needed."""

STORED_IN_16_BITS = "graphopt.stored_in_16_bits"
"""The metadata key of the type of 16 bits that the model holds weights in and casts to float32, by its name in ONNX."""
SCALED = "graphopt.scaled"
"""The metadata key of what passes have divided (`Graph.scaled`)."""


class OnnxGraph(Graph):
    """An ONNX model as a graph of ops. Make one with `from_model`, `from_file` or `empty`."""

    dialect = "onnx"

    def __init__(self, model: ir.Model, scratch: onnx_files.Scratch | None = None) -> None:
        """scratch: the file for weights that are added to a model too large for memory."""
        self.model = model
        self.scratch = scratch
        self.version = 0
        self.functions = model.functions
        self.opsets = model.graph.opset_imports
        self._numbers = itertools.count()
        self._fresh: dict[ir.Node, None] = {}
        self._session: tuple[Hashable, Any] | None = None
        names = {value.name for node in model.graph.all_nodes() for value in node.outputs}
        graphs = [model.graph, *model.graph.subgraphs()]
        given = {value.name for one in graphs for value in (*one.inputs, *one.initializers.values())}
        self._names: set[str | None] = names | given
        self._node_names: set[str | None] = {node.name for node in model.graph.all_nodes()}
        self.inference = Inference(model)
        self._holders: dict[ir.Graph | ir.Function | None, ir.Node] = {}
        self._holds_graphs = len(graphs) > 1
        self._digests: WeakKeyDictionary[ir.Value, bytes] = WeakKeyDictionary()

    # --- making one

    @classmethod
    def from_model(cls, model: ir.Model | onnx.ModelProto) -> OnnxGraph:
        """A graph of a model, put in order (see `reading.in_order`), its operators read as ops.

        The model handed in is not changed. Raises GraphError for what is no valid model.
        """
        from graphopt.dialects.onnx.raising import OPERATORS, WITHIN  # whose stages work on this class

        ordered = onnx_reading.in_order(model)
        if (stored := onnx_reading.stored_in_16_bits(ordered)) is not None:
            ordered.metadata_props[STORED_IN_16_BITS] = stored
        graph = cls(ordered, onnx_files.scratch_for(ordered))
        run_stages(OPERATORS, graph)
        for body in graph.bodies:
            run_stages(WITHIN, body)
        graph.sweep()
        graph.version = 0
        return graph

    @classmethod
    def from_file(cls, path: str | Path) -> OnnxGraph:
        """Read a file; external data stays there, and what is added to a large one goes to a temporary file.

        Raises GraphError for what is not a readable ONNX model.
        """
        return cls.from_model(onnx_reading.read_model(path))

    @classmethod
    def empty(cls, inputs: Mapping[str, tuple[Sequence[int | str], torch.dtype]]) -> OnnxGraph:
        """A graph of inputs only, by name with shape and dtype; `set_outputs` completes it."""
        values = [
            ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(onnx_dtype(dtype)))
            for name, (shape, dtype) in inputs.items()
        ]
        native = ir.Graph(values, [], nodes=[], opset_imports={"": OPSET}, name="graph")
        return cls(ir.Model(native, ir_version=10))

    def set_outputs(self, outputs: Mapping[str, Value]) -> None:
        """Set what the graph returns, by name; a constant or an inner value of such a name gets another."""
        self.model.graph.outputs.clear()
        inner = [*self.model.graph.initializers.values(), *(one for node in self.model.graph for one in node.outputs)]
        for native in inner:
            if native.name is not None and native.name in outputs:
                native.name = self._unique(native.name)
        for name, value in outputs.items():
            native = self.native(value)
            if native.is_graph_output() or native.producer() is None:
                native = self.native(self.emit("identity", value))
            self._rename(native, name)
            self.model.graph.outputs.append(native)

    # --- reading

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return self.inference.opset

    @property
    def nodes(self) -> Sequence[Node]:
        return [OnnxNode(self, node) for node in self.model.graph]

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Those without a default; an input that has one may be given to `evaluate` too."""
        return tuple(OnnxValue(self, value) for value in self.model.graph.inputs if value.const_value is None)

    @property
    def defaults(self) -> Mapping[str, Tensor]:
        """By name, the tensors of inputs that need not be given."""
        stored = {value.name or "": to_torch(value.const_value) for value in self.model.graph.inputs}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(OnnxValue(self, value) for value in self.model.graph.outputs)

    @property
    def scaled(self) -> Mapping[Place, Scaled]:
        """In the metadata of the model, which an exported file keeps."""
        return loads(self.model.metadata_props.get(SCALED, ""))

    @scaled.setter
    def scaled(self, scaled: Mapping[Place, Scaled]) -> None:
        if scaled:
            self.model.metadata_props[SCALED] = dumps(scaled)
        else:
            self.model.metadata_props.pop(SCALED, None)

    def values(self, natives: Sequence[ir.Value | None]) -> tuple[OnnxValue | None, ...]:
        """Views of native values; None stays None."""
        return tuple(None if native is None else OnnxValue(self, native) for native in natives)

    def holder(self, native: ir.Node) -> ir.Node | None:
        """The node of this graph that a node is or is inside of; None where that was removed."""
        if native.graph is self.model.graph:
            return native
        holder = self._holders.get(native.graph)
        if holder is None or holder.graph is not self.model.graph:
            self._holders = {
                node.graph: top
                for top in self.model.graph
                for held in top.attributes.values() if holds_graph(held)
                for graph in ([held.as_graph()] if held.type is ir.AttributeType.GRAPH else held.as_graphs())
                for node in graph.all_nodes()
            }  # fmt: skip
            holder = self._holders.get(native.graph)
        return holder

    def constant(self, value: Value) -> Tensor | None:
        if not isinstance(value, OnnxValue) or not value.is_constant:
            return None
        tensor = to_torch(value.native.const_value)
        return tensor.mT if value.transposed and tensor is not None else tensor

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        for name, native in self.model.graph.initializers.items():
            if native.dtype in READABLE:
                tensor = to_torch(native.const_value)
                if tensor is not None:
                    yield name, tensor

    @property
    def bodies(self) -> tuple[Graph, ...]:
        """Of the standard operators that hold graphs; others (BeamSearch) ask for certain forms of theirs."""
        from graphopt.dialects.onnx.bodies import OnnxBody  # which derives from this class

        return tuple(OnnxBody(self, native) for native in _held(self.model.graph))

    def _is_around(self, native: ir.Value) -> bool:
        """Whether a value comes from a graph that holds this one."""
        return False

    def is_within(self, native: ir.Node) -> bool:
        """Whether a node counts as the producer of a value that is read here."""
        return True

    # --- changing

    def add_constant(self, tensor: Tensor, name: str = "") -> OnnxValue:
        dtype = onnx_dtype(tensor.dtype)
        name = self._unique(name or "constant")
        array = to_numpy(tensor)
        native = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype))
        return self._store(native, ir.Tensor(array, dtype=dtype, name=name))

    def add_transposed(self, value: OnnxValue, name: str) -> OnnxValue:
        """A constant matrix, transposed: written anew each time that it is read, and held in no memory between."""
        given = value.native.const_value
        if given is None or value.rank != 2 or given.dtype in NARROW:
            raise GraphError(f"{value.name!r} is no constant matrix that can be transposed")
        held = transposed(given, self._unique(name))
        return self._store(ir.Value(name=held.name, shape=held.shape, type=ir.TensorType(held.dtype)), held)

    def narrowed(self, value: OnnxValue, bits: int) -> OnnxValue:
        """A constant of int8 or uint8 whose integers fit `bits` (2 or 4), stored packed."""
        if value.native.dtype in NARROW and not value.transposed:
            return value
        tensor = self.constant(value)
        if tensor is None:
            raise GraphError(f"{value.name!r} is to be stored in {bits} bits, and it is no constant")
        held = packed(tensor, bits, self._unique(value.name))
        shape, dtype = ir.Shape(tensor.shape), ir.TensorType(held.dtype)
        return self._store(ir.Value(name=held.name, shape=shape, type=dtype), held)

    def _store(self, native: ir.Value, held: ir.TensorProtocol) -> OnnxValue:
        if (found := self._equal(held)) is not None:
            return OnnxValue(self, found)
        spills = self.scratch is not None and held.nbytes > onnx_files.SMALL
        native.const_value = self.scratch.store(held) if self.scratch is not None and spills else held
        self._register(native)
        return OnnxValue(self, native)

    def _register(self, native: ir.Value) -> None:
        self.model.graph.register_initializer(native)

    def _equal(self, tensor: ir.TensorProtocol) -> ir.Value | None:
        """The constant that holds the same bytes in this dtype and shape, where nodes hold graphs: these read one
        weight in several places, and each makes the same of it."""
        if not self._holds_graphs:
            return None
        alike = [
            value for value in self.model.graph.initializers.values()
            if (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
            and not (value.is_graph_input() or value.is_graph_output())
        ]  # fmt: skip
        wanted = _digest(tensor) if alike else b""
        return next((value for value in alike if self._digest_of(value) == wanted), None)

    def _digest_of(self, value: ir.Value) -> bytes | None:
        if value not in self._digests and value.const_value is not None:
            self._digests[value] = _digest(value.const_value)
        return self._digests.get(value)

    def emit(self, kind: str | Node, *operands: Value | None, at: Node | None = None, **attributes: Any) -> OnnxValue:
        path = at.path if at is not None else ""
        if isinstance(kind, OnnxNode) and kind.op is not None and kind.native.op_type not in onnx_spellings.KEPT:
            spelled = self._spell(kind.kind, operands, {**kind.attributes, **attributes})
        elif isinstance(kind, OnnxNode):
            spelled = onnx_spellings.Spelled(
                kind.native.op_type,
                _onnx_values(operands),
                {a.name: a for a in kind.native.attributes.values()} | attributes,
                kind.native.domain,
                len(kind.native.outputs),
            )
        elif isinstance(kind, str) and kind in OPS:
            spelled = self._spell(kind, operands, attributes)
        elif isinstance(kind, str) and "." in kind:
            domain, op_type = kind.rsplit(".", 1)
            outputs = attributes.pop("_outputs", 1)
            domain = "" if domain == "onnx" else domain
            spelled = onnx_spellings.Spelled(op_type, _onnx_values(operands), attributes, domain, outputs)
        else:
            raise GraphError(f"onnx cannot emit {kind!r}: it is no op, and no operation of the form domain.Op")
        is_copy = isinstance(kind, OnnxNode) and spelled.op_type == kind.native.op_type
        native = self._make(spelled, path, is_copy=is_copy)
        if isinstance(at, OnnxNode):
            at.native.prepend(native)
        else:
            self.model.graph.append(native)
        self._fresh[native] = None
        if isinstance(kind, OnnxNode) and not attributes and _has_the_shapes_of(kind, operands):
            native.outputs[0].shape = kind.native.outputs[0].shape  # a file may state more than inference finds
        return OnnxValue(self, native.outputs[0])

    def emit_if(
        self, condition: Value, then: Callable[[], Sequence[Value]], otherwise: Callable[[], Sequence[Value]], at: Node
    ) -> tuple[OnnxValue, ...]:
        """The results of one of two branches, picked at each run by a boolean scalar.

        then, otherwise: emit the nodes of a branch, and return as many results each, of the same shapes and dtypes.
        """
        assert isinstance(at, OnnxNode)
        branches = []
        for name, make in (("then_branch", then), ("else_branch", otherwise)):
            before = len(self._fresh)
            results = [self.native(value) for value in make()]
            nodes = list(self._fresh)[before:]
            for node in nodes:
                del self._fresh[node]
            self.model.graph.remove(nodes)
            label = self._unique(f"{at.name}/{name}", self._node_names)
            branches.append(ir.AttrGraph(name, ir.Graph([], results, nodes=nodes, name=label)))
        name = self._unique(f"{at.path or at.name}/If", self._node_names)
        path = {PATH: at.path} if at.path else None
        inner = branches[0].as_graph().outputs
        node = ir.Node("", "If", [self.native(condition)], branches, num_outputs=len(inner), name=name,
                       metadata_props=path)  # fmt: skip
        for output, result in zip(node.outputs, inner, strict=True):
            output.name, output.type, output.shape = self._unique(f"{name}_{result.name}"), result.type, result.shape
        at.native.prepend(node)
        self._fresh[node] = None
        return tuple(OnnxValue(self, output) for output in node.outputs)

    def emit_sized(
        self, node: Node, *operands: Value | None, sizes: Mapping[int, int], at: Node | None = None
    ) -> OnnxValue:
        *others, shape = operands
        known = node.result.shape
        if sizes:
            if shape is None or known is None:
                raise GraphError(f"{node.kind} is told no shape that is known ({node.label})")
            shape = self._with_sizes(shape, sizes, len(known), at)
        value = self.emit(node, *others, shape, at=at)
        if known is not None:
            value.native.shape = ir.Shape([sizes.get(axis, None if n == "?" else n) for axis, n in enumerate(known)])
        return value

    def _with_sizes(self, shape: Value, sizes: Mapping[int, int], rank: int, at: Node | None) -> Value:
        """A tensor of sizes with other numbers for some axes of the result, which has rank `rank`."""
        length = shape.shape[0] if shape.shape else 0
        if not isinstance(length, int):
            raise GraphError(f"'{shape.name}' holds sizes, and it is not known how many")
        tensor = self.constant(shape)
        numbers = torch.zeros(length, dtype=torch.int64) if tensor is None else tensor.clone()
        given = torch.tensor([axis + rank - length in sizes for axis in range(length)])
        for axis, size in sizes.items():
            if axis >= rank - length and numbers[axis - rank + length] != -1:
                numbers[axis - rank + length] = size
        if tensor is not None:
            return self.add_constant(numbers, shape.name)
        return self.emit("where", self.add_constant(given), self.add_constant(numbers), shape, at=at)

    def _spell(
        self, kind: str, operands: Sequence[Value | None], attributes: Mapping[str, Any]
    ) -> onnx_spellings.Spelled:
        op = OPS[kind]
        unknown = set(attributes) - set(op.attributes)
        names = op.names(len(operands))
        if unknown or len(operands) > len(names):
            raise GraphError(f"{kind} takes {op.operands} and {tuple(op.attributes)}, not {sorted(unknown)}")
        padded = (*operands, *[None] * (len(names) - len(operands)))
        for name, value in zip(names, padded, strict=True):
            if value is None and name not in op.optional:
                raise GraphError(f"{kind} needs its operand {name!r}")
        filled = dict(op.attributes) | dict(attributes)
        if kind.startswith("conv"):
            weight = padded[op.operands.index("weight")]
            rank = len(weight.shape) - 2 if weight is not None and weight.shape is not None else 2
            ones, zeros = (1,) * rank, (0,) * (2 * rank)
            filled |= {key: filled[key] or default
                       for key, default in (("stride", ones), ("dilation", ones), ("padding", zeros))}  # fmt: skip
        return onnx_spellings.write(self, kind, _onnx_values(operands), filled)

    def _make(self, spelled: onnx_spellings.Spelled, path: str, is_copy: bool) -> ir.Node:
        inputs = [None if value is None else self.native(value) for value in spelled.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        reason = None if is_copy else onnx_functions.why_not_spelled(spelled, self.opset, inputs)
        if reason is not None:
            raise SpellingError(f"{reason} ({path})" if path else reason)
        self.opsets.setdefault(spelled.domain, 1)
        if spelled.domain == DOMAIN and (DOMAIN, spelled.op_type, "") not in self.functions:
            function = onnx_functions.function(spelled.op_type, self.opset)
            self.functions[function.identifier()] = function
        name = self._unique(f"{path}/{spelled.op_type}" if path else spelled.op_type, self._node_names)
        node = ir.Node(
            spelled.domain,
            spelled.op_type,
            inputs,
            [_attribute(key, value) for key, value in spelled.attributes.items()],
            num_outputs=spelled.outputs,
            name=name,
            metadata_props={PATH: path} if path else None,
        )
        for index, output in enumerate(node.outputs):
            output.name = self._unique(f"{name}_{index}" if index else name)
        self.inference.infer(node)
        return node

    def native(self, value: Value) -> ir.Value:
        """The ir.Value of a view; a transposed view outside linear becomes a Transpose node."""
        if not isinstance(value, OnnxValue):
            raise GraphError(f"{value!r} is not a value of an ONNX graph")
        if not value.transposed:
            return value.native
        node = ir.Node("", "Transpose", [value.native], [ir.AttrInt64s("perm", [1, 0])])
        node.name = self._unique("Transpose", self._node_names)
        node.outputs[0].name = self._unique(node.name)
        self.inference.infer(node)
        producer = value.native.producer()
        if producer is not None:
            producer.append(node)
        elif len(self.model.graph):
            self.model.graph.insert_before(self.model.graph[0], node)
        else:
            self.model.graph.append(node)
        self._fresh[node] = None
        return node.outputs[0]

    def replace(self, node: Node, *values: Value) -> None:
        native = self._own(node)
        for old, value in zip(native.outputs, values, strict=False):
            new = self.native(value)
            if new.shape is None or new.dtype is None:  # of an operator that shape inference does not know
                new.shape, new.type = new.shape or old.shape, new.type or old.type
            elif old.shape is not None and len(old.shape) == len(new.shape):
                new.shape = _with_names(new.shape, old.shape)
            name, is_output = old.name, old.is_graph_output()
            if is_output and (new.producer() is None or new.is_graph_output() or self._is_around(new)):
                new = self.native(self.emit("identity", value, at=node))
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            if is_output and name is not None:
                self._rename(old, self._unique(name + "_replaced"))
                self._rename(new, name)
        self._remove(native)
        self.version += 1

    def erase(self, node: Node) -> None:
        native = self._own(node)
        if any(output.uses() or output.is_graph_output() for output in native.outputs):
            raise GraphError(f"{node.kind} cannot be erased: its result is used ({node.label})")
        self._remove(native)
        self.version += 1

    def _own(self, node: Node) -> ir.Node:
        if not isinstance(node, OnnxNode) or node.native.graph is not self.model.graph:
            raise GraphError(f"{node.label} is not (or no longer) a node of this graph")
        return node.native

    def _remove(self, native: ir.Node) -> None:
        producers = {value.producer() for value in native.inputs if value is not None}
        self.model.graph.remove(native, safe=True)
        self._fresh.pop(native, None)
        # Values that only this node read are unused now: the next sweep starts from their producers.
        self._fresh |= {p: None for p in producers if p is not None and p.graph is self.model.graph}

    def sweep(self) -> int:
        pending, removed = deque(self._fresh), 0
        while pending:
            native = pending.pop()
            if native.graph is not self.model.graph or any(o.uses() or o.is_graph_output() for o in native.outputs):
                continue
            pending.extend(p for value in native.inputs if value is not None and (p := value.producer()) is not None)
            self.model.graph.remove(native, safe=True)
            removed += 1
        self._fresh.clear()
        initializers = self.model.graph.initializers
        kept = {value for value in initializers.values() if value.is_graph_input() or value.is_graph_output()}
        for name in [n for n, v in initializers.items() if not v.uses() and v not in kept]:
            del initializers[name]
        self._sweep_functions()
        return removed

    def _sweep_functions(self) -> None:
        used = {(n.domain, n.op_type, n.overload) for n in self.model.graph.all_nodes()}
        for identifier in [i for i in self.functions if i[0] == DOMAIN and i not in used]:
            del self.functions[identifier]

    # --- running

    def evaluate(self, feeds: Mapping[str, Tensor], fetch: Sequence[Value]) -> list[Tensor]:
        """Run in ONNX Runtime without its optimizer, which may change what a graph computes.

        A large model whose weights lie in files runs in sections (`sections.Sections`). Raises GraphError naming a
        missing input.
        """
        found: dict[Value, Tensor] = {}
        given = {**self.defaults, **feeds}
        for native in self.model.graph.inputs:
            if native.name in given:
                found[OnnxValue(self, native)] = given[native.name]
        for value in fetch:
            tensor = self.constant(value)
            if tensor is not None:
                found[value] = tensor
        wanted = [value for value in dict.fromkeys(fetch) if value not in found]
        if wanted:
            found |= self._run(feeds, wanted)
        return [found[value] for value in fetch]

    def _run(self, feeds: Mapping[str, Tensor], wanted: Sequence[Value]) -> Mapping[Value, Tensor]:
        from graphopt.dialects.onnx import run as onnx_run  # which imports onnxruntime
        from graphopt.dialects.onnx import sections as onnx_sections

        key = (self.version, len(self.model.graph), tuple(value.name for value in wanted))
        if self._session is None or self._session[0] != key:
            natives = [self.native(value) for value in wanted]
            if self.scratch is not None:
                nodes = onnx_sections.needed(self.model.graph, natives)
                if not onnx_sections.fit_together(nodes):
                    seen = onnx_sections.Sections(self, [feeds], nodes).through(wanted)
                    return {value: tensor for _, _, some in seen for value, tensor in some.items()}
            self._session = None  # before the next one is made
            self._session = key, onnx_run.session(self.model, natives, level="disable")
        return dict(zip(wanted, onnx_run.run(self._session[1], feeds), strict=True))

    def release(self) -> None:
        if self._session is not None and onnx_files.size(self.model) > _LARGE:
            from graphopt.dialects.onnx import run as onnx_run  # which imports onnxruntime

            self._session = None
            onnx_run.return_memory()

    def flow(self, batches: Iterable[Mapping[str, Tensor]]) -> Flow:
        from graphopt.dialects.onnx import sections as onnx_sections

        return onnx_sections.Sections(self, batches)

    # --- whole graph

    def clone(self) -> Self:
        return type(self)(self.model.clone(), self.scratch)

    def extract(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> OnnxGraph:
        """A graph of what lies between some values, of the same names; it shares the weights."""
        between = [[self.native(value) for value in values] for values in (inputs, outputs)]
        native = ir.convenience.extract(self.model.graph, *between)
        functions = [function.clone() for function in self.functions.values()]
        return OnnxGraph(ir.Model(native, ir_version=self.model.ir_version, functions=functions))

    def verify(self) -> None:
        graph = self.model.graph
        known = {v for v in graph.inputs} | set(graph.initializers.values())
        for body in self.bodies:
            body.verify()
        names: set[str] = set()
        for node in graph:
            for value in node.inputs:
                if value is not None and value not in known and not self._is_around(value):
                    raise error_at(node, f"{node.op_type} reads {value.name!r} before anything defines it")
            for output in node.outputs:
                if output.name in names:
                    raise error_at(node, f"{node.op_type} defines {output.name!r} a second time")
                names.add(output.name or "")
                known.add(output)
            if node.domain == DOMAIN and (DOMAIN, node.op_type, "") not in self.functions:
                raise error_at(node, f"the op {node.op_type} has no function body in the model")
        for output in graph.outputs:
            if output not in known and not self._is_around(output):
                raise GraphError(f"the output {output.name!r} is not defined by the graph")

    def save(self, path: str | Path) -> None:
        with writing.together(Path(path)) as (part,):
            onnx_files.save(self.model, part, external_data=onnx_files.size(self.model) > onnx_files.INSIDE)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises GraphError where it is damaged, or has weights outside the file's folder."""
        model = onnx_reading.read_model(path)
        return cls(model, onnx_files.scratch_for(model))

    def refine_shapes(self) -> None:
        """Infer unknown shapes again: constants, and ops that were raised, tell more than the file did.

        Sizes that the graph computes from its shapes become constants where they are known as numbers. [changes]
        """
        for native, numbers in onnx_shapes.refine(self.model, self.inference.infer).items():
            value = OnnxValue(self, native.outputs[0])
            if value.shape is not None and value.dtype is not None and not value.is_output:
                sizes = torch.tensor(numbers, dtype=value.dtype).reshape([int(size) for size in value.shape])
                self.replace(OnnxNode(self, native), self.add_constant(sizes))

    def _unique(self, hint: str, taken: set[str | None] | None = None) -> str:
        taken = self._names if taken is None else taken
        name = hint
        while name in taken:
            name = f"{hint}_{next(self._numbers)}"
        taken.add(name)
        return name

    def _rename(self, native: ir.Value, name: str) -> None:
        native.name = name
        self._names.add(name)


def _held(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graphs that the standard operators of a graph hold, outer ones first."""
    for node in graph:
        for attribute in node.attributes.values() if node.domain in onnx_spellings.STANDARD else ():
            if attribute.type is ir.AttributeType.GRAPH:
                yield attribute.as_graph()
                yield from _held(attribute.as_graph())


def _digest(tensor: ir.TensorProtocol) -> bytes:
    return hashlib.sha256(tensor.tobytes()).digest()


def _with_names(shape: ir.Shape, known: ir.Shape) -> ir.Shape:
    """A shape whose axes without a name have the names that they had before."""
    return ir.Shape([
        old if not isinstance(new, int) and new.value is None and not isinstance(old, int) else new
        for new, old in zip(shape, known, strict=True)
    ])  # fmt: skip


# --- operands and attributes ---------------------------------------------------------------------------------------


def _has_the_shapes_of(node: OnnxNode, operands: Sequence[Value | None]) -> bool:
    """Whether an op with one result, computed on these operands, has a result of the shape that `node` has.

    Floats may be other values of the same shape. Integers may be sizes, and must be the same values.
    """
    if node.op is None or len(node.native.outputs) != 1 or len(operands) != len(node.operands):
        return False
    pairs = zip(operands, node.operands, strict=True)
    return all(new == old or _is_like(new, old) for new, old in pairs)


def _is_like(new: Value | None, old: Value | None) -> bool:
    if new is None or old is None or new.shape is None or new.dtype is None:
        return False
    return new.dtype.is_floating_point and new.shape == old.shape


def _onnx_values(operands: Sequence[Value | None]) -> list[OnnxValue | None]:
    for value in operands:
        if value is not None and not isinstance(value, OnnxValue):
            raise GraphError(f"{value!r} is not a value of an ONNX graph")
    return list(operands)  # type: ignore[arg-type]  # checked above


def _attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, ir.Attr):
        return value
    if isinstance(value, Tensor):
        return ir.AttrTensor(name, ir.Tensor(to_numpy(value)))
    return ir.convenience.convert_attribute(name, list(value) if isinstance(value, tuple) else value)
