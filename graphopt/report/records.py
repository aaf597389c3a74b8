"""What happened: one record a pass, the report that holds them together, and the graph before and after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from graphopt.analysis.propagation import Propagation
from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Node
from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.measure.timing import Ratio


@dataclass
class PassRecord:
    """The account of one pass: which sites it could change, which it declined and why, and what that did."""

    name: str
    text: str
    stage: str = ""
    eligible: list[str] = field(default_factory=list)
    """Labels of the sites that were considered; empty for passes that work on the whole graph."""
    declined: dict[str, Reason] = field(default_factory=dict)
    """Reasons by site label: sentences, each with the code and the values that it is made of."""
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

    def decline(self, label: str, why: Decline | str) -> None:
        """A site stays as it is."""
        if isinstance(why, str):
            why = Decline("told", sentence=str(why))
        self.declined[label] = Reason.of(why)

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
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    """Kernels that the engine really built, by name."""
    choices: list[dict[str, Any]] = field(default_factory=list)
    """Where a pattern had several legal forms: which was taken, and why."""
    relowering: Relowering | None = None
    """Of what came in quantized and is re-lowered: how far each site is from what it was."""
    agreement: list[Agreement] = field(default_factory=list)
    """The deployed result against the original, on the example inputs."""
    speed: list[dict[str, Any]] = field(default_factory=list)
    """By example shape, how many times as fast as the input: "shapes", "median", "low" and "high" (95%), "rounds"."""
    reverted: dict[str, Reason] = field(default_factory=dict)
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


def _ranked(kinds: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def plain(value: Any) -> Any:
    """Plain data of what holds dataclasses, as json.dumps writes standard JSON: infinity and NaN become text."""
    if isinstance(value, Reason):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


@dataclass
class BenchResult:
    """Ratios of one interleaved run: for each example shape, how many times faster than the original graph."""

    header: str
    rows: list[tuple[str, Mapping[str, Ratio]]] = field(default_factory=list)
    """(shapes, {"optimized": Ratio, "control": Ratio}); the control is the original against itself."""

    def __str__(self) -> str:
        from graphopt.report import text

        return text.bench(self)


@dataclass(frozen=True)
class Damage:
    """How far a changed model's outputs are from the unchanged one's; padding is left out.

    Of the output that is worst in each figure, among those that hold floats (of all, where none does).
    """

    sqnr: float
    """In dB, of the energies summed over all batches; inf where nothing moved, nan where an output holds NaN."""
    cosine: float
    """Each batch as one vector, the mean over the batches."""
    worst_cosine: float
    """Of the worst batch."""
    metric: float | None = None
    """What the user's `evaluate` says of the changed model; more is better."""

    @property
    def rank(self) -> float:
        """What sites are ordered by, the most harmful first: the metric where there is one, else the SQNR."""
        figure = self.sqnr if self.metric is None else self.metric
        return -math.inf if math.isnan(figure) else figure


@dataclass(frozen=True)
class Row:
    """One setting at one site: sites that share a weight change together, and are one."""

    site: str
    """Its label, unique in the table."""
    nodes: tuple[str, ...]
    """The names of its nodes."""
    setting: str
    """The pass as text."""
    damage: Damage | None = None
    """None where the pass declined."""
    declined: str = ""
    """Why it did."""


@dataclass(frozen=True)
class Sensitivity:
    """What `scan` found: the rows in the order of the graph, for each site in the order of the settings."""

    settings: list[str]
    rows: list[Row] = field(default_factory=list)
    batches: int = 0
    """How many the outputs were compared on."""
    baseline: float | None = None
    """The metric of the unchanged model."""

    def ranking(self, setting: object = None) -> list[Row]:
        """The rows of one setting (a pass, or its text; None is all) that were measured, the most harmful first."""
        wanted = self.settings if setting is None else [str(setting)]
        rows = [row for row in self.rows if row.damage is not None and row.setting in wanted]
        return sorted(rows, key=lambda row: row.damage.rank if row.damage else math.inf)

    def of(self, site: Node | str) -> dict[str, Damage]:
        """The damage by setting at one site, by its label or any of its nodes, where it was not declined."""
        name = site if isinstance(site, str) else site.name
        found = [row for row in self.rows if (row.site == name if isinstance(site, str) else name in row.nodes)]
        return {row.setting: row.damage for row in found if row.damage is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: infinity and NaN as text."""
        account: dict[str, Any] = plain(self)
        return account

    def __str__(self) -> str:
        from graphopt.report import text

        return text.sensitivity(self)

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.sensitivity(self)


@dataclass(frozen=True)
class OutputComparison:
    """One output of two models, over all batches."""

    output: str
    sqnr: float
    """In dB, of the worst batch; inf where all are equal."""
    cosine: float
    """Of the worst batch, taken as one vector."""
    max_error: float
    """The largest absolute difference."""
    top1: float | None
    """Share of rows, along the last axis, with the largest entry at the same place; None for outputs without rows."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, one entry an output."""

    outputs: list[OutputComparison]
    batches: int
    propagation: Propagation | None = None
    """The results of sites inside, where they were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: infinity and NaN as text."""
        account: dict[str, Any] = plain(self)
        inside = self.propagation
        if inside is not None:
            account["propagation"] |= {"lost": plain(inside.lost), "noisiest": plain(inside.noisiest)}
        return account

    def __str__(self) -> str:
        from graphopt.report import text

        return text.comparison(self)

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.comparison(self)


@dataclass(frozen=True)
class Relowering:
    """How far the sites of a quantized file are from what they were, each by itself and for the same integers."""

    distances: dict[str, float] = field(default_factory=dict)
    """By site, the largest distance of its result: in steps, or where it is float, in tolerances."""
    differs: float = 0.0
    """Of all the integers that sites gave, the share that are not what they were."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Sites that were not compared, and why."""

    @property
    def furthest(self) -> tuple[str, float] | None:
        """The site that is furthest from what it was, and how far."""
        return max(self.distances.items(), key=lambda one: one[1], default=None)

    def __str__(self) -> str:
        left_out = f"; not compared: {', '.join(self.left_out)}" if self.left_out else ""
        if self.furthest is None:
            return f"re-lowered, and no site was compared with what it was{left_out}"
        site, distance = self.furthest
        return (f"re-lowered, {len(self.distances)} sites give what they gave for the same integers, to within "
                f"{distance:.3g} steps ({site}); {self.differs:.3%} of the integers differ{left_out}")  # fmt: skip
