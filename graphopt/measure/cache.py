"""What was measured before, on disk: one SQLite file, which several processes may write at once."""

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

MOST = 20_000
"""Entries that are kept, about 10 MB; what was not used for longest goes."""

UNSURE = 3600.0
"""Seconds to keep what a machine was too unsteady to tell: a later run may meet a quieter one."""

VERSION = 3
"""Of the table and of what it holds; a file of another one is begun anew."""

WAIT = 10.0
"""Seconds that one process waits for another to have written."""


class TimingsWarning(UserWarning):
    """The cache on disk cannot be used; everything is measured as if there were none."""


def folder() -> Path:
    """Where the cache is: GRAPHOPT_CACHE, or graphopt in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    given = os.environ.get("GRAPHOPT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def opened() -> Timings:
    """The user's cache, the same object each time: that it cannot be used is said once in a process."""
    return _at(folder() / "timings.sqlite")


@cache
def _at(path: Path) -> Timings:
    return Timings(path)


class Timings:
    """Figures by key, in a file that outlives the process. What cannot be read or written costs a warning, no more.

    A key is a mapping of what a timing depends on: engine, version, CPU, threads, form, shapes. A value is JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._usable = True

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """What was kept under a key, or None."""
        with self._open() as database:
            if database is None:
                return None
            found = database.execute(
                "SELECT value FROM timings WHERE key = ? AND expires > ?", (_text(key), time.time())
            ).fetchone()
            if found is None:
                return None
            with suppress(sqlite3.Error):  # a file that can only be read still tells what it holds
                database.execute("UPDATE timings SET used = ? WHERE key = ?", (time.time(), _text(key)))
            return json.loads(found[0])
        return None

    def put(self, key: Mapping[str, Any], value: Any, lasts: float = math.inf) -> None:
        """Keep a value under a key for so many seconds, in place of what was there."""
        with self._open() as database:
            if database is not None:
                now = time.time()
                row = _text(key), json.dumps(value), now, now + lasts
                database.execute("INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?)", row)
                database.execute(
                    "DELETE FROM timings WHERE key NOT IN (SELECT key FROM timings ORDER BY used DESC LIMIT ?)", (MOST,)
                )

    def entries(self) -> list[tuple[dict[str, Any], Any]]:
        """Every key and its value that still holds, what was used last first."""
        with self._open() as database:
            if database is not None:
                rows = database.execute(
                    "SELECT key, value FROM timings WHERE expires > ? ORDER BY used DESC", (time.time(),)
                ).fetchall()
                return [(json.loads(key), json.loads(value)) for key, value in rows]
        return []

    def clear(self) -> int:
        """Forget everything; how many entries there were."""
        with self._open() as database:
            if database is not None:
                return int(database.execute("DELETE FROM timings").rowcount)
        return 0

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection | None]:
        """The database inside one transaction; None once it cannot be used.

        A file that turns out to be no cache is begun anew, with a warning. What fails inside ends the block there.
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
                self._begin_anew(error)
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
            self._begin_anew(error)
            return _prepared(self.path)

    def _begin_anew(self, error: Exception) -> None:
        warnings.warn(f"{self.path} is no cache of timings ({error}): it is begun anew", TimingsWarning, 2)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as failed:
            self._give_up(failed)

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        warnings.warn(f"{self.path} cannot be used ({error}): nothing is kept of what is measured", TimingsWarning, 2)


def _is_damage(error: Exception) -> bool:
    """Whether the file is to blame; an OperationalError tells that it is locked, read-only, or on a full disk."""
    return not isinstance(error, sqlite3.OperationalError)


def _prepared(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=WAIT)
    try:
        if _version(database) != VERSION:
            database.execute("BEGIN IMMEDIATE")
            if _version(database) != VERSION:  # nor did another process make the table in between
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
