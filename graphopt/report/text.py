"""Plain text: as wide as the terminal that it is printed on, else at most 100 columns where names allow it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

from graphopt.report import figures, fitting, tables
from graphopt.report.curves import curves
from graphopt.report.diff import GraphDiff
from graphopt.report.records import PassRecord, Race, Relowering, Report, Shipped

if TYPE_CHECKING:
    from graphopt.analysis.branches import Branch
    from graphopt.analysis.groups import Group
    from graphopt.report.records import BenchResult, Comparison, Sensitivity

WIDTH = 100

LIMIT = "share of the machine's limit that products explain"
"""The title of a table."""

ROWS = 10
"""Sites of a sensitivity table that a report shows."""


def report(report: Report) -> str:
    """What was done to a model, why the rest was not, and what that did to cost and outputs."""
    outputs = [table(tables.agreement_rows(report), indent="  ", left=("output", "inputs"))] if report.agreement else []
    by_length = [table(tables.length_rows(report), indent="  ", left=("output",))] if report.agreement_by_length else []
    kernels = [_wrapped(figures.counts(report.kernels), "  ")] if report.kernels else []
    sections = [
        f"{tables.headline(report)}\n\n{_heading(report)}",
        _titled("notes", [_wrapped(note, "  - ") for note in tables.remarks(report)]),
        passes(report),
        _titled("declined", [_declined(record) for record in report.passes if record.declined]),
        *(
            _titled(f"sensitivity, for {one.name}", [textwrap.indent(sensitivity(one.sensitivity, ROWS), "  ")])
            for one in report.passes
            if one.sensitivity is not None
        ),
        *(
            _titled(f"training, by {one.name}", [f"  {curve}" for curve in curves(one.training)])
            for one in report.passes
            if one.training
        ),
        _titled("outputs against the original", outputs),
        _titled("outputs by length of the calibration texts", by_length),
        _titled("kernels that the engine built", kernels),
        _titled("choices", [_wrapped(line, "  ") for line in tables.choices(report)]),
        _titled("race of the engines", [] if report.race is None else [race(report.race)]),
        _titled("speed over the input", [table(tables.speed_rows(report), indent="  ")] if report.speed else []),
        _titled(LIMIT, [table(tables.roofline_rows(report), indent="  ")] if report.roofline else []),
        _titled("reverted", [_wrapped(line, "  ") for line in tables.reverted(report)]),
    ]
    return "\n\n".join(section for section in sections if section)


def summary(report: Report) -> str:
    """The headline, one row per pass, and what else the report holds."""
    rest = [_wrapped(line, "") for line in tables.rest(report)]
    return "\n\n".join([_wrapped(tables.headline(report), ""), passes(report), *(["\n".join(rest)] if rest else [])])


def diff(diff: GraphDiff, context: int | None = 3) -> str:
    """Changed lines with - and +, and `context` unchanged lines around them (None: all)."""
    lines = [_wrapped(tables.diff_summary(diff), "")]
    for section in diff.sections(context):
        if isinstance(section, int):
            lines.append(f"  ... {section} unchanged")
        else:
            lines += [f"{line.mark} {line.text}".rstrip() for line in section]
    return "\n".join(lines)


def sensitivity(found: Sensitivity, limit: int | None = None) -> str:
    """One row per site, the most sensitive first, and what the columns are; `limit`: most rows."""
    rows = tables.sensitivity_rows(found)
    shown = rows if limit is None else rows[: limit + 1]
    left_out = [f"... {len(rows) - len(shown)} less sensitive"] if len(shown) < len(rows) else []
    parts = ["\n".join([table(shown), *left_out])] if len(rows) > 1 else []
    return "\n\n".join([*parts, "\n".join(_wrapped(line, "") for line in tables.sensitivity_notes(found))])


def comparison(found: Comparison) -> str:
    """One row per output; one row per site, where they were asked for."""
    inside = [] if found.propagation is None else [table(tables.site_rows(found.propagation))]
    return "\n\n".join([table(tables.comparison_rows(found)), *inside, "\n".join(tables.comparison_notes(found))])


def bench(result: BenchResult) -> str:
    """The machine, one row per shape, and the geometric means."""
    return "\n\n".join([result.header, table(tables.bench_rows(result)), "\n".join(tables.bench_notes(result))])


def shipped(found: Shipped) -> str:
    """One line: the three metrics, and whether what ships is what was trained."""
    line = f"metric: {found.original:.6g} of the original, {found.trained:.6g} as trained, {found.shipped:.6g} shipped"
    if found.is_equal:
        return line
    return f"warning: {line}, and the last two differ by more than {found.tolerance:g} of the original's"


def race(found: Race) -> str:
    """One row per entrant, and what the columns are."""
    notes = [_wrapped(note, "  ") for note in tables.race_notes(found)]
    rows = table(tables.race_rows(found), indent="  ", left=("model", "floats", "outcome"))
    return "\n".join([rows, *notes])


def relowering(found: Relowering) -> str:
    """One line: how many sites were compared, and the largest distance among them."""
    left_out = f"; not compared: {', '.join(found.left_out)}" if found.left_out else ""
    if found.furthest is None:
        return f"re-lowered, and no site was compared with what it was{left_out}"
    site, distance = found.furthest
    return (f"re-lowered, {len(found.distances)} sites give what they gave for the same integers, to within "
            f"{distance:.3g} steps ({site}); {found.differs:.3%} of the integers differ{left_out}")  # fmt: skip


def groups(groups: Sequence[Group], branches: Sequence[Branch]) -> str:
    """One row for what shrinks together, and one for each residual branch."""
    if not groups:
        return "no group of axes shrinks together: there is no linear, conv or embedding"
    parts = [tables.group_rows(groups), *([tables.branch_rows(branches)] if branches else [])]
    return "\n\n".join(map(table, parts))


def passes(report: Report) -> str:
    """One row per pass."""
    return table(tables.pass_rows(report), optional=tables.OPTIONAL)


def table(
    rows: tables.Rows, *, optional: Sequence[str] = (), left: Sequence[str] = (), indent: str = ""
) -> str:
    """Columns as wide as needed, the first and those of `left` to the left, the others to the right; a rule under the
    header.

    On a terminal it is as wide as that at most, and splits no word (`fitting`). optional: the columns that may be left
    out for it, by name, the first to go first.
    """
    width = _columns()
    room = sys.maxsize if width is None else width - len(indent)
    right = {index for index, name in enumerate(rows[0]) if index > 0 and name not in left}
    found = fitting.fitted(rows, room, right=right, optional=optional)
    if found is None:
        lines = fitting.listed(rows, room)
    else:
        lines = _drawn(rows, found, right)
        lines += fitting.wrapped(tables.left_out(found.left_out), room) if found.left_out else []
    return textwrap.indent("\n".join(lines), indent)


def _drawn(rows: tables.Rows, found: fitting.Fitted, right: Collection[int]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        cells = [fitting.wrapped(row[index], width) for index, width in zip(found.columns, found.widths, strict=True)]
        for part in range(max(map(len, cells))):
            texts = [cell[part] if part < len(cell) else "" for cell in cells]
            padded = [
                _blanks(text, width) + text if index in right else text + _blanks(text, width)
                for index, text, width in zip(found.columns, texts, found.widths, strict=True)
            ]
            lines.append((" " * fitting.GAP).join(padded).rstrip())
        if row is rows[0]:
            lines.append("-" * max(map(cell_len, lines)))
    return lines


def _blanks(text: str, width: int) -> str:
    return " " * (width - cell_len(text))


def _columns() -> int | None:
    """The width of the terminal that is printed on; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _heading(report: Report) -> str:
    rows = [("model", report.source), ("target", report.target), ("pipeline", report.pipeline)]
    rows += tables.cost_rows(report)
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return "\n".join(_wrapped(value, f"{name:<11}") for name, value in rows if value)


def _declined(record: PassRecord) -> str:
    reasons = tables.declined(record.declined)
    lines = [_wrapped(f"{reason}: {names}", f"    {number} x ") for reason, number, names in reasons]
    return "\n".join([f"  {record.name}", *lines])


def _titled(title: str, blocks: Sequence[str]) -> str:
    return "\n".join([title, *blocks]) if blocks else ""


def _wrapped(line: str, prefix: str) -> str:
    """`line` after `prefix`, its further lines under its beginning. Long names stay whole, to be copied."""
    return textwrap.fill(
        line,
        min(WIDTH, _columns() or WIDTH),
        initial_indent=prefix,
        subsequent_indent=" " * len(prefix),
        break_long_words=False,
        break_on_hyphens=False,
    )
