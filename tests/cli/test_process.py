"""The installed command, as a process of its own: exit codes, streams, and what --help imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphopt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = relu(x)."""
    path = tmp_path_factory.mktemp("cli") / "relu.onnx"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_optimize_and_its_exit_codes(model: Path, tmp_path: Path) -> None:
    found = run("optimize", model, "-o", tmp_path / "small.onnx")
    assert found.returncode == 0
    stages = [line.split(":")[0] for line in found.stderr.splitlines()]
    assert [stage for stage in stages if stage != "measure"] == [
        "capture", "run the original", "simplify", "fold-int8", "lower", "check"
    ]  # fmt: skip
    assert run("optimize", model, "-o", tmp_path / "small.onnx", "--quiet").stderr == ""
    assert (tmp_path / "small.onnx").is_file()

    wrong = run("optimize", model, "-o", tmp_path / "other.onnx", "--passes", "distil")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("graphopt: there is no pass 'distil'") and wrong.stderr.count("\n") == 1

    (tmp_path / "text.onnx").write_text("no model")
    failed = run("inspect", tmp_path / "text.onnx")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "is not a readable ONNX model" in failed.stderr and failed.stderr.count("\n") == 1


def test_trace_by_the_environment(model: Path) -> None:
    found = run("optimize", model, GRAPHOPT_TRACE="1")
    assert found.returncode == 1
    assert "Traceback" in found.stderr and "UsageError: say where to write" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["graphopt", "onnxruntime"])
def test_nothing_is_reported_to_the_maker_of_an_engine(first: str, model: Path, tmp_path: Path) -> None:
    unset = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI")  # what keeps onnxruntime from it
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}  # nobody there
    environment = {name: value for name, value in os.environ.items() if name not in unset} | home
    probe = (
        f"import {first}, graphopt; graphopt.optimize({str(model)!r}, measure=False)\n"
        "try: import onnxruntime; onnxruntime.InferenceSession('missing.onnx')\n"
        "except Exception: pass"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment, capture_output=True)
    reports = [path.read_bytes() for path in tmp_path.rglob("onnxruntime.db*")]
    assert not any(b"RuntimeError" in report for report in reports)
    assert first == "onnxruntime" or not reports


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from typer.testing import CliRunner; from graphopt.cli import app as cli; "
        "found = CliRunner().invoke(cli.app, ['optimize', '--help']); "
        "print(found.exit_code, '--dry-run' in found.output, "
        "sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'jinja2'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout == "0 True []\n"
