"""Runs a model that does not fit memory, section by section: all batches go through one section before the next begins.

Values that flow from one section to the next are kept, on disk where they are many. The weights of a section are mapped
only while it runs.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from graphopt.dialects.onnx import files as onnx_files
from graphopt.dialects.onnx import run as onnx_run
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Flow, Seen, Value, raw_bytes

if TYPE_CHECKING:
    from graphopt.dialects.onnx.graph import OnnxGraph


MOST = 2**28
"""Most bytes of weights, and of fetched values, in one section of a model whose weights are in files."""

STATISTICS = 2**28
"""Most bytes of statistics that are gathered in one run of a model whose weights are in files."""

_IN_MEMORY = 2**26
"""Bytes of values up to which they are kept in memory."""


class Spool:
    """Tensors by name, one batch after another: in memory, or in a nameless temporary file where they are many."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, prefix="graphopt-")  # noqa: SIM115
        self._batches: list[dict[str, tuple[torch.dtype, torch.Size]]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, tensors: Feeds) -> None:
        """Add one batch. Raises OSError, naming the folder, where the disk is full."""
        with onnx_files.no_room("what flows between the sections of a large model"):
            self._file.seek(0, 2)
            for tensor in tensors.values():
                self._file.write(raw_bytes(tensor))
            self._file.flush()
        self._batches.append({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        place = 0
        for batch in self._batches:
            tensors = {}
            for name, (dtype, shape) in batch.items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                place = self._file.seek(place) + self._file.readinto(raw_bytes(tensors[name]))
            yield tensors


class Sections(Flow):
    """A flow that stops before a node and can go on from there. The graph must not change meanwhile."""

    graph: OnnxGraph

    def __init__(self, graph: OnnxGraph, batches: Iterable[Feeds], nodes: Sequence[ir.Node] | None = None) -> None:
        """nodes: the nodes that may be run, in order; None for all of them."""
        super().__init__(graph, batches)
        self._nodes = list(graph.model.graph) if nodes is None else list(nodes)
        self._places = {node: place for place, node in enumerate(self._nodes)}
        self._sizes: Mapping[str, int] = {}
        self._at = 0
        self._feeds, self._flowing = Spool(), Spool()
        self._most = Flow.memory if graph.scratch is None else MOST
        if graph.scratch is not None:
            self.memory = STATISTICS

    def through(self, fetch: Sequence[Value]) -> Iterator[Seen]:
        """Run one section after the other, each on all batches, up to the last value that is fetched."""
        views = {self.graph.native(value): value for value in dict.fromkeys(fetch)}
        wanted = {native: view for native, view in views.items() if native.producer() is not None}
        known = [view for native, view in views.items() if native not in wanted]
        places = [self._places[producer] for native in wanted if (producer := native.producer()) is not None]
        stop = max(places, default=-1) + 1
        if not len(self._feeds) or min(places, default=0) < self._at:
            batches = iter(self.batches)
            first = next(batches)
            batches, self._sizes = itertools.chain([first], batches), cost.sizes(self.graph, first)
            if self.graph.scratch is None and self._end(0, stop, wanted) == stop:
                yield from Flow(self.graph, batches).through(fetch)
                return
            self._begin(batches)
        for number, feeds in enumerate(self._feeds if known else ()):
            yield number, feeds, dict(zip(known, self.graph.evaluate(feeds, known), strict=True))
        while self._at < stop:
            yield from self._section(self._end(self._at, stop, wanted), wanted)

    def _begin(self, batches: Iterable[Feeds]) -> None:
        self._at, self._feeds, self._flowing = 0, Spool(), Spool()
        for feeds in batches:
            self._feeds.append(feeds)
            self._flowing.append({})

    def _section(self, end: int, wanted: Mapping[ir.Value, Value]) -> Iterator[Seen]:
        """Run the nodes up to `end` on all batches, and stop there."""
        read = {value for node in self._nodes[self._at : end] for value in reads(node)}
        given = [value for value in (*self.graph.model.graph.inputs, *self._live(self._at)) if value in read]
        kept, flowing = self._live(end), Spool()
        made = [output for node in self._nodes[self._at : end] for output in node.outputs]
        asked = [value for value in made if value in wanted or value in kept]
        session = self._session(given, asked) if asked else None
        for number, (feeds, values) in enumerate(zip(self._feeds, self._flowing, strict=True)):
            results = onnx_run.run(session, {**feeds, **values}) if session is not None else []
            values |= {_name(value): result for value, result in zip(asked, results, strict=True)}
            flowing.append({_name(value): values[_name(value)] for value in kept})
            if seen := {wanted[value]: values[_name(value)] for value in asked if value in wanted}:
                yield number, feeds, seen
        self._at, self._flowing = end, flowing
        del session
        onnx_files.return_freed_memory()

    def _session(self, given: Sequence[ir.Value], asked: Sequence[ir.Value]) -> ort.InferenceSession:
        """A session of the nodes between some values. It runs only a few times, so no weight is repacked or copied."""
        model = self.graph.model
        functions = [function.clone() for function in model.functions.values()]
        part = ir.convenience.extract(model.graph, given, asked)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        return onnx_run.session(ir.Model(part, ir_version=model.ir_version, functions=functions), options=options)

    def _live(self, place: int) -> list[ir.Value]:
        """The values that are computed before a place and read from there on."""
        later = dict.fromkeys(value for node in self._nodes[place:] for value in reads(node))
        made = {value: self._places.get(producer) for value in later if (producer := value.producer()) is not None}
        return [value for value, at in made.items() if at is not None and at < place]

    def _end(self, start: int, stop: int, wanted: Mapping[ir.Value, Value]) -> int:
        """Where the section that begins at `start` ends: where it is full, at a place whose values can be kept."""
        weights: set[ir.Value] = set()
        held = 0
        for place in range(start, stop):
            new = {value for value in reads(self._nodes[place]) if in_file(value)} - weights
            weights |= new
            held += _bytes(new)
            held += sum(cost.nbytes(wanted[output], self._sizes) for output in self._nodes[place].outputs
                        if output in wanted)  # fmt: skip
            if held > self._most and place > start and self._can_stop(place):
                return place
        return stop

    def _can_stop(self, place: int) -> bool:
        """Whether all values that flow through a place can be kept."""
        return all(value.dtype in onnx_run.SHAREABLE for value in self._live(place))


def fit_together(nodes: Iterable[ir.Node]) -> bool:
    """Whether the weights of these nodes may all be mapped at once."""
    weights = {value for node in nodes for value in reads(node) if in_file(value)}
    return _bytes(weights) <= MOST


def needed(graph: ir.Graph, values: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that compute these values, in order."""
    pending, found = [value.producer() for value in values], set[ir.Node]()
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [value.producer() for value in reads(node)]
    return [node for node in graph if node in found]


def reads(node: ir.Node) -> set[ir.Value]:
    """The values that a node reads, also inside its subgraphs, without those that the subgraphs compute."""
    graphs = [graph for attribute in node.attributes.values() for graph in _graphs(attribute)]
    inner = {value for graph in graphs for one in graph.all_nodes() for value in one.inputs}
    inner |= {value for graph in graphs for value in graph.outputs}
    outer = {value for value in inner if value is not None and value.graph is node.graph}
    return outer | {value for value in node.inputs if value is not None}


def in_file(value: ir.Value) -> bool:
    return value.is_initializer() and isinstance(value.const_value, onnx_files.FileTensor)


def _bytes(weights: Iterable[ir.Value]) -> int:
    return sum(value.const_value.nbytes for value in weights if value.const_value is not None)


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else []


def _name(value: ir.Value) -> str:
    return value.name or ""
