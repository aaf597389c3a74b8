"""The long run: `python -m tests.fuzz [--seconds 3600] [--seed 0] [--only NAME]` tries random models and damaged files
until the time is over, and prints how many it tried of each kind. A failure is made smaller, printed as text, and
saved; then it goes on."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import properties
from tests.fuzz.further_operators import ALL
from tests.fuzz.mutations import LONGEST, fault, folders, mutated
from tests.fuzz.onnx_graphs import OPSETS, Array, models
from tests.fuzz.reduced import reduced, text_of
from tests.fuzz.sources import sources

AT_ONCE = 10
"""Models or files of one kind, until the next one's turn."""
_FILES = ("damaged", "folders")
"""What is tried of files."""

Feeds = Mapping[str, Array]


def _properties() -> dict[str, Callable[[int, onnx.ModelProto, Feeds], object]]:
    """What is tried of a model, by name; the number of the turn picks an opset and a pass."""
    opsets, passes = list(OPSETS), list(properties.PASSES)
    return {
        "simplify": lambda number, *drawn: properties.simplify_keeps_the_numbers(*drawn),
        "forms": lambda number, *drawn: properties.every_form_keeps_the_numbers(*drawn),
        "export": lambda number, *drawn: properties.export_at(opsets[number % len(opsets)], *drawn),
        "portable": lambda number, *drawn: properties.export_at(opsets[number % len(opsets)], *drawn, portable=True),
        "unchanged": lambda number, *drawn: properties.a_second_pass_changes_nothing(*drawn),
        "torch": lambda number, *drawn: properties.torch_computes_the_same(*drawn),
        "again": lambda number, *drawn: properties.a_second_run_computes_the_same(*drawn),
        "text": lambda number, *drawn: properties.a_text_and_a_file_are_the_graph(*drawn),
        "passes": lambda number, *drawn: properties.a_pass_counts_every_weight(passes[number % len(passes)], *drawn),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*_properties(), *_FILES, "files"])
    asked = parser.parse_args()
    if asked.only is not None:
        return _tried(_FILES if asked.only == "files" else (asked.only,), asked.seconds, asked.seed)
    # Files are tried in forks. Those of a process in which an engine has run wait for ever for its threads, which they
    # do not have; so files get a process of their own.
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(asked.seconds), "--seed", str(asked.seed)]
    with subprocess.Popen([*command, "--only", "files"]) as of_files:
        failed = _tried(tuple(_properties()), asked.seconds, asked.seed)
        return max(failed, of_files.wait())


def _tried(names: Sequence[str], seconds: float, first: int) -> int:
    """Try what has these names, in turn; whether anything failed."""
    folder = Path(tempfile.mkdtemp(prefix="graphopt-fuzz-"))
    tried, failed, end = Counter[str](), Counter[str](), time.monotonic() + seconds
    turns: dict[str, Callable[[int], None]] = {
        **{name: partial(_models, name, holds, folder, tried, failed) for name, holds in _properties().items()},
        "damaged": partial(_damaged, folder, tried, failed), "folders": partial(_folders, folder, tried, failed),
    }  # fmt: skip
    for number in itertools.count(first):
        for name in names:
            if time.monotonic() > end:
                print(f"seeds {first} to {number}; failures are in {folder}")
                if properties.references:
                    print(f"the reference evaluator: {dict(properties.references)}")
                print("\n".join(f"{one:10} tried {tried[one]:6} failed {failed[one]:4}" for one in names), flush=True)
                return int(bool(failed))
            turns[name](number)
    return 0


def _models(
    name: str, holds: Callable[[int, onnx.ModelProto, Feeds], object], folder: Path, tried: Counter[str],
    failed: Counter[str], number: int,
) -> None:  # fmt: skip
    """Try a property on AT_ONCE random models."""

    def error_of(model: onnx.ModelProto, feeds: Feeds) -> BaseException | None:
        try:
            holds(number, model, feeds)
        except Exception as error:
            return error
        return None

    @seed(number)
    @settings(max_examples=AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])  # fmt: skip
    @given(models(ALL))
    def each(drawn: tuple[onnx.ModelProto, dict[str, Array]]) -> None:
        tried[name] += 1
        error = error_of(*drawn)
        if error is None:
            return
        failed[name] += 1
        smaller, fed = reduced(*drawn, lambda *one: type(error_of(*one)) is type(error))
        onnx.save(smaller, folder / f"{name}-{number}-{tried[name]}.onnx")
        print(f"--- {name}, seed {number}: {_brief(error_of(smaller, fed) or error)}\n{text_of(smaller)}\n", flush=True)

    each()


def _brief(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-2, chain=False)).strip()[-1500:]


def _damaged(folder: Path, tried: Counter[str], failed: Counter[str], number: int) -> None:
    name, content = list(sources().items())[number % len(sources())]
    path = folder / "damaged.onnx"
    for index, damaged in enumerate(mutated(content, AT_ONCE, number)):
        tried["damaged"] += 1
        path.write_bytes(damaged)
        if (found := fault(path)) is not None:
            failed["damaged"] += 1
            path.rename(folder / f"damaged-{number}-{index}.onnx")
            print(f"--- damaged, seed {number}-{index}, {name}: {found[:LONGEST * 3]}", flush=True)


def _folders(folder: Path, tried: Counter[str], failed: Counter[str], number: int) -> None:
    for index, (path, what) in enumerate(folders(folder / f"folder-{number}", AT_ONCE, number)):
        tried["folders"] += 1
        if (found := fault(path)) is not None:
            failed["folders"] += 1
            print(f"--- folders, seed {number}-{index}, {what}: {found[:LONGEST * 3]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
