"""Tables at every width: no word is split, no figure is lost without a word, and no line is wider than the terminal."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.report import fitting, tables, terminal, text
from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason
from graphopt.report.records import PassRecord, Report

NARROWEST, WIDEST = 72, 200

words = st.text("ab1._-/名é", min_size=1, max_size=12)
names = st.builds("".join, st.lists(words, min_size=1, max_size=5))
sentences = st.lists(names, min_size=1, max_size=4).map(" ".join)
numbers = st.integers(0, 10**13)
decibels = st.floats(-20, 200) | st.just(math.inf)
costs = st.builds(Cost, st.none() | numbers, numbers, numbers)
agreements = st.builds(Agreement, names, decibels, st.floats(-1, 1), st.floats(0, 1e9), st.none() | decibels)


@st.composite
def records(draw: st.DrawFn) -> PassRecord:
    sites = draw(st.lists(names, max_size=4))
    reasons = draw(st.lists(sentences, min_size=len(sites), max_size=len(sites)))
    declined = {site: Reason.of(Decline("told", sentence=reason)) for site, reason in zip(sites, reasons, strict=True)}
    return PassRecord(
        draw(words), draw(sentences), eligible=[*sites, *draw(st.lists(names, max_size=2))], declined=declined,
        changes=draw(numbers), seconds=draw(st.floats(0, 1e6)), nodes_after=draw(numbers), cost_before=draw(costs),
        cost_after=draw(costs), agreement=draw(st.lists(agreements, max_size=2)), notes=draw(st.lists(sentences)),
    )  # fmt: skip


@st.composite
def reports(draw: st.DrawFn) -> Report:
    speeds = st.fixed_dictionaries({
        "shapes": sentences, "median": st.floats(0.01, 100), "low": st.floats(0.01, 100),
        "high": st.floats(0.01, 100) | st.just(math.inf), "rounds": st.integers(1, 99), "steady": st.booleans(),
    })  # fmt: skip
    return Report(
        target=draw(names), source=draw(names), pipeline=",".join(draw(st.lists(words, max_size=5))),
        passes=draw(st.lists(records(), max_size=3)), cost_before=draw(costs), cost_after=draw(costs),
        kernels=draw(st.dictionaries(names, numbers, max_size=3)), agreement=draw(st.lists(agreements, max_size=3)),
        agreement_by_shapes=draw(st.dictionaries(sentences, st.lists(agreements, max_size=2), max_size=3)),
        agreement_by_length=draw(st.dictionaries(names, st.lists(agreements, max_size=2), max_size=3)),
        speed=draw(st.lists(speeds, max_size=3)),
        reverted=draw(st.dictionaries(names, sentences.map(lambda one: Reason.of(Decline("told", sentence=one))))),
    )  # fmt: skip


def at(width: int, what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def require_whole(shown: str, width: int, cells: Iterable[str]) -> None:
    """Every word of the cells that fits a line, with its indent, stands whole in what is shown; no line is too wide."""
    found = set(shown.split())
    assert not [word for cell in cells for word in cell.split() if cell_len(word) <= width - 2 and word not in found]
    assert max(map(cell_len, shown.splitlines()), default=0) <= width


@settings(max_examples=30, deadline=None)
@given(reports(), st.integers(NARROWEST, WIDEST))
def test_a_report_splits_no_word_at_any_width(report: Report, width: int) -> None:
    shown = at(width, report)
    narrow = next((line for line in shown.splitlines() if line.startswith("too narrow for: ")), "")
    left_out = narrow.removeprefix("too narrow for: ").split(", ")
    header, *rows = tables.pass_rows(report)
    cells = [cell for row in [header, *rows] for name, cell in zip(header, row, strict=True) if name not in left_out]
    others = [tables.agreement_rows(report), tables.kernel_rows(report), tables.speed_rows(report)]
    others += [tables.length_rows(report)]
    cells += [cell for table in others for row in table[1:] for cell in row]
    cells += [cell for pair in report.reverted.items() for cell in pair]
    cells += [cell for one in report.passes for row in tables.declined(one.declined) for cell in (row[0], row[2])]
    assert set(left_out) <= {"", *tables.OPTIONAL}
    require_whole(shown.replace(": ", " "), width, (cell.replace(": ", " ") for cell in cells))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(20, WIDEST))
def test_any_table_splits_no_word_at_any_width(data: st.DataObject, width: int) -> None:
    columns = data.draw(st.integers(1, 6))
    header = tuple(data.draw(st.lists(words, min_size=columns, max_size=columns, unique=True)))
    rows = [header, *data.draw(st.lists(st.tuples(*[sentences] * columns), max_size=4))]
    right = data.draw(st.sets(st.integers(1, columns)))
    shown = at(width, terminal.table(rows, right=tuple(right)))
    require_whole(shown.replace(": ", " "), width, (cell for row in rows[1:] for cell in row))
    if found := fitting.fitted(rows, width, right=right):
        assert sum(found.widths) + fitting.GAP * (columns - 1) <= width
        figures = [row[index] for row in rows[1:] for index in right if index < columns]
        assert all(any(figure in line for line in shown.splitlines()) for figure in figures)


@settings(max_examples=50)
@given(st.lists(words, max_size=20).map(" ".join), st.integers(1, 60))
def test_lines_keep_every_character_and_break_only_words_with_commas(sentence: str, width: int) -> None:
    lines = fitting.wrapped(sentence, width)
    assert " ".join(lines).split() == sentence.split()
    assert all(cell_len(line) <= width or " " not in line for line in lines)


def test_a_pipeline_that_is_too_wide_is_broken_after_a_comma() -> None:
    assert fitting.wrapped("simplify,low-rank{rank=9},quantize", 25) == ["simplify,", "low-rank{rank=9},quantize"]


ROWS: tables.Rows = [
    ("pass", "sites", "nodes", "size"),
    ("simplify", "-", "12", "90.4 MB"),
    ("quantize", "74", "120", "22.6 MB"),
]


def test_columns_are_left_out_by_name_and_then_rows_become_lists() -> None:
    assert fitting.fitted(ROWS, 31, right=(1, 2, 3), optional=("nodes", "sites")) == fitting.Fitted(
        (0, 1, 2, 3), (8, 5, 5, 7), ()
    )
    assert fitting.fitted(ROWS, 30, right=(1, 2, 3), optional=("nodes", "sites")) == fitting.Fitted(
        (0, 1, 3), (8, 5, 7), ("nodes",)
    )
    assert fitting.fitted(ROWS, 16, right=(1, 2, 3), optional=("nodes", "sites")) is None
    assert fitting.listed(ROWS, 28) == [
        "simplify", "  sites: -   nodes: 12", "  size: 90.4 MB",
        "quantize", "  sites: 74   nodes: 120", "  size: 22.6 MB",
    ]  # fmt: skip


def test_text_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"columns": 20}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((sizes["columns"], 24)))
    assert text.table(ROWS, optional=("nodes", "sites")).splitlines() == [
        "pass         size", "-----------------", "simplify  90.4 MB", "quantize  22.6 MB",
        "too narrow for:", "nodes, sites",
    ]  # fmt: skip
    sizes["columns"] = 16
    assert text.table(ROWS).splitlines()[:2] == ["simplify", "  sites: -"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert text.table(ROWS).splitlines()[0] == "pass      sites  nodes     size"


def test_wide_characters_count_twice() -> None:
    rows: tables.Rows = [("名前", "size"), ("言語言語", "1 B")]
    assert text.table(rows).splitlines() == ["名前      size", "--------------", "言語言語   1 B"]
