"""The import law: who may import whom, read from the syntax tree of every file.

    numerics -> torch and the standard library          passes -> the core and numerics; no dialect, backend or fx
    dialects -> neither passes nor backends             backends -> no pass
    core -> a dialect only inside a function of capture.py; a pass or backend never by name
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

NUMERICS, PASSES, BACKENDS = "graphopt.numerics", "graphopt.passes", "graphopt.backends"
DIALECTS, CLI = "graphopt.dialects", "graphopt.cli"
DEMO = "graphopt.demo"  # an application on top of the core, as the command line is
ONNX = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnx_graphsurgeon")


@dataclass(frozen=True)
class Import:
    """One imported module, or one name out of a module (`from a import b` gives a and a.b)."""

    name: str
    line: int
    lazy: bool
    """Whether it stands inside a function, and so runs only when that is called."""

    def within(self, *packages: str) -> bool:
        return any(self.name == package or self.name.startswith(package + ".") for package in packages)


def imports(path: Path, source: str) -> list[Import]:
    """Every import of a file, relative ones resolved; import_module("a.b") counts, so does the attribute torch.fx."""
    modules: dict[str, str] = {}

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                modules[alias.asname or bound] = bound
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            module = resolve(path, node)
            yield Import(module, node.lineno, lazy)
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, lazy)
        elif isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in modules:
                yield Import(f"{modules[root]}.{rest}", node.lineno, lazy)
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types_only(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    return list(visit(ast.parse(source), lazy=False))


def for_types_only(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:` never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def resolve(path: Path, node: ast.ImportFrom) -> str:
    """The absolute module of `from x import y`; `path` is relative to the root."""
    if not node.level:
        return node.module or ""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(path: Path, source: str) -> list[str]:
    """What a file imports against the law. `path` is relative to the root and spells graphopt/passes, not passes."""
    lines = (f"{path}:{found.line}: {why}" for found in imports(path, source) for why in judge(path, found))
    return list(dict.fromkeys(lines))


def judge(path: Path, found: Import) -> Iterator[str]:
    top, module = path.parts[0], module_of(path)
    here = Import(module, 0, lazy=False)
    if found.within("passes", "backends"):
        yield f"{found.name}: the name is graphopt.{found.name}; the bare one is a second module object"
    if top != "graphopt":
        return
    if found.within("tests", "benchmarks"):
        yield f"{found.name}: nothing imports tests or benchmarks"
    if found.within("onnxruntime") and not owns_onnxruntime(here):
        yield f"{found.name}: onnxruntime belongs to its backend and to dialects/onnx"

    if here.within(NUMERICS):
        if not found.within("torch", NUMERICS) and found.name.split(".")[0] not in sys.stdlib_module_names:
            yield f"{found.name}: numerics know torch and the standard library only"
    elif here.within(PASSES):
        if found.within("torch.fx", "torch.onnx", *ONNX, DIALECTS, BACKENDS, CLI):
            yield f"{found.name}: a pass knows the core and numerics only"
    elif here.within(DIALECTS):
        if found.within(PASSES, BACKENDS, CLI):
            yield f"{found.name}: a dialect knows no pass and no backend"
    elif here.within(BACKENDS):
        if found.within(PASSES, CLI):
            yield f"{found.name}: a backend knows no pass"
    elif not here.within(CLI, DEMO):
        yield from judge_core(module, found)


def judge_core(module: str, found: Import) -> Iterator[str]:
    if found.within(CLI):
        yield f"{found.name}: the core doesn't know its command line"
    if found.within(DIALECTS) and not (module == "graphopt.capture" and found.lazy):
        yield f"{found.name}: the core reaches a dialect only inside a function of capture.py"
    if found.within(PASSES, BACKENDS):
        if not found.lazy:
            yield f"{found.name}: the core reaches passes and backends inside functions only"
        if names_one(found):
            yield f"{found.name}: the core knows no pass and no backend by name"


def owns_onnxruntime(here: Import) -> bool:
    package, _, name = here.name.rpartition(".")
    return (package == BACKENDS and name.startswith("onnxruntime")) or (package == DIALECTS and name.startswith("onnx"))


def names_one(found: Import) -> bool:
    """Whether an import from graphopt.passes or graphopt.backends is of one pass or one backend (or its module)."""
    parts = found.name.split(".")
    return len(parts) > 2 and parts[2] in individuals(parts[1])


@cache
def individuals(package: str) -> frozenset[str]:
    """The modules of `passes` or `backends`, and the classes in them. Timing (measure, timings) is neither."""
    files = [file for file in (ROOT / package).glob("*.py") if file.stem not in ("__init__", "measure", "timings")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    return frozenset(classes | {file.stem for file in files})


def sources() -> list[Path]:
    """Every Python file, relative to the root, each once."""
    folders = ["graphopt", "graphopt/passes", "graphopt/backends", "tests", "benchmarks"]
    # rglob doesn't enter links, so the linked folders are named.
    return sorted({file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*.py")})


def test_every_file_keeps_the_law() -> None:
    found = [line for path in sources() for line in violations(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_every_folder_is_read() -> None:
    read = {path.parts[:2] for path in sources()}
    assert {("graphopt", "numerics"), ("graphopt", "passes"), ("graphopt", "backends"), ("tests", "laws")} <= read


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("graphopt/numerics/prune.py", "import numpy", "torch and the standard library"),
        ("graphopt/numerics/prune.py", "from ..words import WORDS", "torch and the standard library"),
        ("graphopt/passes/prune.py", "import torch.fx", "core and numerics"),
        ("graphopt/passes/prune.py", "import torch\ng: torch.fx.Graph", "core and numerics"),
        ("graphopt/passes/prune.py", "import torch as t\ng: t.fx.Graph", "core and numerics"),
        ("graphopt/passes/prune.py", "def f():\n    from torch import fx", "core and numerics"),
        ("graphopt/passes/prune.py", "import onnx_ir as ir", "core and numerics"),
        ("graphopt/passes/prune.py", "from ..dialects import fx", "core and numerics"),
        ("graphopt/passes/prune.py", "from graphopt import backends", "core and numerics"),
        ("graphopt/passes/prune.py", "import importlib\nimportlib.import_module('onnx')", "core and numerics"),
        ("graphopt/dialects/fx.py", "def f():\n    from graphopt.passes import PASSES", "no pass and no backend"),
        ("graphopt/dialects/fx.py", "import graphopt.backends", "no pass and no backend"),
        ("graphopt/dialects/fx.py", "import onnxruntime", "belongs to its backend"),
        ("graphopt/backends/measure.py", "import onnxruntime", "belongs to its backend"),
        ("graphopt/backends/onednn.py", "from graphopt.passes import PASSES", "knows no pass"),
        ("graphopt/backends/__init__.py", "from .. import passes", "knows no pass"),
        ("graphopt/capture.py", "from graphopt.dialects import fx", "inside a function of capture"),
        ("graphopt/optimize.py", "def f():\n    import graphopt.dialects.fx", "inside a function of capture"),
        ("graphopt/pipeline.py", "from graphopt.passes import PASSES", "inside functions only"),
        ("graphopt/pipeline.py", "import graphopt.backends", "inside functions only"),
        ("graphopt/render/text.py", "from ..dialects import onnx", "inside a function of capture"),
        ("graphopt/graph.py", "from graphopt.cli import main", "command line"),
        ("graphopt/graph.py", "import tests.language", "nothing imports tests"),
        ("graphopt/cli.py", "def f():\n    from benchmarks import run", "nothing imports tests or benchmarks"),
        ("graphopt/cli.py", "import passes", "second module object"),
        ("tests/passes/test_prune.py", "from passes import prune", "second module object"),
        ("benchmarks/run.py", "import backends.measure", "second module object"),
    ],
)
def test_the_law_can_be_broken(path: str, source: str, reason: str) -> None:
    found = violations(Path(path), source)
    assert any(reason in line for line in found), found


@pytest.mark.parametrize("source", ["from {} import {}", "from {} import {} as it", "import {}.{}"])
@pytest.mark.parametrize("package", ["passes", "backends"])
def test_the_core_names_no_pass_and_no_backend(
    package: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "shrink.py").write_text("class Shrink: ...\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    individuals.cache_clear()
    try:
        for name in ("shrink", "Shrink"):
            planted = "def f():\n    " + source.format(f"graphopt.{package}", name)
            found = violations(Path("graphopt/optimize.py"), planted)
            assert any("by name" in line for line in found), planted
    finally:
        individuals.cache_clear()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("graphopt/numerics/prune.py", "import math\nimport torch\nfrom graphopt.numerics.finite import check"),
        ("graphopt/passes/recover.py", "import torch\nfrom torch import nn, optim\nx = torch.nn.Linear"),
        ("graphopt/passes/prune.py", "from graphopt.numerics import prune\nfrom ..graph import Graph\nfx = 1"),
        ("graphopt/dialects/onnx_run.py", "import onnxruntime, onnx_ir\nfrom ..graph import Graph"),
        ("graphopt/backends/onnxruntime_cuda.py", "import onnxruntime"),
        ("graphopt/backends/onnxruntime.py", "from graphopt.dialects.onnx import OnnxGraph"),
        ("graphopt/capture.py", "def f():\n    from graphopt.dialects import fx"),
        ("graphopt/pipeline.py", "def f():\n    from graphopt.passes import PASSES"),
        ("graphopt/optimize.py", "def f():\n    from graphopt.backends.measure import paired"),
        ("graphopt/optimize.py", "if TYPE_CHECKING:\n    from graphopt.backends.measure import Ratio"),
        ("graphopt/cli.py", "from graphopt.passes import PASSES\nfrom graphopt.backends import TARGETS"),
        ("tests/laws/test_imports.py", "from tests.language import build\nimport graphopt.passes"),
    ],
)
def test_the_law_permits(path: str, source: str) -> None:
    assert violations(Path(path), source) == []
