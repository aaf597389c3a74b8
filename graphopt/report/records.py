"""What happened: one record a pass, the report that holds them together, and the graph before and after."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphopt.ir.cost import Cost
from graphopt.ir.graph import Graph, Node

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.lowering.relower import Reemission
    from graphopt.sensitivities import Sensitivity


@dataclass(frozen=True)
class Agreement:
    """How close one output is to the original's: SQNR in dB, cosine similarity, largest absolute difference."""

    output: str
    sqnr: float
    cosine: float
    max_error: float


@dataclass
class PassRecord:
    """The account of one pass: which sites it could change, which it declined and why, and what that did."""

    name: str
    text: str
    stage: str = ""
    eligible: list[str] = field(default_factory=list)
    """Labels of the sites that were considered; empty for passes that work on the whole graph."""
    declined: dict[str, str] = field(default_factory=dict)
    """Reasons by site label."""
    changes: int = 0
    """How often the graph was changed (replace and erase)."""
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    cost_before: Cost = field(default_factory=Cost)
    cost_after: Cost = field(default_factory=Cost)
    agreement: list[Agreement] = field(default_factory=list)
    """Against the original model's outputs on the example inputs, worst shape first counted."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Hits, tries, seconds and declined reasons of each rule that ran inside."""
    notes: list[str] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    """The damage site by site, where the pass looked at that first."""

    @property
    def changed(self) -> int:
        """Sites changed; for passes without sites, changes of the graph."""
        return sum(label not in self.declined for label in self.eligible) if self.eligible else self.changes


@dataclass
class Report:
    """Everything that is known about one optimization."""

    target: str = ""
    source: str = ""
    """What was handed in, in words."""
    pipeline: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know: what was assumed, specialized, repeated, left out."""
    passes: list[PassRecord] = field(default_factory=list)
    cost_before: Cost = field(default_factory=Cost)
    cost_after: Cost = field(default_factory=Cost)
    words_before: dict[str, int] = field(default_factory=dict)
    words_after: dict[str, int] = field(default_factory=dict)
    census: dict[str, int] = field(default_factory=dict)
    """Kernels that the engine really built, by name."""
    choices: list[dict[str, Any]] = field(default_factory=list)
    """Where a pattern had several legal forms: which was taken, and why."""
    reemission: Reemission | None = None
    """Of what came in quantized and is written anew: how far each site is from what it was."""
    agreement: list[Agreement] = field(default_factory=list)
    """The deployed result against the original, on the example inputs."""
    speed: list[dict[str, Any]] = field(default_factory=list)
    """By example shape, how many times as fast as the input: "shapes", "median", "low" and "high" (95%), "rounds"."""
    put_back: dict[str, str] = field(default_factory=dict)
    """By label, sites that are as they were because the model was slower with them changed, and by how much."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: numbers that JSON does not have (an SQNR of infinity) as text."""
        passes = [asdict(record) | {"changed": record.changed} for record in self.passes]
        account: dict[str, Any] = plain(asdict(self) | {"passes": passes})
        return account

    def __str__(self) -> str:
        from graphopt.report import text

        return text.report(self)

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.report(self)

    def _repr_html_(self) -> str:
        from graphopt.report import html

        return html.fragment(self)


def count_kinds(nodes: Iterable[Node]) -> dict[str, int]:
    """How many nodes of each kind, most frequent first."""
    return _ranked(node.kind for node in nodes)


@dataclass(frozen=True)
class DiffLine:
    """One line of a diff: mark is " " (on both sides), "-" (before only) or "+" (after only)."""

    mark: str
    text: str


@dataclass(frozen=True)
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
        pairs = {kind: (before.get(kind, 0), after.get(kind, 0)) for kind in sorted(before | after)}
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
        found: list[list[DiffLine] | int] = []
        for line, show in zip(self.lines, shown, strict=True):
            last = found[-1] if found else None
            if show and isinstance(last, list):
                last.append(line)
            elif show:
                found.append([line])
            elif isinstance(last, int):
                found[-1] = last + 1
            else:
                found.append(1)
        return found

    def text(self, context: int | None = 3) -> str:
        """The diff with `context` unchanged lines around each change (None: all of them)."""
        from graphopt.report import text

        return text.diff(self, context)

    def __str__(self) -> str:
        return self.text()

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


def _kinds(listing: str) -> dict[str, int]:
    return _ranked(match[1] for line in listing.splitlines() if (match := _KIND.match(line)))


def _ranked(kinds: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def plain(value: Any) -> Any:
    """Plain data of what holds dataclasses, as json.dumps writes standard JSON: infinity and NaN become text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
