"""Decomposed forms -> words, as rules that hold in either dialect. Runs once, at capture."""

from __future__ import annotations

from graphopt.graph import Graph


def raise_words(graph: Graph) -> None:
    graph.sweep()
