"""Which values of a graph become integers, and the quantize and dequantize that make them so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from graphopt.graph import Graph, Node, Value
from graphopt.numerics import quantize
from graphopt.numerics.observe import MinMax
from graphopt.pipeline import Selector


@dataclass
class Islands:
    """What will be in integers: decided on the graph as it is, then emitted in its order.

    One scale and zero point a value, for all sites that read it. The result of a static conv is quantized too, behind a
    relu that follows, and so is that of an add between such convs: a target then finds closed islands.
    """

    graph: Graph
    schemes: dict[Node, str] = field(default_factory=dict)
    """Each linear and conv that becomes integers: static or dynamic."""
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
        if node.kind == "linear" or self.schemes.get(node) == "dynamic":
            if node.result in self.parameters:  # another static site reads it
                self.parameters[value] = self.parameters[node.result]
            self.graph.replace(node, value)
            return
        end = _end(node)
        if end != node:
            value = self.graph.emit("relu", value, at=end)
        self.graph.replace(end, self._pair(value, end.result, end))
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
