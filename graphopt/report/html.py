"""The same as one HTML page, without anything to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from graphopt.report import curves, tables
from graphopt.report.diff import GraphDiff
from graphopt.report.records import BenchResult, Report


def page(report: Report | None = None, diff: GraphDiff | None = None, title: str = "graphopt") -> str:
    """A whole document."""
    body = Markup(fragment(report, diff))  # the template has escaped it
    return str(_template().module.document(title, body))  # type: ignore[attr-defined]


def fragment(report: Report | None = None, diff: GraphDiff | None = None) -> str:
    """What a notebook shows."""
    return str(_template().module.fragment(report, diff, tables, curves))  # type: ignore[attr-defined]


def summary(report: Report) -> str:
    """What a notebook shows of a result: the headline, one row per pass, and what else the report holds."""
    return _notebook(tables.headline(report), tables.pass_rows(report), tables.rest(report))


def bench(result: BenchResult) -> str:
    """What a notebook shows of timings."""
    notes = [result.header, *tables.bench_notes(result)]
    return _notebook(tables.bench_headline(result), tables.bench_rows(result), notes)


def _notebook(headline: str, rows: tables.Rows, notes: Sequence[str]) -> str:
    return str(_template().module.notebook(headline, rows, notes))  # type: ignore[attr-defined]


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("graphopt.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja")
