"""Plain records of what is reported: a run and its passes, timings, sensitivities, comparisons."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt import writing
from graphopt.analysis.propagation import Propagation
from graphopt.errors import GraphError, UsageError, outer_door
from graphopt.ir.cost import Cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Node
from graphopt.report.agreements import Agreement
from graphopt.report.declines import Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.measure.timing import Ratio
    from graphopt.report.diff import GraphDiff


@dataclass
class PassRecord:
    """One pass: the sites that it considered, those that it declined and why, and its effect on cost and outputs."""

    name: str
    text: str
    stage: str = ""
    eligible: list[str] = field(default_factory=list)
    """Labels of the sites that were considered; empty for passes that work on the whole graph."""
    declined: dict[str, Reason] = field(default_factory=dict)
    """The reason by site label: a sentence, with its code and its values."""
    changes: int = 0
    """How often the graph was changed (replace and erase)."""
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    cost_before: Cost = field(default_factory=Cost)
    cost_after: Cost = field(default_factory=Cost)
    agreement: list[Agreement] = field(default_factory=list)
    """Outputs against the original model's on the example inputs, of the worst shape."""
    rules: dict[str, Any] = field(default_factory=dict)
    """The log of each rewrite rule that ran inside: tries, hits, seconds, declined matches (`ir.rewrite.RuleLog`)."""
    notes: list[str] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    """Of a pass that trains: one entry for each step ("step", "loss", its terms, "lr") and each evaluation ("step",
    "metric"), in order."""
    sensitivity: Sensitivity | None = None
    """The damage by site, where the pass measured that first."""

    def decline(self, label: str, why: Decline | str) -> None:
        """Record that a site stays as it is, and why. A sentence is accepted in place of a code."""
        if isinstance(why, str):
            why = Decline("told", sentence=str(why))
        self.declined[label] = Reason.of(why)

    @property
    def changed(self) -> int:
        """Sites changed; for passes without sites, changes of the graph."""
        return sum(label not in self.declined for label in self.eligible) if self.eligible else self.changes


@dataclass(repr=False)
class Report:
    """One optimization, from what was handed in to what runs on the target."""

    target: str = ""
    source: str = ""
    """What was handed in: a file's name, or the class of a module."""
    pipeline: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know: what was assumed about the inputs, specialized, or not done."""
    passes: list[PassRecord] = field(default_factory=list)
    cost_before: Cost = field(default_factory=Cost)
    cost_after: Cost = field(default_factory=Cost)
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    """The kernels that the engine built, by name."""
    choices: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each rule of the target: its sites and declines; of several forms, the timings and the choice."""
    relowering: Relowering | None = None
    """Of a model that came in quantized: how far each re-lowered site is from what it was."""
    agreement: list[Agreement] = field(default_factory=list)
    """The deployed result against the original, on the example inputs: the worst of each output."""
    agreement_by_shapes: dict[str, list[Agreement]] = field(default_factory=dict)
    """The same by the shapes of the example inputs."""
    agreement_by_length: dict[str, list[Agreement]] = field(default_factory=dict)
    """The same on calibration texts of several lengths, by their tokens; empty for models that take no tokens."""
    shipped: Shipped | None = None
    """Of a model that was trained: the metric of what was trained, and of what ships."""
    speed: list[dict[str, Any]] = field(default_factory=list)
    """By example shape, how many times as fast as the input: "shapes", "median", "low" and "high" (95%), "rounds"."""
    race: Race | None = None
    """Where several engines or precisions were asked for: how each of them did."""
    roofline: list[Roofline] = field(default_factory=list)
    """By example shape, how much of a run the machine's limits explain; empty where these are not known."""
    reverted: dict[str, Reason] = field(default_factory=dict)
    """By label, the sites that stay as they were because the model was slower with them changed."""

    def set_speed(self, shapes: Iterable[str], ratios: Iterable[Ratio]) -> None:
        """Say how many times as fast the result is, by example shape."""
        self.speed = [
            {"shapes": text, "median": ratio.median, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds,
             "steady": ratio.steady}
            for text, ratio in zip(shapes, ratios, strict=True)
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: a reason as its code, values and sentence; infinity and NaN as text."""
        passes = [plain(record) | {"changed": record.changed} for record in self.passes]
        return dict(plain(self)) | {"passes": passes}

    def save(self, path: str | Path, diff: GraphDiff | None = None) -> None:
        """Write the report: by the suffix of the file a page (.html), plain text (.txt) or what `to_dict` says (.json).

        diff: shown on a page below the report, such as `Optimized.diff()`. Raises UsageError for another suffix, and
        GraphError where the file cannot be written; then nothing is.
        """
        path = Path(path)
        require_report_name(path)
        with outer_door(GraphError, f"{path} cannot be written"), writing.whole(path) as part:
            part.write_text(self._written(path.suffix, diff), encoding="utf-8")

    def _written(self, suffix: str, diff: GraphDiff | None) -> str:
        if suffix == ".html":
            from graphopt.report import html

            return html.page(self, diff, f"{Path(self.source).name} by graphopt")
        return f"{self}\n" if suffix == ".txt" else json.dumps(self.to_dict(), indent=2) + "\n"

    def __repr__(self) -> str:
        from graphopt.report import tables

        return f"<Report of {self.source} for {self.target}: {tables.headline(self)}>"

    def __str__(self) -> str:
        from graphopt.report import text

        return text.report(self)

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.report(self)

    def _repr_html_(self) -> str:
        from graphopt.report import html

        return html.fragment(self)


@dataclass(frozen=True)
class Roofline:
    """What one run takes, and the least that its products take on this machine."""

    shapes: str
    """Of the inputs."""
    seconds: float
    """p50 of one run."""
    least: dict[str, float]
    """Seconds by class of products: int8, or the precision of floats."""

    @property
    def share(self) -> float:
        """Of the machine's limit, what the run reaches: 1 is all of it."""
        return sum(self.least.values()) / self.seconds


@dataclass(frozen=True)
class Entrant:
    """One model in one engine, in a race."""

    engine: str
    """Name and version."""
    model: str
    """`as asked`, or `uncompressed`: the model as it came in."""
    precision: str
    """What its floats are computed in."""
    sqnr: float | None = None
    """In dB, of the worst output against the original's; None where it was not compared."""
    milliseconds: tuple[float, ...] = ()
    """p50 of one call at each of the example shapes; empty where it was not timed."""
    speed: tuple[float, float, float] | None = None
    """How many times as fast as the race's baseline, in the geometric mean over the shapes: median, 95% interval."""
    why_out: str = ""
    """Why it cannot win: how it fails, or that it is too far from the original; empty where it can."""


@dataclass(frozen=True)
class Race:
    """All candidates of a race, timed in one interleaved run, each in a process of its own."""

    entrants: list[Entrant]
    winner: int
    """The one that was taken, by its place in `entrants`."""
    baseline: int | None
    """The one that speeds are over; None where nothing was measured."""
    shapes: list[str]
    """Of the example inputs."""
    least_sqnr: float | None = None
    """In dB, what an entrant must reach to win; None where no pass is lossy."""
    steady: bool = True
    """Whether the machine's speed was steady."""


def require_report_name(path: Path) -> None:
    """Raise UsageError for a file that is no report by its suffix."""
    if path.suffix not in (".html", ".json", ".txt"):
        what = f"{path.name} ends in {path.suffix}" if path.suffix else f"{path.name} has no suffix"
        raise UsageError(f"{what}, and a report is an .html, .txt or .json file: name it {path.stem}.html")


@dataclass(frozen=True)
class Shipped:
    """The user's metric of the original, of the graph that was trained, and of the lowered result in its engine."""

    original: float
    trained: float
    shipped: float

    tolerance: ClassVar[float] = 5e-4
    """Most that the last two may differ, as a share of the original's; of the trained one's where that scores 0."""

    @property
    def is_equal(self) -> bool:
        return abs(self.shipped - self.trained) <= self.tolerance * abs(self.original or self.trained)

    def __str__(self) -> str:
        from graphopt.report import text

        return text.shipped(self)


def count_kinds(nodes: Iterable[Node]) -> dict[str, int]:
    """How many nodes of each kind, most frequent first."""
    counts = Counter(node.kind for node in nodes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def plain(value: Any) -> Any:
    """Dicts, lists, numbers and text, for json.dumps: dataclasses by field, declines as code, values and sentence.

    JSON has neither infinity nor NaN: they become text, and so does whatever else JSON lacks.
    """
    if isinstance(value, Decline):
        value = Reason.of(value)
    if isinstance(value, Reason):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


@dataclass(repr=False)
class BenchResult:
    """Ratios of one interleaved run: for each example shape, how many times faster than the original graph."""

    header: str
    rows: list[tuple[str, Mapping[str, Ratio]]] = field(default_factory=list)
    """(shapes, {"optimized": Ratio, "control": Ratio}); the control is the original against itself."""

    def __str__(self) -> str:
        from graphopt.report import text

        return text.bench(self)

    def __repr__(self) -> str:
        from graphopt.report import tables

        return f"<BenchResult: {tables.bench_headline(self)}>"

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.bench(self)

    def _repr_html_(self) -> str:
        from graphopt.report import html

        return html.bench(self)


@dataclass(frozen=True)
class Damage:
    """How far a changed model's outputs are from the unchanged one's; padding is left out.

    Each figure is that of the worst output, among the outputs that hold floats (among all, where none does).
    """

    sqnr: float
    """In dB, of the energies summed over all batches; inf where outputs are equal, nan where one holds NaN."""
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
    """The label of the site, unique in the table."""
    nodes: tuple[str, ...]
    """The names of its nodes."""
    setting: str
    """The pass as text."""
    damage: Damage | None = None
    """None where the pass declined."""
    declined: tuple[Reason, ...] = ()
    """Why the pass declined, each reason once; empty where it did not."""


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured: rows in the order of the graph, and for each site in the order of the settings."""

    settings: list[str]
    rows: list[Row] = field(default_factory=list)
    batches: int = 0
    """How many batches the outputs were compared on."""
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
        rows = [row for row in self.rows if (row.site == name if isinstance(site, str) else name in row.nodes)]
        return {row.setting: row.damage for row in rows if row.damage is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: infinity and NaN as text."""
        return dict(plain(self))

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
    """How far two models are apart, one entry per output."""

    outputs: list[OutputComparison]
    batches: int
    propagation: Propagation | None = None
    """The results of the sites inside, where they were asked for."""
    left_out: dict[str, int] = field(default_factory=dict)
    """By output whose sizes depend on data, on how many batches they differ, so that it was not compared there."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: infinity and NaN as text."""
        plain_self = dict(plain(self))
        inside = self.propagation
        if inside is not None:
            plain_self["propagation"] |= {"lost": plain(inside.lost), "noisiest": plain(inside.noisiest)}
        return plain_self

    def __str__(self) -> str:
        from graphopt.report import text

        return text.comparison(self)

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.comparison(self)


@dataclass(frozen=True)
class Relowering:
    """How far the re-lowered sites of a quantized file are from what they were, each alone, given the same integers."""

    distances: dict[str, float] = field(default_factory=dict)
    """By site, the largest distance of its result: in steps of its scale, or for floats in units of the tolerance."""
    differs: float = 0.0
    """The share of all integers in the results of sites that are not what they were."""
    left_out: dict[str, Decline] = field(default_factory=dict)
    """Sites that were not compared, and why."""

    @property
    def furthest(self) -> tuple[str, float] | None:
        """The site that is furthest from what it was, and how far."""
        return max(self.distances.items(), key=lambda item: item[1], default=None)

    def __str__(self) -> str:
        from graphopt.report import text

        return text.relowering(self)
