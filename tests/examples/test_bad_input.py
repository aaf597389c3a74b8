"""What users may hand over by mistake is one line on stderr, which names the line, the column or the folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import generation
import pytest
import question_answering
import text_classification
from frame import folder, program
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import encoder, minilm

from graphopt import UsageError
from graphopt.cli.sources import tokenizer_in
from graphopt.serving import Predictor

GOOD = "review,kind\nfine,good\n bad ,poor\nso so,poor\nnice,good\n"


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object,
    example: ModuleType = text_classification,
) -> str:  # fmt: skip
    """The line on stderr of an example that ends with exit code 2, without its name."""
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        program(example.main)
    out, err = capsys.readouterr()
    assert (raised.value.code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix(f"{example.__name__}: ").rstrip("\n")


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (GOOD, ("revew", "kind"), "has no column 'revew'; there are review, kind"),
        (GOOD, ("review", "label"), "has no column 'label'; there are review, kind"),
        (GOOD, (None, "kind"), "has several columns: say which one to read, --text COLUMN; there are review, kind"),
        (GOOD, ("review", None), "has several columns: say which one to read, --label COLUMN; there are review, kind"),
        (
            "review,kind\nfine,good\nnice,good\n",
            ("review", "kind"),
            "all rows have the kind 'good'; a classifier needs",
        ),
        (
            "review,kind\nfine,good\n  ,poor\n",
            ("review", "kind"),
            "line 3: review is empty; fill it, or remove the line",
        ),
        ("review,kind\nfine,good\nbad,\n", ("review", "kind"), "line 3: kind is empty; fill it, or remove the line"),
        (GOOD, ("kind", "review"), "review has 4 values in 4 rows; name a column of classes"),
        ("review,kind\n", ("review", "kind"), "has no rows below its header line"),
        ("", ("review", "kind"), "has no rows below its header line"),
        ("review,kind\nfine\n", ("review", "kind"), "line 2: 1 columns, and there are 2 names: review, kind"),
        (b"review,kind\ncaf\xe9,good\n", ("review", "kind"), "is no table of text in UTF-8: UnicodeDecodeError"),
        (
            'review,kind\n"never closed,good\n' + "x,poor\n" * 20000,
            ("review", "kind"),
            "is a quotation mark never closed?",
        ),
    ],
)
def test_refuses_a_table(
    content: str | bytes, columns: tuple[str | None, str | None], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "my.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = [
        part for name, value in zip(("--text", "--label"), columns, strict=True) if value for part in (name, value)
    ]
    line = refused(capsys, monkeypatch, "--data", file, *options, "--out", tmp_path / "out")
    assert line.startswith(f"{file}") and message in line


@pytest.mark.parametrize("name", ["nowhere.csv", "my.xlsx"])
def test_refuses_what_is_no_table(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.xlsx").write_bytes(b"PK")
    line = refused(capsys, monkeypatch, "--data", tmp_path / name, "--out", tmp_path / "out")
    assert str(tmp_path / name) in line


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(TEXT, st.sampled_from(["good", "poor"])), min_size=4, max_size=8))
def test_what_a_table_says_is_read(rows: list[tuple[str, str]]) -> None:
    """Whatever is in the texts: quotation marks, commas, any script."""
    import csv
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "my.csv"
        with file.open("w", encoding="utf-8", newline="") as opened:
            csv.writer(opened).writerows([("review", "kind"), *rows])
        if len({kind for _, kind in rows}) < 2:
            with pytest.raises(UsageError, match="needs two classes"):
                text_classification.table(file, "review", "kind")
        else:
            assert text_classification.table(file, "review", "kind") == rows


def test_a_text_of_a_hundred_thousand_characters_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "my.csv"
    file.write_text(GOOD + f"{'word ' * 20000},poor\n", encoding="utf-8")
    rows = text_classification.table(file, "review", "kind")
    tokenizer = tokenizer_in(minilm())
    sizes = [
        tuple(batch["input_ids"].shape) for batch in text_classification.Batches(tokenizer, rows, ["good", "poor"], 2)
    ]
    assert max(length for _, length in sizes) == text_classification.LENGTH


@pytest.mark.slow
def test_the_smallest_table_with_the_longest_text_ends_in_a_bundle(tmp_path: Path) -> None:
    file = tmp_path / "my.csv"
    file.write_text(f"review,kind\nfine,good\nnice,good\nbad,poor\n{'word ' * 20000},poor\n", encoding="utf-8")
    text_classification.main("tiny", tmp_path / "out", file, "review", "kind")
    assert Predictor(tmp_path / "out" / "bundle").predict("so so")[0]["label"] in ("good", "poor")


@pytest.mark.parametrize("example", [text_classification, question_answering, generation])
@pytest.mark.parametrize("content", [{}, {"config.json": json.dumps({"model_type": "bert"})}])
def test_refuses_a_folder_without_a_tokenizer(
    content: dict[str, str], example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    for name, text in content.items():
        (model / name).write_text(text, encoding="utf-8")
    line = refused(capsys, monkeypatch, "--model", model, "--out", tmp_path / "out", example=example)
    assert line.startswith(f"{model} holds no tokenizer that transformers loads")


def test_refuses_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(capsys, monkeypatch, "--model", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert line == f"there is no folder {tmp_path / 'nowhere'} with a tokenizer"


def test_refuses_a_folder_for_results_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"--out .*out cannot be written: NotADirectoryError"):
        folder(tmp_path / "file" / "out")


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    tokenizer_in(minilm()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="holds no model that transformers loads as AutoModel"):
        encoder("AutoModel", tmp_path, "tiny")
