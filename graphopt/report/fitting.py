"""How a table fits a width without splitting a word: columns wrap or are left out, and in the end rows become lists."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

GAP = 2
"""Blanks between two columns."""


@dataclass(frozen=True)
class Fitted:
    """A table that fits: the columns that it shows, by index, how wide each is, and the names of those left out."""

    columns: tuple[int, ...]
    widths: tuple[int, ...]
    left_out: tuple[str, ...]


def fitted(
    rows: Sequence[Sequence[str]], width: int, *, right: Collection[int], optional: Sequence[str] = ()
) -> Fitted | None:
    """How a table (its first row is the header) fits a width; None where a word would be split all the same.

    right: the columns of figures, by index, whose cells stay on one line. optional: the columns that may be left out,
    by name, the first to go first.
    """
    for number in range(len(optional) + 1):
        columns = [index for index, name in enumerate(rows[0]) if name not in optional[:number]]
        cells = [[row[index] for row in rows] for index in columns]
        whole = [max(map(cell_len, column)) for column in cells]
        least = [_least(column, index in right) for index, column in zip(columns, cells, strict=True)]
        free = width - GAP * (len(columns) - 1) - sum(least)
        if free >= 0:
            return Fitted(tuple(columns), tuple(_widened(least, whole, free)), tuple(optional[:number]))
    return None


def listed(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table as a list: the first cell of each row on a line of its own, and below it the others with their names."""
    header, *body = rows
    lines: list[str] = []
    for row in body:
        lines += wrapped(row[0], width)
        line = ""
        for pair in [f"{name}: {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell]:
            if line and cell_len(line) + 3 + cell_len(pair) <= width:
                line += f"   {pair}"
                continue
            lines += [line] if line else []
            *above, last = wrapped(pair, width - 2)
            lines += [f"  {part}" for part in above]
            line = f"  {last}"
        lines += [line] if line else []
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most a width, broken at blanks; a word wider than that is broken after its commas, or stays whole."""
    if cell_len(text) <= width:
        return [text]
    lines, line = list[str](), ""
    for word in text.split():
        parts = [word] if cell_len(word) <= width else re.findall(r"[^,]*,|[^,]+", word)
        for index, part in enumerate(parts):
            blank = " " if line and index == 0 else ""
            if line and cell_len(line) + len(blank) + cell_len(part) > width:
                lines.append(line)
                line, blank = "", ""
            line += blank + part
    return [*lines, line]


def _least(column: Sequence[str], figures: bool) -> int:
    """The least width of a column. figures: whether its cells, other than the header, stay on one line."""
    words = [word for cell in column for word in cell.split()]
    return max(map(cell_len, [*words, *(column[1:] if figures else ())]), default=0)


def _widened(least: Sequence[int], whole: Sequence[int], free: int) -> list[int]:
    """Widths from the least ones to the whole cells', as far as what is free goes; who needs less is served first."""
    widths = list(least)
    needs = sorted(range(len(least)), key=lambda index: whole[index] - least[index])
    for place, index in enumerate(needs):
        more = min(whole[index] - least[index], free // (len(needs) - place))
        widths[index] += more
        free -= more
    return widths
