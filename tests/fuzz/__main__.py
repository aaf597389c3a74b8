"""The long run: `python -m tests.fuzz [--seconds 3600] [--seed 0]` tries random models and damaged files until the time
is over, and prints how many it tried of each kind. A failure is shrunk, printed, and saved; then it goes on."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import properties
from tests.fuzz.mutations import fault, mutated
from tests.fuzz.onnx_graphs import OPSETS, Array, models
from tests.fuzz.sources import sources

AT_ONCE = 10
"""Models or files of one kind, until the next one's turn."""

Drawn = tuple[onnx.ModelProto, dict[str, Array]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="graphopt-fuzz-"))
    tried, failed, end = Counter[str](), Counter[str](), time.monotonic() + asked.seconds
    for number in itertools.count(asked.seed):
        for name, run in (("simplify", _simplify), ("export", _export), ("damaged", _damaged)):
            if time.monotonic() > end:
                print(f"tried {dict(tried)}, failed {dict(failed)}; failures are in {folder}")
                return int(bool(failed))
            try:
                run(number, folder, partial(tried.update, [name]))
            except Exception:
                failed[name] += 1
                print(f"--- {name}, seed {number}\n{traceback.format_exc(limit=-3)}", flush=True)
    return 0


def _simplify(number: int, folder: Path, count: Callable[[], None]) -> None:
    @seed(number)
    @settings(max_examples=AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(models())
    def holds(drawn: Drawn) -> None:
        count()
        with _kept(drawn, folder / f"simplify-{number}.onnx"):
            properties.simplify_keeps_the_numbers(*drawn)

    holds()


def _export(number: int, folder: Path, count: Callable[[], None]) -> None:
    @seed(number)
    @settings(max_examples=AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(models(), st.sampled_from(OPSETS))
    def holds(drawn: Drawn, opset: int) -> None:
        count()
        with _kept(drawn, folder / f"export-{number}-{opset}.onnx"):
            properties.export_at(opset, *drawn)

    holds()


@contextmanager
def _kept(drawn: Drawn, path: Path) -> Iterator[None]:
    """Save the model where the block fails; the last one that is saved is the smallest."""
    try:
        yield
    except Exception:
        onnx.save(drawn[0], path)
        raise


def _damaged(number: int, folder: Path, count: Callable[[], None]) -> None:
    name, content = list(sources().items())[number % len(sources())]
    path = folder / "damaged.onnx"
    for index, damaged in enumerate(mutated(content, AT_ONCE, number)):
        count()
        path.write_bytes(damaged)
        if (found := fault(path)) is not None:
            path.rename(folder / f"damaged-{number}-{index}.onnx")
            raise AssertionError(f"{name}: {found}")


if __name__ == "__main__":
    sys.exit(main())
