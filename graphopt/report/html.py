"""The same as one HTML page, without anything to fetch."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from graphopt.report import curves, tables
from graphopt.report.diff import GraphDiff
from graphopt.report.records import Report


def page(report: Report | None = None, diff: GraphDiff | None = None, title: str = "graphopt") -> str:
    """A whole document."""
    body = Markup(fragment(report, diff))  # the template has escaped it
    return str(_template().module.document(title, body))  # type: ignore[attr-defined]


def fragment(report: Report | None = None, diff: GraphDiff | None = None) -> str:
    """What a notebook shows."""
    return str(_template().module.fragment(report, diff, tables, curves))  # type: ignore[attr-defined]


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("graphopt.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja")
