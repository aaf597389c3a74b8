"""The same in a terminal: rich tables, and a diff in colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.report import tables
from graphopt.report.curves import curves
from graphopt.report.diff import GraphDiff
from graphopt.report.records import Report
from graphopt.report.text import ROWS

if TYPE_CHECKING:
    from graphopt.report.records import BenchResult, Comparison, Sensitivity

STYLES = {"-": "red", "+": "green", " ": "dim"}


def report(report: Report) -> RenderableType:
    """What was done to a model, as tables."""
    facts = [("model", report.source), ("target", report.target), ("pipeline", report.pipeline)]
    heading = Table.grid(padding=(0, 2))
    for name, value in [*facts, *tables.cost_rows(report)]:
        heading.add_row(Text(name, style="bold"), Text(value))
    parts: list[RenderableType] = [heading]
    parts += [Text(f"- {note}", style="yellow") for note in tables.remarks(report)]
    parts.append(table(tables.pass_rows(report), "passes"))
    declined = [
        (record.name, str(number), reason, names)
        for record in report.passes
        for reason, number, names in tables.declined(record.declined)
    ]
    if declined:
        parts.append(table([("pass", "sites", "declined because", "where"), *declined], "declined", right=(1,)))
    parts += [Text(f"{one.name}: {curve}") for one in report.passes for curve in curves(one.training)]
    parts += [sensitivity(one.sensitivity, ROWS) for one in report.passes if one.sensitivity is not None]
    if report.agreement:
        parts.append(table(tables.agreement_rows(report.agreement), "outputs against the original"))
    if report.kernels:
        parts.append(table(tables.kernel_rows(report), "kernels that the engine built"))
    parts += [Text(line) for line in tables.choices(report)]
    if report.speed:
        parts.append(table(tables.speed_rows(report), "speed over the input"))
    if report.reverted:
        parts.append(table([("site", "reverted because"), *report.reverted.items()], "reverted", right=()))
    return Group(*parts)


def diff(diff: GraphDiff, context: int | None = 3) -> RenderableType:
    """Removed lines in red, added ones in green, runs of unchanged ones as their number."""
    lines = [Text(tables.diff_summary(diff), style="bold")]
    for section in diff.sections(context):
        if isinstance(section, int):
            lines.append(Text(f"  ... {section} unchanged", style="dim italic"))
        else:
            lines += [Text(f"{line.mark} {line.text}", style=STYLES[line.mark]) for line in section]
    return Group(*lines)


def comparison(found: Comparison) -> RenderableType:
    """One row per output; one row per site, where they were asked for."""
    inside = [] if found.propagation is None else [table(tables.site_rows(found.propagation), "sites", right=(2, 3))]
    notes = Text("\n".join(tables.comparison_notes(found)), style="dim")
    return Group(table(tables.comparison_rows(found)), *inside, notes)


def bench(result: BenchResult) -> RenderableType:
    """One row per shape, under the description of the machine."""
    notes = Text("\n".join(tables.bench_notes(result)), style="dim")
    return Group(Text(result.header, style="dim"), table(tables.bench_rows(result)), notes)


def sensitivity(found: Sensitivity, limit: int | None = None) -> RenderableType:
    """One row per site, the most sensitive first; `limit`: most rows."""
    rows = tables.sensitivity_rows(found)
    shown = rows if limit is None else rows[: limit + 1]
    left_out = [f"... {len(rows) - len(shown)} less sensitive"] if len(shown) < len(rows) else []
    notes = [Text(line, style="dim") for line in [*left_out, *tables.sensitivity_notes(found)]]
    return Group(*([table(shown, "sensitivity")] if len(rows) > 1 else []), *notes)


def table(rows: tables.Rows, title: str | None = None, *, right: Sequence[int] | None = None) -> Table:
    """`right` are the columns set to the right (None: all but the first)."""
    header, *body = rows
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        to_the_right = index in right if right is not None else index > 0
        drawn.add_column(name, justify="right" if to_the_right else "left", overflow="fold")
    for row in body:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn
