"""Each example runs at size tiny, and prints the lines that its expected output has."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from frame import EXAMPLES, Deployed, sizes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
QUICK = ("wild_onnx",)
"""Those that are quick enough for each run of the tests."""


def lines(output: str) -> set[str]:
    """What stands in front of the figures at the end of an output."""
    return {re.split(r"  +", line)[0] for line in output.strip().split("\n\n")[-1].splitlines()}


def marked(name: str) -> object:
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name", [marked(name) for name in EXAMPLES])
def test_runs_and_ends_with_a_file_that_loads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHOPT_DATA", raising=False)
    importlib.import_module(name).main(size="tiny", out=tmp_path / "out")
    output = capsys.readouterr().out
    found = lines(output)
    assert {"time", "peak memory"} <= found
    assert re.search(r"\bsize +\d", output)
    expected = lines((FOLDER / "expected" / f"{name}.txt").read_text(encoding="utf-8"))
    if find_spec("openvino") is None:
        expected = {line for line in expected if not line.endswith(", openvino")}
    assert expected == found
    for file in (tmp_path / "out").rglob("*.onnx"):
        assert Deployed(file).outputs


@pytest.mark.parametrize("name", EXAMPLES)
def test_says_how_it_is_called(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in text
    assert f"examples/{name}.py" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def test_each_example_has_its_output_at_full_size() -> None:
    files = {file.stem: file.read_text(encoding="utf-8") for file in (FOLDER / "expected").glob("*.txt")}
    assert files.keys() == set(EXAMPLES)
    for text in files.values():
        assert {"time", "peak memory"} <= lines(text)
        assert "not measured at size tiny" not in text and not re.search(r"  -$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(2_000_000, 500_000, "2.00 MB -> 500 kB, 4.0 times smaller"), (800, 1200, "800 B -> 1.20 kB, 1.5 times larger")],
)
def test_sizes_are_said_as_they_are(before: int, after: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(after))
    assert sizes(before, path) == said


def test_all_are_listed() -> None:
    files = {file.stem for file in FOLDER.glob("*.py") if "program(main)" in file.read_text(encoding="utf-8")}
    assert files - {"frame"} == set(EXAMPLES)
