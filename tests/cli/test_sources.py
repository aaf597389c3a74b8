"""Where the command line takes batches from: archives, tables of texts, functions, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from graphopt.cli.sources import batches, example, function
from graphopt.errors import UsageError
from graphopt.pipeline.batches import Batches
from tests.cli.test_cli import RANDOM, done, refused

WORDS = ["a", "the", "cat", "dog", "sat", "ran", '"', "quick"]
VOCABULARY = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
X = RANDOM.normal(size=(20, 16)).astype(np.float32)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=X, labels=np.arange(20))
    return tmp_path / "data.npz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a word tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    BertTokenizer(vocab=VOCABULARY).save_pretrained(folder)
    return folder


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- archives ------------------------------------------------------------------------------------------------------


def test_an_archive(archive: Path) -> None:
    found = batches(str(archive))
    assert list(found) == ["x", "labels"] and np.array_equal(found["x"], X)
    cut = batches(f"{archive}{{batch=8}}")
    assert [batch["x"].shape for batch in cut] == [(8, 16), (8, 16), (4, 16)]
    assert np.concatenate([batch["labels"] for batch in cut]).tolist() == list(range(20))


def test_shuffled_rows_keep_their_labels_and_are_the_same_each_time(archive: Path) -> None:
    first, second = batches(str(archive), shuffle=True), batches(str(archive), shuffle=True)
    order = first["labels"]
    assert order.tolist() != list(range(20)) and sorted(order) == list(range(20))
    assert np.array_equal(first["x"], X[order]) and np.array_equal(second["labels"], order)


def test_example_inputs(model: Path, archive: Path) -> None:
    assert torch.equal(example(str(archive), model)["x"], torch.from_numpy(X))
    assert torch.equal(example(f"{archive}{{batch=2}}", model)["x"], torch.from_numpy(X[:2]))


# --- tables --------------------------------------------------------------------------------------------------------


def decoded(tokenizer: Path, ids: Any) -> list[str]:
    found: list[str] = BertTokenizer.from_pretrained(tokenizer).batch_decode(ids, skip_special_tokens=True)
    return found


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.tsv", ["idx\ttext\tlabel", "7\tthe cat sat\t1", '8\tdog " ran\t0', "9\tcat\t2"]),
        ("a.csv", ["idx,text,label", "7,the cat sat,1", '8,"dog "" ran",0', "9,cat,2"]),
    ],
)
def test_a_table(name: str, lines: list[str], tokenizer: Path, tmp_path: Path) -> None:
    table = write(tmp_path / name, *lines)
    found = batches(f"{table}{{text=text label=label tokenizer={tokenizer} batch=2}}")
    first, second = found
    assert len(found) == 2 and [batch["labels"].tolist() for batch in found] == [[1, 0], [2]]
    assert decoded(tokenizer, first["input_ids"]) == ["the cat sat", 'dog " ran']
    assert first["attention_mask"].shape == (2, 5) and second["input_ids"].shape == (1, 3)
    assert second["labels"].dtype == second["input_ids"].dtype == torch.int64


def test_pairs_of_texts_cut_and_padded_to_a_length(tokenizer: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "a.tsv", "one\ttwo", "the cat sat\tthe dog ran the cat", "a\tb")
    options = f"text=[one,two] tokenizer={tokenizer} max_length=8 padding=max_length"
    (batch,) = batches(f"{table}{{{options}}}")
    expected = BertTokenizer.from_pretrained(tokenizer)(
        ["the cat sat", "a"], ["the dog ran the cat", "b"], padding="max_length", truncation=True, max_length=8,
        return_tensors="pt",
    )  # fmt: skip
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "cells", "expected"),
    [
        ("", "0 1", torch.tensor([0, 1])),
        ("", "0.5 1", torch.tensor([0.5, 1.0])),
        ("label=label", "-1 3", torch.tensor([-1, 3])),
        ("classes=[no,yes]", "yes no", torch.tensor([1, 0])),
        ("classes=[1,0]", "0 1", torch.tensor([1, 0])),
    ],
)
def test_labels_of_a_table(options: str, cells: str, expected: Any, tokenizer: Path, tmp_path: Path) -> None:
    rows = [f"cat\t{cell}" for cell in cells.split()]
    table = write(tmp_path / "a.tsv", "sentence\tlabel", *rows)
    (batch,) = batches(f"{table}{{text=sentence tokenizer={tokenizer} {options}}}")
    assert torch.equal(batch["labels"], expected) and batch["labels"].dtype == expected.dtype


def test_a_table_without_a_header_line(tokenizer: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "a.tsv", "x\t1\tcat", "y\t0\tdog")
    (batch,) = batches(f"{table}{{columns=[id,label,text] text=text tokenizer={tokenizer}}}")
    assert decoded(tokenizer, batch["input_ids"]) == ["cat", "dog"] and batch["labels"].tolist() == [1, 0]


def test_a_table_without_labels(tokenizer: Path, tmp_path: Path) -> None:
    (batch,) = batches(f"{write(tmp_path / 'a.csv', 'text', 'cat')}{{text=text tokenizer={tokenizer}}}")
    assert "labels" not in batch


def test_a_tokenizer_without_padding_pads_with_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pad_token": None, "eos_token": "[SEP]"}
    BertTokenizer(vocab=VOCABULARY, **options).save_pretrained(tmp_path / "decoder")
    table = write(tmp_path / "a.csv", "text", "cat", "the cat")
    (batch,) = batches(f"{table}{{text=text tokenizer={tmp_path / 'decoder'}}}")
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=5), st.integers(-9, 9)),
        min_size=1,
        max_size=9,
    ),
    size=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_row_comes_once_with_its_label(
    rows: list[tuple[list[str], int]], size: int, shuffle: bool, tokenizer: Path, tmp_path: Path
) -> None:
    table = write(tmp_path / "a.tsv", "text\ty", *(f"{' '.join(words)}\t{label}" for words, label in rows))
    found = batches(f"{table}{{text=text label=y tokenizer={tokenizer} batch={size}}}", shuffle=shuffle)
    seen = [
        pair for batch in found
        for pair in zip(decoded(tokenizer, batch["input_ids"]), batch["labels"].tolist(), strict=True)
    ]  # fmt: skip
    given_rows = [(" ".join(words), label) for words, label in rows]
    assert seen == given_rows if not shuffle else sorted(seen) == sorted(given_rows)
    assert len(found) == -(-len(rows) // size)


# --- functions -----------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from beside import SIZE

FEEDS = [{"x": torch.full((2, SIZE), float(number))} for number in range(3)]
ONCE = iter(FEEDS)
NUMBER = 3
with open(__file__ + ".log", "a") as log: log.write("run ")

def whole(): return FEEDS
def generated():
    for feeds in FEEDS: yield feeds
def once(): return ONCE
def nothing(): pass
def failing(): raise OSError("the disk is gone")
def score(model): return float(model(FEEDS[0])["y"].sum())
def takes(one): return one
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(tmp_path / "beside.py", "SIZE = 16")
    return write(tmp_path / "random.py", SCRIPT)  # named as a module of the standard library


@pytest.mark.parametrize("name", ["whole", "generated"])
def test_a_function_gives_batches_again_and_again(name: str, script: Path) -> None:
    found = batches(f"{script}:{name}")
    for _ in range(3):
        assert [batch["x"][0, 0].item() for batch in found] == [0, 1, 2]
    assert "shuffle" in dir(__import__("random"))


def test_a_script_runs_once_for_all_that_name_it(script: Path) -> None:
    batches(f"{script}:whole")
    function(f"{script}:score")
    assert script.with_name("random.py.log").read_text() == "run "


def test_a_function_that_gives_out_once(script: Path) -> None:
    once = Batches(batches(f"{script}:once"), function_inputs(), name="training")
    assert len(list(once)) == 3
    with pytest.raises(UsageError, match=r"training holds no batch .*used up before"):
        list(once)


def function_inputs() -> Any:
    from graphopt.capture.sources import Declared

    return [Declared("x", ("batch", 16), torch.float32)]


def test_a_function_of_a_model(script: Path) -> None:
    score = function(f"{script}:score")
    assert score(lambda feeds: {"y": feeds["x"] + 1}) == 32
    with pytest.raises(UsageError, match=r"your function score in .*random\.py failed: TypeError"):
        score(3)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/none.npz", "there is no file {folder}/none.npz"),
        ("{folder}/none.tsv{{text=text}}", "there is no file {folder}/none.tsv"),
        ("{folder}/none.py:f", "there is no file {folder}/none.py"),
        ("{folder}/text.npz", "text.npz is not an .npz file of plain arrays"),
        ("{folder}/pickled.npz", "pickled.npz is not an .npz file of plain arrays"),
        ("{folder}/a.npy", "a.npy has no names of inputs, or may hold a pickle, which is never loaded; give an .npz"),
        ("{folder}/a.pkl", "a.pkl has no names of inputs, or may hold a pickle"),
        ("{folder}", "is no source of batches; give an .npz, .csv or .tsv file, or script.py:function"),
        ("{folder}/random.py", "say which function returns the batches, as in {folder}/random.py:batches"),
        ("{folder}/random.py:hole", "random.py has no function 'hole'; did you mean 'whole'?"),
        ("{folder}/random.py:", "is no function; give script.py:function"),
        ("{folder}/random.py:NUMBER", "NUMBER in {folder}/random.py is a int; name a function"),
        ("{folder}/random.py:nothing", "random.py:nothing returned None; it must return batches"),
        ("{folder}/random.py:failing", "your function failing in {folder}/random.py failed: OSError: the disk is gone"),
        ("{folder}/random.py:takes", "your function takes in {folder}/random.py failed: TypeError"),
        ("{folder}/broken.py:f", "broken.py cannot be loaded: SyntaxError"),
        ("{folder}/leaving.py:f", "leaving.py exits when it is loaded"),
        ("{folder}/data.npz{{bacth=3}}", "data.npz has no option 'bacth'; did you mean 'batch'?"),
        ("{folder}/data.npz{{batch=0}}", "data.npz: batch is 0; give a whole number, at least 1"),
        ("{folder}/uneven.npz{{batch=2}}", "uneven.npz: axis 0 must hold the same number of samples in every array"),
        ("{folder}/data.npz{{batch=}}", "data.npz{{batch=}}, at character 8: cannot read '}}' in '{{batch=}}'"),
        ("{folder}/a.tsv", "a.tsv: say which columns hold the texts, text=NAME or text=[NAME,NAME]; there are text, y"),
        ("{folder}/a.tsv{{text=txet}}", "a.tsv has no column 'txet'; did you mean 'text'? (columns=[...] names those"),
        ("{folder}/a.tsv{{text=text label=lable}}", "a.tsv has no column 'lable'; there are text, y"),
        ("{folder}/a.tsv{{text=text label=y}}", "a.tsv, line 3: y is 'no'; give numbers, or the names of classes"),
        ("{folder}/a.tsv{{text=text label=y classes=[1,on]}}", "a.tsv, line 3: y is 'no'; did you mean 'on'?"),
        ("{folder}/a.tsv{{text=text}}", "a.tsv: name the folder of the model's tokenizer, tokenizer=FOLDER"),
        ("{folder}/a.tsv{{text=text tokenizer=nowhere}}", "a.tsv: there is no folder nowhere with a tokenizer"),
        ("{folder}/a.tsv{{text=text tokenizer={folder}}}", "{folder} holds no tokenizer that transformers loads"),
        ("{folder}/a.tsv{{text=text tokenizer={folder}/bare}}", "loads: it has no vocabulary; save one there with"),
        ("{folder}/a.tsv{{text=text tokenizer={tokenizer} padding=left}}", "padding is 'left'; give longest"),
        ("{folder}/a.tsv{{text=text tokenizer={tokenizer} padding=max_length}}", "say how long texts are padded to be"),
        ("{folder}/a.tsv{{text=text tokenizer={tokenizer} max_length=-1}}", "a.tsv: max_length is -1; give a whole"),
        ("{folder}/a.tsv{{text=text batch=two}}", "a.tsv: batch is 'two'; give a whole number, at least 1"),
        ("{folder}/a.tsv{{columns=[a,b,c] text=a}}", "a.tsv, line 1: 2 columns, and there are 3 names: a, b, c"),
        ("{folder}/ragged.tsv{{text=text}}", "ragged.tsv, line 2: 3 columns, and there are 2 names: text, y"),
        ("{folder}/header.csv{{text=text}}", "header.csv has no rows below its header line"),
        ("{folder}/latin.csv{{text=text}}", "latin.csv is no table of text in UTF-8: UnicodeDecodeError"),
        ("{folder}/open.csv{{text=text}}", "open.csv, line 6554: field larger than field limit (131072); is a quota"),
    ],
)
def test_refuses(source: str, message: str, tokenizer: Path, script: Path, archive: Path, tmp_path: Path) -> None:
    write(tmp_path / "text.npz", "no archive")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    np.savez(tmp_path / "uneven.npz", x=X, labels=np.arange(3))
    np.save(tmp_path / "a.npy", X)
    write(tmp_path / "broken.py", "def f(:")
    write(tmp_path / "leaving.py", "raise SystemExit(3)")
    write(tmp_path / "a.tsv", "text\ty", "cat\t1", "dog\tno")
    write(tmp_path / "ragged.tsv", "text\ty", "cat\t1\t2")
    write(tmp_path / "header.csv", "text,y")
    (tmp_path / "bare").mkdir()
    write(tmp_path / "bare" / "config.json", '{"model_type": "bert"}')
    write(tmp_path / "open.csv", "text,y", '"a quotation mark that is never closed,1', *["twenty characters,1"] * 9000)
    (tmp_path / "latin.csv").write_bytes(b"text\ncaf\xe9")
    places = {"folder": tmp_path, "tokenizer": tokenizer}
    with pytest.raises(UsageError) as caught:
        for _ in batches(source.format(**places)):
            pass
    assert message.format(**places) in str(caught.value)


def test_without_transformers_the_extra_is_named(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    table = write(tmp_path / "a.tsv", "text", "cat")
    with pytest.raises(UsageError, match=r"texts need transformers: pip install 'graphopt\[demo\]'"):
        batches(f"{table}{{text=text tokenizer={tokenizer}}}")


# --- the commands --------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a command after its arguments were read."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A run of `graphopt optimize`: what it asks of `graphopt.optimize`."""
    seen: dict[str, Any] = {}

    def fake(*arguments: Any, **options: Any) -> None:
        seen.update(options)
        raise _Stop("asked")

    monkeypatch.setattr("graphopt.api.optimize", fake)

    def ask(*arguments: object) -> dict[str, Any]:
        assert "_Stop: asked" in refused(1, "optimize", *arguments, "--dry-run")
        return seen

    return ask


def test_optimize_passes_on_what_is_given(
    asked: Callable[..., dict[str, Any]], model: Path, archive: Path, script: Path, tmp_path: Path
) -> None:
    found = asked(
        model, "--calibration", archive, "--training", archive, "--inputs", f"{archive}{{batch=4}}",
        "--evaluate", f"{script}:score", "--teacher", model, "--checkpoint", tmp_path / "state",
    )  # fmt: skip
    assert np.array_equal(found["calibration"]["x"], X)
    assert sorted(found["training"]["labels"]) == list(range(20)) and not np.array_equal(found["training"]["x"], X)
    assert found["example_inputs"]["x"].shape == (4, 16)
    assert found["evaluate"](lambda feeds: {"y": feeds["x"] + 1}) == 32
    assert (found["teacher"], found["checkpoint"]) == (model, tmp_path / "state")


def test_optimize_passes_on_nothing_else(asked: Callable[..., dict[str, Any]], model: Path) -> None:
    assert not {"training", "teacher", "checkpoint", "evaluate", "example_inputs", "calibration"} & set(asked(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training", "{folder}/none.npz"], "there is no file {folder}/none.npz"),
        (["--evaluate", "{folder}/data.npz"], "data.npz' is no function; give script.py:function"),
        (["--teacher", "{folder}/none.onnx"], "there is no file {folder}/none.onnx"),
        (["--checkpoint", "{folder}/data.npz"], "data.npz is a file; name a folder for the checkpoints"),
        (["--inputs", "{folder}/other.npz"], "inputs batch 0 has no 'x'; there are y"),
    ],
)
def test_optimize_refuses(arguments: list[str], message: str, model: Path, archive: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", y=X)
    line = refused(2, "optimize", model, "--dry-run", *(one.format(folder=tmp_path) for one in arguments))
    assert message.format(folder=tmp_path) in line


def test_every_command_reads_functions(model: Path, script: Path, tmp_path: Path) -> None:
    source, small = f"{script}:generated", tmp_path / "small.onnx"
    done("optimize", model, "-o", small, "--passes", "quantize{scheme=static}", "--calibration", source,
         "--inputs", source)  # fmt: skip
    assert json.loads(done("compare", model, small, "--data", source, "--json"))["batches"] == 3
    shown = done("sensitivity", model, "--setting", "quantize{scheme=dynamic}", "--calibration", source)
    assert "over 3 batches" in shown


def test_help_shows_the_forms_of_a_source() -> None:
    for command in ("optimize", "sensitivity", "compare", "bench"):
        shown = " ".join(done(command, "--help").split())
        assert "data.tsv{text=[question,sentence] label=label tokenizer=FOLDER" in shown
        assert "script.py:function" in shown


