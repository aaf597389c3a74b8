"""Slice(x) from the first entry to the last  ->  x: exporters write out what Python spells x[:, :]."""

from __future__ import annotations

from graphopt.dialects.onnx.graph import OnnxGraph

FAR = 2**31 - 1
"""The end of a slice means the end of the axis from this number on."""


def drop_whole_slices(graph: OnnxGraph) -> None:
    """Use what a Slice reads in its place, where its constant bounds take all of each axis. [changes]"""
    for node in graph.sites("onnx.Slice"):
        x, *bounds = node.operands
        known = len(bounds) > 1 and all(value is not None and value.is_constant for value in bounds[:2])
        if x is None or node.result.is_output or not known:  # before opset 10 the bounds are attributes
            continue
        starts, ends = (graph.constant(value).tolist() for value in bounds[:2])  # type: ignore[arg-type, union-attr]
        steps = bounds[3] if len(bounds) > 3 else None
        step = [1] if steps is None else None if (found := graph.constant(steps)) is None else found.tolist()
        if step is not None and {*step} == {1} and not any(starts) and min(ends) >= FAR:
            graph.replace(node, x)
