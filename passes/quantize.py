"""f(x, W, b)  ->  f(dequantize(quantize(x, s, z), s, z), dequantize(Wq, ws), b), with integers of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from graphopt.graph import Graph, Node, Value
from graphopt.numerics import quantize
from graphopt.numerics.observe import MinMax
from graphopt.pipeline import Context, Pass, Selector, Stage, UsageError
from graphopt.weights import why_fixed


@dataclass(frozen=True)
class Quantize(Pass):
    """Round weights and activations to 8 bits: quantize and dequantize around float words (Jacob et al., 2018).

    Weights are int8, symmetric, one scale an output channel. Activations are uint8, one scale and zero point a value,
    for all sites that read it. Static convs have their results quantized too (behind a relu that follows), and so have
    the adds between them, so that a target finds closed islands. Declined: a weight that is not stored in float32, and
    a word that the target has no fast kernel for.
    """

    name = "quantize"
    stage = Stage.QUANTIZE

    scheme: str = "auto"
    """Where activation ranges come from: calibration (static) or each run (dynamic); auto is static if it can be."""

    observer: str = "minmax"
    """What calibration keeps of an activation: its smallest and largest value (minmax)."""

    targets: Selector = Selector("linear", "conv")
    """Sites to consider: words, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave in float."""

    def __post_init__(self) -> None:
        if self.scheme not in ("auto", "static", "dynamic"):
            raise UsageError(f"quantize: scheme is {self.scheme!r}; give auto, static or dynamic")
        if self.observer != "minmax":
            raise UsageError(f"quantize: observer is {self.observer!r}; give minmax")

    def run(self, graph: Graph, context: Context) -> None:
        islands = _Islands(graph)
        for site in context.sites(graph, self.targets, self.ignore):
            scheme = self._scheme_of(site.kind, context)
            reason = _why_not(site) or _why_no_kernel(site.kind, scheme, context)
            if reason:
                context.decline(site, reason)
            else:
                islands.schemes[site] = scheme
        adds = islands.join_adds(self.ignore) if "static" in _legal("add", context) else 0
        if adds:
            context.note(f"{adds} adds between quantized convs are quantized too")
        observed = islands.observed()
        islands.measure(context.statistics(graph, observed) if observed else {})
        islands.emit()

    def _scheme_of(self, word: str, context: Context) -> str:
        if self.scheme != "auto":
            return self.scheme
        return "static" if context.calibration is not None and "static" in _legal(word, context) else "dynamic"


def _legal(word: str, context: Context) -> tuple[str, ...]:
    """The schemes that have a fast kernel; every one where no target is given."""
    if context.target is None:
        return "static", "dynamic"
    schemes: tuple[str, ...] = context.target.schemes.get(word, ())
    return schemes


def _why_not(site: Node) -> str | None:
    if site.kind not in ("linear", "conv"):
        return f"{site.kind} has no form in 8 bits"
    weight = site.weight
    if weight is not None and weight.is_floating_point() and weight.dtype != torch.float32:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    return why_fixed(site)


def _why_no_kernel(word: str, scheme: str, context: Context) -> str | None:
    legal = _legal(word, context)
    if scheme in legal:
        return None
    more = "; static needs calibration" if "static" in legal and context.calibration is None else ""
    return f"{context.target.name} has no fast {scheme} {word}{more}"


@dataclass
class _Islands:
    """What will be in integers: decided on the graph as it is, then emitted in its order."""

    graph: Graph
    schemes: dict[Node, str] = field(default_factory=dict)
    """Scheme of each linear and conv."""
    adds: set[Node] = field(default_factory=set)
    parameters: dict[Value, tuple[float, int]] = field(default_factory=dict)
    """Static scale and zero point of each observed value."""
    stored: dict[tuple[Value, str], Value] = field(default_factory=dict)
    """What was emitted: the dequantized form of a value, by what it is ("static", "dynamic" or "weight")."""

    def static_convs(self) -> list[Node]:
        return [site for site, scheme in self.schemes.items() if site.kind == "conv" and scheme == "static"]

    def join_adds(self, ignore: Selector) -> int:
        """Take in each add of two values that are quantized anyway, one of them the result of a conv or such an add."""
        results = {_end(conv).result for conv in self.static_convs()}
        inputs = {conv.input for conv in self.static_convs()}
        for add in self.graph.sites("add"):
            operands = {add.required("a"), add.required("b")}
            if operands <= results | inputs and operands & results and add not in ignore:
                self.adds.add(add)
                results.add(_end(add).result)
        return len(self.adds)

    def observed(self) -> list[Value]:
        """The values that need a range: inputs of static sites, results of static convs and of adds."""
        inputs = [site.input for site, scheme in self.schemes.items() if scheme == "static"]
        results = [_end(node).result for node in [*self.static_convs(), *self.adds]]
        return [value for value in dict.fromkeys(inputs + results) if not _is_dequantized(value)]

    def measure(self, ranges: Mapping[Value, MinMax]) -> None:
        """Turn ranges into parameters. Raises ValueError, naming the node, where a range is empty or not finite."""
        for value, seen in ranges.items():
            try:
                self.parameters[value] = quantize.activation_parameters(*seen.range())
            except ValueError as error:
                where = value.producer.label if value.producer is not None else value.name
                raise ValueError(f"activation of {where}: {error}") from error

    def emit(self) -> None:
        for node in self.graph.nodes:
            if node in self.schemes:
                x = self._activation(node.input, self.schemes[node], node)
                self._finish(node, x, self._weight(node), node.bias)
            elif node in self.adds:
                a, b = (self._activation(node.required(name), "static", node) for name in ("a", "b"))
                self._finish(node, a, b)

    def _finish(self, node: Node, *operands: Value | None) -> None:
        """Emit a node on dequantized operands; in place of a conv or add goes its result, quantized."""
        value = self.graph.emit(node.kind, *operands, at=node, **node.attributes)
        end = _end(node) if self.schemes.get(node, "static") == "static" and node.kind != "linear" else node
        if end != node:
            value = self.graph.emit(end.kind, value, at=end)
        if end.result in self.parameters:
            value = self._pair(value, end.result, end)
        self.graph.replace(end, value)
        if end != node:
            self.graph.erase(node)

    def _activation(self, x: Value, scheme: str, at: Node) -> Value:
        if _is_dequantized(x):
            return x
        if (x, scheme) not in self.stored:
            if scheme == "static":
                self.stored[x, scheme] = self._pair(x, x, at)
            else:
                scale, zero_point = self.graph.emit_all("choose_qparams", x, at=at)
                steps = self.graph.emit("quantize", x, scale, zero_point, at=at)
                self.stored[x, scheme] = self.graph.emit("dequantize", steps, scale, zero_point, at=at)
        return self.stored[x, scheme]

    def _pair(self, x: Value, observed: Value, at: Node) -> Value:
        """dequantize(quantize(x)) by the parameters of an observed value."""
        number, integer = self.parameters[observed]
        scale = self.graph.add_constant(torch.tensor(number), "scale")
        zero_point = self.graph.add_constant(torch.tensor(integer, dtype=torch.uint8), "zero_point")
        steps = self.graph.emit("quantize", x, scale, zero_point, at=at)
        return self.graph.emit("dequantize", steps, scale, zero_point, at=at)

    def _weight(self, site: Node) -> Value:
        value, weight = site.required("weight"), site.weight
        assert weight is not None  # others are declined
        if (value, "weight") not in self.stored:
            try:
                integers, scales = quantize.quantize_weight(weight)
            except ValueError as error:
                raise ValueError(f"{site.label}: {error}") from error
            steps = self.graph.add_constant(integers, value.name)
            scale = self.graph.add_constant(scales, f"{value.name}_scale")
            self.stored[value, "weight"] = self.graph.emit("dequantize", steps, scale, axis=0, at=site)
        return self.stored[value, "weight"]


def _is_dequantized(value: Value) -> bool:
    return value.producer is not None and value.producer.kind == "dequantize"


def _end(node: Node) -> Node:
    """The relu that alone reads a node, else the node itself."""
    users = node.result.users
    follows = len(users) == 1 and users[0].kind == "relu" and not node.result.is_output
    return users[0] if follows else node
