"""What happened: one record a pass, and the report that holds them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.cost import Cost


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

    @property
    def changed(self) -> int:
        """Sites changed; for passes without sites, changes of the graph."""
        return len(self.eligible) - len(self.declined) if self.eligible else self.changes


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
    agreement: list[Agreement] = field(default_factory=list)
    """The deployed result against the original, on the example inputs."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {
            "passes": [asdict(record) | {"changed": record.changed} for record in self.passes],
        }

    def __str__(self) -> str:
        from graphopt.render import text

        return text.report(self)


def count_kinds(nodes: Any) -> dict[str, int]:
    """How many nodes of each kind, most frequent first."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.kind] = counts.get(node.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


Summary = Mapping[str, Any]
