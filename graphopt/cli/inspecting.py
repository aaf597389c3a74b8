"""The commands that show graphs: inspect and diff."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.options import Json, Model
from graphopt.cli.printing import print_json, show
from graphopt.cli.reading import graph_of, require_file

if TYPE_CHECKING:
    from graphopt.capture.sources import Captured
    from graphopt.ir.graph import Graph, Value


def inspect(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="Print the whole listing.")] = False,
    show_groups: Annotated[bool, typer.Option("--groups", help="List what prune may cut, and what is locked.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a model takes, returns and consists of, as the passes see it."""
    from graphopt.analysis.groups import groups
    from graphopt.capture.sources import capture
    from graphopt.ir.cost import Cost
    from graphopt.ir.ops import OPS
    from graphopt.report import text
    from graphopt.report.records import count_kinds

    require_file(model)
    captured = capture(model, "onnx")
    graph, cost = captured.graph, Cost.of(captured.graph)
    if show_groups:  # as prune finds them, behind simplify
        found = groups(_simplified(captured))
        if as_json:
            keys = "name", "kind", "size", "locked"
            print_json([{key: getattr(group, key) for key in keys} for group in found])
        else:
            typer.echo(text.groups(found))
        return
    kinds = count_kinds(graph.nodes)
    ops = {kind: number for kind, number in kinds.items() if kind in OPS}
    opaque = {kind: number for kind, number in kinds.items() if kind not in OPS}
    if as_json:
        facts: dict[str, Any] = {
            "inputs": {value.name: _type_text(value) for value in graph.inputs},
            "outputs": {value.name: _type_text(value) for value in graph.outputs},
            "ops": ops,
            "opaque": opaque,
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "notes": captured.notes,
        }
        print_json(facts | ({"listing": graph.text().splitlines()} if full else {}))
        return
    lines = [f"input    {value.name} {_type_text(value)}" for value in graph.inputs]
    lines += [f"output   {value.name} {_type_text(value)}" for value in graph.outputs]
    lines.append(f"weights  {text.count(cost.parameters)} parameters, {text.size(cost.bytes)}")
    lines += [] if cost.flops is None else [f"FLOPs    {text.count(cost.flops)}"]
    lines += [f"ops    {text.counts(ops) or 'none'}", f"opaque   {text.counts(opaque) or 'none'}"]
    lines += [f"note     {note}" for note in captured.notes]
    typer.echo("\n".join(lines + ([f"\n{graph.text()}"] if full else [])))


def diff(
    before: Model,
    after: Model,
    full: Annotated[bool, typer.Option("--full", help="Print unchanged lines too.")] = False,
    as_json: Json = False,
) -> None:
    """Show how two models differ, as graphs."""
    from graphopt.report import terminal
    from graphopt.report.diff import GraphDiff

    found = GraphDiff.of(graph_of(before), graph_of(after))
    context = None if full else 3
    if as_json:
        lines = [line.mark + line.text for line in found.lines if full or line.mark != " "]
        print_json({"removed": found.removed, "added": found.added, "kinds": found.kinds, "lines": lines})
    elif sys.stdout.isatty():
        show(terminal.diff(found, context))
    else:
        typer.echo(found.text(context))


def _simplified(captured: Captured) -> Graph:
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.text import parse

    return parse("simplify", REGISTRY).apply(captured.graph, Context(feeds=captured.feeds))


def _type_text(value: Value) -> str:
    shape = "[?]" if value.shape is None else "[" + ", ".join(str(size) for size in value.shape) + "]"
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"
