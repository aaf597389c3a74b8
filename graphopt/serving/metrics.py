"""Counts and times of a server, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Histogram:
    """How often a value was at most each bound; all in the last one."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.total += value
        for place, bound in enumerate(self.bounds):
            if value <= bound:
                self.counts[place] += 1
                return
        self.counts[-1] += 1


class Metrics:
    """What one process has done. A model's name is a label only where the model is there, so that nobody can make more
    of them."""

    def __init__(self) -> None:
        self.requests: dict[Labels, int] = {}
        self.seconds: dict[Labels, Histogram] = {}
        self.batch_rows: dict[Labels, Histogram] = {}
        self.in_flight = 0

    def answered(self, route: str, model: str, status: int, seconds: float) -> None:
        """Count a request. route: of a fixed list. model: NAME:VERSION, or empty."""
        labels = (("model", model), ("route", route))
        counted = (*labels, ("status", str(status)))
        self.requests[counted] = self.requests.get(counted, 0) + 1
        found = self.seconds.get(labels)
        if found is None:
            found = self.seconds[labels] = Histogram(SECONDS)
        found.observe(seconds)

    def batch(self, model: str, rows: int) -> None:
        """Count a run of the engine."""
        labels = (("model", model),)
        found = self.batch_rows.get(labels)
        if found is None:
            found = self.batch_rows[labels] = Histogram(ROWS)
        found.observe(rows)

    def text(self, gauges: Mapping[str, tuple[str, Iterable[tuple[Labels, float]]]]) -> str:
        """All of it. gauges: by name, what it is, and its values of the moment."""
        lines = [
            "# HELP graphopt_requests_total Requests by route, model and status.",
            "# TYPE graphopt_requests_total counter",
        ]
        lines += [
            f"graphopt_requests_total{_braces(labels)} {count}" for labels, count in sorted(self.requests.items())
        ]
        lines += _histogram("graphopt_request_seconds", "Seconds from the first byte to the answer.", self.seconds)
        lines += _histogram("graphopt_batch_rows", "Rows in a run of the engine.", self.batch_rows)
        for name, (what, values) in gauges.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} gauge"]
            lines += [f"{name}{_braces(labels)} {value:g}" for labels, value in values]
        return "\n".join(lines) + "\n"


def _histogram(name: str, what: str, values: Mapping[Labels, Histogram]) -> list[str]:
    lines = [f"# HELP {name} {what}", f"# TYPE {name} histogram"]
    for labels, histogram in sorted(values.items()):
        below = 0
        for bound, count in zip((*(f"{one:g}" for one in histogram.bounds), "+Inf"), histogram.counts, strict=True):
            below += count
            lines.append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {below}")
        lines += [f"{name}_sum{_braces(labels)} {histogram.total:.9g}", f"{name}_count{_braces(labels)} {below}"]
    return lines


def _braces(labels: Labels) -> str:
    """Labels as the format has them; names of models hold nothing that must be escaped."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
