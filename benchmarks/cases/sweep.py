"""Int8 of ONNX files as found in the wild: how far outputs move, and how many int8 kernels run.

Each file of the corpus is quantized by its defaults, with scales of each run (dynamic) and calibrated ones (static), on
seeded random feeds that the original accepts, and judged on others, against the original without any optimization of
the engine. Random inputs say nothing of accuracy on real ones; they show what breaks. A file without a site, or without
a kernel, says why. Only a crash, and a refusal of what loads in ONNX Runtime, fall short. An output that is one
probability near 0 has an SQNR that says little.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks.case import Settings, checked, table
from benchmarks.cases.corpus import REFUSALS, Feeds, accepted_feeds, line, plain_session
from graphopt.backends.onnxruntime.kernel_counts import INT8_KERNELS, WEIGHT_ONLY_KERNELS
from graphopt.errors import GraphError, PassError, UsageError
from graphopt.numerics import metrics

SCHEMES = ("dynamic", "static")
CALIBRATING, JUDGING = 4, 2
"""Feeds of each kind."""
KERNELS = {kernel for kernels in INT8_KERNELS.values() for kernel in kernels} | {*WEIGHT_ONLY_KERNELS.values()}


@dataclass(frozen=True)
class Swept:
    """What became of one file under one scheme."""

    said: str
    """Why nothing is in integers, or how it failed; empty where all went well."""
    holds: bool = True
    sites: str = ""
    """How many were changed, of how many."""
    kernels: int = 0
    """That read integers: tables too."""
    sqnr: float | None = None
    """dB, of the worst output over the feeds that judge."""


def run(settings: Settings) -> bool:
    folder = settings.required("onnx_corpus")
    entries = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    rows = table("int8 on random inputs, against the float file", "file", "scheme", "sites", "int8 kernels",
                 "worst SQNR dB", "why not")  # fmt: skip
    swept: dict[str, Swept] = {}
    for entry in entries:
        if not settings.chosen(entry["file"]):
            continue
        for scheme, found in sweep(folder / entry["file"], entry["ort"] == "ok", settings.threads).items():
            swept[f"{entry['file']}, {scheme}"] = found
            kernels = str(found.kernels) if found.sites else ""
            loss = "" if found.sqnr is None else f"{found.sqnr:.1f}"
            rows.add_row(entry["file"], scheme, found.sites, kernels, loss, checked(found.said, found.holds))
    rows.columns[-1].justify, rows.columns[-1].no_wrap = "left", False
    settings.console.print(rows)
    if settings.out is not None:
        figures = {name: asdict(found) for name, found in swept.items()}
        (settings.out / "sweep.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return all(found.holds for found in swept.values())


def sweep(path: Path, loads: bool, threads: int) -> dict[str, Swept]:
    """By scheme; loads: whether ONNX Runtime takes the file, and so may not be refused by graphopt."""
    if not loads:
        return dict.fromkeys(SCHEMES, Swept("the original does not load"))
    session = plain_session(path, threads)
    feeds = accepted_feeds(session, range(CALIBRATING + JUDGING))
    expected = [session.run(None, one) for one in feeds[CALIBRATING:]]
    return {scheme: _swept(path, scheme, feeds, expected, threads) for scheme in SCHEMES}


def _swept(
    path: Path, scheme: str, feeds: Sequence[Feeds], expected: Sequence[Sequence[object]], threads: int
) -> Swept:
    try:
        result = graphopt.optimize(
            path, f"quantize{{scheme={scheme}}}", example_inputs=feeds[0], threads=threads, measure=False,
            calibration=feeds[:CALIBRATING] if scheme == "static" else None,
        )  # fmt: skip
        found = [result.runner(_tensors(one)) for one in feeds[CALIBRATING:]]
    except UsageError as reason:
        return Swept(line(reason), holds="has no site" in str(reason) or "nothing is left" in str(reason))
    except REFUSALS as reason:
        return Swept(f"refused: {line(reason)}", holds=False)
    except PassError as error:
        known = isinstance(error.__cause__, GraphError)  # such as an op that the file's opset has no operator for
        return Swept(f"{'declined' if known else 'CRASH'}: {error.reason}", holds=known)
    except Exception as error:
        return Swept(f"CRASH: {type(error).__name__}: {line(error)}", holds=False)
    record = next(record for record in result.report.passes if record.name == "quantize")
    kernels = sum(count for kernel, count in result.report.kernels.items() if kernel in KERNELS)
    outputs = zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True)
    losses = [float(metrics.sqnr(_joined(wanted), _joined(made))) for wanted, made in outputs
              if made[0].is_floating_point()]  # fmt: skip
    why = Counter(record.declined.values()).most_common(1) if kernels == 0 else []
    said = "".join(f"{count} of {len(record.declined)} declined: {reason}" for reason, count in why)
    return Swept(said, True, f"{record.changed} of {len(record.eligible)}", kernels, min(losses, default=None))


def _joined(several: Sequence[Any]) -> torch.Tensor:
    """One output on all feeds, as one vector."""
    return torch.cat([torch.as_tensor(one).flatten() for one in several])


def _tensors(feeds: Feeds) -> Mapping[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}
