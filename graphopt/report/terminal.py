"""The same in a terminal: rich tables, and a diff in colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from graphopt.report import fitting, tables
from graphopt.report.curves import curves
from graphopt.report.diff import GraphDiff
from graphopt.report.records import Report
from graphopt.report.text import LIMIT, ROWS

if TYPE_CHECKING:
    from graphopt.report.records import BenchResult, Comparison, Sensitivity

STYLES = {"-": "red", "+": "green", " ": "dim"}


def report(report: Report) -> RenderableType:
    """What was done to a model, as tables."""
    facts = [("model", report.source), ("target", report.target), ("pipeline", report.pipeline)]
    heading = _Facts([*facts, *tables.cost_rows(report)])
    parts: list[RenderableType] = [Text(tables.headline(report), style="bold"), heading]
    parts += [Text(f"- {note}", style="yellow") for note in tables.remarks(report)]
    parts.append(passes(report))
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
        rows = tables.agreement_rows(report)
        parts.append(table(rows, "outputs against the original", right=range(rows[0].index("SQNR"), len(rows[0]))))
    if report.agreement_by_length:
        rows = tables.length_rows(report)
        parts.append(table(rows, "outputs by length of the calibration texts", right=range(1, len(rows[0]))))
    if report.kernels:
        parts.append(table(tables.kernel_rows(report), "kernels that the engine built"))
    parts += [Text(line) for line in tables.choices(report)]
    if report.race is not None:
        parts.append(table(tables.race_rows(report.race), "race of the engines", right=(3, 4, 5)))
        parts += [Text(note, style="dim") for note in tables.race_notes(report.race)]
    if report.speed:
        parts.append(table(tables.speed_rows(report), "speed over the input"))
    if report.roofline:
        parts.append(table(tables.roofline_rows(report), LIMIT))
    if report.reverted:
        rows = [("site", "reverted because"), *report.reverted.items()]
        parts.append(table(rows, "reverted", right=()))
    return Group(*parts)


def summary(report: Report) -> RenderableType:
    """The headline, one row per pass, and what else the report holds."""
    rest = [Text(line, style="yellow" if tables.is_warning(line) else "dim") for line in tables.rest(report)]
    return Group(Text(tables.headline(report) + "\n", style="bold"), passes(report), *rest)


def passes(report: Report) -> RenderableType:
    """One row per pass."""
    return table(tables.pass_rows(report), "passes", optional=tables.OPTIONAL)


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
    headline = Text(tables.bench_headline(result), style="bold")
    return Group(headline, Text(result.header, style="dim"), table(tables.bench_rows(result)), notes)


def sensitivity(found: Sensitivity, limit: int | None = None) -> RenderableType:
    """One row per site, the most sensitive first; `limit`: most rows."""
    rows = tables.sensitivity_rows(found)
    shown = rows if limit is None else rows[: limit + 1]
    left_out = [f"... {len(rows) - len(shown)} less sensitive"] if len(shown) < len(rows) else []
    notes = [Text(line, style="dim") for line in [*left_out, *tables.sensitivity_notes(found)]]
    return Group(*([table(shown, "sensitivity")] if len(rows) > 1 else []), *notes)


def table(
    rows: tables.Rows, title: str | None = None, *, right: Sequence[int] | None = None, optional: Sequence[str] = ()
) -> RenderableType:
    """A table that splits no word (`fitting`). right: the columns set to the right, by index (None: all but the first).
    optional: the columns that may be left out where the terminal is narrow, by name, the first to go first."""
    figures = tuple(range(1, len(rows[0]))) if right is None else tuple(right)
    return _Table(rows, title, figures, tuple(optional))


@dataclass(frozen=True)
class _Table:
    """Drawn when the width is known."""

    rows: tables.Rows
    title: str | None
    right: tuple[int, ...]
    optional: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        found = fitting.fitted(self.rows, width, right=self.right, optional=self.optional)
        if self.title:
            yield Text(self.title, style="bold")
        if found is None:
            yield from map(Text, fitting.listed(self.rows, width))
        else:
            yield self._drawn(found)
            if found.left_out:
                yield Text("\n".join(fitting.wrapped(tables.left_out(found.left_out), width)), style="dim")
        yield Text("")

    def _drawn(self, found: fitting.Fitted) -> Table:
        drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, fitting.GAP - 1, 0, 0))
        for index, width in zip(found.columns, found.widths, strict=True):
            justify = "right" if index in self.right else "left"
            name = "\n".join(fitting.wrapped(self.rows[0][index], width))
            drawn.add_column(Text(name), justify=justify, width=width, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows[1:]:
            cells = [fitting.wrapped(row[i], width) for i, width in zip(found.columns, found.widths, strict=True)]
            drawn.add_row(*(Text("\n".join(lines)) for lines in cells))
        return drawn


@dataclass(frozen=True)
class _Facts:
    """Names in bold, and behind them their values, whose further lines stand under the first."""

    rows: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        indent = max(len(name) for name, _ in self.rows) + fitting.GAP
        for name, value in self.rows:
            lines = fitting.wrapped(value, options.max_width - indent)
            first = Text.assemble((name.ljust(indent), "bold"), lines[0])
            yield Text("\n").join([first, *(Text(" " * indent + line) for line in lines[1:])])
