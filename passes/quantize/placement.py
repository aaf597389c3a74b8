"""Integers where a target wants them: closed quantized regions of them, or only what int8 ops read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.qdq.regions import end_of, is_dequantized, label_of
from graphopt.numerics import quantize
from graphopt.numerics.observe import Observer
from graphopt.passes.quantize.islands import Islands
from graphopt.pipeline.context import Context
from graphopt.pipeline.target import Placement

POOLS = ("max_pool", "average_pool", "mean")
"""What joins where its result is read in integers: its input is quantized too, and it computes in them."""


def islands_on(graph: Graph, context: Context, dtype: torch.dtype) -> Islands:
    """The islands of a graph, as the target places them. dtype: of activations where they are about zero."""
    placement = context.target.placement
    return Islands(graph) if placement is None else OpenIslands(graph, placement=placement, dtype=dtype)


@dataclass
class OpenIslands(Islands):
    """Integers only where they are read: by static sites, and by adds and pools of what static convs give.

    Nothing is quantized for its own sake, so a target can fuse what stands behind a conv.
    """

    placement: Placement = field(default_factory=Placement)
    dtype: torch.dtype = torch.int8
    """Of activations about zero: int8, or a float of 8 bits."""
    floats: set[Value] = field(default_factory=set)
    """What an add takes as it is: the result of the conv that it is fused into."""

    def join(
        self, legal: Callable[[str], bool], stays: Callable[[Node], str | None], asked: Collection[Node] = ()
    ) -> dict[Node, str]:
        """Take in what reads results of convs or of what joined before; the reasons of adds that stay float.

        Arguments as of `Islands.join`; a softmax has no form in integers here. A pool joins where a static site reads
        its result.
        """
        results = {end_of(conv).result for conv in self.static("conv")}
        read = {site.input for site in self.static("linear", "conv")}
        declined: dict[Node, str] = {}
        for node in self.graph.sites("add", *POOLS):
            if not (legal(node.kind) and any(value in results for value in node.operands)):
                continue
            stored = next((value for value in node.operands if value is not None and value.is_constant), None)
            reason = stays(node)
            if node.kind in POOLS and (node.result not in read or reason):
                continue
            if reason:
                declined[node] = reason
            elif stored is not None:
                declined[node] = f"one side is stored: {label_of(stored)}"
            else:
                self.members[node] = None
                results.add(end_of(node).result)
        if self.placement.fuses_sum:
            convs = {conv.result for conv in self.static("conv") if len(conv.result.users) == 1}
            for node in self.members:
                if node.kind == "add":
                    self.floats.update([value for value in _data(node) if value in convs][-1:])
        return declined

    def observed(self) -> list[Value]:
        """The values that need a range: what static sites and adds read, unless they take it as it is."""
        read = [site.input for site in self.static("linear", "conv")]
        read += [value for node in [*self.static("matmul"), *self.members] for value in _data(node)]
        known = self.floats | {pool.result for pool in self._largest()}
        return [value for value in dict.fromkeys(read) if not (is_dequantized(value) or value in known)]

    def measure(self, ranges: Mapping[Value, Observer]) -> None:
        """Turn ranges into parameters. Raises ValueError, naming the node, where a range is empty or not finite."""
        self._measure(ranges)
        for pool in self._largest():
            self.parameters[pool.result] = self.parameters[pool.input]

    def _largest(self) -> list[Node]:
        """The pools whose result holds numbers of their input: it keeps its scale."""
        return [node for node in self.members if node.kind == "max_pool"]

    def _measure(self, ranges: Mapping[Value, Observer]) -> None:
        if not self.placement.signed:
            return super().measure(ranges)
        for value, seen in ranges.items():
            try:
                scale = quantize.symmetric_scale(*seen.range(), largest=quantize.largest(self.dtype))
            except ValueError as error:
                raise ValueError(f"activation of {label_of(value)}: {error}") from error
            self.parameters[value] = self.graph.add_constant(torch.tensor(scale), "scale"), self._zero()

    def _zero(self) -> Value:
        """The zero point of activations about zero, which says their type."""
        return self.graph.add_constant(torch.zeros((), dtype=self.dtype), "zero_point")

    def _close(self, node: Node, value: Value) -> None:
        """A result stays open: who reads it quantizes it."""
        if node.result in self.floats:
            self.floats.add(value)
        self._put(node, value)

    def _activation(self, x: Value, scheme: str, at: Node) -> Value:
        return x if x in self.floats else super()._activation(x, scheme, at)

    def _dynamic(self, x: Value, at: Node) -> Value:
        if not self.placement.rows:
            return super()._dynamic(x, at)
        scale = self.graph.emit("row_scale", x, at=at, largest=quantize.largest(self.dtype))
        zero_point = None if self.dtype == torch.int8 else self._zero()
        steps = self.graph.emit("quantize", x, scale, zero_point, at=at)
        return self.graph.emit("dequantize", steps, scale, at=at)


def _data(node: Node) -> tuple[Value, ...]:
    return tuple(value for value in node.operands if value is not None)
