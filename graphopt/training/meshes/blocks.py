"""A GraphModule, cut into one module for each repeated block: what FSDP shards, and what a pipeline runs as stages.

A graph calls its ops, and never the forward of a submodule, so that hooks on submodules do not run. A segment of the
graph is a module of its own, with the parameters that it alone reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from graphopt.dialects.fx.module import TrainableModule
from graphopt.dialects.fx.native import module_path
from graphopt.training.features import block_of


class Segment(nn.Module):
    """A part of a graph between some of its values; it returns a tuple."""

    def __init__(self, inner: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.inputs, self.outputs = inner, tuple(inputs), tuple(outputs)

    def forward(self, *values: Any) -> Any:
        return self.inner(*values)


class Chain(nn.Module):
    """Segments in order: the whole graph again. Parameters that several segments read are its own."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.segments = nn.ModuleList(cut.segments)
        self.shared = nn.ParameterList(cut.shared.values())
        self.names, self.inputs, self.returned = list(cut.shared), cut.inputs, cut.returned

    def forward(self, *feeds: Tensor) -> Any:
        known: dict[str, Any] = dict(zip(self.inputs, feeds, strict=True))
        known |= dict(zip(self.names, self.shared, strict=True))
        for segment in self.segments:
            assert isinstance(segment, Segment)
            results = segment(*(known[name] for name in segment.inputs))
            known |= dict(zip(segment.outputs, results, strict=True))
        return returned(self.returned, known)


@dataclass(frozen=True)
class Cut:
    """A graph in segments."""

    segments: list[Segment]
    inputs: list[str]
    """The names of what the module is given, in order."""
    shared: dict[str, nn.Parameter]
    """Parameters that several segments read, by name; each is an input of these segments."""
    returned: Any
    """What the module returns, with a `Place` for each value."""


@dataclass(frozen=True)
class Place:
    """Stands for a value by its name."""

    name: str


def returned(structure: Any, known: Mapping[str, Any]) -> Any:
    """What a module returns, of values by name."""
    if isinstance(structure, Place):
        return known[structure.name]
    if isinstance(structure, tuple | list):
        return type(structure)(returned(one, known) for one in structure)
    return structure


def blocks(module: fx.GraphModule) -> list[str]:
    """The paths of the repeated blocks of a graph (encoder.layer.0, layer1.2), in the order in which they run."""
    return list(dict.fromkeys(path for node in module.graph.nodes if (path := block_of(module_path(node))) is not None))


def cut(module: fx.GraphModule, stages: int | None = None) -> Cut:
    """Cut a graph into a segment for what is before the first block, one for each block, and one for what follows.

    stages: in place of that, into as many segments with the same number of blocks each, which run in different
    processes: each is handed what the one before it returns, and the inputs of the model. What depends on no parameter
    is then computed in each segment that reads it, what later segments read goes through those between, and a parameter
    that several segments read is in each of them.
    """
    passing = stages is not None
    nodes = list(module.graph.nodes)
    of_segment = _segments(module, nodes, stages)
    last = max(of_segment.values())
    free = _free(module, nodes) if passing else set()
    readers: dict[str, set[int]] = {}
    for node in nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), set()).update(of_segment[user] for user in node.users)
    shared = {} if passing else {
        name: found for name, several in readers.items()
        if len(several) > 1 and isinstance(found := attribute(module, name), nn.Parameter)
    }  # fmt: skip
    output = nodes[-1]
    live: dict[fx.Node, int] = {}
    """The last segment that reads a value of an earlier one; the output counts as behind all."""
    for node in nodes:
        for read in node.all_input_nodes:
            if read.op not in ("placeholder", "get_attr") and read not in free:
                until = last + 1 if node is output else of_segment[node]
                live[read] = max(live.get(read, 0), until)
    segments = []
    for number in range(last + 1):
        own = [node for node in nodes if of_segment.get(node) == number and node.op not in ("placeholder", "output")]
        own = [node for node in own if node not in free and node.op != "get_attr"]
        made = {node: of_segment[node] for node in live}
        if passing:
            given = [node for node in live if made[node] < number and live[node] >= number]
            left = [node for node in live if made[node] <= number < live[node]]
        else:
            wanted = {read for node in own for read in node.all_input_nodes}
            given = [node for node in live if made[node] < number and node in wanted]
            left = [node for node in live if made[node] == number and live[node] > number]
        segments.append(_segment(module, own, given, left, free, shared, passing))
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    return Cut(segments, inputs, shared, _placed(output.args[0]))


def attribute(module: nn.Module, path: str) -> Any:
    """What a module holds at a path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _placed(structure: Any) -> Any:
    """What an output returns, in plain tuples and lists, with a `Place` for each value."""
    if isinstance(structure, fx.Node):
        return Place(structure.name)
    if isinstance(structure, tuple | list):
        placed = map(_placed, structure)
        return tuple(placed) if isinstance(structure, tuple) else list(placed)
    return structure


def _segments(module: fx.GraphModule, nodes: Sequence[fx.Node], stages: int | None) -> dict[fx.Node, int]:
    """The segment of each node: never before those of what it reads."""
    number = {path: place for place, path in enumerate(blocks(module))}
    count = len(number)
    level: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((level[read] for read in node.all_input_nodes), default=0)
        path = block_of(module_path(node))
        if path is not None:
            level[node] = max(before, number[path] + 1)
        elif count and before >= count and node.op != "output":
            level[node] = count + 1  # behind the last block
        else:
            level[node] = before
    if stages is not None:
        return {node: min(max(one - 1, 0), count - 1) * stages // count for node, one in level.items()}
    numbers = {one: place for place, one in enumerate(sorted(set(level.values())))}
    return {node: numbers[one] for node, one in level.items()}


def _free(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What depends on inputs and stored tensors that are not trained, and on no module: masks, positions, sizes."""
    bound: set[fx.Node] = set()
    for node in nodes:
        trained = node.op == "get_attr" and isinstance(attribute(module, str(node.target)), nn.Parameter)
        is_returned = any(user.op == "output" for user in node.users)
        if trained or is_returned or node.op in ("call_module", "output") or not bound.isdisjoint(node.all_input_nodes):
            bound.add(node)
    return {node for node in nodes if node not in bound and node.op != "placeholder"}


def _segment(
    module: fx.GraphModule,
    own: Sequence[fx.Node],
    given: Sequence[fx.Node],
    left: Sequence[fx.Node],
    free: Collection[fx.Node],
    shared: Mapping[str, nn.Parameter],
    passing: bool,
) -> Segment:
    """The nodes as a module of their own. given: the values that it is handed. left: those that it returns."""
    part, known = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs: list[str] = []

    def placeholder(node: fx.Node, name: str) -> None:
        known[node] = part.placeholder(node.name)
        known[node].meta = dict(node.meta)
        inputs.append(name)

    for node in given:
        placeholder(node, node.name)
    if passing:
        for node in module.graph.find_nodes(op="placeholder"):
            placeholder(node, node.name)
    wanted = _needed(own, known, free)
    for node in (node for node in wanted if node not in known):
        if node.op == "placeholder":
            placeholder(node, node.name)
        elif node.op == "get_attr" and str(node.target) in shared:
            placeholder(node, str(node.target))
    for node in wanted:
        if node not in known:
            known[node] = part.node_copy(node, known.__getitem__)
    part.output(tuple(known[node] for node in left))
    inner = TrainableModule(module, part)
    inner.train(module.training)
    return Segment(inner, inputs, [node.name for node in left])


def _needed(own: Sequence[fx.Node], known: Mapping[fx.Node, fx.Node], free: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes, and what they read that no other segment hands over: in the order of the graph."""
    found = set(own)
    waiting = list(own)
    while waiting:
        for read in waiting.pop().all_input_nodes:
            if read in known or read in found:
                continue
            if read.op in ("placeholder", "get_attr") or read in free:
                found.add(read)
                waiting.append(read)
    order = {node: place for place, node in enumerate(own[0].graph.nodes)} if own else {}
    return sorted(found, key=order.__getitem__)
