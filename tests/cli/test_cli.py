"""The commands, called in this process on tiny models: what they print, what they write, and how they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

import graphopt
from graphopt.cli import app as cli
from tests import models

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "W1": RANDOM.normal(size=(16, 32)).astype(np.float32),
    "b1": RANDOM.normal(size=32).astype(np.float32),
    "W2": RANDOM.normal(size=(32, 4)).astype(np.float32),
}


def write_model(path: Path, weights: dict[str, Any] = WEIGHTS, activation: str = "Relu", name: str = "x") -> Path:
    """linear -> activation -> linear, in the names of a TorchScript export."""
    nodes = [
        helper.make_node("MatMul", [name, "W1"], ["a"], name="/encoder/fc1/MatMul"),
        helper.make_node("Add", ["a", "b1"], ["b"], name="/encoder/fc1/Add"),
        helper.make_node(activation, ["b"], ["c"], name="/encoder/act/Act"),
        helper.make_node("MatMul", ["c", "W2"], ["y"], name="/head/MatMul"),
    ]
    float_ = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, float_, ["batch", 16])],
        [helper.make_tensor_value_info("y", float_, ["batch", 4])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def run(*arguments: object, trace: bool = False) -> Result:
    return CliRunner().invoke(cli.app, (["--trace"] if trace else []) + [str(one) for one in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code: int, *arguments: object) -> str:
    """The one line of an error, which is the last; those above it are of stages that were done."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    *stages, line = result.stderr.splitlines()
    assert result.stderr.endswith("\n") and line.startswith("graphopt: ")
    assert all(re.fullmatch(r"[\w -]+: (.+, )?\d+\.\d s", stage) for stage in stages)
    return line.removeprefix("graphopt: ")


def outputs(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


# --- optimize ------------------------------------------------------------------------------------------------------


def test_optimize_writes_the_model_its_manifest_and_a_page(model: Path, calibration: Path, tmp_path: Path) -> None:
    small, page = tmp_path / "small.onnx", tmp_path / "report.html"
    text = "sparsify{amount=0.25},quantize{scheme=static}"
    shown = done("optimize", model, "-o", small, "--passes", text, "--calibration", calibration, "--report", page)
    rows = {line.split()[0]: line.split()[1:4] for line in shown.splitlines() if line.startswith(("sparsify", "quant"))}
    assert rows == {"sparsify": ["2", "2", "0"], "quantize": ["2", "2", "0"]}
    assert shown.splitlines()[-1] == f"written: {small}, {page}"
    manifest = json.loads((tmp_path / "small.onnx.json").read_text())
    assert f"simplify,{text}" in manifest["pipeline"]
    assert "linear_int8" in page.read_text()
    x = RANDOM.normal(size=(5, 16)).astype(np.float32)
    expected, found = outputs(model, x), outputs(small, x)
    cosine = float((expected * found).sum() / np.linalg.norm(expected) / np.linalg.norm(found))
    assert cosine > 0.95 and not np.array_equal(expected, found)


def test_optimize_without_passes_loses_nothing(model: Path, tmp_path: Path) -> None:
    done("optimize", model, "-o", tmp_path / "same.onnx")
    x = RANDOM.normal(size=(5, 16)).astype(np.float32)
    np.testing.assert_allclose(outputs(tmp_path / "same.onnx", x), outputs(model, x), rtol=1e-4, atol=1e-5)


def test_optimize_as_json(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    facts = json.loads(done("optimize", model, "-o", small, "--passes", "low-rank{rank=0.25}", "--json"))
    assert facts["written"] == [str(small)]
    low_rank = next(record for record in facts["passes"] if record["name"] == "low-rank")
    assert low_rank["eligible"] == ["encoder.fc1", "head"] and low_rank["changed"] == 2
    assert low_rank["cost_after"]["parameters"] < low_rank["cost_before"]["parameters"]


def test_a_dry_run_says_why_not_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    shown = done("optimize", model, "--dry-run", "--passes", "low-rank{rank=1.0}")
    assert "2 x" not in shown.split("declined")[0]
    assert "rank 16 holds 768 numbers, no fewer than the 512 of [32, 16]: encoder.fc1" in " ".join(shown.split())
    assert shown.endswith("dry run: nothing was written\n")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "say where to write: -o FILE, --bundle DIR, or --dry-run"),
        (["{model}", "--dry-run", "-o", "{folder}/small.onnx"], "--dry-run writes nothing"),
        (["{folder}/none.onnx", "--dry-run"], "there is no file {folder}/none.onnx"),
        (["{model}", "-o", "{folder}/none/small.onnx"], "there is no folder {folder}/none; make it first"),
        (["{model}", "-o", "{folder}"], "{folder} is a folder; name another file"),
        (["{model}", "-o", "{folder}/a.txt"], "a.txt is no .onnx file, and onnxruntime writes .onnx: name it a.onnx"),
        (["{model}", "-o", "{folder}/a"], "a has no suffix, and onnxruntime writes .onnx: name it a.onnx"),
        (["{model}", "-o", "/dev/null"], "/dev/null is a device, which is never overwritten"),
        (["{model}", "-o", "{folder}/a.onnx", "--target", "fbgemm"], "fbgemm writes .pt2: name it a.pt2"),
        (["{model}", "-o", "{folder}/a.onnx", "--report", "{model}"], "{model} is the model itself; write the"),
        (["{model}", "--dry-run", "--passes", "quantise"], "there is no pass 'quantise'; did you mean 'quantize'?"),
        (["{model}", "--dry-run", "--passes", "sparsify{{amuont=1}}"], "no option 'amuont'; did you mean 'amount'?"),
        (["{model}", "--dry-run", "--passes", "quantize,sparsify"], "the right order is sparsify,quantize"),
        (["{model}", "--dry-run", "--passes", "sparsify{{"], "pipeline text, at character 10"),
        (["{model}", "--dry-run", "--target", "onnxrutime"], "there is no target 'onnxrutime'; did you mean 'onnxrun"),
        (["{model}", "--dry-run", "--passes", "quantize{{scheme=static}}"], "quantize needs calibration data"),
        (["{model}", "--dry-run", "--passes", "sparsify{{targets=encodr.*}}"], "'encodr.*' selects no site"),
        (["{model}", "--dry-run", "--calibration", "{folder}/none.npz"], "there is no file {folder}/none.npz"),
        (["{model}", "--dry-run", "--calibration", "{model}"], "tiny.onnx' is no source of batches; give an .npz"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    places = {"model": model, "folder": tmp_path}
    line = refused(2, "optimize", *(argument.format(**places) for argument in arguments))
    assert message.format(**places) in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((8, 16), np.float32)}, "calibration has no 'x'; there are y"),
        ({"x": np.zeros((8, 15), np.float32)}, "batch 0, input 'x' has shape [8, 15], and the model takes [batch, 16]"),
        ({"x": np.zeros((8, 16), np.int64)}, "input 'x' holds int64, and the model takes float32"),
        ({"x": np.full((8, 16), np.nan, np.float32)}, "input 'x' holds 128 NaN"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "is not an .npz file of plain arrays"),
    ],
)
def test_wrong_calibration(model: Path, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    small = tmp_path / "small.onnx"
    arguments = "-o", small, "--passes", "quantize{scheme=static}", "--calibration", tmp_path / "wrong.npz"
    assert message in refused(2, "optimize", model, *arguments)
    assert not small.exists()


@pytest.mark.parametrize(
    ("output", "report", "message"),
    [
        ("a.onnx", "a.onnx", "a.onnx is what --output writes"), ("a.onnx", "a.onnx.json", "is what --output writes"),
        ("a.onnx", "outside.onnx", "outside.onnx is the model itself"),
        ("w.onnx", None, "w.onnx.json holds weights of the model"),
        ("a.onnx", "w.onnx.json", "w.onnx.json holds weights of the model"),
    ],
)  # fmt: skip
def test_nothing_that_is_read_or_written_is_overwritten(
    output: str, report: str | None, message: str, model: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(model), outside, save_as_external_data=True, location="w.onnx.json", size_threshold=64)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("optimize", outside, "-o", tmp_path / output, *(["--report", tmp_path / report] if report else []))
    assert result.exit_code == 2 and message in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_over_itself(model: Path) -> None:
    before = model.read_bytes()
    done("optimize", model, "-o", model, "--passes", "quantize{scheme=dynamic}")
    assert model.read_bytes() != before and "linear" in done("inspect", model)


def test_a_failing_pass_is_one_line_and_leaves_a_reproducer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken = write_model(tmp_path / "nan.onnx", WEIGHTS | {"W2": np.full((32, 4), np.nan, np.float32)})
    line = refused(1, "optimize", broken, "-o", tmp_path / "small.onnx", "--passes", "quantize{scheme=dynamic}")
    assert line.startswith("pass quantize failed") and "head: weight has 128 of 128 values NaN" in line
    folder = Path(line.split("to reproduce: ")[1])
    assert folder.parent == tmp_path
    assert not (tmp_path / "small.onnx").exists()
    assert line.startswith(refused(1, "reproduce", folder))


def test_a_corrupt_file_is_one_line(model: Path, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(model.read_bytes()[:-200])
    for command in (["optimize", corrupt, "--dry-run"], ["inspect", corrupt], ["diff", model, corrupt]):
        assert "corrupt.onnx is not a readable ONNX model" in refused(1, *command)


def test_an_unknown_error_is_one_short_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.capture import sources as capture

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the engine says:\n" + "a very long story " * 100)

    monkeypatch.setattr(capture, "capture", broken)
    line = refused(1, "inspect", model)
    assert line.startswith("RuntimeError: the engine says: a very") and line.endswith("(--trace shows where)")
    assert len(line) < 400


def test_trace_shows_where(model: Path) -> None:
    result = run("optimize", model, trace=True)
    assert type(result.exception).__name__ == "UsageError"
    assert run("optimize", model).exit_code == 2


# --- inspect, diff, bench ------------------------------------------------------------------------------------------


def test_inspect(model: Path) -> None:
    shown = done("inspect", model).splitlines()
    assert shown[:2] == ["input    x [batch, 16] float32", "output   y [batch, 4] float32"]
    assert "weights  672 parameters, 2.69 kB" in shown
    assert "ops      linear 2, relu 1" in shown and "opaque   none" in shown
    assert "return %2[batch,4]" in done("inspect", model, "--full").splitlines()


def test_flops_are_at_the_sizes_of_the_inputs(model: Path, calibration: Path) -> None:
    assert "FLOPs    1.28 k at x [1, 16]" in done("inspect", model).splitlines()
    assert "FLOPs    25.6 k at x [20, 16]" in done("inspect", model, "--inputs", calibration).splitlines()
    facts = json.loads(done("inspect", model, "--inputs", calibration, "--json"))
    assert (facts["flops"], facts["flops_at"]) == (20 * 1280, {"x": [20, 16]})


def test_inspect_lists_what_prune_may_cut(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    shown = done("inspect", model, "--groups")
    found = json.loads(done("inspect", model, "--groups", "--json"))
    assert found[-1]["locked"]["sentence"] == "it is the model's output 'y'"
    assert all(group["name"] in shown and group["kind"] in shown for group in found)


def test_inspect_lists_residual_branches(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    model = models.exported(models.seeded(models.Encoder), {"ids": models.tokens(), "mask": models.padding()}, 18, True)
    onnx.save(model, path)
    shown = done("inspect", path, "--groups")
    layers = [one for one in json.loads(done("inspect", path, "--groups", "--json")) if one["kind"] == "layers"]
    assert len(layers) == 4 and all(one["name"] in shown and one["locked"] is None for one in layers)


def test_inspect_as_json(tmp_path: Path) -> None:
    facts = json.loads(done("inspect", write_model(tmp_path / "a.onnx", activation="Softplus"), "--json", "--full"))
    assert facts["inputs"] == {"x": "[batch, 16] float32"}
    assert (facts["ops"], facts["opaque"]) == ({"linear": 2}, {"onnx.Softplus": 1})
    assert (facts["parameters"], facts["bytes"], facts["flops"]) == (672, 2688, 1280)
    assert facts["flops_at"] == {"x": [1, 16]}
    assert len(facts["listing"]) == 4


def test_diff(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.onnx", activation="Tanh")
    lines = done("diff", model, other).splitlines()
    assert lines[0] == "1 removed, 1 added, 3 unchanged lines; relu 1 -> 0, tanh 0 -> 1"
    assert [line for line in lines[1:] if line[0] in "+-"] == [
        "- %1 = relu(%0[batch,32])  # encoder.act",
        "+ %1 = tanh(%0[batch,32])  # encoder.act",
    ]
    facts = json.loads(done("diff", model, other, "--json"))
    assert facts["kinds"] == {"relu": [1, 0], "tanh": [0, 1]} and len(facts["lines"]) == 2
    assert done("diff", model, model).splitlines() == ["0 removed, 0 added, 4 unchanged lines", "  ... 4 unchanged"]


def fake_ratios(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Timing that runs each candidate once, takes no time, and gives 1, 2, 3 for the candidates in order."""
    from graphopt.measure import timing

    seen: dict[str, int] = {}

    def paired(candidates: Any, *, baseline: str, rounds: int, on_round: Any) -> dict[str, timing.Ratio]:
        for name, call in candidates.items():
            seen[name] = len(call())
        return {
            name: timing.Ratio(1.0 + number, 0.9, 9.9, rounds, 0, {baseline: (0.002, 0.003), name: (0.001, 0.002)})
            for number, name in enumerate(candidates)
        }

    monkeypatch.setattr(timing, "paired", paired)
    return seen


def test_bench_against_the_optimized_form(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_ratios(monkeypatch)
    shown = " ".join(done("bench", model, "--rounds", "7").split())
    assert "x [1, 16] 2.000 2.00 [0.90, 9.90] 3.00 [0.90, 9.90]" in shown and "7 paired rounds" in shown
    assert seen == {"tiny.onnx": 1, "optimized": 1, "control": 1}


def test_bench_of_two_files(model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_ratios(monkeypatch)
    (tmp_path / "b").mkdir()
    other = write_model(tmp_path / "b/tiny.onnx", activation="Tanh")
    facts = json.loads(done("bench", model, other, "--inputs", calibration, "--json", "--rounds", "7"))
    assert facts["inputs"] == "x [20, 16]" and set(facts["ratios"]) == {str(other), "control"}
    assert facts["ratios"][str(other)]["rounds"] == 7 and "cpu" in facts["environment"]
    assert set(seen) == {"tiny.onnx", str(other), "control"}


def test_bench_uses_the_data_that_it_is_given(
    model: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is measured and calibrated on, none of it is made up."""
    import graphopt.api
    from graphopt.capture import sources

    fake_ratios(monkeypatch)
    monkeypatch.setattr(sources, "_made_feeds", lambda *_: pytest.fail("inputs were made up"))
    given: list[dict[str, Any]] = []
    optimize = graphopt.api.optimize

    def seen(*args: Any, **options: Any) -> Any:
        given.append(options)
        return optimize(*args, **options)

    monkeypatch.setattr(graphopt.api, "optimize", seen)
    arguments = "bench", model, "--passes", "quantize{scheme=static}", "--calibration", calibration
    assert "x [8, 16]" in done(*arguments)
    np.savez(model.with_name("few.npz"), x=np.ones((3, 16), np.float32))
    assert "x [3, 16]" in done(*arguments, "--inputs", model.with_name("few.npz"))
    assert [list(options["example_inputs"]["x"].shape) for options in given] == [[8, 16], [3, 16]]


@pytest.mark.parametrize("command", ["optimize", "sensitivity", "compare"])
def test_no_inputs_are_made_up_where_data_is_given(
    command: str, model: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.capture import sources
    from graphopt.dialects.onnx.graph import OnnxGraph

    arguments: dict[str, list[object]] = {
        "optimize": [model, "--dry-run", "--passes", "fast", "--calibration", calibration],
        "sensitivity": [model, "--setting", "sparsify{amount=0.5}", "--calibration", calibration],
        "compare": [model, model, "--data", calibration],
    }
    ran: list[tuple[int, ...]] = []
    evaluate = OnnxGraph.evaluate

    def seen(graph: OnnxGraph, feeds: Any, fetch: Any) -> Any:
        ran.extend(tuple(feed.shape) for feed in feeds.values())
        return evaluate(graph, feeds, fetch)

    monkeypatch.setattr(OnnxGraph, "evaluate", seen)
    if command != "compare":  # which captures graphs alone, and runs none on what was made up
        monkeypatch.setattr(sources, "_made_feeds", lambda *_: pytest.fail("inputs were made up"))
    done(command, *arguments[command])
    assert (1, 16) not in ran


def test_bench_refuses(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.onnx", name="z")
    assert "different inputs: x and z" in refused(2, "bench", model, other)
    assert "leave out one" in refused(2, "bench", model, other, "--passes", "simplify")
    assert "leave out one" in refused(2, "bench", model, other, "--calibration", "x.npz")
    assert "there is no file" in refused(2, "bench", model, tmp_path / "none.onnx")


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *(command.__name__ for command in cli.COMMANDS)])
def test_help_is_whole_at_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = done(*filter(None, [command]), "--help")
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown and "<bool>" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_every_option_is_tried() -> None:
    commands = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    options = {tuple(param.opts) for command in commands for param in command.params if param.opts[0].startswith("-")}
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.parent.rglob("test_*.py"))
    assert not [names for names in options if not any(f'"{name}"' in tests for name in names)]


def test_a_file_for_any_engine(model: Path, tmp_path: Path) -> None:
    for options, opset in ((["--portable"], 23), (["--portable", "--opset", "17"], 17)):
        done("optimize", model, "-o", tmp_path / "a.onnx", "--passes", "fast", *options)
        written = onnx.load(tmp_path / "a.onnx")
        assert {one.domain: one.version for one in written.opset_import} == {"": opset}
        assert "DynamicQuantizeLinear" in {node.op_type for node in written.graph.node}


def test_calibration_steps_and_what_is_said_of_them(model: Path, calibration: Path) -> None:
    arguments = "optimize", model, "--dry-run", "--passes", "fast", "--calibration", f"{calibration}{{batch=4}}"
    said = [run(*arguments, "--verbose", *more).stderr for more in ([], ["--calibration-steps", "1"])]
    assert all("quantize" in lines for lines in said)
    few, many = (json.loads(done(*arguments, "--json", *more)) for more in (["--calibration-steps", "1"], []))
    assert few["passes"] and many["passes"]


def test_the_version() -> None:
    assert done("--version") == f"graphopt {graphopt.__version__}\n"


# --- passes, targets, reproduce ------------------------------------------------------------------------------------


def test_passes_lists_every_pass_with_its_options() -> None:
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.presets import PRESETS

    facts = {one["name"]: one for one in json.loads(done("passes", "--json"))}
    assert set(facts) == {*REGISTRY, *PRESETS}
    for name in PRESETS:
        assert facts.pop(name)["preset"] == PRESETS[name].text and PRESETS[name].text in done("passes", name)
    for one in facts.values():
        assert one["help"]
        assert all(help_ for _, help_ in one["options"].values()), f"an option of {one['name']} has no docstring"
    assert facts["sparsify"]["options"]["scope"][0] == "local"
    shown = done("passes")
    assert all(f"{name}  (" in shown for name in REGISTRY)


def test_passes_explains_one() -> None:
    shown = done("passes", "sparsify")
    assert "    scope=local\n        What a weight is ranked against" in shown and "low-rank" not in shown
    assert "did you mean 'sparsify'?" in refused(2, "passes", "sparsfy")


def test_targets() -> None:
    from graphopt.backends import TARGETS

    facts = json.loads(done("targets", "--json"))
    assert set(facts) == set(TARGETS)
    assert facts["onnxruntime"]["dialect"] == "onnx" and "linear" in facts["onnxruntime"]["schemes"]
    assert "onnxruntime  (onnx)" in done("targets")


def test_a_target_whose_engine_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import TARGETS

    monkeypatch.setitem(TARGETS.built_in, "absent", "graphopt.backends.absent:Absent")
    assert (
        "absent  (broken: target 'absent' cannot be imported: ModuleNotFoundError: No module named "
        "'graphopt.backends.absent')"
    ) in done("targets")
    assert refused(2, "optimize", write_model(tmp_path / "m.onnx"), "--dry-run", "--target", "absent").startswith(
        "target 'absent' cannot be imported"
    )


def test_reproduce_refuses_another_folder(tmp_path: Path) -> None:
    assert "it has no pass.json" in refused(2, "reproduce", tmp_path)


@pytest.mark.parametrize("arguments", [["optimise"], ["optimize", "--nonsense"], ["bench", "a", "--rounds", "0"], []])
def test_what_the_parser_refuses_is_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
