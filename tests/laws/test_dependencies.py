"""What the shipped sources import is declared in pyproject.toml: a dependency, or an extra that is imported lazily."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("graphopt", "passes", "backends")
PROVIDED = {"triton": "builds of torch for CUDA bring it, in the version that they need"}


@cache
def declared() -> tuple[set[str], set[str]]:
    """The distributions that graphopt always needs, and those of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name, several in project["optional-dependencies"].items() if name != "dev" for one in several]
    return {distribution(one) for one in project["dependencies"]}, {distribution(one) for one in extras}


@cache
def installed() -> dict[str, set[str]]:
    """By importable package, the distributions that hold it."""
    return {package: set(map(distribution, names)) for package, names in packages_distributions().items()}


def distribution(requirement: str) -> str:
    """The normalized name in a requirement, such as onnx-ir in onnx_ir>=1.1."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """The packages that a module imports, and whether inside a function or for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], lazy
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from imports(node, lazy or is_for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def faults(source: str) -> list[str]:
    """The imports of a source that pyproject.toml does not allow."""
    needed, extras = declared()
    found = []
    for package, lazy in imports(ast.parse(source)):
        if package in sys.stdlib_module_names or package == "graphopt" or package in PROVIDED:
            continue
        names = installed().get(package, {distribution(package)})
        if not names & needed and not (lazy and names & extras):
            found.append(f"{package} is {'in an extra, and imported at the top' if names & extras else 'not declared'}")
    return found


@pytest.mark.parametrize("folder", SHIPPED)
def test_what_is_imported_is_declared(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{file.relative_to(ROOT)}: {fault}" for file in files for fault in faults(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_faults_are_seen() -> None:
    assert faults("import scipy.linalg") == ["scipy is in an extra, and imported at the top"]
    assert faults("def f():\n    from hypothesis import given") == ["hypothesis is not declared"]
    assert faults("import no_such_package") == ["no_such_package is not declared"]


def test_other_imports_are_left_alone() -> None:
    lazy = "if TYPE_CHECKING:\n    import scipy\n"
    assert faults(f"import os\nimport torch.fx\nfrom . import x\nfrom graphopt.ir import graph\n{lazy}") == []
    assert faults("def f():\n    import openvino") == []
