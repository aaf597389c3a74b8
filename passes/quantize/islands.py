"""Which values of a graph become integers, and the quantize and dequantize that make them so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import JOINED, MOVES, end_of, is_dequantized, is_global, label_of
from graphopt.numerics import quantize
from graphopt.numerics.observe import Observer
from graphopt.passes.quantize.rounding import Rounding
from graphopt.pipeline.context import Context

_SEVERAL = ("add", "mul", "concat")

_SHARES = 1 / 256, 0
"""Scale and zero point of a softmax in integers: what is between 0 and 1 by nature needs no calibration."""


@dataclass
class Islands:
    """What will be in integers: decided on the graph as it is, then emitted in its order.

    One scale and zero point a value, for all sites that read it. The result of a static conv is quantized too, behind a
    relu or clip that follows, and so is that of what joins such results: a target then finds closed quantized
    regions. The result of a static matmul is where it is read in integers.
    """

    graph: Graph
    schemes: dict[Node, str] = field(default_factory=dict)
    """Each linear, conv and matmul that becomes integers: static, dynamic, or weight-only."""
    members: dict[Node, None] = field(default_factory=dict)
    """What joins results that are integers, in order."""
    moves: dict[Node, None] = field(default_factory=dict)
    """What moves them, in order."""
    closed: dict[Node, None] = field(default_factory=dict)
    """The static matmuls whose result is quantized."""
    weights: Rounding | None = None
    """The weights of these sites, in integers."""
    parameters: dict[Value, tuple[Value, Value]] = field(default_factory=dict)
    """Static scale and zero point of each observed value."""
    pairs: dict[tuple[Value, str], Value] = field(default_factory=dict)
    """What was emitted: the dequantized form of a value, by scheme."""

    def static(self, *ops: str) -> Iterator[Node]:
        return (site for site, scheme in self.schemes.items() if scheme == "static" and site.kind in ops)

    def join(
        self, legal: Callable[[str], bool], stays: Callable[[Node], str | None], asked: Collection[Node] = ()
    ) -> dict[Node, str]:
        """Take in what reads integers and pays; the reasons of what reads them, or was asked for, and stays float.

        legal: whether the target has a kernel for an op; stays: why a node is to stay float, None where it is not;
        asked: softmaxes that are to join, behind a static matmul; others do not. An op of several operands joins where
        all of them are quantized anyway, and one is the result of a conv or of what joined before; an op of one
        operand, and a move, where its own result is read in integers too.
        """
        inputs = {conv.input for conv in self.static("conv")}
        results = {end_of(site).result for site in self.static("conv", "matmul")}
        declined: dict[Node, str] = {}
        for node in self.graph.nodes:
            if node.kind not in (*JOINED, *MOVES) or (node.kind == "softmax" and node not in asked):
                continue
            if not any(value in results for value in node.operands):
                if node in asked:
                    declined[node] = f"{label_of(node.input)}, which it reads, stays float"
                continue
            reason = stays(node) or _why_not(node, results | inputs)
            if reason is None and node.kind in JOINED and not legal(node.kind):
                reason = "the target has no fast static form of it"
            if reason is None:
                (self.members if node.kind in JOINED else self.moves)[node] = None
                results.add(end_of(node).result if node.kind in JOINED else node.result)
            elif node.kind in JOINED:
                declined[node] = reason
        self._drop_idle(declined)
        return declined

    def _drop_idle(self, declined: dict[Node, str]) -> None:
        """Let go of ops of one operand whose result nobody reads in integers, the last first; matmuls give float."""
        readers = {site: [site.input] for site in self.static("linear", "conv")}
        for site in self.static("matmul"):
            readers[site] = [site.required("a"), site.required("b")]
        wanted = {value for values in readers.values() for value in values}
        for node in reversed([node for node in self.graph.nodes if node in self.members or node in self.moves]):
            result = end_of(node).result if node in self.members else node.result
            if node.kind not in _SEVERAL and result not in wanted:
                if node in self.members:
                    declined[node] = "its result is read in float"
                self.members.pop(node, None)
                self.moves.pop(node, None)
            else:
                wanted.update(value for value in _data(node))
        self.closed = dict.fromkeys(site for site in self.static("matmul") if site.result in wanted)

    def observed(self) -> list[Value]:
        """The values that need a range: inputs of static sites, results of static convs and of what joins them."""
        inputs = [site.input for site in self.static("linear", "conv")]
        inputs += [site.required(name) for site in self.static("matmul") for name in ("a", "b")]
        results = [end_of(node).result for node in [*self.static("conv"), *self.closed, *self.members]]
        known = {node.result for node in self.moves} | self._softmaxes()
        return [value for value in dict.fromkeys(inputs + results) if not is_dequantized(value) and value not in known]

    def _softmaxes(self) -> set[Value]:
        return {node.result for node in self.members if node.kind == "softmax"}

    def measure(self, ranges: Mapping[Value, Observer]) -> None:
        """Turn ranges into parameters. Raises ValueError, naming the node, where a range is empty or not finite."""
        for value, seen in ranges.items():
            try:
                number, integer = quantize.activation_parameters(*seen.range())
            except ValueError as error:
                raise ValueError(f"activation of {label_of(value)}: {error}") from error
            self.parameters[value] = self._stored(number, integer)
        self.parameters |= {value: self._stored(*_SHARES) for value in self._softmaxes()}

    def grids(self) -> dict[Node, quantize.Grid]:
        """The integers of what each static linear and conv reads, but for what was quantized before."""
        found = dict[Node, quantize.Grid]()
        for site in self.static("linear", "conv"):
            value = site.input
            while value.producer in self.moves:
                value = value.producer.input
            if value in self.parameters:
                scale, zero_point = map(self.graph.constant, self.parameters[value])
                assert scale is not None and zero_point is not None  # `_stored`
                if zero_point.dtype.is_floating_point:  # float8, whose steps are no grid
                    continue
                signed = zero_point.dtype == torch.int8  # and about 0
                ends = (-128, 127) if signed else (0, 255)
                found[site] = quantize.Grid(scale, None if signed else zero_point, *ends, axis=None)
        return found

    def _stored(self, scale: float, zero_point: int) -> tuple[Value, Value]:
        stored = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8)
        return self.graph.add_constant(stored[0], "scale"), self.graph.add_constant(stored[1], "zero_point")

    def emit(self) -> None:
        assert self.weights is not None
        parts = self.schemes.keys() | self.members.keys() | self.moves.keys()
        for node in [node for node in self.graph.nodes if node in parts]:
            if node.kind == "embedding":
                table, _ = self.weights.emit(node)
                self._put(node, self.graph.emit(node, table, node.required("ids"), at=node))
            elif node.kind == "matmul":
                sides = (self._activation(node.required(name), self.schemes[node], node) for name in ("a", "b"))
                put = self._close if node in self.closed else self._put
                put(node, self.graph.emit(node, *sides, at=node))
            elif node in self.schemes:
                x = self._activation(node.input, self.schemes[node], node)
                weight, bias = self.weights.emit(node)
                value = self.graph.emit(node.kind, x, weight, bias, at=node, **node.attributes)
                if node.kind == "conv" and self.schemes[node] == "static":
                    self._close(node, value)
                else:
                    self._put(node, value)
            elif node in self.members:
                operands = (self._activation(value, "static", node) for value in _data(node))
                self._close(node, self.graph.emit(node, *operands, at=node))
            else:
                self.parameters[node.result] = self.parameters[node.input]
                value = self.graph.emit(node, *node.operands, at=node)
                self.graph.replace(node, self._pair(value, node.result, node))

    def _put(self, node: Node, value: Value) -> None:
        """Replace a node by a float value, which another static site may read."""
        if node.result in self.parameters:
            self.parameters[value] = self.parameters[node.result]
        self.graph.replace(node, value)

    def _close(self, node: Node, value: Value) -> None:
        """In place of a node, and of the relu or clip behind it, goes its result, quantized."""
        end = end_of(node)
        if end != node:
            value = self.graph.emit(end, value, at=end)
        self.graph.replace(end, self._pair(value, end.result, end))
        if end != node:
            self.graph.erase(node)

    def _activation(self, x: Value, scheme: str, at: Node) -> Value:
        if scheme == "weight-only" or is_dequantized(x):
            return x
        if (x, scheme) not in self.pairs:
            if scheme == "static":
                self.pairs[x, scheme] = self._pair(x, x, at)
            else:
                self.pairs[x, scheme] = self._dynamic(x, at)
        return self.pairs[x, scheme]

    def _dynamic(self, x: Value, at: Node) -> Value:
        """dequantize(quantize(x)) by the range that x has at each run."""
        scale, zero_point = self.graph.emit_all("choose_qparams", x, at=at)
        steps = self.graph.emit("quantize", x, scale, zero_point, at=at)
        return self.graph.emit("dequantize", steps, scale, zero_point, at=at)

    def _pair(self, x: Value, observed: Value, at: Node) -> Value:
        """dequantize(quantize(x)) by the parameters of an observed value."""
        scale, zero_point = self.parameters[observed]
        steps = self.graph.emit("quantize", x, scale, zero_point, at=at)
        found = self.graph.emit("dequantize", steps, scale, zero_point, at=at)
        self.parameters[found] = scale, zero_point
        return found


def _why_not(node: Node, integers: set[Value]) -> str | None:
    """Why a node that reads integers cannot compute in them."""
    if node.kind == "mean" and not is_global(node):
        return "a mean over other axes than all of space has no form in integers"
    if node.kind == "pad" and (node.attributes["value"] or min(node.attributes["padding"]) < 0):
        return "it pads with another number than 0"
    floats = [value for value in _data(node) if value not in integers]
    return f"one side stays float: {label_of(floats[0])}" if floats else None


def _data(node: Node) -> tuple[Value, ...]:
    """The operands that hold data: not the shape of a reshape."""
    values = (node.input,) if node.kind == "reshape" else node.operands
    return tuple(value for value in values if value is not None)


def account(context: Context, islands: Islands, declined: Mapping[Node, str]) -> None:
    """Count what joins islands as sites, and say why some does not."""
    parts = [node for node in (*islands.members, *declined) if node not in context.labels]
    often = Counter([*context.record.eligible, *(node.label for node in parts)])
    for node in parts:
        context.labels[node] = node.label if often[node.label] == 1 else f"{node.label} ({node.name})"
        context.record.eligible.append(context.labels[node])
    for node, reason in declined.items():
        context.decline(node, reason)
