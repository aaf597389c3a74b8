"""What reports show of what was measured: choices, speed over the input, and what was reverted."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from graphopt.ir.decline import Decline
from graphopt.report import html
from graphopt.report.declines import Reason
from graphopt.report.records import Report

MEASURED = {
    "site": "layers.0.norm", "sites": 6, "form": "Skip", "sure": True,
    "ratios": {"Sum": (1.0, 1.0, 1.0), "Skip": (1.25, 1.125, 1.5)}, "dropped": {"Fused": "no such <operator>"},
}  # fmt: skip
UNSTEADY = {"site": "head.norm", "sites": 1, "form": "Sum", "sure": False, "dropped": {},
            "ratios": {"Sum": (1.0, 1.0, 1.0), "Skip": (1.25, 0.5, 2.0)}}  # fmt: skip


@pytest.fixture
def report() -> Report:
    speed = {"shapes": "x [1, 16]", "median": 1.5, "low": 1.25, "high": 1.75, "rounds": 15, "steady": True}
    return Report(
        choices=[{"rule": "residual-norm", "sites": 7, "declined": {}, "measured": [MEASURED, UNSTEADY]}],
        speed=[speed, speed | {"shapes": "x [8, 16]", "steady": False, "high": math.inf}],
        reverted={"layers.0.up": Reason.of(Decline("slower", before=2.0, after=3.0))},
    )


def shown(report: Report, form: str) -> str:
    if form == "text":
        return " ".join(str(report).split())
    if form == "html":
        return " ".join(html.page(report).split())
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize("form", ["text", "terminal", "html"])
def test_figures_are_shown(report: Report, form: str) -> None:
    found = shown(report, form)
    operator = "&lt;operator&gt;" if form == "html" else "<operator>"
    assert (
        "residual-norm: sites 7; layers.0.norm and 5 like it as Skip (Skip 1.25 [1.12, 1.50] over Sum), "
        f"Fused dropped: no such {operator}; head.norm as Sum (Skip 1.25 [0.50, 2.00] over Sum), "
        "by the static order as the machine was unsteady"
    ) in found
    assert "speed over the input" in found and "reverted" in found
    assert "1.50 [1.25, 1.75]" in found and "~1.50" in found and "x [8, 16]" in found
    assert "layers.0.up" in found and "slower when changed: 3 us in place of 2 us" in found


@pytest.mark.parametrize("form", ["text", "terminal", "html"])
def test_what_was_not_measured_takes_no_room(form: str) -> None:
    found = shown(Report(choices=[{"rule": "gelu", "sites": 2, "declined": {}, "measured": []}]), form)
    assert "gelu: sites 2" in found
    assert "speed over the input" not in found and "reverted" not in found
