"""Graph over torch.fx: aten operations without in-place writes, and weights as stored tensors.

Nodes are calls between placeholders and one flat output. Each carries a fake tensor in meta["val"], which has its shape
(with symbols for dynamic axes) and dtype. `module` makes a GraphModule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from graphopt import writing
from graphopt.dialects.fx import absorb as fx_absorb
from graphopt.dialects.fx import archive
from graphopt.dialects.fx import module as fx_module
from graphopt.dialects.fx import run as fx_run
from graphopt.dialects.fx import spellings as fx_spellings
from graphopt.dialects.fx.native import (
    Native,
    computes,
    copied,
    has_effect,
    identifier,
    is_result,
    is_state,
    keep_dropout,
    meta,
    name_inputs,
    needed,
    results,
    target_name,
    tensors_read,
)
from graphopt.dialects.fx.reading import Loader, functional
from graphopt.dialects.fx.views import FxNode, FxValue, native_node, raw_of
from graphopt.dialects.fx.writer import NodeWriter
from graphopt.errors import GraphError, first_line
from graphopt.ir.graph import Flow, Graph, Node, Seen, Value
from graphopt.ir.ops import OPS
from graphopt.ir.structure import Output

__all__ = ["FxGraph", "FxNode", "FxValue"]


class FxGraph(Graph):
    """A network as a functional aten graph; made by `from_program` or `empty`.

    native: the torch.fx side of it. output_names: the model's own names of what it returns, in order.
    """

    dialect = "fx"

    def __init__(self, native: Native, output_names: Sequence[str], axis_names: Mapping[str, str] | None = None):
        self.native, self.output_names = native, list(output_names)
        self.axis_names: dict[str, str] = dict(axis_names or {})
        """Names of dynamic axes by their symbol."""
        self.returns: Any = tuple(map(Output, range(len(self.output_names))))
        """What the model returns, as tuples, lists and dicts with an `Output` for each of `outputs`."""

    @classmethod
    def from_program(
        cls,
        program: ExportedProgram,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        axis_names: Mapping[str, Mapping[int, str]] | None = None,
    ) -> Self:
        """The graph of an exported module, whose results are a flat tuple of the tensors that it returns.

        input_names and output_names default to the program's own; axis_names gives dynamic axes of inputs their names.
        The program is made functional first; linear, conv, norms, attention and activations are not decomposed.
        Raises GraphError where the module writes to anything but its buffers and inputs, or names do not fit.
        """
        return cls._from_functional(functional(program), input_names, output_names, axis_names or {})

    @classmethod
    def _from_functional(
        cls,
        program: ExportedProgram,
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        axis_names: Mapping[str, Mapping[int, str]],
    ) -> Self:
        loaded = Loader(program, input_names)
        names = loaded.output_names if output_names is None else output_names
        if len(names) != len(loaded.output_names):
            raise GraphError(
                f"the program returns {len(loaded.output_names)} tensors, and there are {len(names)} names"
            )
        fakes = [value.fake_mode for value in map(meta, loaded.graph.nodes) if hasattr(value, "fake_mode")]
        native = Native(loaded.graph, loaded.stored, fakes[0] if fakes else FakeTensorMode())
        symbols: dict[str, str] = {}
        for node in native.graph.find_nodes(op="placeholder"):
            for axis, label in axis_names.get(node.meta["input_name"], {}).items():
                if not isinstance(meta(node).shape[axis], int):
                    symbols.setdefault(str(meta(node).shape[axis]), label)
        graph = cls(native, names, symbols)
        graph.sweep()
        return graph

    @classmethod
    def empty(cls, inputs: Mapping[str, tuple[Sequence[int | str], torch.dtype]]) -> Self:
        """A graph of inputs only, by name with shape (a str names a dynamic axis) and dtype.

        `set_outputs` completes it.
        """
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        native = fx.Graph()
        native.output(())
        shape_env = ShapeEnv()
        graph = cls(Native(native, {}, FakeTensorMode(shape_env=shape_env)), ())
        sizes: dict[int | str, Any] = {}
        for name, (shape, dtype) in inputs.items():
            for size in shape:
                if isinstance(size, str) and size not in sizes:
                    sizes[size] = _dynamic_size(shape_env, size, hint=_HINTS[len(sizes) % len(_HINTS)])
                    graph.axis_names[str(sizes[size])] = size
            with native.inserting_before(graph.native.output):
                node = native.placeholder(identifier(name))
            node.meta["input_name"] = name
            with graph.native.fake:
                node.meta["val"] = torch.empty([sizes.get(size, size) for size in shape], dtype=dtype)
        name_inputs(native)
        return graph

    def set_outputs(self, outputs: Mapping[str, Value]) -> None:
        """Set what the graph returns, by name."""
        writer = NodeWriter(self.native)
        self.native.output.args = (tuple(writer.tensor(raw_of(value)) for value in outputs.values()),)
        self.output_names = list(outputs)
        self.returns = tuple(map(Output, range(len(outputs))))

    # --- reading

    @property
    def nodes(self) -> Sequence[Node]:
        return [FxNode(self, node) for node in self.native.graph.nodes if computes(node)]

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(FxValue(self, node) for node in self.native.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(FxValue(self, node) for node in cast(tuple[fx.Node, ...], self.native.output.args[0]))

    @property
    def input_names(self) -> list[str]:
        return [value.name for value in self.inputs]

    @property
    def stateful(self) -> bool:
        return any(has_effect(node) for node in self.native.graph.nodes)

    def constant(self, value: Value) -> Tensor | None:
        return NodeWriter(self.native).constant(raw_of(value))

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, thing.detach()) for name, thing in self.native.stored.items() if isinstance(thing, Tensor))

    def axis(self, size: Any) -> int | str:
        """A size as in `Shape`: a number, or the name of a dynamic axis."""
        if isinstance(size, int):
            return size
        name = re.sub(r"[su]\d+", lambda symbol: self.axis_names.get(symbol[0], symbol[0]), str(size))
        return int(name) if name.isdigit() else name  # a symbol may stand for a number

    # --- changing

    def add_constant(self, tensor: Tensor, name: str = "") -> FxValue:
        return FxValue(self, self.native.add_constant(tensor, name))

    def emit(self, kind: str | Node, *operands: Value | None, at: Node | None = None, **attributes: Any) -> FxValue:
        """As in Graph. An operation of the dialect has its name in torch.ops, such as "aten.topk.default"; operands are
        its first arguments, attributes its keyword arguments. A transposed constant is a constant without producer."""
        raws = [None if value is None else raw_of(value) for value in operands]
        writer = NodeWriter(self.native, None if at is None else native_node(at))
        if isinstance(kind, Node):
            read = fx_spellings.read(native_node(kind), self.native.tensor)
            if read is None:
                node = writer.copy(native_node(kind), raws, attributes)
            else:
                node = writer.op(read.op, raws, read.attributes | attributes)
        elif kind in OPS:
            node = writer.op(kind, raws, attributes)
        else:
            node = writer.operator(kind, raws, attributes)
        return FxValue(self, results(node)[0])

    def emit_sized(
        self, node: Node, *operands: Value | None, sizes: Mapping[int, int], at: Node | None = None
    ) -> FxValue:
        native, (x, *_) = native_node(node), operands
        arguments = fx_spellings.arguments(native)
        name = next((name for name in ("size", "shape") if name in arguments), None)
        if x is None or name is None:
            raise GraphError(f"{node.kind} is told no shape ({node.label})")
        given = [size if size == -1 else sizes.get(axis, size) for axis, size in enumerate(arguments[name])]
        writer = NodeWriter(self.native, None if at is None else native_node(at))
        return FxValue(self, writer.copy(native, [raw_of(x), *tensors_read(native)[1:]], {name: given}))

    def replace(self, node: Node, *values: Value) -> None:
        old = results(native_node(node))
        if len(values) != len(old):
            raise GraphError(f"{node.name} has {len(old)} results, and {len(values)} values replace them")
        writer = NodeWriter(self.native)
        for result, value in zip(old, values, strict=True):
            new = cast(fx.Node, writer.tensor(raw_of(value)))
            keep_dropout(result, new)
            result.replace_all_uses_with(new)
        self.erase(node)

    def erase(self, node: Node) -> None:
        native = native_node(node)
        if any(result.users for result in results(native)):
            raise GraphError(f"{node.name} is still used")
        self.native.remove(native)
        self.version += 1

    def sweep(self) -> int:
        removed = 0
        for node in list(reversed(self.native.graph.nodes)):
            if node.op in ("placeholder", "output") or is_result(node) or has_effect(node):
                continue
            if not any(result.users for result in results(node)):
                removed += computes(node)
                self.native.remove(node)
        return removed

    # --- running

    def evaluate(self, feeds: Mapping[str, Tensor], fetch: Sequence[Value]) -> list[Tensor]:
        with torch.no_grad():
            values = self._run(feeds, fetch, None)
        return [torch.as_tensor(value) for value in values]

    def gradients(
        self, feeds: Mapping[str, Tensor], loss: Callable[[list[Tensor]], Tensor], values: Sequence[Value]
    ) -> list[Tensor]:
        """d loss(outputs) / d values on named inputs; zeros where the loss does not depend on a value.

        values: floating point, any in the graph. Raises GraphError where the loss is not one element.
        """
        wanted = {raw_of(value) for value in values}

        def mark(node: fx.Node, value: Any) -> Any:
            return value.detach().requires_grad_() if node in wanted and not value.requires_grad else value

        with torch.enable_grad():
            computed = self._run(feeds, [*self.outputs, *values], mark)
            outputs, points = computed[: len(self.outputs)], computed[len(self.outputs) :]
            total = loss(outputs)
            if total.numel() != 1:
                raise GraphError(f"the loss has shape {list(total.shape)}; it must be one element")
            if not total.requires_grad:
                return [torch.zeros_like(point) for point in points]
            return list(torch.autograd.grad(total.reshape(()), points, allow_unused=True, materialize_grads=True))

    def flow(self, batches: Iterable[Mapping[str, Tensor]]) -> Flow:
        return _Steps(self, batches)

    def require_inputs(self, feeds: Mapping[str, Tensor]) -> None:
        """Raise GraphError where a feed is no input of the graph."""
        names = self.input_names
        if unknown := [name for name in feeds if name not in names]:
            raise GraphError(f"feeds for {unknown}, which are no inputs; the graph's inputs are {names}")

    def _run(self, feeds: Mapping[str, Tensor], fetch: Sequence[Value], mark: fx_run.Mark | None) -> list[Any]:
        self.require_inputs(feeds)
        raws = [raw_of(value) for value in fetch]
        computed = fx_run.run(self.native, feeds, [raw for raw in raws if isinstance(raw, fx.Node)], mark)
        return [computed[r] if isinstance(r, fx.Node) else self.constant(v) for r, v in zip(raws, fetch, strict=True)]

    def module(
        self,
        rebuild: Callable[[list[Any]], Any] | None = None,
        *,
        also: Sequence[Value] = (),
        learn_scales: bool = False,
    ) -> fx.GraphModule:
        return fx_module.as_module(self, rebuild, also=also, learn_scales=learn_scales)

    def absorb(self, module: nn.Module) -> None:
        fx_absorb.absorb(self, module)

    def parameter(self, module: nn.Module, value: Value) -> str | None:
        return fx_absorb.parameter(module, value)

    def unpacked(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, packed in self.native.packed.items():
            tensor = self.native.stored.get(name) if module is None else fx_absorb.float_of(module, name)
            found |= {} if tensor is None else packed.parts(tensor)
        return found

    # --- the whole graph

    def clone(self) -> Self:
        native = Native(copied(self.native.graph), dict(self.native.stored), self.native.fake)
        for node in filter(is_state, native.graph.nodes):  # a tensor that runs write to is not shared
            native.stored[str(node.target)] = native.stored[str(node.target)].detach().clone()
        clone = type(self)(native, self.output_names, self.axis_names)
        clone.version, clone.returns, clone.scaled = self.version, self.returns, self.scaled
        native.packed = dict(self.native.packed)
        return clone

    def extract(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> FxGraph:
        """As in Graph. Raises GraphError where a value is a computed shape, or depends on an input left out."""
        raws = [raw_of(value) for value in (*inputs, *outputs)]
        if not all(isinstance(raw, fx.Node) for raw in raws):
            raise GraphError("a shape that is computed cannot be cut out of an fx graph")
        part, env = fx.Graph(), dict[fx.Node, fx.Node]()
        given, ends = cast(list[fx.Node], raws[: len(inputs)]), cast(list[fx.Node], raws[len(inputs) :])
        for value, raw in zip(inputs, given, strict=True):
            env[raw] = part.placeholder(identifier(value.name))
            env[raw].meta = {"val": meta(raw), "input_name": value.name}
        name_inputs(part)
        stored: dict[str, Any] = {}
        for node in needed(ends, set(given)):
            if node.op == "placeholder" and node not in env:
                raise GraphError(f"what lies between reads {node.meta['input_name']}, which is no input of the part")
            if node.op == "get_attr":
                stored[str(node.target)] = self.native.stored[str(node.target)]
            if node not in env:
                env[node] = part.node_copy(node, env.__getitem__)
        part.output(tuple(env[end] for end in ends))
        return type(self)(Native(part, stored, self.native.fake), [value.name for value in outputs], self.axis_names)

    def verify(self) -> None:
        try:
            self.native.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise GraphError(first_line(error)) from error
        for node in self.native.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in self.native.stored:
                raise GraphError(f"{node.name} names {node.target}, which is not stored")
            if node.op == "placeholder" and "input_name" not in node.meta:
                raise GraphError(f"the input {node.name} has no name")
            if computes(node) and not has_effect(node) and meta(node) is None:
                raise GraphError(f"{node.name} ({target_name(node)}) has no known shape and dtype")
        if len(self.outputs) != len(self.output_names):
            raise GraphError(f"{len(self.outputs)} outputs have {len(self.output_names)} names")

    def package(self, path: Path, feeds: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
        from graphopt.dialects.fx import package as fx_package  # which imports inductor

        return fx_package.compile_package(self, path, feeds, metadata)

    def save(self, path: str | Path) -> None:
        """Write a torch.export archive (.pt2) of the graph as it is, with its names."""
        with writing.whole(Path(path)) as part:
            archive.save(self, part)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises GraphError for any other file, and for one with pickles.

        Load only files that you trust (see `archive.read_program`).
        """
        program, names = archive.load(path)
        graph = cls._from_functional(program, names["inputs"], names["outputs"], {})
        graph.axis_names, graph.returns = names["axes"], archive.returned(program)
        return graph


class _Steps(Flow):
    """Yields values as soon as they are computed; of a batch, only the values that are still needed are in memory."""

    graph: FxGraph

    @torch.no_grad()
    def through(self, fetch: Sequence[Value]) -> Iterator[Seen]:
        raws = {raw_of(value): value for value in fetch}
        nodes = [raw for raw in raws if isinstance(raw, fx.Node)]
        others = [value for raw, value in raws.items() if not isinstance(raw, fx.Node)]
        for number, feeds in enumerate(self.batches):
            self.graph.require_inputs(feeds)
            if others:
                yield number, feeds, dict(zip(others, self.graph.evaluate(feeds, others), strict=True))
            for node, tensor in fx_run.steps(self.graph.native, feeds, nodes):
                yield number, feeds, {raws[node]: torch.as_tensor(tensor)}


_HINTS = (7, 11, 13, 17, 19, 23)
"""Example sizes of dynamic axes: all different, and none of them 1, so that no two broadcast or seem equal."""


def _dynamic_size(shape_env: Any, name: str, hint: int) -> Any:
    """A SymInt for a dynamic axis."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    origin = ConstantSource(name)
    symbol = shape_env.create_symbol(hint, source=origin, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return shape_env.create_symintnode(symbol, hint=hint, source=origin)
