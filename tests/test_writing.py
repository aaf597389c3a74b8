"""Files are whole at any moment, whoever writes them, and nothing of the user's is lost."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import graphopt
from graphopt import writing
from graphopt.errors import GraphError, UsageError
from tests.models import plain_run

ROOT = Path(__file__).parent.parent
X = torch.ones(2, 32)


def model(value: float) -> onnx.ModelProto:
    """x[n,32] @ W + b: W (4 KiB) goes to a file beside the model, b stays in it, and both hold `value` alone."""
    constants = {"W": np.full((32, 32), value, np.float32), "b": np.full((32,), value, np.float32)}
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 32]) for name in "xy")
    nodes = [onnx.helper.make_node("MatMul", ["x", "W"], ["h"]), onnx.helper.make_node("Add", ["h", "b"], ["y"])]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], stored)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture(scope="module")
def small() -> graphopt.Optimized:
    return graphopt.optimize(model(1.0))


def export(small: graphopt.Optimized, path: Path) -> Path:
    return small.export(path, external_data=True)


def output(path: Path) -> float:
    """What the model in a file makes of ones: 33 times its value."""
    return float(plain_run(str(path), {"x": X})[0].unique())


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def data(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.data"))


# --- what is no regular file ---------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        here = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere.onnx")


def make_circle(path: Path) -> None:
    path.symlink_to("other.onnx")
    path.with_name("other.onnx").symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_fifo, "out.onnx is a FIFO, which is never overwritten; name another file"),
        (make_socket, "out.onnx is a socket, which is never overwritten; name another file"),
        (make_device, "out.onnx is a device, which is never overwritten; name another file"),
        (make_dangling, "out.onnx is a link to nowhere.onnx, which is not there: name another file"),
        (make_circle, "out.onnx is a link that leads back to itself: name another file"),
        (Path.mkdir, "out.onnx is a folder; name another file"),
    ],
)
def test_what_is_no_regular_file_is_refused_and_stays(
    make: Callable[[Path], None], message: str, small: graphopt.Optimized, tmp_path: Path
) -> None:
    path = tmp_path / "out.onnx"
    make(path)
    before = {file.name: file.lstat().st_mode for file in tmp_path.iterdir()}
    with pytest.raises(GraphError) as caught:
        small.export(path)
    assert str(caught.value) == f"{tmp_path}/{message}"
    with pytest.raises(GraphError), writing.whole(path):
        pytest.fail("nothing is written")
    assert {file.name: file.lstat().st_mode for file in tmp_path.iterdir()} == before


def test_a_manifest_that_is_no_regular_file_is_refused(small: graphopt.Optimized, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.onnx.json")
    with pytest.raises(GraphError, match=r"out\.onnx\.json is a FIFO"):
        small.export(tmp_path / "out.onnx")
    assert names(tmp_path) == ["out.onnx.json"]


def test_a_link_is_followed(small: graphopt.Optimized, tmp_path: Path) -> None:
    for folder in ("real", "links"):
        (tmp_path / folder).mkdir()
    real, middle, link = tmp_path / "real" / "m.onnx", tmp_path / "links" / "b.onnx", tmp_path / "links" / "a.onnx"
    real.touch()
    middle.symlink_to(real)
    link.symlink_to("b.onnx")
    assert export(small, link) == real
    assert link.is_symlink() and middle.is_symlink() and not real.is_symlink()
    assert names(tmp_path / "links") == ["a.onnx", "b.onnx"]
    assert names(tmp_path / "real") == ["m.onnx", *(file.name for file in data(real.parent)), "m.onnx.json"]
    assert output(real) == 33


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "a.txt is no .onnx file, and onnxruntime writes .onnx: name it a.onnx"),
        ("model", "model has no suffix, and onnxruntime writes .onnx: name it model.onnx"),
        ("model.v2", "model.v2 is no .onnx file, and onnxruntime writes .onnx: name it model.onnx"),
    ],
)
def test_another_suffix(name: str, message: str, small: graphopt.Optimized, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        small.export(tmp_path / name)
    assert str(caught.value) == message and not names(tmp_path)


# --- names and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 245, 250])
def test_long_names(length: int, small: graphopt.Optimized, tmp_path: Path) -> None:
    path = tmp_path / ("n" * (length - 5) + ".onnx")
    for _ in range(2):
        export(small, path)
    assert len(names(tmp_path)) == 3 and len(data(tmp_path)) == 1
    assert output(path) == 33


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@given(mask=st.sampled_from([0o000, 0o022, 0o027, 0o077]), mode=st.sampled_from([0o600, 0o640, 0o604, 0o666]))
@settings(max_examples=8, deadline=None)
def test_the_mode_is_that_of_open_and_stays(mask: int, mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder, umask(mask):
        path, plain = Path(folder) / "a.bin", Path(folder) / "plain"
        plain.touch()
        for content in ("first", "second"):
            with writing.together(path) as (part,):
                part.unlink()  # as a library that writes through a file of its own
                part.touch(mode=0o600)
                part.write_text(content)
                part.with_name("beside").write_text(content)
            expected = plain.stat().st_mode if content == "first" else stat.S_IFREG | mode
            assert path.stat().st_mode == path.with_name("beside").stat().st_mode == expected
            path.chmod(mode)
        assert path.read_text() == "second" and names(Path(folder)) == ["a.bin", "beside", "plain"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), GraphError("why")])
def test_a_failed_write_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    path, other = tmp_path / "a.bin", tmp_path / "b.json"
    path.write_text("old")
    with pytest.raises(type(error)), writing.together(path, other) as (part, second):
        part.write_text("new")
        part.with_name("a.bin.data").write_text("new")
        second.write_text("new")
        raise error
    assert names(tmp_path) == ["a.bin"] and path.read_text() == "old"


def test_a_failed_move_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, move = tmp_path / "a.bin", Path.replace
    path.write_text("old")

    def replace(source: Path, place: Any) -> Any:
        if source.name == "a.bin":
            raise OSError(5, "Input/output error")
        return move(source, place)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="Input/output"), writing.together(path) as (part,):
        part.write_text("new")
        part.with_name("a.bin.data").write_text("new")
    assert names(tmp_path) == ["a.bin"] and path.read_text() == "old"


# --- weights beside the file ---------------------------------------------------------------------------------------


def test_the_file_of_weights_is_named_by_its_content(small: graphopt.Optimized, tmp_path: Path) -> None:
    path = export(small, tmp_path / "m.onnx")
    (weights,) = data(tmp_path)
    assert weights.name == f"m.onnx.{writing.digest_of(weights)}.data"
    export(graphopt.optimize(model(2.0)), path)
    (others,) = data(tmp_path)  # those of before are gone
    assert others != weights
    small.export(path, external_data=False)
    assert names(tmp_path) == ["m.onnx", "m.onnx.json"]


def test_a_model_over_itself_with_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(3.0), path, save_as_external_data=True, location="theirs.bin", size_threshold=64)
    theirs = (tmp_path / "theirs.bin").read_bytes()
    result = graphopt.optimize(path)
    for _ in range(2):
        export(result, path)
        assert output(path) == 99
        assert next(iter(result(X).values())).unique().item() == 99
        assert (tmp_path / "theirs.bin").read_bytes() == theirs and len(data(tmp_path)) == 1


KINDS = ("unused", "changed", "named elsewhere", "a link", "of another model", "not by digest")
"""What may lie beside a model: only the first is graphopt's to remove."""


def plant(kind: str, content: bytes, path: Path) -> Path:
    """A file beside `path` that looks like weights of an earlier export."""
    digest = hashlib.sha256(content).hexdigest()[:32]
    name = writing.data_name("other.onnx" if kind == "of another model" else path.name, digest)
    file = path.with_name("m.onnx.data" if kind == "not by digest" else name)
    if kind == "a link":
        real = path.with_name(f"real-{digest}")
        real.write_bytes(content)
        file.symlink_to(real)
    else:
        file.write_bytes(content + b"!" if kind == "changed" else content)
    if kind == "named elsewhere":
        path.with_name(f"copy-{digest}.onnx").write_bytes(b"head" + file.name.encode() + b"tail")
    return file


@given(kinds=st.lists(st.sampled_from(KINDS), max_size=6))
@settings(max_examples=40, deadline=None)
def test_only_unused_weights_that_graphopt_wrote_are_removed(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        planted = [(kind, plant(kind, f"weights {place}".encode(), path)) for place, kind in enumerate(kinds)]
        before = set(names(path.parent))
        with writing.together(path) as (part,):
            part.write_text("model")
        gone = before - set(names(path.parent))
        assert gone == {file.name for kind, file in planted if kind == "unused"}


# --- several processes ---------------------------------------------------------------------------------------------

PROCESSES, EXPORTS = 4, 6


def keep_exporting(small: graphopt.Optimized, path: Path, failures: Any) -> None:
    for _ in range(EXPORTS):
        try:
            export(small, path)
        except Exception as error:
            failures.put(repr(error))


def test_several_processes_export_to_one_path_while_another_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    results = [graphopt.optimize(model(float(value))) for value in range(1, PROCESSES + 1)]
    export(results[0], path)
    context = multiprocessing.get_context("fork")
    failures: Any = context.SimpleQueue()
    writers = [context.Process(target=keep_exporting, args=(one, path, failures)) for one in results]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers) or not seen:
        try:
            read = onnx.load(path)
        except (FileNotFoundError, onnx.checker.ValidationError):  # its weights were replaced: it is read again
            continue
        values = {float(value) for one in read.graph.initializer for value in np.unique(numpy_helper.to_array(one))}
        assert len(values) == 1, "weights and model are of two exports"
        seen += 1
    for writer in writers:
        writer.join()
    assert failures.empty() and all(writer.exitcode == 0 for writer in writers)
    assert names(tmp_path) == ["m.onnx", data(tmp_path)[0].name, "m.onnx.json"]
    onnx.checker.check_model(str(path))


# --- who writes ----------------------------------------------------------------------------------------------------

RENAMES = re.compile(r"os\.(replace|rename)\b|\.rename\(|mkstemp|NamedTemporaryFile|\.part\b[\"']|import shutil.*move")


def test_files_are_renamed_in_one_place() -> None:
    sources = [file for folder in ("graphopt", "passes", "backends") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)) for file in sources if RENAMES.search(file.read_text())}
    assert found <= {"graphopt/writing.py"}
    assert RENAMES.search("os.replace(part, path)") and RENAMES.search('name + ".part"')


# --- folders ---------------------------------------------------------------------------------------------------------

FOLDER = {"1/model.pb": "model", "1/mark.json": "{}", "1/variables/variables.index": "w"}


def written_folder(path: Path) -> None:
    with writing.whole_folder(path, "1/mark.json", lambda: ("1/model.pb", "1/variables/variables.*")) as part:
        for name, text in FOLDER.items():
            (part / name).parent.mkdir(exist_ok=True, parents=True)
            (part / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


@settings(max_examples=25, deadline=None)
@given(
    where=st.sampled_from(["1", "2", "1/variables", "1/assets", "."]),
    name=st.sampled_from(["mine.txt", "model.pb", "x.index"]),
)
def test_a_folder_is_replaced_only_where_it_holds_nothing_of_the_users(where: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as around:
        path = Path(around) / "m"
        written_folder(path)
        theirs = (Path(where) / name).as_posix()
        (path / theirs).parent.mkdir(exist_ok=True)
        (path / theirs).write_text("mine")
        before = contents(path)
        if theirs in FOLDER:
            written_folder(path)
            assert contents(path) == FOLDER
        else:
            with pytest.raises(GraphError, match=rf"m holds {theirs}, which was not written with it"):
                written_folder(path)
            assert contents(path) == before
        assert [file for file in Path(around).iterdir() if file != path] == []


@pytest.mark.parametrize("path", [".", "/", "..", "a/.."])
def test_what_has_no_name_is_no_place_for_a_file(path: str) -> None:
    with pytest.raises(UsageError, match=f"{path} has no name of its own: write to a file or folder in it"):
        writing.manifest_of(Path(path))
