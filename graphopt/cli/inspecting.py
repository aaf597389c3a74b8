"""The commands that show graphs: inspect and diff."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.options import Inputs, Json, Model
from graphopt.cli.printing import print_json, show
from graphopt.cli.reading import graph_of, require_file
from graphopt.cli.sources import example

if TYPE_CHECKING:
    from graphopt.capture.sources import Captured
    from graphopt.ir.cost import Cost
    from graphopt.ir.graph import Graph, Value


def inspect(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="Print the whole listing.")] = False,
    show_groups: Annotated[bool, typer.Option("--groups", help="List what prune may cut, and what is locked.")] = False,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Show what a model takes, returns and consists of, as the passes see it.

    FLOPs are at the sizes of --inputs; without it, an unknown batch is 1, and other unknown sizes are 16.
    """
    from graphopt.capture.sources import capture

    require_file(model)
    captured = capture(model, "onnx", example_inputs=None if inputs is None else example(inputs, model))
    if show_groups:
        _show_groups(captured, as_json)
    elif as_json:
        _print_facts(captured, full)
    else:
        _show_facts(captured, full)


def _show_groups(captured: Captured, as_json: bool) -> None:
    """The groups and residual branches as prune finds them: after simplify."""
    from graphopt.analysis.branches import Branch, branches
    from graphopt.analysis.groups import Group, groups
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.text import parse
    from graphopt.report import text
    from graphopt.report.declines import Reason

    simplified = parse("simplify", REGISTRY).apply(captured.graph, Context(feeds=captured.feeds))
    found, residual = groups(simplified), branches(simplified)
    everything: list[Group | Branch] = [*found, *residual]
    if as_json:
        print_json([
            {"name": one.name, "kind": one.kind, "size": one.size,
             "locked": Reason.of(one.locked).to_dict() if one.locked else None}
            for one in everything
        ])  # fmt: skip
    else:
        typer.echo(text.groups(found, residual))


def _print_facts(captured: Captured, full: bool) -> None:
    graph, cost = captured.graph, _cost(captured)
    ops, opaque = _kinds(graph)
    facts: dict[str, Any] = {
        "inputs": {value.name: _type_text(value) for value in graph.inputs},
        "outputs": {value.name: _type_text(value) for value in graph.outputs},
        "ops": ops,
        "opaque": opaque,
        "parameters": cost.parameters,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "flops_at": {name: list(feed.shape) for name, feed in captured.feeds[0].items()} if captured.feeds else {},
        "notes": captured.notes,
    }
    print_json(facts | ({"listing": graph.text().splitlines()} if full else {}))


def _show_facts(captured: Captured, full: bool) -> None:
    from graphopt.ir.graph import shapes_text
    from graphopt.report import figures

    graph, cost = captured.graph, _cost(captured)
    ops, opaque = _kinds(graph)
    lines = [f"input    {value.name} {_type_text(value)}" for value in graph.inputs]
    lines += [f"output   {value.name} {_type_text(value)}" for value in graph.outputs]
    lines.append(f"weights  {figures.count(cost.parameters)} parameters, {figures.size(cost.bytes)}")
    at = f" at {shapes_text(captured.feeds[0])}" if captured.feeds else ""
    lines += [] if cost.flops is None else [f"FLOPs    {figures.count(cost.flops)}{at}"]
    lines += [f"ops      {figures.counts(ops) or 'none'}", f"opaque   {figures.counts(opaque) or 'none'}"]
    lines += [f"note     {note}" for note in captured.notes]
    typer.echo("\n".join(lines + ([f"\n{graph.text()}"] if full else [])))


def _cost(captured: Captured) -> Cost:
    """With FLOPs at the sizes of the example, where there is one."""
    from graphopt.ir.cost import Cost, sizes

    return Cost.of(captured.graph, sizes(captured.graph, captured.feeds[0]) if captured.feeds else {})


def _kinds(graph: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """How many nodes there are of each op, and of each kind that is no op."""
    from graphopt.ir.ops import OPS
    from graphopt.report.records import count_kinds

    kinds = count_kinds(graph.nodes)
    opaque = {kind: number for kind, number in kinds.items() if kind not in OPS}
    return {kind: number for kind, number in kinds.items() if kind in OPS}, opaque


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


def _type_text(value: Value) -> str:
    from graphopt.ir.graph import dtype_name

    shape = "[?]" if value.shape is None else "[" + ", ".join(str(size) for size in value.shape) + "]"
    return f"{shape} {dtype_name(value.dtype)}"
