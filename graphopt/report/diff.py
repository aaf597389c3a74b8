"""The graph before and after: two listings, aligned."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from graphopt.ir.graph import Graph

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class DiffLine:
    """One line of a diff: mark is " " (on both sides), "-" (before only) or "+" (after only)."""

    mark: str
    text: str


@dataclass(frozen=True, repr=False)
class GraphDiff:
    """Two listings of a graph (`Graph.text`), aligned.

    Lines are the same when they differ in nothing but the numbers of values: one more node would shift all of these.
    """

    before: str
    after: str

    @classmethod
    def of(cls, before: Graph, after: Graph) -> GraphDiff:
        return cls(before.text(), after.text())

    @cached_property
    def lines(self) -> list[DiffLine]:
        """Every line of both listings, once where it is on both sides (as it stands in `after`)."""
        return list(_aligned(self.before.splitlines(), self.after.splitlines()))

    @property
    def added(self) -> int:
        return sum(line.mark == "+" for line in self.lines)

    @property
    def removed(self) -> int:
        return sum(line.mark == "-" for line in self.lines)

    @property
    def unchanged(self) -> int:
        return sum(line.mark == " " for line in self.lines)

    @cached_property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """How many nodes of each kind there were before and are after, where that changed."""
        before, after = _kinds(self.before), _kinds(self.after)
        pairs = {kind: (before[kind], after[kind]) for kind in sorted(before | after)}
        return {kind: pair for kind, pair in pairs.items() if pair[0] != pair[1]}

    def sections(self, context: int | None = 3) -> list[list[DiffLine] | int]:
        """The lines, with runs of unchanged ones further than `context` from a change as their number (None: all)."""
        if context is None:
            return [self.lines]
        shown = [False] * len(self.lines)
        for index, line in enumerate(self.lines):
            if line.mark != " ":
                low, high = max(0, index - context), min(len(self.lines), index + context + 1)
                shown[low:high] = [True] * (high - low)
        sections: list[list[DiffLine] | int] = []
        for line, show in zip(self.lines, shown, strict=True):
            last = sections[-1] if sections else None
            if show and isinstance(last, list):
                last.append(line)
            elif show:
                sections.append([line])
            elif isinstance(last, int):
                sections[-1] = last + 1
            else:
                sections.append(1)
        return sections

    def text(self, context: int | None = 3) -> str:
        """The diff with `context` unchanged lines around each change (None: all of them)."""
        from graphopt.report import text

        return text.diff(self, context)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<GraphDiff: {self.removed} removed, {self.added} added, {self.unchanged} unchanged lines>"

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.diff(self)

    def _repr_html_(self) -> str:
        from graphopt.report import html

        return html.fragment(diff=self)


LONG = 2000
"""Lines above which difflib may skip frequent ones: without that its time grows with the square."""

_NUMBER = re.compile(r"%\d+")
_KIND = re.compile(r"^%\d+(?:, %\d+)* = ([^\s(]+)\(")


def _aligned(before: list[str], after: list[str]) -> Iterator[DiffLine]:
    matcher = difflib.SequenceMatcher(
        None,
        [_NUMBER.sub("%", line) for line in before],
        [_NUMBER.sub("%", line) for line in after],
        autojunk=max(len(before), len(after)) > LONG,
    )
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag == "equal":
            yield from (DiffLine(" ", line) for line in after[other_start:other_end])
            continue
        yield from (DiffLine("-", line) for line in before[start:end])
        yield from (DiffLine("+", line) for line in after[other_start:other_end])


def _kinds(listing: str) -> Counter[str]:
    return Counter(match[1] for line in listing.splitlines() if (match := _KIND.match(line)))
