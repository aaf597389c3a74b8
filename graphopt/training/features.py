"""Which values inside a student are compared with which inside its teacher: by module path.

A student that is a rewrite of its teacher has the same module paths, so its blocks are found without being named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from graphopt.errors import UsageError, nearest
from graphopt.ir.graph import Graph, Node, Value
from graphopt.training import streams


@dataclass(frozen=True)
class Pair:
    """A value of the student, and what it is compared with in the teacher."""

    name: str
    """The module path of the student's."""
    student: Value
    teacher: Value


def hidden_states(student: Graph, teacher: Graph, match: Mapping[str, str]) -> list[Pair]:
    """The results of modules in both graphs: those that `match` maps (student path -> teacher path), else all blocks.

    A block is the outermost module whose name is a number (encoder.layer.0, layer1.2, blocks.3).
    Raises UsageError where a path of `match` is no module with one result, and where no block is in both.
    """
    if match:
        return [
            Pair(ours, _result_of(student, ours, "student"), _result_of(teacher, theirs, "teacher"))
            for ours, theirs in match.items()
        ]
    ours, theirs = _blocks(student), _blocks(teacher)
    found = [Pair(path, ours[path], theirs[path]) for path in ours if path in theirs]
    if not found:
        raise UsageError(
            "hidden states are matched by module path, and student and teacher have no block with one path "
            f"(student: {_some(ours)}; teacher: {_some(theirs)}): give match={{student path: teacher path}}, or "
            "hidden=0"
        )
    return found


def relations(student: Graph, teacher: Graph, match: Mapping[str, str]) -> list[Pair]:
    """Queries, keys and values of the last attention that both have, or of the last in each where paths differ.

    Raises UsageError where one of them has no attention.
    """
    ours, theirs = (graph.sites("attention") for graph in (student, teacher))
    for graph, sites in (("student", ours), ("teacher", theirs)):
        if not sites:
            raise UsageError(f"relations compare attention, and the {graph} has none: give relations=0")
    paths = {node.path: node for node in theirs}
    both = [(node, paths[mapped]) for node in ours if (mapped := match.get(node.path, node.path)) in paths and mapped]
    ours_last, theirs_last = both[-1] if both else (ours[-1], theirs[-1])
    return [
        Pair(f"{ours_last.label}.{name}", ours_last.required(name), theirs_last.required(name))
        for name in ("query", "key", "value")
    ]


def tokens_by_width(x: Tensor, rank: int) -> Tensor:
    """Queries, keys or values as (batch, length, width): heads of a 4-D tensor (batch, heads, length, size) joined."""
    return x.transpose(1, 2).flatten(2) if rank == 4 else x


class Projection(nn.Module):
    """A linear map of the student's features to the teacher's width, trained along and dropped at the end.

    Features are along the last axis of (..., width), and along axis 1 of images (batch, channels, height, width).
    """

    def __init__(self, ours: int, theirs: int) -> None:
        super().__init__()
        self.map = nn.Linear(ours, theirs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            projected: Tensor = self.map(x.movedim(1, -1)).movedim(-1, 1)
            return projected
        mapped: Tensor = self.map(x)
        return mapped


def projections(pairs: Sequence[Pair], seed: int = 0) -> nn.ModuleDict:
    """A `Projection` for each pair of different widths, by its place, in the dtype of the student's value; seed: of
    their first weights.

    Raises UsageError where ranks differ.
    """
    found = nn.ModuleDict()
    for place, pair in enumerate(pairs):
        shapes = ours, theirs = pair.student.shape or (), pair.teacher.shape or ()
        if len(ours) != len(theirs):
            raise UsageError(
                f"the student's {pair.name} is {list(ours)}, and the teacher's is {list(theirs)}: match modules whose "
                "results have as many axes"
            )
        axis = 1 if len(ours) == 4 else -1
        widths = [shape[axis] for shape in shapes]
        if widths[0] != widths[1]:
            if not all(isinstance(width, int) for width in widths):
                raise UsageError(f"the width of {pair.name} is dynamic, so that it cannot be projected")
            with streams.Stream(seed + place).active():
                found[str(place)] = Projection(int(widths[0]), int(widths[1])).to(dtype=pair.student.dtype)
    return found


def _blocks(graph: Graph) -> dict[str, Value]:
    """The result of each outermost module whose name is a number, where it has exactly one; in the order of the
    graph."""
    inside: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if (path := block_of(node.path)) is not None:
            inside.setdefault(path, []).append(node)
    found = {path: list(_results(nodes)) for path, nodes in inside.items()}
    return {path: values[0] for path, values in found.items() if len(values) == 1}


def block_of(path: str) -> str | None:
    """The outermost module with a number for a name that a module path lies in; None where there is none."""
    parts = path.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None or (place == 0 and len(parts) == 1) else ".".join(parts[: place + 1])


def _results(nodes: Sequence[Node]) -> Iterator[Value]:
    """The float values that nodes compute and others read, or the graph returns."""
    members = set(nodes)
    for node in nodes:
        for value in node.results:
            read = value.is_output or any(user not in members for user in value.users)
            if read and value.dtype is not None and value.dtype.is_floating_point:
                yield value


def _result_of(graph: Graph, path: str, which: str) -> Value:
    nodes = [node for node in graph.nodes if node.path == path or node.path.startswith(f"{path}.")]
    if not nodes:
        known = sorted({node.path for node in graph.nodes if node.path})
        raise UsageError(f"match: the {which} has no module {path!r}{nearest(path, known)}")
    values = list(_results(nodes))
    if len(values) != 1:
        raise UsageError(
            f"match: module {path!r} of the {which} has {len(values)} results that are read outside of it; name a "
            "module with one"
        )
    return values[0]


def _some(paths: Mapping[str, Value]) -> str:
    return ", ".join(list(paths)[:3]) or "none"
