"""The layout: two links, one list of packages, no trace of any one machine, and names that say something."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("passes", "backends")

HOME_PATH = re.compile(r"(?<![\w./~*})])/(?:home|root|work|Users|tmp|opt|mnt|srv)/\w")
INDEX_HOST = re.compile(r"\bpypi\.\w|pythonhosted\.\w|download\.pytorch\.\w|--(?:extra-)?index-url\b|\bfile:/{2,}\w")
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "misc", "common"}


def test_links_resolve_to_the_top_folders() -> None:
    for name in LINKED:
        link = ROOT / "graphopt" / name
        assert link.is_symlink(), f"graphopt/{name} is not a link"
        assert link.readlink() == Path("..") / name
        assert link.resolve() == (ROOT / name).resolve()


def test_package_dir_agrees_with_the_links() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert mapping_faults(configuration) == []


def mapping_faults(configuration: dict[str, Any]) -> list[str]:
    """Where the list of packages or their folders say something else than the tree."""
    folders = configuration["package-dir"]
    expected = {"graphopt": "graphopt"} | {f"graphopt.{name}": name for name in LINKED}
    faults = [] if folders == expected else [f"package-dir is {folders}, not {expected}"]
    roots = [ROOT / "graphopt", *(ROOT / "graphopt" / name for name in LINKED)]  # rglob doesn't enter links
    real = {file.parent for root in roots for file in root.rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in real}
    listed = configuration["packages"]
    faults += [f"{package} is not in packages" for package in sorted(packages - set(listed))]
    faults += [f"{package} is in packages, but has no folder" for package in sorted(set(listed) - packages)]
    faults += [f"{package} is listed twice" for package in sorted({p for p in listed if listed.count(p) > 1})]
    return faults


def test_mapping_faults_are_seen() -> None:
    folders = {"graphopt": "graphopt", "graphopt.passes": "passes"}
    faults = mapping_faults({"package-dir": folders, "packages": ["graphopt", "graphopt", "graphopt.moved"]})
    assert any("package-dir" in fault for fault in faults)
    assert "graphopt.backends is not in packages" in faults
    assert "graphopt.numerics is not in packages" in faults
    assert "graphopt.moved is in packages, but has no folder" in faults
    assert "graphopt is listed twice" in faults


def tracked() -> list[Path]:
    """Files in git's index, or about to be (not ignored), links left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def traces(text: str) -> list[str]:
    """Lines that name a folder of one machine, or a package index."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"{number}: {line.strip()}" for number, line in lines if HOME_PATH.search(line) or INDEX_HOST.search(line)]


def text_of(path: Path) -> str:
    """The text of a file, "" for a binary one."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8", errors="replace")


def test_no_trace_of_a_machine_or_an_index() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in tracked() for line in traces(text_of(path))]
    assert not found, "\n" + "\n".join(found)


def test_traces_are_seen() -> None:
    # Put together here, so that this file doesn't hold what it forbids.
    for folder in ("home", "root", "work", "Users", "tmp"):
        assert traces(f"cd '/{folder}/someone'"), folder
    assert traces("https://" + "pypi" + ".org/simple")
    assert traces("https://files." + "pythonhosted" + ".org/x")
    assert traces("pip install --" + "index-url somewhere")
    assert traces("torch @ file:" + "//somewhere/torch.whl")


def test_traces_leave_other_text_alone() -> None:
    innocent = ["#!/usr/bin/env bash", "/proc/cpuinfo", "https://example.com/work/x", "tests/tmp/x", "~/work/x"]
    assert [line for line in innocent if traces(line)] == []


def test_names_say_something() -> None:
    assert vague(tracked()) == []


def vague(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.suffix == ".py" and path.stem.strip("_") in VAGUE_NAMES]


def test_vague_names_are_seen() -> None:
    planted = [Path("graphopt/utils.py"), Path("tests/_helpers.py"), Path("passes/prune.py"), Path("utils.md")]
    assert vague(planted) == planted[:2]
