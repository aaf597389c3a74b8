"""How long it takes to optimize MiniLM with every choice measured: with an empty cache of timings, and with its own.

Each run is a process of its own; imports and the reading of weights are not counted. With the first run's timings, the
second has to write the same bytes. A third run, with another empty cache, tells which choices measuring is not sure of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.case import Settings, checked, table
from benchmarks.speed import write

COLD, WARM = 60.0, 20.0
"""Seconds at most, with an empty cache and with one that has all timings."""
PASSES = "quantize{scheme=dynamic}"


def run(settings: Settings) -> bool:
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        cold, warm, other = (
            optimized(folder / cache, folder / f"{number}.onnx", settings.threads)
            for number, cache in enumerate(("cache", "cache", "another cache"))
        )
        first, second = ((folder / f"{number}.onnx").read_bytes() for number in (0, 1))
    limits = {"empty cache": (cold, COLD), "the same cache again": (warm, WARM), "another empty cache": (other, COLD)}
    rows = table(f"optimize and export MiniLM, {PASSES}, at four shapes", "", "seconds", "bound", "kinds of patterns")
    for name, (one, most) in limits.items():
        figure = checked(f"{one['seconds']:.1f}", one["seconds"] <= most)
        rows.add_row(name, figure, f"{most:g}", str(len(one["forms"])))
    same = first == second
    settings.console.print(rows)
    what = "the same bytes" if same else "OTHER bytes"
    settings.console.print(checked(f"with the first run's timings, the second file has {what}", same))
    differing = "; ".join(differences(cold, other)) or "none"
    settings.console.print(f"choices that differ with another empty cache: {differing}", markup=False, soft_wrap=True)
    write(settings, "optimizing", {"cold": cold, "warm": warm, "other": other, "same bytes": same})
    return same and all(one["seconds"] <= most for one, most in limits.values())


def optimized(cache: Path, to: Path, threads: int) -> dict[str, Any]:
    """Seconds, the form of each kind of pattern, and what was reverted, of a run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cases.optimizing", str(to), str(threads)]
    environment = os.environ | {"GRAPHOPT_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What another run chose for the same kinds of patterns, and reverted."""
    found = [
        f"{kind}: {form} or {other['forms'][kind]}"
        for kind, form in one["forms"].items()
        if other["forms"].get(kind, form) != form
    ]
    found += [f"{kind}: in one run only" for kind in one["forms"].keys() ^ other["forms"].keys()]
    return found + [f"{site}: reverted in one run only" for site in {*one["reverted"]} ^ {*other["reverted"]}]


def main(to: Path, threads: int) -> None:
    """Optimize MiniLM, and print what `optimized` reads."""
    import torch

    import graphopt
    from benchmarks.networks import NETWORKS

    torch.set_num_threads(threads)
    network = NETWORKS["minilm"]()
    start = time.perf_counter()
    small = graphopt.optimize(network.module, PASSES, threads=threads, measure=True, **network.options)
    small.export(to)
    seconds = time.perf_counter() - start
    forms = {
        f"{choice['rule']} at {measured['site']}": measured["form"]
        for choice in small.report.choices
        for measured in choice["measured"]
    }
    print(json.dumps({"seconds": seconds, "forms": forms, "reverted": list(small.report.reverted)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
