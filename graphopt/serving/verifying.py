"""A bundle, replayed on the engine and the machine of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.report.records import plain
from graphopt.serving import bundles, golden
from graphopt.serving.engine import version
from graphopt.serving.predictor import Predictor, replayed


@dataclass(frozen=True)
class Verified:
    """What `verify` found; a bundle that fails is an error."""

    name: str
    sqnr: float
    """Of the answers to the golden inputs on this machine, in dB."""
    recorded: float
    least: float
    """The SQNR below which the bundle would be refused."""
    portable_sqnr: float | None
    """Of the portable twin; None where there is none."""
    cases: int
    files: int
    engine: str
    missing_flags: str
    """CPU flags that the bundle was tuned for, and this CPU lacks."""
    notes: tuple[str, ...] = ()
    """What the bundle says of itself."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: infinity as text."""
        return dict(plain(self))

    def __str__(self) -> str:
        twin = "" if self.portable_sqnr is None else f"; portable twin {self.portable_sqnr:.1f} dB"
        lacks = f"\ntuned for a CPU with {self.missing_flags}, which this one lacks" if self.missing_flags else ""
        notes = "".join(f"\n{one}" for one in self.notes)
        return (
            f"{self.name}: {self.files} files have their hashes; {self.cases} golden cases on {self.engine}: SQNR "
            f"{self.sqnr:.1f} dB ({self.recorded:.1f} recorded, at least {self.least:.1f} wanted){twin}{lacks}{notes}"
        )


def verify(folder: str | Path, *, threads: int | None = None) -> Verified:
    """Check each hash of a bundle, and replay its golden inputs here, on the model and on its portable twin.

    Raises BundleError where a file is another one, and where answers have an SQNR more than 3 dB below the recorded
    one. Hashes find damage, not an attacker, who can write hashes too.
    """
    predictor = Predictor(folder, threads=threads)
    own, twin = predictor.manifest, None
    if own.portable is not None:
        bundle = bundles.opened(folder)
        twin = replayed(bundle, bundle.engine(threads, portable=True))
    return Verified(
        own.name, predictor.sqnr, own.golden.sqnr, golden.least(own.golden.sqnr), twin, own.golden.cases,
        len(own.files), f"{own.engine.name} {version()}", bundles.missing_flags(own),
        tuple(map(str, own.report.get("notes", ()))),
    )  # fmt: skip
