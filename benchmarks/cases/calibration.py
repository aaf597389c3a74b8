"""Memory of a long calibration: static int8 of all-MiniLM-L6-v2 by entropy, over 2,000 batches of 1x32 random tokens.

Statistics are streamed, so resident memory after all batches is that after the first 100. Second-order rounding and
ranges each run over the batches, and each is held to that: they keep different statistics. Random token ids, with
padding of random length, are enough for memory, and say nothing of accuracy. In a process of its own, without timing of
forms; Linux only.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import graphopt
from benchmarks.case import Settings, checked, table
from benchmarks.models import Batch, minilm

PIPELINE = "quantize{scheme=static observer=entropy}"
BATCHES, EARLY, LENGTH, VOCABULARY = 2000, 100, 32, 30522
MOST_GROWN = 0.05
"""How much larger resident memory may be after all batches of a run than after its first EARLY."""


class Watched:
    """Seeded batches, made when their turn comes; notes resident memory when the next one is asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.start = count, time.perf_counter()
        self.runs: list[dict[int, tuple[float, int]]] = []
        """Of each run over them, by how many were given: seconds, and bytes of resident memory."""

    def __iter__(self) -> Iterator[Batch]:
        self.runs.append({})
        for number in range(self.count):
            draw = torch.Generator().manual_seed(number)
            real = int(torch.randint(1, LENGTH + 1, (), generator=draw))
            yield {
                "input_ids": torch.randint(0, VOCABULARY, (1, LENGTH), generator=draw),
                "attention_mask": (torch.arange(LENGTH) < real).long().unsqueeze(0),
            }
            if number + 1 in (EARLY, self.count):
                gc.collect()
                self.runs[-1][number + 1] = time.perf_counter() - self.start, resident("VmRSS")


def run(settings: Settings) -> bool:
    code = f"from benchmarks.cases.calibration import child; child({BATCHES}, {settings.threads})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        settings.console.print(f"calibration failed: {(done.stderr.strip().splitlines() or ['without a op'])[-1]}")
        return False
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    rows = table(f"{PIPELINE} of all-MiniLM-L6-v2, batches of 1x{LENGTH}", "run over the batches", "batches", "of all",
                 "seconds", "resident MB", "grown")  # fmt: skip
    holds = True
    for number, seen in enumerate(figures["runs"]):
        early = seen[str(EARLY)][1]
        for given, (seconds, held) in seen.items():
            fits = held < early * (1 + MOST_GROWN)
            holds = holds and fits
            rows.add_row(f"{number + 1}", given, f"{number * BATCHES + int(given)}", f"{seconds:.0f}",
                         f"{held / 1e6:.0f}", checked(f"{held / early - 1:+.1%}", fits))  # fmt: skip
    settings.console.print(rows)
    settings.console.print(f"at most {figures['peak'] / 1e6:.0f} MB at any time, the capture included; "
                           f"bound: grown by less than {MOST_GROWN:.0%}")  # fmt: skip
    if settings.out is not None:
        (settings.out / "calibration.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return holds


def child(count: int, threads: int) -> None:
    """Calibrate, and print the figures as the last line."""
    torch.set_num_threads(threads)
    batches = Watched(count)
    graphopt.optimize(minilm(), PIPELINE, example_inputs=next(iter(Watched(1))), calibration=batches, threads=threads,
                      measure=False)  # fmt: skip
    print(json.dumps({"runs": batches.runs, "peak": resident("VmHWM")}))


def resident(field: str) -> int:
    """Bytes of this process's resident memory: now (VmRSS), or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
