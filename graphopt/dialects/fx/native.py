"""The native side of an FxGraph: a torch.fx.Graph, the tensors that it names, and what its nodes are.

Three kinds of native nodes are no operations: get_attr, a permute of one (both are constants), and getitem, which is
one result of an operation with several.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import GraphError, first_line

ORIGIN = ("nn_module_stack", "stack_trace")
"""The keys of a node's meta that say where it came from; the nodes that replace it inherit them."""


def meta(node: fx.Node) -> Any:
    """What the node computes: a fake tensor, a SymInt, or a tuple of them; None where it is unknown."""
    return node.meta.get("val")


def source(node: fx.Node) -> fx.Node:
    """The first thing that a node reads."""
    return cast(fx.Node, node.args[0])


def with_nodes(arguments: Any, change: Callable[[fx.Node], Any]) -> Any:
    """Arguments, nested ones too, with something else in place of the nodes."""
    return fx.node.map_aggregate(arguments, lambda item: change(item) if isinstance(item, fx.Node) else item)


def is_constant(node: fx.Node) -> bool:
    """Whether a node is a stored tensor, or a permute of one, that no run writes to."""
    if node.op == "get_attr":
        return isinstance(meta(node), Tensor) and not is_state(node)
    return node.target is torch.ops.aten.permute.default and is_constant(source(node))


def is_state(node: fx.Node) -> bool:
    """Whether a node is a stored tensor that each run of the module writes to."""
    return node.op == "get_attr" and "state" in node.meta


def identifier(name: str) -> str:
    """A Python identifier that looks like the name."""
    text = re.sub(r"\W", "_", name)
    return text if text[:1].isalpha() else f"v_{text}"


def name_inputs(graph: fx.Graph) -> None:
    """Call the arguments of a module like the inputs, with an underscore for each character that Python refuses, and
    behind what is taken: torch.fx would call an `input` input_1, and an `inputImage` input_image."""
    taken = {"self"}
    for node in graph.find_nodes(op="placeholder"):
        name = identifier(str(node.meta["input_name"]))
        while name in taken or keyword.iskeyword(name):
            name += "_"
        node.target = name
        taken.add(name)


def is_result(node: fx.Node) -> bool:
    """Whether a node is one of the results of another."""
    return node.target is operator.getitem and isinstance(meta(source(node)), tuple | list)


def results(node: fx.Node) -> list[fx.Node]:
    """The nodes of an operation's results: itself, or its getitems in order."""
    if not isinstance(meta(node), tuple | list):
        return [node]
    return sorted(node.users, key=lambda user: cast(int, user.args[1]))


def computes(node: fx.Node) -> bool:
    """Whether a native node is an operation, and so a node of the `FxGraph`."""
    return node.op not in ("placeholder", "get_attr", "output") and not is_result(node) and not is_constant(node)


def has_effect(node: fx.Node) -> bool:
    """Whether a node does something beside computing its value."""
    mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutates or (computes(node) and "val" not in node.meta)


def is_value(node: fx.Node) -> bool:
    """Whether a native node carries a value, and not the graph of a branch or a loop's body."""
    return node.op != "get_attr" or isinstance(meta(node), Tensor)


def tensors_read(node: fx.Node) -> list[fx.Node]:
    """The values in a node's arguments, in order, repeated ones too."""
    return [found for found in _nodes_in((node.args, node.kwargs)) if is_value(found)]


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    with_nodes(arguments, found.append)
    return found


def plain_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an opaque operation that hold no values, by name."""
    if isinstance(node.target, torch._ops.OpOverload):
        names = [parameter.name for parameter in node.target._schema.arguments]
    else:
        names = [f"arg{index}" for index in range(len(node.args))]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {name: argument for name, argument in given.items() if not _nodes_in(argument)}


def target_name(node: fx.Node) -> str:
    """The name of what an operation calls: aten.topk.default, operator.mul, cond."""
    if isinstance(node.target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(node.target)
    return f"{getattr(node.target, '__module__', '?').strip('_')}.{getattr(node.target, '__name__', node.target)}"


def frozen(argument: Any) -> Hashable:
    """Arguments as a hashable value in which 1, 1.0, True and -0.0 differ. All stored tensors are equal in it, for who
    compares signatures compares the operands too."""
    if isinstance(argument, fx.Node) and is_constant(argument):
        return "stored"
    if isinstance(argument, list | tuple):
        return tuple(map(frozen, argument))
    if isinstance(argument, dict):
        return tuple((key, frozen(argument[key])) for key in sorted(argument))
    if isinstance(argument, bool | int | float):
        return type(argument), repr(argument)
    return cast(Hashable, argument)


def needed(fetch: Sequence[fx.Node], given: Collection[fx.Node] = ()) -> list[fx.Node]:
    """The nodes that these values are computed from, themselves included, in topological order.

    given: values that are known, so that nothing before them is needed.
    """
    found, waiting = set(fetch), [node for node in fetch if node not in given]
    while waiting:
        fresh = [read for read in waiting.pop().all_input_nodes if read not in found and read not in given]
        found.update(fresh)
        waiting.extend(fresh)
    return [node for node in fetch[0].graph.nodes if node in found] if fetch else []


def copied(graph: fx.Graph) -> fx.Graph:
    """The same nodes in another graph, outputs included."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def keep_dropout(old: fx.Node, new: fx.Node) -> None:
    """Let the node that replaces a value keep the dropout mark of it (rate, module path), for a module that trains.

    The mark is lost where other nodes read the new value too.
    """
    mark = old.meta.get("dropout")
    if mark is not None and new.op == "call_function" and all(user is old for user in new.users):
        new.meta.setdefault("dropout", mark)


def module_path(node: fx.Node) -> str:
    """The module path that a node came from; "" where it is unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = next(reversed(stack.values()))
    if path.startswith("_empty_nn_module_stack"):  # torch's mark of nodes that belong to no module
        return ""
    return re.sub(r"@\d+", "", re.sub(r"^L\['self'\]\.?", "", path))


@dataclass(frozen=True)
class Packed:
    """What a constant was packed from: along its first axis, and there along the second, by names in the program."""

    names: tuple[tuple[str, ...], ...]

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of the constant, by name."""
        return {
            name: part
            for one, names in zip(tensor, self.names, strict=True)
            for name, part in zip(names, one.chunk(len(names)), strict=True)
        }


class Native:
    """A torch.fx.Graph that ends in its output node, what its get_attr nodes name, and the mode of its fake tensors."""

    def __init__(self, graph: fx.Graph, stored: dict[str, Any], fake: FakeTensorMode) -> None:
        self.graph, self.stored, self.fake = graph, stored, fake
        self.packed: dict[str, Packed] = {}
        """By name, stored tensors that were packed from several of the program."""
        self.output: fx.Node = next(iter(reversed(graph.nodes)))
        for node in graph.nodes:
            self._complete(node)

    def tensor(self, node: fx.Node) -> Tensor | None:
        """The tensor that a constant node stands for, never a copy; None for other nodes."""
        if not is_constant(node):
            return None
        if node.op == "get_attr":
            return cast(Tensor, self.stored[str(node.target)]).detach()
        inner = self.tensor(source(node))
        return None if inner is None else inner.permute(cast(list[int], node.args[1]))

    def add_constant(self, tensor: Tensor, name: str = "") -> fx.Node:
        """A get_attr node for a tensor, first in the graph, so that any node may read it."""
        with self.graph.inserting_before(None):
            node = self.graph.create_node("get_attr", identifier(name or "constant"))
        target = node.name
        while target in self.stored:
            target += "_"
        node.target, self.stored[target] = target, tensor
        node.meta["val"] = self.fake.from_tensor(tensor.detach(), static_shapes=True)
        return node

    def call(
        self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], before: fx.Node
    ) -> fx.Node:
        """A node that calls `target` just before another (a permute of a constant stands beside the constant).

        Its meta["val"] is what the call makes of fake tensors; GraphError where it refuses them.
        """
        value = self._infer(target, args, kwargs)
        beside = args[0] if target is torch.ops.aten.permute.default and is_constant(args[0]) else None
        with self.graph.inserting_before(before) if beside is None else self.graph.inserting_after(beside):
            node = self.graph.call_function(target, tuple(args), dict(kwargs))
        node.meta = {key: before.meta[key] for key in ORIGIN if key in before.meta} | {"val": value}
        self._complete(node)
        return node

    def remove(self, node: fx.Node) -> None:
        """Erase a node that nobody uses, with its results."""
        for result in list(node.users):
            self.graph.erase_node(result)
        self.graph.erase_node(node)
        if node.op == "get_attr":
            del self.stored[str(node.target)]

    def _infer(self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        fake_args, fake_kwargs = with_nodes((tuple(args), dict(kwargs)), meta)
        try:
            with enable_python_dispatcher(), self.fake, torch.no_grad():  # C++ kernels would specialize symbolic sizes
                return target(*fake_args, **fake_kwargs)
        except Exception as error:
            raise GraphError(f"{target} does not take these operands: {first_line(error)}") from error

    def _complete(self, node: fx.Node) -> None:
        """Give each result of an operation with several results exactly one getitem."""
        values = meta(node)
        if node.op != "call_function" or not isinstance(values, tuple | list):
            return
        known: dict[Any, fx.Node] = {}
        for user in list(node.users):
            first = known.setdefault(user.args[1], user)
            if first is not user:
                user.replace_all_uses_with(first)
                self.graph.erase_node(user)
        for index in reversed(range(len(values))):
            if index not in known and values[index] is not None:
                with self.graph.inserting_after(node):
                    known[index] = self.graph.call_function(operator.getitem, (node, index))
                known[index].meta = node.meta | {"val": values[index]}
