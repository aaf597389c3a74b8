"""Rows of a sensitivity table that were measured before, in a file."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.ir.graph import Feeds, Graph, digest, update_digest
from graphopt.measure.machine import version
from graphopt.pipeline.context import Context
from graphopt.pipeline.reference import Evaluate
from graphopt.report.declines import Reason
from graphopt.report.records import Damage, Row, plain

FORMAT = 2
"""Of a line, and a part of its key: lines of another format are not read."""


def cache_key(graph: Graph, batches: Sequence[Feeds], context: Context, evaluate: Evaluate | None) -> str:
    """A digest of all that a cached row depends on."""
    compared = _batches_digest(batches)
    calibration = context.batches()
    seen = compared if calibration.once else _batches_digest(calibration)
    target = context.target.name
    facts = [FORMAT, version("graphopt"), digest(graph), compared, seen, target, evaluate is not None]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _batches_digest(batches: Iterable[Feeds]) -> str:
    found = hashlib.sha256()
    for feeds in batches:
        update_digest(found, feeds)
    return found.hexdigest()


class RowCache:
    """Rows in a file of JSON lines. Each is written when it is measured, so that an interrupted scan can go on."""

    def __init__(self, path: Path, key: str) -> None:
        """Reads the rows of `key`. Raises UsageError where the path is a folder, or in none."""
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{path} cannot be a cache: " + ("it is a folder" if path.is_dir() else "no such folder"))
        self.path, self.key = path, key
        self.rows: dict[tuple[str, tuple[str, ...]], Row] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        damaged = 0
        for line in lines:
            try:
                facts = json.loads(line)
                row = _row(facts) if facts["key"] == key else None
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            if row is not None:
                self.rows[row.setting, row.nodes] = row
        if damaged:
            text = f"{path}: {damaged} of {len(lines)} rows cannot be read; they are measured again"
            warnings.warn(text, stacklevel=4)
        if lines and not path.read_bytes().endswith(b"\n"):  # the last writer was cut off
            self._append("\n")

    def add(self, row: Row) -> None:
        self.rows[row.setting, row.nodes] = row
        self._append(json.dumps({"key": self.key, **plain(row)}) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def _row(facts: Any) -> Row:
    """The row of a line. Raises ValueError, TypeError or KeyError where it is something else."""
    damage = facts["damage"]
    figures = None if damage is None else {name: None if one is None else float(one) for name, one in damage.items()}
    row = Row(
        site=str(facts["site"]),
        nodes=tuple(map(str, facts["nodes"])),
        setting=str(facts["setting"]),
        damage=None if figures is None else Damage(**figures),  # type: ignore[arg-type]  # a bad one fails below
        declined=tuple(map(Reason.from_dict, facts["declined"])),
    )
    if row.damage is not None and None in (row.damage.sqnr, row.damage.cosine, row.damage.worst_cosine):
        raise ValueError("a figure is missing")
    return row
