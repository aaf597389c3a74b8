"""What was measured, from the shell: the cache and its table, and the options that say whether to measure."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from graphopt.measure import timing
from graphopt.measure.cache import Timings
from graphopt.measure.timing import Ratio, Ratios
from tests.cli.test_cli import done, refused, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path) -> None:
    kept = Timings(folder / "timings.sqlite")
    for number, threads in enumerate((None, 2)):
        shapes = [[[1, 16], [16]], [[8, 16], [16]]]
        key = {"engine": "onnxruntime 9.9", "threads": threads, "choice": f"choice-{number}", "shapes": shapes}
        ratios = {"Sum": (1.0, 1.0, 1.0), "Add": (1.25, 1.125, 1.5)}
        kept.put(key, {"form": "Add", "ratios": ratios, "dropped": {"Skip": "refused"}, "sure": True})


def test_the_latest_contests_are_a_table(folder: Path) -> None:
    fill(folder)
    first, _, header, rule, *rows = done("cache").splitlines()
    assert first.startswith(f"{folder}/timings.sqlite: 2 entries, ") and first.endswith("B")
    assert " ".join(header.split()) == "choice taken times as fast as the first form shapes threads engine"
    assert set(rule) == {"-"}
    expected = "Add Add 1.25 [1.12, 1.50], Skip dropped 1x16 16 | 8x16 16"
    assert [" ".join(row.split()) for row in rows] == [
        f"choice-1 {expected} 2 onnxruntime 9.9",
        f"choice-0 {expected} default onnxruntime 9.9",
    ]
    assert len(done("cache", "--latest", 1).splitlines()) == 5


def test_as_json(folder: Path) -> None:
    fill(folder)
    facts = json.loads(done("cache", "--json"))
    assert (facts["path"], facts["entries"]) == (f"{folder}/timings.sqlite", 2)
    assert facts["bytes"] == (folder / "timings.sqlite").stat().st_size
    assert [one["choice"] for one in facts["latest"]] == ["choice-1", "choice-0"]
    assert facts["latest"][0]["ratios"]["Add"] == [1.25, 1.125, 1.5]


def test_clear_empties_it(folder: Path) -> None:
    fill(folder)
    assert done("cache", "--clear") == f"2 entries forgotten, of {folder}/timings.sqlite\n"
    assert Timings(folder / "timings.sqlite").entries() == []
    assert json.loads(done("cache", "--clear", "--json")) == {"path": f"{folder}/timings.sqlite", "forgotten": 0}
    assert done("cache").splitlines()[0].startswith(f"{folder}/timings.sqlite: 0 entries, ")


def test_optimize_measures_where_it_is_asked_to(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contest(
        candidates: dict[str, list[object]], *, baseline: str, rounds: int = 15, **options: float
    ) -> dict[str, Ratios]:
        ratio = Ratio(1.25, 1.125, 1.5, rounds, 0, {})
        return {name: Ratios(ratio, (ratio,) * len(calls)) for name, calls in candidates.items()}

    monkeypatch.setattr(timing, "paired_calls", contest)
    arguments = "optimize", model, "--dry-run"
    shown = done(*arguments, "--measure")
    assert "speed over the input" in shown and "x [1, 16]" in shown and "1.25 [1.12, 1.50]" in shown
    assert "speed over the input" not in done(*arguments, "--no-measure")
    assert "speed over the input" not in done(*arguments)  # the environment of tests says so
    monkeypatch.delenv("GRAPHOPT_MEASURE")
    assert "speed over the input" in done(*arguments)


def test_optimize_for_another_cpu(model: Path, tmp_path: Path) -> None:
    assert "onnxruntime (avx512_vnni)" in done("optimize", model, "-o", tmp_path / "o.onnx", "--cpu", "avx512_vnni")
    properties = {one.key: one.value for one in onnx.load(tmp_path / "o.onnx").metadata_props}
    assert properties["graphopt.target"] == "onnxruntime (avx512_vnni)"


def test_what_cannot_be_asked(model: Path) -> None:
    arguments = "optimize", model, "--dry-run"
    assert "there is no cpu 'avx9'; give avx2, avx512, avx512_vnni" in refused(2, *arguments, "--cpu", "avx9")
    assert "leave measure=True out" in refused(2, *arguments, "--cpu", "avx2", "--measure")
    for threads in (0, -1):
        found = run(*arguments, "--threads", threads)
        assert found.exit_code == 2 and "greater than or equal to 1" in found.stderr
