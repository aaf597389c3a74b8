"""The cache of timings on disk: what it keeps, what it forgets, and what becomes of a file that it cannot use."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from graphopt.measure import cache as timings
from graphopt.measure.cache import Timings, TimingsWarning

PUTS = 200


def key(number: int, who: str = "a") -> dict[str, object]:
    return {"engine": "onnxruntime 1.0", "threads": None, "shapes": [[number, 16]], "who": who}


def test_what_was_put_is_found_by_another_object(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "timings.sqlite"
    Timings(path).put(key(1), {"form": "Sum", "ratios": {"Sum": [1.0, 1.0, float("inf")]}})
    assert Timings(path).get(key(1)) == {"form": "Sum", "ratios": {"Sum": [1.0, 1.0, float("inf")]}}
    assert Timings(path).get(dict(reversed(key(1).items()))) is not None  # the order of a key's parts says nothing
    assert Timings(path).get(key(2)) is None


def test_a_later_value_takes_the_place_of_an_earlier(tmp_path: Path) -> None:
    cache = Timings(tmp_path / "timings.sqlite")
    cache.put(key(1), "first")
    cache.put(key(1), "second")
    assert cache.entries() == [(key(1), "second")]


def test_a_value_that_lasts_for_so_long_is_gone_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = Timings(tmp_path / "timings.sqlite")
    timings.put({"a": 1}, "short", 60)
    timings.put({"a": 2}, "long")
    assert timings.get({"a": 1}) == "short" and len(timings.entries()) == 2
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert timings.get({"a": 1}) is None
    assert timings.entries() == [({"a": 2}, "long")]


def test_clear_says_how_many_there_were(tmp_path: Path) -> None:
    cache = Timings(tmp_path / "timings.sqlite")
    for number in range(3):
        cache.put(key(number), number)
    assert (cache.clear(), cache.clear()) == (3, 0)
    assert cache.entries() == [] and cache.get(key(0)) is None


def test_what_was_not_used_for_longest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "MAX_ENTRIES", 3)
    seconds = iter(range(100))
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))
    cache = Timings(tmp_path / "timings.sqlite")
    for number in range(3):
        cache.put(key(number), number)
    assert cache.get(key(0)) == 0  # used again, so that 1 is the oldest
    cache.put(key(3), 3)
    assert [value for _, value in cache.entries()] == [3, 0, 2]


@pytest.mark.parametrize(("variables", "expected"), [
    ({"GRAPHOPT_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
    ({"XDG_CACHE_HOME": "/c"}, "/c/graphopt"),
    ({"HOME": "/me"}, "/me/.cache/graphopt"),
])  # fmt: skip
def test_where_the_cache_is(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRAPHOPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(timings.folder()) == expected
    assert timings.opened() is timings.opened() and str(timings.opened().path) == f"{expected}/timings.sqlite"


def test_a_file_that_is_no_database_is_replaced_with_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "timings.sqlite"
    path.write_text("this was never a database, only text of some length" * 100)
    cache = Timings(path)
    with pytest.warns(TimingsWarning, match=r"no cache of timings .*: it is replaced by an empty one") as told:
        assert cache.get(key(1)) is None
        cache.put(key(1), "kept")
    assert len(told) == 1
    assert Timings(path).get(key(1)) == "kept"


def test_a_database_with_damaged_pages_is_replaced_with_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "timings.sqlite"
    cache = Timings(path)
    for number in range(PUTS):
        cache.put(key(number), number)
    header = path.read_bytes()[:100]
    path.write_bytes(header + b"\xff" * (path.stat().st_size - 100))
    with pytest.warns(TimingsWarning, match=r"replaced by an empty one") as told:
        assert cache.get(key(1)) is None
        cache.put(key(1), "kept")
    assert len(told) == 1 and cache.entries() == [(key(1), "kept")]


def test_a_value_that_is_no_json_is_damage(tmp_path: Path) -> None:
    cache = Timings(tmp_path / "timings.sqlite")
    cache.put(key(1), 1)
    with closing(sqlite3.connect(cache.path)) as database, database:
        database.execute("UPDATE timings SET value = 'no json'")
    with pytest.warns(TimingsWarning, match=r"replaced by an empty one"):
        assert cache.get(key(1)) is None


def test_a_file_of_another_version_is_replaced_in_silence(tmp_path: Path) -> None:
    cache = Timings(tmp_path / "timings.sqlite")
    cache.put(key(1), 1)
    with closing(sqlite3.connect(cache.path)) as database:
        database.execute(f"PRAGMA user_version = {timings.VERSION + 1}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(key(1)) is None
        cache.put(key(2), 2)
    assert cache.entries() == [(key(2), 2)]


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions hold, also where tests run as root."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may enter: those of tmp_path they may not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions are those of POSIX")
@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_is_one_warning(folder: Path, exists: bool) -> None:
    path = folder / "timings.sqlite"
    if exists:
        Timings(path).put(key(1), "kept")
        path.chmod(0o444)
    folder.chmod(0o555)
    cache = Timings(path)
    with without_privileges(), pytest.warns(TimingsWarning, match=r"cannot be used .*nothing is kept") as told:
        assert cache.get(key(1)) == ("kept" if exists else None)  # what can be read still is
        cache.put(key(2), 2)
        cache.put(key(3), 3)
        assert cache.get(key(2)) is None and cache.entries() == [] and cache.clear() == 0
    assert len(told) == 1


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Timings(tmp_path / "file" / "timings.sqlite")
    with pytest.warns(TimingsWarning, match=r"cannot be used") as told:
        cache.put(key(1), 1)
        assert cache.get(key(1)) is None
    assert len(told) == 1 and (tmp_path / "file").read_text() == "in the way"


def write(path: Path, who: str) -> None:
    warnings.simplefilter("error")
    cache = Timings(path)
    for number in range(PUTS):
        cache.put(key(number, who), number)
        assert cache.get(key(number, who)) == number


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """The file is not there yet, so that they also make it at once."""
    path = tmp_path / "timings.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(path, who)) for who in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(Timings(path).entries()) == 3 * PUTS


def test_a_table_that_another_process_makes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the version and the lock, another process makes the table and writes to it."""
    path = tmp_path / "timings.sqlite"
    look = timings._version
    met: list[int] = []

    def meanwhile(database: sqlite3.Connection) -> int:
        found = look(database)
        if not met:
            met.append(found)
            Timings(path).put(key(1), "theirs")
        return found

    monkeypatch.setattr(timings, "_version", meanwhile)
    Timings(path).put(key(2), "ours")
    assert met == [0]
    assert [value for _, value in Timings(path).entries()] == ["ours", "theirs"]
