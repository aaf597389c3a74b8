"""Graph over torch.fx: aten operations, functional, with the weights as stored tensors.

The native graph is a torch.fx.Graph of call_function nodes between placeholders and one flat output; what its
get_attr nodes name is in a dict beside it, and a GraphModule is made only when one is asked for. Nodes carry a fake
tensor in meta["val"], which gives shapes (dynamic ones too) and dtypes. Three kinds of native nodes are no nodes of
the waist: get_attr and a permute of one (both constants), and getitem (a result of its producer).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from graphopt.dialects import fx_words
from graphopt.dialects.fx_load import Loader, identifier, is_constant
from graphopt.dialects.fx_words import Literal, Raw, Sizes, meta
from graphopt.graph import Graph, GraphError, Node, Shape, Value
from graphopt.words import WORDS


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
            return str(self.native.meta.get("input_name", self.native.name))
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
        return FxNode(self.graph, native.args[0] if _is_result(native) else native)  # type: ignore[arg-type]

    @property
    def users(self) -> tuple[Node, ...]:
        return tuple(FxNode(self.graph, user) for user in dict.fromkeys(self._readers()))

    def _readers(self) -> Iterator[fx.Node]:
        """Native nodes that read it; of a constant, those that read a transposed view too."""
        native = self.native
        if not isinstance(native, fx.Node):
            return
        while is_constant(native) and native.op != "get_attr":
            native = native.args[0]  # type: ignore[assignment]
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
        stack = self.native.meta.get("nn_module_stack")
        if not stack:
            return ""
        path, _ = next(reversed(stack.values()))
        if path.startswith("_empty_nn_module_stack"):  # torch's mark for nodes that no module made
            return ""
        return re.sub(r"@\d+", "", re.sub(r"^L\['self'\]\.?", "", path))

    @property
    def kind(self) -> str:
        read = self._read()
        return read.word if read is not None else _target_name(self.native)

    @property
    def operands(self) -> tuple[Value | None, ...]:
        read = self._read()
        raws = read.operands if read is not None else _tensors_read(self.native)
        return tuple(None if raw is None else FxValue(self.owner, raw) for raw in raws)

    @property
    def attributes(self) -> Mapping[str, Any]:
        read = self._read()
        if read is not None:
            return MappingProxyType(dict(WORDS[read.word].attributes) | read.attributes)
        return MappingProxyType(_plain_arguments(self.native))

    @property
    def results(self) -> tuple[Value, ...]:
        if not isinstance(meta(self.native), tuple | list):
            return (FxValue(self.owner, self.native),)
        return tuple(FxValue(self.owner, user) for user in _results(self.native))

    @property
    def signature(self) -> Hashable | None:
        target = self.native.target
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
                return None
        elif self.native.op != "call_function" or getattr(target, "__module__", "") not in ("_operator", "math"):
            return None
        return target, _frozen(self.native.args), _frozen(self.native.kwargs)

    def _read(self) -> fx_words.Read | None:
        return fx_words.read(self.native, self.owner.stored_tensor)


class FxGraph(Graph):
    """A network as a functional aten graph. `input_names` and `output_names` are the model's own, in order.

    Made by `from_program` or `empty`. `version` and the rest are as in Graph.
    """

    dialect = "fx"

    def __init__(self, native: fx.Graph, stored: dict[str, Any], output_names: Sequence[str], fake: FakeTensorMode):
        self.native, self.output_names, self._stored, self._fake = native, list(output_names), stored, fake
        self._axes: dict[str, str] = {}
        self._feeds: Mapping[str, Tensor] | None = None
        self._output = next(iter(reversed(native.nodes)))
        for node in native.nodes:
            self._complete(node)

    @classmethod
    def from_program(
        cls,
        program: ExportedProgram,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        axis_names: Mapping[str, Mapping[int, str]] | None = None,
    ) -> FxGraph:
        """The graph of an exported module: inputs flat by name, results a flat tuple of the tensors it returns.

        input_names and output_names default to the program's own; axis_names gives dynamic axes of inputs their names.
        The program is made functional first (in evaluation mode; linear, norms, attention and activations stay whole).
        Raises GraphError where the module writes to its own state, or a name is missing or too many.
        """
        return cls._from_functional(program.run_decompositions({}), input_names, output_names, axis_names)

    @classmethod
    def _from_functional(
        cls,
        program: ExportedProgram,
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        axis_names: Mapping[str, Mapping[int, str]] | None = None,
    ) -> FxGraph:
        loaded = Loader(program, input_names)
        outputs = loaded.output_names
        if output_names is not None and len(output_names) != len(outputs):
            raise GraphError(f"the program returns {len(outputs)} tensors, and there are {len(output_names)} names")
        fakes = [value.fake_mode for value in map(meta, loaded.graph.nodes) if hasattr(value, "fake_mode")]
        graph = cls(loaded.graph, loaded.stored, outputs if output_names is None else output_names, fakes[0] if fakes else FakeTensorMode())
        for value in graph.inputs:
            graph._name_axes(value, (axis_names or {}).get(value.name, {}))
        graph.sweep()
        return graph

    @classmethod
    def empty(cls, inputs: Mapping[str, tuple[Sequence[int | str], torch.dtype]]) -> FxGraph:
        """A graph of inputs only, by name with shape and dtype (a str is a dynamic axis); `set_outputs` completes it."""
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        native, shape_env = fx.Graph(), ShapeEnv()
        native.output(())
        graph = cls(native, {}, (), FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=False))
        sizes: dict[str, Any] = {}
        for shape, _ in inputs.values():
            for name in shape:
                if isinstance(name, str) and name not in sizes:
                    sizes[name] = _dynamic_size(shape_env, name, hint=_HINTS[len(sizes) % len(_HINTS)])
                    graph._axes[str(sizes[name])] = name
        for name, (shape, dtype) in inputs.items():
            with native.inserting_before(graph._output):
                node = native.placeholder(identifier(name))
            node.target = node.name
            node.meta["input_name"] = name
            with graph._fake:
                node.meta["val"] = torch.empty([sizes.get(s, s) for s in shape], dtype=dtype)  # type: ignore[arg-type]
        return graph

    def set_outputs(self, outputs: Mapping[str, Value]) -> None:
        """What the graph returns, by name."""
        self._output.args = (tuple(self._tensor_node(_raw(value)) for value in outputs.values()),)
        self.output_names = list(outputs)

    # --- reading

    @property
    def nodes(self) -> Sequence[Node]:
        return [FxNode(self, node) for node in self.native.nodes if _computes(node)]

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(FxValue(self, node) for node in self.native.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(FxValue(self, node) for node in self._output.args[0])  # type: ignore[union-attr,arg-type]

    @property
    def input_names(self) -> list[str]:
        return [value.name for value in self.inputs]

    def constant(self, value: Value) -> Tensor | None:
        raw = _raw(value)
        if isinstance(raw, fx.Node):
            return self.stored_tensor(raw)
        if isinstance(raw, Literal):
            return torch.tensor(raw.number, dtype=raw.dtype)
        return torch.tensor(raw.items, dtype=torch.int64) if value.is_constant else None  # type: ignore[union-attr]

    def stored_tensor(self, node: fx.Node) -> Tensor | None:
        """The tensor that a constant node stands for: a view, never a copy."""
        if not is_constant(node):
            return None
        if node.op == "get_attr":
            return self._stored[str(node.target)].detach()  # type: ignore[no-any-return]
        inner = self.stored_tensor(node.args[0])  # type: ignore[arg-type]
        return None if inner is None else inner.permute(node.args[1])  # type: ignore[arg-type]

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, thing.detach()) for name, thing in self._stored.items() if isinstance(thing, Tensor))

    def stored(self, node: fx.Node) -> Any:
        """What a get_attr node names: a tensor, or a GraphModule of control flow."""
        return self._stored[str(node.target)]

    @property
    def output_node(self) -> fx.Node:
        return self._output

    @property
    def axis_names(self) -> dict[str, str]:
        """Names of dynamic axes by their symbol."""
        return dict(self._axes)

    def axis(self, size: Any) -> int | str:
        """A size as Shape has it: a number, or the name of a dynamic axis."""
        if isinstance(size, int):
            return size
        text = str(size)
        return self._axes.get(text) or re.sub(r"[su]\d+", lambda m: self._axes.get(m[0], m[0]), text)

    # --- changing

    def add_constant(self, tensor: Tensor, name: str = "") -> FxValue:
        with self.native.inserting_before(None):  # before everything, so that any node may read it
            node = self.native.create_node("get_attr", identifier(name or "constant"))
        node.target = self._unused_name(node.name)
        self._stored[node.target] = tensor
        with torch.no_grad():
            node.meta["val"] = self._fake.from_tensor(tensor.detach(), static_shapes=True)
        return FxValue(self, node)

    def emit(self, kind: str | Node, *operands: Value | None, at: Node | None = None, **attributes: Any) -> FxValue:
        """As in Graph. A dialect's own operation is named as torch.ops has it: "aten.topk.default"; its operands are
        the first arguments, its attributes keywords. A transposed constant is a constant: it has no producer."""
        raws = [None if value is None else _raw(value) for value in operands]
        writer = _Writer(self, at)
        if isinstance(kind, FxNode):
            read = fx_words.read(kind.native, kind.owner.stored_tensor)
            if read is not None:
                node = writer.word(read.word, raws, read.attributes | attributes)
            else:
                node = writer.copy(kind.native, raws)
        elif isinstance(kind, str) and kind in WORDS:
            node = writer.word(kind, raws, attributes)
        elif isinstance(kind, str) and kind.count(".") == 2:
            node = writer.call(_operator(kind), *map(writer.tensor, raws), **attributes)
        else:
            raise GraphError(f"fx cannot emit {kind!r}: it is no word, and no operation of the form namespace.op.overload")
        return FxValue(self, node if not isinstance(meta(node), tuple | list) else _results(node)[0])

    def replace(self, node: Node, *values: Value) -> None:
        results = node.results
        if len(values) != len(results):
            raise GraphError(f"{node.name} has {len(results)} results, and {len(values)} values replace them")
        for result, value in zip(results, values, strict=True):
            self._own(result).replace_all_uses_with(self._tensor_node(_raw(value)))
        self.erase(node)

    def erase(self, node: Node) -> None:
        for result in node.results:
            if result.users or result.is_output:
                raise GraphError(f"{node.name} is still used")
        assert isinstance(node, FxNode)
        self._remove(node.native)
        self.version += 1

    def sweep(self) -> int:
        removed = 0
        for node in list(reversed(self.native.nodes)):
            if node.op in ("placeholder", "output") or _is_result(node) or _has_effect(node):
                continue
            if all(_is_result(user) and not user.users for user in node.users):
                removed += _computes(node)
                self._remove(node)
        return removed

    def _remove(self, node: fx.Node) -> None:
        for result in list(node.users):
            self.native.erase_node(result)
        self.native.erase_node(node)
        if node.op == "get_attr":
            del self._stored[str(node.target)]

    def _own(self, value: Value) -> fx.Node:
        raw = _raw(value)
        assert isinstance(raw, fx.Node)
        return raw

    def _tensor_node(self, raw: Raw) -> fx.Node:
        """A node for an operand: numbers and shapes become constants. GraphError for a shape that is computed."""
        if isinstance(raw, fx.Node):
            return raw
        tensor = self.constant(FxValue(self, raw)) if raw is not None else None
        if tensor is None:
            raise GraphError("a shape that is computed is no tensor in fx")
        return self._own(self.add_constant(tensor))

    def _unused_name(self, name: str) -> str:
        while name in self._stored:
            name += "_"
        return name

    def _complete(self, node: fx.Node) -> None:
        """Give every result of an operation with several its getitem, once."""
        values = meta(node)
        if node.op != "call_function" or not isinstance(values, tuple | list):
            return
        known: dict[Any, fx.Node] = {}
        for user in list(node.users):
            first = known.setdefault(user.args[1], user)
            if first is not user:
                user.replace_all_uses_with(first)
                self.native.erase_node(user)
        for index in reversed(range(len(values))):
            if index not in known and values[index] is not None:
                with self.native.inserting_after(node):
                    known[index] = self.native.call_function(operator.getitem, (node, index))
                known[index].meta = node.meta | {"val": values[index]}

    def _name_axes(self, value: Value, names: Mapping[int, str]) -> None:
        for axis, size in enumerate(meta(self._own(value)).shape):
            if not isinstance(size, int) and axis in names:
                self._axes.setdefault(str(size), names[axis])

    # --- running

    def evaluate(self, feeds: Mapping[str, Tensor], fetch: Sequence[Value]) -> list[Tensor]:
        self._feeds = feeds
        with torch.no_grad():
            values = self._run(feeds, fetch)
        return [torch.as_tensor(value) for value in values]

    def gradients(self, loss: Value, values: Sequence[Value]) -> list[Tensor]:
        """d loss / d values at the feeds of the last `evaluate`; zeros where the loss does not depend on a value.

        loss: one element. values: floating point, any in the graph. Raises GraphError before the first `evaluate`.
        """
        if self._feeds is None:
            raise GraphError("gradients are taken at the feeds of the last evaluate, and there was none")
        wanted = {self._own(value) for value in values}

        def mark(node: fx.Node, value: Any) -> Any:
            if node not in wanted or value.requires_grad:
                return value
            return value.detach().requires_grad_()

        with torch.enable_grad():
            total, *points = self._run(self._feeds, [loss, *values], mark)
            if total.numel() != 1:
                raise GraphError(f"the loss has shape {list(total.shape)}; it must be one element")
            if not total.requires_grad:
                return [torch.zeros_like(point) for point in points]
            return list(torch.autograd.grad(total.reshape(()), points, allow_unused=True, materialize_grads=True))

    def _run(
        self, feeds: Mapping[str, Tensor], fetch: Sequence[Value], mark: Callable[[fx.Node, Any], Any] | None = None
    ) -> list[Any]:
        """Compute the values asked for, and only what they need; a value is let go after its last use."""
        names = self.input_names
        if missing := [name for name in names if name not in feeds]:
            raise GraphError(f"no feed for the inputs {missing}; the graph's inputs are {names}")
        if unknown := [name for name in feeds if name not in names]:
            raise GraphError(f"feeds for {unknown}, which are no inputs; the graph's inputs are {names}")
        wanted = [_raw(value) for value in fetch]
        needed = _needed([raw for raw in wanted if isinstance(raw, fx.Node)])
        last: dict[fx.Node, fx.Node] = {source: node for node in needed for source in node.all_input_nodes}
        kept = set(wanted)
        env: dict[fx.Node, Any] = {}
        for node in needed:
            env[node] = self._compute(node, env, feeds)
            if mark is not None:
                env[node] = mark(node, env[node])
            for source in node.all_input_nodes:
                if last[source] is node and source not in kept:
                    del env[source]
        return [env[raw] if isinstance(raw, fx.Node) else self.constant(v) for raw, v in zip(wanted, fetch, strict=True)]

    def _compute(self, node: fx.Node, env: Mapping[fx.Node, Any], feeds: Mapping[str, Tensor]) -> Any:
        if node.op == "placeholder":
            return feeds[node.meta["input_name"]]
        if node.op == "get_attr":
            return self._stored[str(node.target)]
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: env[a] if isinstance(a, fx.Node) else a)  # type: ignore[misc]
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise GraphError(f"{FxNode(self, node).label} ({_target_name(node)}) failed: {error}") from error

    def module(self) -> fx.GraphModule:
        """The graph as a module: inputs in order, a tuple of outputs. It shares the tensors, not the nodes."""
        native = _copied(self.native)
        stored = {str(node.target): self._stored[str(node.target)] for node in native.find_nodes(op="get_attr")}
        return fx.GraphModule(stored, native)

    # --- the whole graph

    def clone(self) -> Self:
        native = _copied(self.native)
        clone = type(self)(native, dict(self._stored), self.output_names, self._fake)
        clone._axes, clone.version = dict(self._axes), self.version
        return clone

    def verify(self) -> None:
        try:
            self.native.lint()
        except (RuntimeError, ValueError) as error:
            raise GraphError(str(error).splitlines()[0]) from error
        for node in self.native.nodes:
            if node.op == "get_attr" and str(node.target) not in self._stored:
                raise GraphError(f"{node.name} names {node.target}, which is not stored")
            if node.op == "placeholder" and "input_name" not in node.meta:
                raise GraphError(f"the input {node.name} has no name")
            if _computes(node) and "val" not in node.meta:
                raise GraphError(f"{FxNode(self, node).label} ({node.name}) has no known shape and dtype")
        if len(self.outputs) != len(self.output_names):
            raise GraphError(f"{len(self.outputs)} outputs have {len(self.output_names)} names")

    def save(self, path: str | Path) -> None:
        """Write a torch.export archive (.pt2) of the graph as it is, with its names."""
        from graphopt.dialects import fx_save

        fx_save.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises GraphError for anything else."""
        from graphopt.dialects import fx_save

        program, names = fx_save.load(path)
        graph = cls._from_functional(program, names["inputs"], names["outputs"])
        graph._axes = names["axes"]
        return graph


class _Writer:
    """Puts nodes before `at`, under its module path; see fx_words.Writer."""

    def __init__(self, graph: FxGraph, at: Node | None) -> None:
        assert at is None or isinstance(at, FxNode)
        self._graph, self._at = graph, graph._output if at is None else at.native
        self._origin = {key: self._at.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self._at.meta}

    def word(self, name: str, raws: Sequence[Raw], attributes: Mapping[str, Any]) -> fx.Node:
        word = WORDS[name]
        if len(raws) > len(word.operands):
            raise GraphError(f"{name} takes {', '.join(word.operands)}; there are {len(raws)} operands")
        if unknown := sorted(set(attributes) - set(word.attributes)):
            raise GraphError(f"{name} has no attribute {', '.join(unknown)}; it has {', '.join(word.attributes) or 'none'}")
        complete = [*raws, *[None] * (len(word.operands) - len(raws))]
        for operand, raw in zip(word.operands, complete, strict=True):
            if raw is None and operand not in word.optional:
                raise GraphError(f"{name} needs its operand {operand!r}")
        return fx_words.write(self, name, complete, dict(word.attributes) | dict(attributes))

    def copy(self, node: fx.Node, raws: Sequence[Raw]) -> fx.Node:
        """The same operation on other values, in the order in which it reads them."""
        if len(raws) != len(_tensors_read(node)):
            raise GraphError(f"{_target_name(node)} reads {len(_tensors_read(node))} values, not {len(raws)}")
        waiting = iter(raws)

        def other(argument: Any) -> Any:
            if not isinstance(argument, fx.Node) or not _is_value(argument):
                return argument
            raw = next(waiting)
            return raw.number if isinstance(raw, Literal) and not isinstance(meta(argument), Tensor) else self.tensor(raw)

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), other)  # type: ignore[misc]
        return self.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        value = self._infer(target, args, kwargs)
        native = self._graph.native
        of_constant = target is torch.ops.aten.permute.default and is_constant(args[0])
        with native.inserting_after(args[0]) if of_constant else native.inserting_before(self._at):
            node = native.call_function(target, args, kwargs)
        node.meta = self._origin | {"val": value}
        self._graph._complete(node)
        return node

    def _infer(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call computes, from the fake tensors of what it reads."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: meta(a) if isinstance(a, fx.Node) else a)  # type: ignore[misc]
        try:
            with self._graph._fake, torch.no_grad():
                return target(*args, **kwargs)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise GraphError(f"{target} does not take these operands: {reason}") from error

    def tensor(self, raw: Raw) -> fx.Node | None:
        return None if raw is None else self._graph._tensor_node(raw)

    def constant(self, raw: Raw) -> Tensor | None:
        return None if raw is None else self._graph.constant(FxValue(self._graph, raw))

    def add(self, tensor: Tensor) -> fx.Node:
        return self._graph._own(self._graph.add_constant(tensor))


_HINTS = (7, 11, 13, 17, 19, 23)
"""Sizes that stand in for dynamic axes where shapes are compared: no two alike, none that broadcasts."""


def _dynamic_size(shape_env: Any, name: str, hint: int) -> Any:
    """A SymInt for a dynamic axis."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = shape_env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return shape_env.create_symintnode(symbol, hint=hint, source=source)


def _raw(value: Value) -> fx.Node | Literal | Sizes:
    if not isinstance(value, FxValue):
        raise GraphError(f"{value!r} is no value of an fx graph")
    return value.native


def _operator(kind: str) -> Callable[..., Any]:
    """The operator that torch.ops has under a name such as aten.topk.default."""
    found: Any = torch.ops
    for part in kind.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise GraphError(f"torch.ops has no {kind}")
    return found  # type: ignore[no-any-return]


def _is_result(node: fx.Node) -> bool:
    """Whether a node is one of the results of another."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and isinstance(meta(source), tuple | list)


def _results(node: fx.Node) -> list[fx.Node]:
    return sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type,return-value]


def _computes(node: fx.Node) -> bool:
    """Whether a native node is a node of the waist."""
    return node.op not in ("placeholder", "get_attr", "output") and not _is_result(node) and not is_constant(node)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does something beside computing its value."""
    mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutates or (_computes(node) and "val" not in node.meta)


def _is_value(node: fx.Node) -> bool:
    """Whether a native node carries a value, and not the graph of a branch or a loop's body."""
    return node.op != "get_attr" or isinstance(meta(node), Tensor)


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    """The values in a node's arguments, in order, repeated ones too."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [source for source in found if _is_value(source)]


def _plain_arguments(node: fx.Node) -> dict[str, Any]:
    """What an opaque operation was given beside values, by name."""
    if isinstance(node.target, torch._ops.OpOverload):
        names = [parameter.name for parameter in node.target._schema.arguments]
    else:
        names = [f"arg{index}" for index in range(len(node.args))]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {name: argument for name, argument in given.items() if not _holds_node(argument)}


def _holds_node(argument: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return bool(found)


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(node.target)
    return f"{getattr(node.target, '__module__', '?').strip('_')}.{getattr(node.target, '__name__', node.target)}"


def _frozen(argument: Any) -> Hashable:
    """Arguments as something hashable that keeps 1, 1.0, True and -0.0 apart."""
    if isinstance(argument, list | tuple):
        return tuple(map(_frozen, argument))
    if isinstance(argument, dict):
        return tuple((key, _frozen(argument[key])) for key in sorted(argument))
    if isinstance(argument, bool | int | float):
        return type(argument), repr(argument)
    return argument  # type: ignore[no-any-return]


def _needed(fetch: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that these values are computed from, themselves included, in topological order."""
    needed, waiting = set(fetch), list(fetch)
    while waiting:
        fresh = [source for source in waiting.pop().all_input_nodes if source not in needed]
        needed.update(fresh)
        waiting.extend(fresh)
    return [node for node in fetch[0].graph.nodes if node in needed] if fetch else []


def _copied(native: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    results = copy.graph_copy(native, {})
    copy.output(results)
    return copy
