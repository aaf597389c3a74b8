"""What every case is given, and the cells of its tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.measure.timing import Ratio


class DataMissing(Exception):
    """A case needs a folder of data that was not given."""


@dataclass(frozen=True)
class Settings:
    """How to measure, and where to print."""

    data: Path | None
    """A folder of real data and weights; None where there is none."""
    threads: int
    rounds: int
    """Interleaved rounds of a timing."""
    medium: bool = False
    """Architectures of a medium size in place of small ones."""
    console: Console = field(default_factory=Console)
    out: Path | None = None
    """A folder for figures as JSON, and for plots; None writes none."""
    only: tuple[str, ...] = ()
    """The models of a case that are run; all where empty."""

    def chosen(self, name: str) -> bool:
        """Whether a model of the case is to be run."""
        return not self.only or name in self.only

    def file(self, *parts: str) -> Path | None:
        """A file or folder of the data; None without data. Raises DataMissing where data was given without it."""
        if self.data is None:
            return None
        path = self.data.joinpath(*parts)
        if not path.exists():
            raise DataMissing(f"{self.data} has no {'/'.join(parts)}")
        return path

    def required(self, *parts: str) -> Path:
        """As `file`. Raises DataMissing without data."""
        path = self.file(*parts)
        if path is None:
            raise DataMissing(f"it needs {'/'.join(parts)}: pass --data DIR, or set GRAPHOPT_DATA")
        return path


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column is text, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    return made


def checked(text: str, holds: bool) -> Text:
    """A figure with a bound: red where it falls short."""
    return Text(text, style="" if holds else "bold red")


def at_least(value: float, bound: float, digits: int = 4) -> Text:
    """The figure, red below the bound (NaN is below any)."""
    return checked(f"{value:.{digits}f}", value >= bound)


def times(ratio: Ratio) -> Text:
    """2.87 [2.80, 2.93] where the interval is clear of 1; a tie and a loss are named. Few rounds give no interval."""
    if math.isinf(ratio.high):
        return checked(f"{ratio.median:.2f}", ratio.median >= 1)
    verdict = "" if ratio.low > 1 else " slower" if ratio.high < 1 else " tie"
    return checked(f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{verdict}", ratio.high >= 1)
