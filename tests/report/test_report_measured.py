"""What reports show of what was measured: choices, speed over the input, and what was reverted."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.report import html, tables
from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason
from graphopt.report.records import Report, Shipped

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


def speed(median: float, low: float, high: float, steady: bool = True) -> dict[str, Any]:
    return {"shapes": "x [1, 16]", "median": median, "low": low, "high": high, "rounds": 15, "steady": steady}


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        ([], "speed not measured"),
        ([speed(2.0, 1.5, 3.9)], "2.0 times as fast [1.5, 3.9]"),
        ([speed(1.04, 1.01, 1.2)], "1.04 times as fast [1.01, 1.2]"),
        ([speed(1.3, 0.95, 1.5, steady=False)], "perhaps faster: ~1.3 times as fast [0.95, 1.5]"),
        ([speed(0.9, 0.0, math.inf)], "perhaps slower: 0.90 times as fast"),
        ([speed(0.9, 0.85, 0.95)], "slower: 0.90 times as fast [0.85, 0.95]"),
        ([speed(2.0, 1.5, 3.9), speed(1.5, 1.2, 1.6)], "1.5 [1.2, 1.6] to 2.0 [1.5, 3.9] times as fast over 2 shapes"),
        ([speed(2.0, 1.5, 3.9), speed(0.5, 0.4, 0.6), speed(3.0, 2.0, 4.0)],
         "slower at 1: 0.50 [0.40, 0.60] to 3.0 [2.0, 4.0] times as fast over 3 shapes"),
    ],
)  # fmt: skip
def test_the_headline_says_how_fast_and_how_sure(speeds: list[dict[str, Any]], words: str) -> None:
    assert tables.faster(speeds) == words


def test_the_headline_says_what_was_measured_and_what_was_not() -> None:
    report = Report(cost_before=Cost(None, 43, 430), cost_after=Cost(None, 43, 100), speed=[speed(2.0, 1.5, 3.9)])
    report.agreement = [Agreement("a", 40.0, 0.99991, 0.1), Agreement("b", 45.0, 0.99999, 0.1)]
    assert tables.headline(report) == "4.3 times smaller, 2.0 times as fast [1.5, 3.9], cosine 0.9999"
    report.cost_after, report.agreement, report.speed = Cost(None, 43, 860), [], []
    assert tables.headline(report) == "2.0 times as large, speed not measured, outputs not compared"
    report.cost_after, report.shipped = report.cost_before, Shipped(0.9, 0.95, 0.95)
    report.agreement = [Agreement("a", math.inf, 1.0, 0.0)]
    assert tables.headline(report) == "no smaller, speed not measured, outputs equal, metric 0.95 of 0.9"
    report.agreement = [Agreement("a", 40.0, 0.9, 0.1), Agreement("b", math.nan, math.nan, math.nan)]
    assert "cosine nan" in tables.headline(report)


def test_a_result_is_shown_in_brief_the_same_everywhere(report: Report, tmp_path: Path) -> None:
    import graphopt
    from tests.language import build

    build("onnx", "y = linear(x[batch,4], W[3,4]:seed1)").save(tmp_path / "tiny.onnx")
    small = graphopt.optimize(tmp_path / "tiny.onnx", measure=False)
    small.report = report
    report.source, report.notes = "tiny.onnx", ["fixed axis 1", "warning: it is slower"]
    headline, rest = tables.headline(report), "more in .report: 2 notes, 1 reverted site, 1 choice"
    assert repr(small) == f"<Optimized tiny.onnx for onnxruntime: {headline}>"
    assert repr(report) == f"<Report of tiny.onnx for : {headline}>"
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(small)
    for shown in (str(small), console.export_text(), small._repr_html_()):
        for words in (headline, "seconds", "warning: it is slower", rest):
            assert words in shown
        assert "fixed axis 1" not in shown
    assert str(small).splitlines()[0] == headline
