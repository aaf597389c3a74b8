"""How long until something happens: importing graphopt over importing torch, and `graphopt --help`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.case import Settings, checked, table

IMPORT_SECONDS, HELP_SECONDS = 0.3, 1.0
RUNS = 7


def run(settings: Settings) -> bool:
    script = Path(sys.executable).with_name("graphopt")
    python = [sys.executable, "-c"]
    commands = {
        "import torch": [*python, "import torch"],
        "import torch, graphopt": [*python, "import torch, graphopt"],
        "graphopt.optimize found": [*python, "import torch, graphopt; graphopt.optimize"],
        "graphopt --help": [*([str(script)] if script.exists() else [sys.executable, "-m", "graphopt"]), "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(RUNS + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first reads files into the page cache
                seconds[name].append(time.perf_counter() - start)
    medians = {name: median(several) for name, several in seconds.items()}
    rows = table(f"seconds of a process, median of {RUNS}", "", "all", "over import torch", "bound")
    verdicts = []
    for name, figure in medians.items():
        over = figure - medians["import torch"]
        match name:
            case "import torch, graphopt":
                holds, shown, bound = over < IMPORT_SECONDS, f"{over:.2f}", f"{IMPORT_SECONDS:g} over torch"
            case "graphopt --help":
                holds, shown, bound = figure < HELP_SECONDS, "", f"{HELP_SECONDS:g} in all"
            case _:
                holds, shown, bound = True, "" if name == "import torch" else f"{over:.2f}", ""
        verdicts.append(holds)
        rows.add_row(name, checked(f"{figure:.2f}", holds), checked(shown, holds), bound)
    settings.console.print(rows)
    return all(verdicts)
