"""The planned quantize and dequantize nodes, put around the ops of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops.recurrent import RECURRENT
from graphopt.ir.qdq.regions import end_of, is_dequantized
from graphopt.numerics import quantize
from graphopt.passes.quantize.plan import QuantizationPlan
from graphopt.passes.quantize.ranges import Activation, Parameters
from graphopt.passes.quantize.weights import Stored, Weights

_MIDDLE = 128
"""The zero point of rows in uint8: as symmetric as int8, and 128 higher."""


def emit(graph: Graph, plan: QuantizationPlan, parameters: Mapping[Activation, Parameters], weights: Weights) -> None:
    """Change the graph as planned, in topological order. All readers of a quantized value share one quantize."""
    nodes = plan.sites.keys() | {*plan.regions.joined, *plan.regions.moves}
    planned = [(node, node.operands) for node in graph.nodes if node in nodes]
    emitter = _Emitter(graph, plan, parameters, weights)
    for node, operands in planned:
        emitter.emit(node, operands)


class _Emitter:
    """Emits the plan. Its dictionaries are by the values of the planned graph, before any node was replaced."""

    def __init__(
        self, graph: Graph, plan: QuantizationPlan, parameters: Mapping[Activation, Parameters], weights: Weights
    ) -> None:
        self.graph, self.plan, self.parameters, self.weights = graph, plan, parameters, weights
        self.activations: dict[tuple[Value, str, int], Value] = {}
        """The dequantized form of a value, by scheme and bits."""
        self.dequantized: dict[Stored, Value] = {}
        """The dequantized form of a weight."""

    def emit(self, node: Node, planned: Sequence[Value | None]) -> None:
        """Replace a node by its planned form. planned: its operands in the planned graph."""
        scheme = self.plan.sites[node].scheme if node in self.plan.sites else "static"
        if node in self.plan.regions.moves:
            value = self.graph.emit(node, *node.operands, at=node)
        elif node.kind == "embedding":
            value = self.graph.emit(node, self._weight(node, "table"), node.required("ids"), at=node)
        elif node.kind in RECURRENT:
            self._emit_recurrent(node, planned[0], scheme)
            return
        elif node.kind in ("linear", "conv", "conv_transpose"):
            bits = self.plan.sites[node].activation_bits
            x, weight = self._activation(planned[0], node.input, scheme, node, bits), self._weight(node)
            value = self.graph.emit(node.kind, x, weight, self._bias(node), at=node, **node.attributes)
        else:
            sides = zip(planned, node.operands, strict=True)
            operands = [self._activation(before, now, scheme, node) for before, now in sides]
            value = self.graph.emit(node, *operands, at=node)
        if node in self.plan.regions.closed:
            self._close(node, value)
        else:
            self.graph.replace(node, value)

    def _emit_recurrent(self, node: Node, planned: Value | None, scheme: str) -> None:
        """Replace a recurrent layer, whose state stays float in the graph."""
        x = self._activation(planned, node.input, scheme, node)
        operands = x, self._weight(node, "weight"), self._weight(node, "recurrent"), *node.operands[3:]
        self.graph.replace(node, *self.graph.emit_all(node, *operands, at=node))

    def _close(self, node: Node, value: Value) -> None:
        """Quantize the result of a node, after the relu or clip that follows it, and replace these."""
        end = end_of(node)
        if end != node:
            value = self.graph.emit(end, value, at=end)
        self.graph.replace(end, self._static(value, end.result, at=end))
        if end != node:
            self.graph.erase(node)

    def _activation(self, planned: Value | None, x: Value | None, scheme: str, at: Node, bits: int = 8) -> Value | None:
        """The value that a node reads for x. planned: x in the planned graph."""
        if planned is None or x is None or scheme == "weight-only":
            return x
        if bits == 8 and (planned in self.plan.regions.floats or is_dequantized(x)):
            return x
        key = planned, scheme, bits
        if key not in self.activations:
            self.activations[key] = self._static(x, planned, at, bits) if scheme == "static" else self._dynamic(x, at)
        return self.activations[key]

    def _static(self, x: Value, planned: Value, at: Node, bits: int = 8) -> Value:
        """dequantize(quantize(x)) with the parameters of the planned value."""
        found = self.parameters[planned, bits]
        return self._quantized(x, found.scale, found.zero_point, at=at, bits=bits)

    def _dynamic(self, x: Value, at: Node) -> Value:
        """dequantize(quantize(x)) with the range that x has at each run."""
        dtype = self.plan.row_dtype
        if dtype is None:
            return self._quantized(x, *self.graph.emit_all("choose_qparams", x, at=at), at=at)
        scale = self.graph.emit("row_scale", x, at=at, largest=quantize.largest(dtype))
        if dtype == torch.uint8:
            middle = self.graph.add_constant(torch.tensor(_MIDDLE, dtype=dtype), "zero_point")
            return self._quantized(x, scale, middle, at=at)
        zero_point = None  # quantize gives int8 then; other dtypes come from the zero point
        if dtype != torch.int8:
            zero_point = self.graph.add_constant(torch.zeros((), dtype=dtype), "zero_point")
        integers = self.graph.emit("quantize", x, scale, zero_point, at=at)
        return self.graph.emit("dequantize", integers, scale, at=at)

    def _quantized(self, x: Value, scale: Value, zero_point: Value, *, at: Node, bits: int = 8) -> Value:
        """dequantize(quantize(x))."""
        integers = self.graph.emit("quantize", x, scale, zero_point, at=at, bits=bits)
        return self.graph.emit("dequantize", integers, scale, zero_point, at=at, bits=bits)

    def _weight(self, site: Node, name: str = "weight") -> Value:
        """A weight of a site, dequantized."""
        stored = self.weights.stored[site][name]
        if stored not in self.dequantized:
            operands = stored.integers, stored.scale, stored.zero_point
            self.dequantized[stored] = self.graph.emit("dequantize", *operands, at=site, **stored.attributes)
        return self.dequantized[stored]

    def _bias(self, site: Node) -> Value | None:
        if site not in self.weights.biases:
            return site.bias
        name = "bias" if site.bias is None else site.bias.name
        return self.graph.add_constant(self.weights.biases[site], name)
