"""A package that adds a pass and a target by entry points: found by name, imported when used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.laws.test_package import environment, install

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_package"

OPTIMIZE = """
import sys
import onnx, torch, graphopt
from onnx import numpy_helper, parser
assert not any(name.startswith("graphopt_clip") for name in sys.modules)
model = parser.parse_model('<ir_version: 10, opset_import: ["": 20]> '
                           'g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, W) }')
model.graph.initializer.append(numpy_helper.from_array(torch.eye(4).numpy(), "W"))
small = graphopt.optimize(model, "clip-weights{limit=0.1}", target="float-convs", measure=False)
print(small.report.target, small.report.pipeline, float(small(torch.ones(1, 4))["y"].sum()))
(record,) = [record for record in small.report.passes if record.name == "clip-weights"]
print(record.changed, graphopt.optimize(model, "clip-weights{limit=2}", target="float-convs").report.passes[1].declined)
"""


def add(folder: Path, name: str, *entry_points: str) -> None:
    """A distribution of nothing but entry points, as an installer writes it."""
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("\n".join(entry_points) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with this checkout, the example package, and some broken ones."""
    folder = tmp_path_factory.mktemp("plugins")
    found = environment(folder / "venv")
    (own,) = (folder / "venv").rglob("site-packages")
    (own / "checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    install(found, folder / "source")
    add(own, "broken", "[graphopt.passes]", "no-module = nowhere:Pass", "no-pass = json:loads")
    add(own, "rival", "[graphopt.passes]", "twice = a:A", "quantize = a:A", "", "[graphopt.backends]", "fast = a:A")
    add(own, "second", "[graphopt.passes]", "twice = b:B")
    return found


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), *arguments], cwd=python.parent, capture_output=True, text=True, timeout=300)


def test_both_are_found_by_name(python: Path) -> None:
    done = run(python, "-c", OPTIMIZE)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("float-convs simplify,clip-weights{limit=0.1},fold-int8 0.4")
    assert second.startswith("1 {") and second.endswith("'within the limit (largest 1.0, limit 2)'}"), second


@pytest.mark.slow
def test_the_commands_list_them_and_what_is_broken(python: Path) -> None:
    done = run(python, "-m", "graphopt", "passes")
    assert done.returncode == 0, done.stderr
    assert "clip-weights  (PRUNE, lossy, fx and onnx)" in done.stdout and "limit=1.0" in done.stdout
    lines = done.stdout.splitlines()
    (missing,) = [line for line in lines if line.startswith("no-module")]
    assert missing == (
        "no-module  (broken: pass 'no-module' of package broken 0.1 cannot be imported: ModuleNotFoundError: No module "
        "named 'nowhere')"
    )
    assert "no-pass  (broken: pass 'no-pass' of package broken 0.1 is json:loads, which is no Pass class)" in lines
    assert "twice  (broken: pass 'twice' is registered by rival 0.1 and second 0.1: uninstall one of them)" in lines
    assert "quantize  (broken: that of package rival 0.1 is not used: it needs another name)" in lines
    assert "quantize  (QUANTIZE, lossy, fx and onnx)" in lines

    done = run(python, "-m", "graphopt", "targets")
    summary = "ONNX Runtime with integers in linears alone"
    assert f"float-convs  (onnx)\n    {summary}\n    quantized: linear dynamic" in done.stdout
    assert "fast  (broken: target 'fast' of package rival 0.1 cannot be imported" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", "pass 'twice' is registered by rival 0.1 and second 0.1: uninstall one of them"),
        ("no-module", "pass 'no-module' of package broken 0.1 cannot be imported: ModuleNotFoundError"),
        ("clip-weigths", "there is no pass 'clip-weigths'; did you mean 'clip-weights'?"),
    ],
)
def test_a_name_that_stands_for_no_pass_is_one_line(name: str, message: str, python: Path) -> None:
    done = run(python, "-m", "graphopt", "passes", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_built_in_name_stays_graphopts_own(python: Path) -> None:
    done = run(python, "-c", "from graphopt.passes import REGISTRY; print(REGISTRY['quantize'].__module__)")
    assert done.stdout == "graphopt.passes.quantize.quantize\n"
    assert "pass 'quantize' is graphopt's own; that of package rival 0.1 is not used: it needs" in done.stderr


def test_no_plugin_is_imported_before_its_name_is_used(python: Path) -> None:
    names = "'float-convs' in list(b.TARGETS), 'graphopt_clip' in sys.modules"
    probe = f"import sys, graphopt.backends as b; print({names})"
    assert run(python, "-c", probe).stdout == "True False\n"
