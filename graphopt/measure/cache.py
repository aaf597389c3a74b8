"""The cache of timings: one SQLite file on disk, which several processes may read and write at once."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

MAX_ENTRIES = 20_000
"""Entries that are kept, about 10 MB; the least recently used go."""

UNSURE = 3600.0
"""Seconds to keep figures of an unsteady machine: a later run may find it quieter."""

VERSION = 3
"""Of the table and the keys and values in it; a file of another version is replaced by an empty one."""

WAIT = 10.0
"""Seconds to wait for another process that is writing."""


class TimingsWarning(UserWarning):
    """The cache on disk cannot be used; everything is measured again."""


def folder() -> Path:
    """Where the cache is: the environment variable GRAPHOPT_CACHE, else graphopt in the user's cache folder.

    By platformdirs, that is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on
    Windows.
    """
    given = os.environ.get("GRAPHOPT_CACHE")
    return Path(given) if given else user_cache_path("graphopt", appauthor=False)


def opened() -> Timings:
    """The user's cache; the same object at each call, so that a warning about it comes once in a process."""
    return _at(folder() / "timings.sqlite")


@cache
def _at(path: Path) -> Timings:
    return Timings(path)


class Timings:
    """A persistent mapping. Where the file cannot be read or written, there is a warning and the cache seems empty.

    A key is a mapping of all that a timing depends on: engine, version, CPU, threads, form, shapes. Keys and values are
    JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._usable = True

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The value of a key, or None."""
        with self._open() as database:
            if database is None:
                return None
            found = database.execute(
                "SELECT value FROM timings WHERE key = ? AND expires > ?", (_text(key), time.time())
            ).fetchone()
            if found is None:
                return None
            with suppress(sqlite3.Error):  # a read-only file can still be read
                database.execute("UPDATE timings SET used = ? WHERE key = ?", (time.time(), _text(key)))
            return json.loads(found[0])
        return None

    def put(self, key: Mapping[str, Any], value: Any, lasts: float = math.inf) -> None:
        """Set the value of a key. lasts: seconds until it expires."""
        with self._open() as database:
            if database is not None:
                now = time.time()
                row = _text(key), json.dumps(value), now, now + lasts
                database.execute("INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?)", row)
                recent = "SELECT key FROM timings ORDER BY used DESC LIMIT ?"
                database.execute(f"DELETE FROM timings WHERE key NOT IN ({recent})", (MAX_ENTRIES,))

    def entries(self) -> list[tuple[dict[str, Any], Any]]:
        """All keys and values that have not expired, the most recently used first."""
        with self._open() as database:
            if database is not None:
                rows = database.execute(
                    "SELECT key, value FROM timings WHERE expires > ? ORDER BY used DESC", (time.time(),)
                ).fetchall()
                return [(json.loads(key), json.loads(value)) for key, value in rows]
        return []

    def clear(self) -> int:
        """Delete all entries; returns how many there were."""
        with self._open() as database:
            if database is not None:
                return int(database.execute("DELETE FROM timings").rowcount)
        return 0

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection | None]:
        """The database, in one transaction; None once it cannot be used.

        A damaged file is replaced by an empty one, with a warning. An SQL or JSON error inside ends the block silently.
        """
        if not self._usable:
            yield None
            return
        try:
            database = self._connect()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            yield None
            return
        try:
            with database:
                yield database
        except (sqlite3.Error, json.JSONDecodeError) as error:
            if _is_damage(error):
                self._start_over(error)
            else:
                self._give_up(error)
        finally:
            database.close()

    def _connect(self) -> sqlite3.Connection:
        with suppress(OSError):  # a folder that cannot be made, or is read-only, fails below
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _prepared(self.path)
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise
            self._start_over(error)
            return _prepared(self.path)

    def _start_over(self, error: Exception) -> None:
        what = f"{self.path} is no cache of timings ({error}): it is replaced by an empty one"
        warnings.warn(what, TimingsWarning, 2)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as failed:
            self._give_up(failed)

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        warnings.warn(f"{self.path} cannot be used ({error}): nothing is kept of what is measured", TimingsWarning, 2)


def _is_damage(error: Exception) -> bool:
    """Whether the file is damaged; an OperationalError means that it is locked, read-only, or that the disk is full."""
    return not isinstance(error, sqlite3.OperationalError)


def _prepared(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=WAIT)
    try:
        if _version(database) != VERSION:
            database.execute("BEGIN IMMEDIATE")
            if _version(database) != VERSION:  # no other process has made the table meanwhile
                database.execute("DROP TABLE IF EXISTS timings")
                database.execute("CREATE TABLE timings (key TEXT PRIMARY KEY, value TEXT NOT NULL, used REAL NOT NULL, "
                                 "expires REAL NOT NULL)")  # fmt: skip
                database.execute(f"PRAGMA user_version = {VERSION}")
            database.commit()
        return database
    except BaseException:
        database.close()
        raise


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
