"""Run all examples at full size, one after another, and keep what they print: `python examples [NAME ...]`.

Each runs in a process of its own. Its output goes to examples/expected/NAME.txt, where it replaces that of an earlier
run; a table at the end has the time and the peak memory of each. The exit code is 1 where one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from frame import EXAMPLES, Size

HERE = Path(__file__).parent
MINUTES = 45
"""What all examples together may take, on two cores with nothing else running."""


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(EXAMPLES)}; all without any.")] = None,
    size: Size = "full",
    out: Annotated[Path, typer.Option(help="Folder for the files that are made.", file_okay=False)] = Path("out"),
) -> None:
    """Run the examples, and write down what they print (at size full)."""
    unknown = [name for name in names or () if name not in EXAMPLES]
    if unknown:
        raise typer.BadParameter(f"there is no example {unknown[0]!r}; there are {', '.join(EXAMPLES)}")
    rows, failed = [], []
    for name in names or EXAMPLES:
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, str(HERE / f"{name}.py"), "--size", size, "--out", str(out / name)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as running:
            assert running.stdout is not None
            lines = []
            for line in running.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            _, status, used = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
        rows.append((name, time.perf_counter() - start, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
        if running.returncode:
            failed.append(name)
        elif size == "full":
            expected = HERE / "expected" / f"{name}.txt"
            expected.parent.mkdir(exist_ok=True)
            expected.write_text("".join(lines), encoding="utf-8")
    print(f"\n{'example':24}{'minutes':>8}{'peak memory':>14}")
    for name, seconds, memory in rows:
        print(f"{name:24}{seconds / 60:8.1f}{memory / 1e9:11.2f} GB{'  failed' if name in failed else ''}")
    total = sum(seconds for _, seconds, _ in rows) / 60
    print(f"{'all':24}{total:8.1f}{'' if total <= MINUTES else f'  (more than {MINUTES})'}")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
