"""What cannot be: each ends in one clear exception, and nothing is written or changed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import CaptureError, GraphError, LoweringError, PassError, UsageError
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.passes import LowRank, Quantize
from graphopt.pipeline.runner import Pipeline
from tests.models import ConvNet, Encoder, exported, images, model, padding, plain_run, seeded, tokens

W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 64)


def linear(weight: Tensor = W) -> onnx.ModelProto:
    return model("g (float[n,64] x) => (float[n,64] y) { y = MatMul(x, W) }", {"W": weight})


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 3, {"model": 1}, np.zeros(3), nn.Module, lambda x: x, b"onnx"])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(CaptureError, match=r"cannot capture a .*; hand over an nn.Module, ExportedProgram"):
        graphopt.optimize(thing, example_inputs=X)


def test_a_path_that_is_not_there_and_files_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"there is no file .*missing.onnx"):
        graphopt.optimize(tmp_path / "missing.onnx")
    with pytest.raises(CaptureError, match=r"is a folder without config\.json"):
        graphopt.optimize(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(CaptureError, match="pickle, which is never loaded"):
        graphopt.optimize(tmp_path / "weights.pt")


def test_a_module_without_example_inputs() -> None:
    with pytest.raises(CaptureError, match=r"ConvNet is a module, .* pass example_inputs= or calibration="):
        graphopt.optimize(seeded(ConvNet))


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # depends on values
            return x * 2
        return x


class Importing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            import a_module_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401
        return x


class OverNumPy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


class Undescribed(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.ops.graphopt_tests.undescribed(x)


LIBRARY: Any = torch.library.Library("graphopt_tests", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("undescribed(Tensor x) -> Tensor")
LIBRARY.impl("undescribed", lambda x: x.clone(), "CPU")


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(5, 5)


class Empty(nn.Module):
    def forward(self, x: Tensor) -> list[str]:
        return ["no tensor"]


@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm"])
def test_an_untraceable_module_names_the_line(target: str) -> None:
    line = Untraceable.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"cannot trace Untraceable at .*test_bad_input\.py:{line} \(if x\.sum"):
        graphopt.optimize(Untraceable(), example_inputs=X, target=target)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Untraceable(), "GuardOnDataDependentSymNode: Could not guard .* Control flow and sizes that depend on values"),
        (Importing(), "ModuleNotFoundError: No module named 'a_module_that_is_not_there'. Install what forward"),
        (OverNumPy(), r"RuntimeError: .numpy\(\) is not supported .* NumPy is not traced: compute with torch"),
        (Undescribed(), "UnsupportedOperatorException: graphopt_tests.undescribed.default. Say which shapes that"),
    ],
)
def test_each_failed_trace_has_its_own_way_out(
    module: nn.Module, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        graphopt.optimize(module, example_inputs=X)
    assert ("Control flow" in str(caught.value)) == isinstance(module, Untraceable)
    assert "def forward" not in capfd.readouterr().err  # torch prints the graph that it had so far


def test_a_module_that_fails_names_the_line_and_the_shapes() -> None:
    line = Failing.forward.__code__.co_firstlineno + 1
    message = rf"Failing fails on the example inputs \(x \[3, 64\]\).*py:{line} \(return x"
    with pytest.raises(CaptureError, match=message):
        graphopt.optimize(Failing(), example_inputs=X)


def test_a_module_that_returns_no_tensor() -> None:
    with pytest.raises(CaptureError, match="returns a list without a tensor"):
        graphopt.optimize(Empty(), example_inputs=X)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((tokens(), padding(), X), "3 tensors, and Encoder.forward takes 2"),
        ({"ids": tokens(), "masks": padding()}, "no argument 'masks'; did you mean 'mask'"),
        ({"ids": tokens()}, "missing .*'mask'"),
        (("a text", padding()), r"fails on the example inputs \(mask \[2, 7\], ids='a text'\).* be Tensor, not str"),
        ([], "example_inputs is an empty list"),
        (tokens().float(), "Encoder fails on the example inputs"),
    ],
)
def test_wrong_example_inputs(example: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        graphopt.optimize(seeded(Encoder), example_inputs=example)


class Positions(nn.Module):
    """Rows of a table of 8 positions, added to x (batch, length, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.table(torch.arange(x.shape[1]))
        return y


@pytest.mark.parametrize(
    ("shapes", "axes", "message"),
    [
        ([(2, 5, 4), (2, 9, 4)], {0: "n", 1: "length"},
         r"Positions fails on the example inputs \(x \[2, 9, 4\]\): IndexError"),
        ([(2, 5, 4), (2, 6, 4)], {0: "n"},
         r"x is \[2, 6, 4\], and the export takes \[n, 5, 4\]: name the axes that differ in dynamic_shapes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("measure", [True, False])
def test_a_second_example_that_the_model_does_not_accept(
    shapes: list[tuple[int, ...]], axes: dict[int, str], message: str, measure: bool
) -> None:
    examples = [{"x": torch.zeros(shape)} for shape in shapes]
    with pytest.raises(CaptureError, match=message):
        graphopt.optimize(Positions(), example_inputs=examples, dynamic_shapes={"x": axes}, measure=measure)


@pytest.mark.parametrize(
    ("spec", "message"),
    [({"id": {0: "n"}}, "no input 'id'; did you mean 'ids'"), ({"ids": {2: "n"}}, "ids has 2 axes, and no axis 2")],
)
def test_wrong_dynamic_shapes(spec: Any, message: str) -> None:
    inputs = {"ids": tokens(), "mask": padding()}
    with pytest.raises(CaptureError, match=message):
        graphopt.optimize(seeded(Encoder), example_inputs=inputs, dynamic_shapes=spec)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"z": X}, "no input 'z'"), ((X, X), "takes 1 inputs"),
        (torch.randn(3, 5), "does not run on the example inputs"),
        (X.double(), "does not run on the example inputs"), ({}, "missing inputs: x"),
    ],
)  # fmt: skip
def test_examples_that_do_not_fit_an_onnx_model(example: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        graphopt.optimize(linear(), example_inputs=example)


@pytest.mark.parametrize("options", [{"cache": True}, {"dynamic_shapes": {"x": {0: "n"}}}])
def test_options_of_the_trace_for_what_is_not_traced(options: Any, tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "m.onnx")
    surgeon = onnx_graphsurgeon.import_onnx(linear())
    program = torch.export.export(seeded(ConvNet), (images(),))
    for thing in (linear(), tmp_path / "m.onnx", str(tmp_path / "m.onnx"), surgeon, program):
        with pytest.raises(CaptureError, match=f"{next(iter(options))} says how a module is traced"):
            graphopt.optimize(thing, **options)


def test_constants_that_the_engine_cannot_compute() -> None:
    text = "g (float[n,64] x, string[n] s) => (float[n,64] y) { c = Gather(W, i)  y = Add(x, c) }"
    with pytest.raises(CaptureError, match=r"what the model computes of its constants cannot be run: .*out of"):
        graphopt.optimize(model(text, {"W": W, "i": torch.tensor([99])}))


def test_an_onnx_model_for_a_target_of_the_other_dialect() -> None:
    with pytest.raises(CaptureError, match=r"use target=onnxruntime, or hand over the nn.Module"):
        graphopt.optimize(linear(), target="fbgemm")


# --- calibration ---------------------------------------------------------------------------------------------------

BATCH = {"ids": tokens(), "mask": padding()}


@pytest.fixture(scope="module")
def encoder() -> onnx.ModelProto:
    """The encoder as a file, which is read faster than a module is traced."""
    return exported(seeded(Encoder), BATCH, 23, dynamo=True)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"id": tokens(), "mask": padding()}, "batch 1.*'ids'.*did you mean 'id'"),
        ({"ids": tokens(), "mask": padding()[..., None]}, "batch 1, input 'mask'"),
        ({"ids": tokens().float() + 0.5, "mask": padding()}, "batch 1, input 'ids'"),
        ((tokens(),), "batch 1 holds 1 tensor, and the model has the inputs ids, mask"),
        ({"ids": ["a", "b"], "mask": padding()}, "batch 1, input 'ids'"),
    ],
)
def test_a_wrong_calibration_batch_is_named(encoder: onnx.ModelProto, batch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graphopt.optimize(
            encoder, "quantize{scheme=static}", example_inputs=BATCH, calibration=[BATCH, batch]
        )


def test_calibration_that_is_not_finite() -> None:
    x = images()
    x[0, 1, 2, 3] = torch.nan
    with pytest.raises(UsageError, match="calibration batch 0, input 'x' holds 1 NaN"):
        graphopt.optimize(seeded(ConvNet), "quantize{scheme=static}", example_inputs=images(), calibration=[x])
    x[0, 1, 2, 3] = torch.inf
    for passes, found in {
        "quantize{scheme=static}": r"at node_relu_1: on calibration batch 0, 'relu_1': x has 193 of 1024 .*: inf",
        "quantize{smooth=false}": r"at x: on calibration batch 0, 'x': x has 1 of 384 .* at \(0, 1, 2, 3\)",
    }.items():
        with pytest.raises(PassError, match=found):
            graphopt.optimize(seeded(ConvNet), passes, example_inputs=images(), calibration=[x])


def test_calibration_that_is_missing_or_empty(encoder: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        graphopt.optimize(encoder, "quantize{scheme=static}", example_inputs=BATCH)
    with pytest.raises(UsageError, match="holds no batch"):
        graphopt.optimize(encoder, "quantize{scheme=static}", example_inputs=BATCH, calibration=[])
    with pytest.raises(UsageError, match="must be an iterable of batches"):
        graphopt.optimize(encoder, "quantize{scheme=static}", example_inputs=BATCH, calibration=3)


@pytest.mark.parametrize("passes", ["quantize{scheme=static}", "smooth,quantize{scheme=static}"])
def test_a_generator_that_is_used_up_says_what_to_pass(encoder: onnx.ModelProto, passes: str) -> None:
    message = "needed again, and a generator gives them once; pass a list or a DataLoader"
    with pytest.raises(UsageError, match=message):
        graphopt.optimize(encoder, passes, example_inputs=BATCH, calibration=(batch for batch in [BATCH]))
    empty = iter([BATCH])
    next(empty)
    with pytest.raises(UsageError, match=r"used up before\? pass a list or a DataLoader"):
        graphopt.optimize(encoder, passes, example_inputs=BATCH, calibration=empty)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [
        "quantize{scheme=dynamic}",
        pytest.param("sparsify{amount=0.5}", marks=pytest.mark.slow),
        pytest.param("low-rank{rank=4}", marks=pytest.mark.slow),
    ],
)
def test_a_weight_that_is_not_finite_names_its_module(passes: str) -> None:
    module = seeded(Encoder)
    with torch.no_grad():
        module.layers[1].up.weight[3, 5] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(PassError, match=r"layers\.1\.up.*NaN.*\(3, 5\)") as caught:
        graphopt.optimize(module, passes, example_inputs=BATCH, agree=False)
    assert caught.value.pass_name == passes.split("{")[0]
    assert caught.value.reproducer is not None and (Path(caught.value.reproducer) / "README").is_file()


# --- names and order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "target", "message"),
    [
        ("quantise", "onnxruntime", "no pass 'quantise'; did you mean 'quantize'"),
        ("quantize{schema=static}", "onnxruntime", "no option 'schema'; did you mean 'scheme'"),
        ("quantize{scheme=statik}", "onnxruntime", "scheme is 'statik'; give auto, static, dynamic, weight-only or"),
        ("quantize{scheme=static", "onnxruntime", "at character"),
        ("sparsify{amount=3}", "onnxruntime", "amount"),
        (None, "onnxruntim", "no target 'onnxruntim'; did you mean 'onnxruntime'"),
        ("quantize,low-rank", "onnxruntime", "low-rank .FACTORIZE. cannot stand after quantize .QUANTIZE.; the right"),
        ("fold-int8,simplify", "onnxruntime", "simplify .* cannot stand after fold-int8"),
        ("quantize{scheme=dynamic targets=layers.9.up}", "onnxruntime", "selects no site.*did you mean 'layers.1.up'"),
        ("quantize{scheme=dynamic ignore=lineal}", "onnxruntime", "selects no site.*did you mean 'linear'"),
        ([Quantize(), LowRank()], "onnxruntime", "the right order is"),
        ([LowRank], "onnxruntime", "give pass objects, or one text"),
        (3, "onnxruntime", "passes"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(encoder: onnx.ModelProto, passes: Any, target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graphopt.optimize(encoder, passes, target=target, example_inputs=BATCH)


def test_nested_pipelines_are_put_in_order_too() -> None:
    with pytest.raises(UsageError, match=r"cannot stand after"):
        Pipeline([Pipeline([Quantize()]), Pipeline([LowRank()])])


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    path = tmp_path / "cut.onnx"
    for size in [0, 1, 5, 20, 100, 200, 1000, len(whole) - 200, len(whole) - 60, len(whole) - 20, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CaptureError):
            graphopt.optimize(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 500, b"{}", os.urandom(300)])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"odd.onnx is not a (readable|valid) ONNX model"):
        graphopt.optimize(path)


DAMAGES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "an input that nothing defines": lambda m: m.graph.node[0].input.__setitem__(0, "nothing"),
    "an output that nothing defines": lambda m: m.graph.output[0].__setattr__("name", "nothing"),
    "no operator": lambda m: m.graph.node[0].ClearField("op_type"),
    "an unknown operator": lambda m: m.graph.node[0].__setattr__("op_type", "NoSuchOp"),
    "data of another size": lambda m: m.graph.initializer[0].__setattr__("raw_data", b"1234"),
    "a negative size": lambda m: m.graph.initializer[0].dims.__setitem__(0, -64),
    "an unknown dtype": lambda m: m.graph.initializer[0].__setattr__("data_type", 99),
    "one input too many": lambda m: m.graph.node[0].input.append("x"),
    "two nodes of one result": lambda m: m.graph.node.append(m.graph.node[0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    proto = linear()
    DAMAGES[damage](proto)
    for one in (proto, tmp_path / "damaged.onnx"):
        if one is not proto:
            (tmp_path / "damaged.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises((CaptureError, LoweringError)) as caught:
            graphopt.optimize(one)
        assert str(caught.value).count("\n") == 0


def external(folder: Path, location: str, **entries: int) -> Path:
    """A model whose weight lies at `location`."""
    proto = linear()
    (tensor,) = proto.graph.initializer
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "length": len(data), **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    folder.mkdir(exist_ok=True)
    (folder / "beside.bin").write_bytes(data)
    (folder.parent / "outside.bin").write_bytes(data)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    path = external(tmp_path / "m", "beside.bin")
    torch.testing.assert_close(graphopt.optimize(path)(X)["y"], X @ W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["..", "absolute", "symlink", "linked folder", "through a folder"])
def test_external_data_outside_the_folder_is_refused(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "up").symlink_to(tmp_path)
    location = {
        "..": "../outside.bin", "absolute": str(tmp_path / "outside.bin"), "symlink": "link.bin",
        "linked folder": "up/outside.bin", "through a folder": "sub/../../outside.bin",
    }[way]  # fmt: skip
    path = external(folder, location)
    with pytest.raises(CaptureError, match=r"outside the model's folder; refused"):
        graphopt.optimize(path)
    with pytest.raises(GraphError, match=r"outside the model's folder; refused"):
        OnnxGraph.load(path)


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"'W' has its data in 'gone.bin', and there is no such file"):
        graphopt.optimize(external(tmp_path / "a", "gone.bin"))
    with pytest.raises(CaptureError, match="shorter: truncated"):
        graphopt.optimize(external(tmp_path / "b", "beside.bin", offset=8))
    for odd in ({"offset": -8}, {"length": 12}):
        with pytest.raises(CaptureError, match="does not hold its 16384 bytes"):
            graphopt.optimize(external(tmp_path / "c", "beside.bin", **odd))


def test_references_to_external_data_in_memory_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path / "m", "beside.bin")
    proto = onnx.load(path, load_external_data=False)
    monkeypatch.chdir(path.parent)
    with pytest.raises(CaptureError, match=r"'W' has its data in the file 'beside.bin', which was not read"):
        graphopt.optimize(proto)


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    result = graphopt.optimize(linear())
    with pytest.raises(GraphError, match=r"there is no folder .*missing"):
        result.export(tmp_path / "missing" / "out.onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphError, match="there is no folder"):
        result.export(tmp_path / "file" / "out.onnx")


@pytest.mark.parametrize("name", ["out.onnx", "out.onnx.json"])
def test_a_folder_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(GraphError, match=rf"{name} is a folder; name another file"):
        graphopt.optimize(linear()).export(tmp_path / "out.onnx", external_data=True)
    assert [path.name for path in tmp_path.iterdir()] == [name] and not list((tmp_path / name).iterdir())


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["model", "data", "manifest"])
def test_a_full_disk_leaves_what_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.onnx"
    graphopt.optimize(linear()).export(path, external_data=step == "data")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    result = graphopt.optimize(linear(W * 2))
    if step == "manifest":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        original = onnx_ir.save

        def half(model: Any, written: Any, **options: Any) -> None:
            original(model, written, **options)
            Path(written).write_bytes(Path(written).read_bytes()[:50])
            full()

        monkeypatch.setattr(onnx_ir, "save", half)
    with pytest.raises(GraphError, match=r"out\.onnx cannot be written: OSError: No space left"):
        result.export(path, external_data=step == "data")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    torch.testing.assert_close(plain_run(str(path), {"x": X})[0], X @ W, rtol=1e-4, atol=1e-4)


def test_no_failure_leaves_a_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong: list[dict[str, Any]] = [{"passes": "quantise"}, {"target": "nowhere"}, {"example_inputs": torch.randn(3, 5)}]
    for arguments in wrong:
        with pytest.raises((UsageError, CaptureError)):
            graphopt.optimize(linear(), **arguments)
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_json_without_infinity(tmp_path: Path) -> None:
    path = graphopt.optimize(linear(), example_inputs=X).export(tmp_path / "out.onnx")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    manifest = json.loads((tmp_path / "out.onnx.json").read_text(), parse_constant=refuse)
    assert manifest["target"] == "onnxruntime" and path.is_file()
