"""The tensorflow target: how it computes each op, and what it writes. Real runs need the package tensorflow."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import graphopt
from graphopt.backends import target
from graphopt.backends.tensorflow import canonical, operators
from graphopt.backends.tensorflow.saved_model import SavedModel
from graphopt.backends.tensorflow.target import TensorFlow
from graphopt.backends.tensorflow.translation import FORMS
from graphopt.capture import capture
from graphopt.capture.onnx_conversion import to_onnx
from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode
from graphopt.errors import GraphError, LoweringError, UsageError
from graphopt.ir.graph import Graph
from graphopt.ir.ops import OPS
from graphopt.numerics.metrics import sqnr, tolerance, within_tolerance
from tests.cli.test_cli import done, refused
from tests.dialects.fx.test_graph import CASES, Case, reference
from tests.dialects.fx.test_graph import emitted as emitted_in_fx
from tests.dialects.onnx.test_graph import ALL_CASES, emitted
from tests.fuzz.further_operators import ALL
from tests.fuzz.onnx_graphs import models
from tests.fuzz.test_graphs import SHORT, Model
from tests.language import build, feeds
from tests.models import ConvNet, Decoder, Encoder, bert, exported, images, model, padding, plain_run, seeded, tokens

# --- without the package ---------------------------------------------------------------------------------------------


def test_every_op_has_a_form() -> None:
    assert set(canonical.FORMS) == set(OPS)


def test_further_forms_are_of_operators_of_onnx() -> None:
    assert set(operators.FORMS) <= {f"onnx.{schema.name}" for schema in onnx.defs.get_all_schemas()} | {"onnx.Scatter"}


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError, match=r"pip install 'graphopt\[tf\]'"):
        graphopt.optimize(seeded(ConvNet), target="tensorflow", example_inputs=images())
    assert target("tensorflow").summary.startswith("TensorFlow")


def test_operators_without_a_form_are_named_with_their_nodes() -> None:
    graph = capture(model("g (float[2,2] x) => (y) {y = Det(x)}"), "onnx").graph
    (node,) = graph.nodes
    assert isinstance(node, OnnxNode)
    node.native.metadata_props["graphopt.path"] = "head.volume"
    expected = r"tensorflow has no form of these operators: onnx\.Det \(head\.volume\)\. Use target=onnxruntime"
    with pytest.raises(LoweringError, match=expected):
        TensorFlow().lower(graph)


@pytest.mark.parametrize("name", ["small.onnx", "small.pt2", "small.pb"])
def test_the_name_of_a_file_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"tensorflow writes a folder, .*: name it small"):
        TensorFlow().require_suffix(Path(name))


def test_the_command_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    onnx.save(model("g (float[2,2] x) => (y) {y = Relu(x)}"), tmp_path / "m.onnx")
    said = refused(2, "optimize", tmp_path / "m.onnx", "-o", tmp_path / "small", "--target", "tensorflow")
    assert said == "target tensorflow needs the package tensorflow: pip install 'graphopt[tf]'"


@pytest.mark.slow
def test_the_command_refuses_what_is_no_folder_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    onnx.save(model("g (float[2,2] x) => (y) {y = Relu(x)}"), tmp_path / "m.onnx")
    out = tmp_path / "small.onnx"
    said = refused(2, "optimize", tmp_path / "m.onnx", "-o", out, "--target", "tensorflow")
    assert "tensorflow writes a folder" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    said = refused(2, "optimize", tmp_path / "m.onnx", "-o", tmp_path / "full", "--target", "tensorflow")
    assert "holds other files" in said


# --- each op ---------------------------------------------------------------------------------------------------------


def run_in_tensorflow(graph: Graph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    pytest.importorskip("tensorflow")
    return TensorFlow().compile(graph)({value.name: inputs[value.name] for value in graph.inputs})


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case"), ALL_CASES)
def test_an_op_of_onnx_computes_what_its_reference_says(op: str, case: Case) -> None:
    graph, inputs = emitted(op, case)
    for found, wanted in zip(run_in_tensorflow(graph, inputs), reference(op, *case), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(CASES))
def test_an_op_of_fx_computes_what_its_reference_says(op: str) -> None:
    for tensors, attributes in CASES[op]:
        graph, inputs = emitted_in_fx(op, tensors, attributes)
        wanted = graph.evaluate(inputs, graph.outputs)
        for found, expected in zip(run_in_tensorflow(to_onnx(graph, [inputs]), inputs), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


REFUSED = re.compile(
    r"tensorflow has no form of onnx\.("
    r"Resize here: (mode=cubic|how=\w+|antialias)|Scatter\w+ here: reduction=mul|"
    r"(Max|Average)Pool here: indices are read|LayerNormalization here: its mean or deviation|"
    r"\w+ here: operand \d is computed, and must be stored)"
)
"""What an operator that has a form may be refused for."""


@pytest.mark.slow
@settings(SHORT, max_examples=40)
@given(models(ALL))
def test_a_random_model_computes_the_same_or_names_what_has_no_form(drawn: Model) -> None:
    """Each output by itself: of what is computed from what has a form, nothing may differ."""
    proto, arrays = drawn
    inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    wanted = plain_run(proto, inputs)
    graph = capture(proto, "onnx", example_inputs=inputs).graph
    for value, expected in zip(graph.outputs, wanted, strict=True):
        part = graph.extract(graph.inputs, [value])
        missing = {node.kind for node in part.nodes} - set(FORMS)
        try:
            (found,) = run_in_tensorflow(part, inputs)
        except LoweringError as error:
            assert any(kind in str(error) for kind in missing) or REFUSED.search(str(error)), error
            assert error.__cause__ is None or "is not known before it runs" in str(error), error  # else a form failed
        else:
            assert not missing
            # Where a model computes in 16 bits, ONNX Runtime leaves out some of the rounding.
            dtypes = {value.dtype for node in part.nodes for value in node.results}
            rtol = tolerance(torch.float16)[0] if dtypes & {torch.float16, torch.bfloat16} else None
            assert found.dtype == expected.dtype and within_tolerance(expected, found, rtol=rtol), part.text()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "float"])
@pytest.mark.parametrize("how", ["half_pixel", "asymmetric", "align_corners"])
def test_a_linear_resize_of_integers_is_not_one_of_nearest_entries(dtype: str, how: str) -> None:
    proto = model(f"""g ({dtype}[1,2,4,4] x) => (y) <float[4] scales = {{1, 1, 2.5, 2}}> {{
        y = Resize<mode="linear", coordinate_transformation_mode="{how}">(x, , scales)}}""")  # fmt: skip
    x = torch.randint(0, 100, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    inputs = {"x": x.to(getattr(torch, dtype))}
    (found,) = run_in_tensorflow(capture(proto, "onnx").graph, inputs)
    (wanted,) = plain_run(proto, inputs)
    assert found.dtype == wanted.dtype
    # By align_corners a number just below 20 may be cut off to 19; the two others are exact in float32 here.
    atol = 1e-5 if dtype == "float" else 1 if how == "align_corners" else 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol)
    assert float((found != wanted).double().mean()) < 0.05 or dtype == "float"


# --- models ----------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An embedding, an LSTM in both directions and a GRU; x (batch, length) -> (batch, length, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 8)
        self.first = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.second, self.head = nn.GRU(12, 7, batch_first=True), nn.Linear(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(self.table(ids))[0])[0])
        return y


class Residual(nn.Module):
    """Convs with batch norms, groups and a residual sum, pools, and a linear; x (batch, 3, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 16, 1)
        self.grouped, self.head = nn.Conv2d(16, 16, 3, 1, 2, dilation=2, groups=4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.stem(x)).relu(), 3, 2, 1, ceil_mode=True)
        x = x + nn.functional.silu(self.point(nn.functional.hardswish(self.depth(x))))
        x = torch.cat([x, self.grouped(x)], 1)[:, 8:24] * torch.sigmoid(x.mean((2, 3), keepdim=True))
        y: Tensor = self.head(nn.functional.avg_pool2d(x, 2, ceil_mode=True).mean((2, 3)))
        return y


MODELS: dict[str, tuple[Any, dict[str, Tensor], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": tokens(), "attention_mask": padding()},
             {"input_ids": tokens(3, 11, seed=5), "attention_mask": padding(3, 11)}),
    "encoder": (lambda: seeded(Encoder), {"ids": tokens(), "mask": padding()},
                {"ids": tokens(3, 11, seed=5), "mask": padding(3, 11)}),
    "decoder": (lambda: seeded(Decoder), {"ids": tokens()}, {"ids": tokens(3, 11, seed=5)}),
    "convs": (lambda: seeded(ConvNet), {"x": images()}, {"x": images(3, seed=9)}),
    "residual": (lambda: seeded(Residual), {"x": torch.randn(2, 3, 32, 32)}, {"x": torch.randn(5, 3, 32, 32)}),
    "recurrent": (lambda: seeded(Recurrent), {"ids": tokens()}, {"ids": tokens(4, 9, seed=5)}),
}  # fmt: skip


def flat(found: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return found if isinstance(found, Tensor) else next(iter(found.values() if isinstance(found, Mapping) else found))


def loaded(folder: Path) -> Any:
    """By tensorflow's own loader."""
    tf = pytest.importorskip("tensorflow")
    return tf.saved_model.load(str(folder / "1")).signatures["serving_default"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_is_written_and_answers_at_other_sizes(name: str, tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    make, example, others = MODELS[name]
    module = make()
    small = graphopt.optimize(module, target="tensorflow", example_inputs=example)
    assert small.export(tmp_path / "m") == tmp_path / "m"
    signature = loaded(tmp_path / "m")
    for inputs in (example, others):
        with torch.no_grad():
            wanted = flat(module(**inputs))
        found = signature(**{key: tf.constant(tensor.numpy()) for key, tensor in inputs.items()})
        torch.testing.assert_close(
            torch.from_numpy(found[small.signature.outputs[0]].numpy()), wanted, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(flat(small(**inputs)), wanted, rtol=1e-4, atol=1e-5)
    facts = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert facts["load"]["python"] == "tensorflow.saved_model.load('m/1').signatures['serving_default']"


@pytest.mark.slow
def test_convs_are_computed_in_one_layout() -> None:
    """The image is transposed once; nothing else is."""
    pytest.importorskip("tensorflow")
    small = graphopt.optimize(seeded(Residual), target="tensorflow", example_inputs=torch.randn(2, 3, 32, 32))
    assert small.report.kernels["Transpose"] == 1
    plain = graphopt.optimize(seeded(ConvNet), target="tensorflow", example_inputs=images())
    assert plain.report.kernels["Transpose"] == 1 and plain.report.kernels["Conv2D"] == 3


@pytest.mark.slow
def test_what_prune_and_low_rank_save_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    inputs = {"ids": tokens(), "mask": padding()}
    sizes = []
    for name, passes in (("whole", None), ("small", "prune{neurons=0.5},low-rank{rank=0.25}")):
        small = graphopt.optimize(seeded(Encoder), passes, target="tensorflow", example_inputs=inputs)
        folder = small.export(tmp_path / name)
        sizes.append(sum(file.stat().st_size for file in (folder / "1" / "variables").iterdir()))
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.slow
def test_integers_become_floats_and_the_report_says_so() -> None:
    pytest.importorskip("tensorflow")
    inputs = {"ids": tokens(), "mask": padding()}
    module = seeded(Encoder)
    rounded = graphopt.optimize(
        module, "quantize{scheme=static}", example_inputs=inputs,
        calibration=[inputs],
    )  # fmt: skip
    with torch.no_grad():
        wanted = flat(module(**inputs))
    small = graphopt.optimize(rounded, target="tensorflow")
    assert sqnr(wanted, flat(small(**inputs))) > sqnr(wanted, flat(rounded(**inputs)))
    assert not small.lowered.sites("quantize", "dequantize")
    (record,) = [one for one in small.report.passes if one.name == "dequantize"]
    assert record.changed and record.agreement
    assert any("TensorFlow computes in floats" in note for note in small.report.notes)


def with_relu_in_the_range() -> onnx.ModelProto:
    """Two products of integers: zero point 0 of the second uint8 is all that is left of a Relu between them."""
    generator = torch.Generator().manual_seed(1)
    weights = {"v": torch.randn(8, 16, generator=generator), "w": torch.randn(16, 4, generator=generator)}
    return model(
        """g (float[n,8] x) => (y) <float s = {0.05}, uint8 m = {128}, float t = {0.1}, uint8 z = {0}> {
        q = QuantizeLinear(x, s, m)
        d = DequantizeLinear(q, s, m)
        a = MatMul(d, v)
        p = QuantizeLinear(a, t, z)
        b = DequantizeLinear(p, t, z)
        y = MatMul(b, w)}""",
        weights,
    )


@pytest.mark.slow
def test_a_relu_that_was_folded_into_a_range_stays() -> None:
    pytest.importorskip("tensorflow")
    inputs = {"x": torch.randn(16, 8, generator=torch.Generator().manual_seed(3))}
    small = graphopt.optimize(with_relu_in_the_range(), target="tensorflow", example_inputs=inputs)
    (wanted,) = plain_run(with_relu_in_the_range(), inputs)
    assert not small.lowered.sites("quantize", "dequantize") and sqnr(wanted, flat(small(**inputs))) > 30


@pytest.mark.slow
def test_quantize_declines_every_site() -> None:
    pytest.importorskip("tensorflow")
    small = graphopt.optimize(
        seeded(ConvNet), "quantize", target="tensorflow", example_inputs=images(), calibration=[images()]
    )
    (record,) = [one for one in small.report.passes if one.name == "quantize"]
    assert set(record.eligible) == set(record.declined) and record.eligible


# --- what is written -------------------------------------------------------------------------------------------------


NAMES = [(["x.1", "a/b:0"], "191"), (["input", "self"], "o/p:0"), (["onnx::Add_0", "1"], "y"), (["x", "X"], "Y"),
         (["é", "x y"], "z"), (["only"], "one"), ([f"i{place}" for place in range(12)], "o")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "output"), NAMES)
def test_the_signature_has_the_models_own_names(inputs: list[str], output: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    from tensorflow.core.protobuf import saved_model_pb2

    graph = OnnxGraph.empty({name: (("n", place + 1), torch.float32) for place, name in enumerate(inputs)})
    y = graph.emit("concat", *graph.inputs, axis=1)
    graph.set_outputs({output: y})
    TensorFlow().export(graph, tmp_path, metadata={"made": "here"})
    given = feeds(graph)
    (found,) = SavedModel(tmp_path, [output])(given)
    torch.testing.assert_close(found, graph.evaluate(given, graph.outputs)[0])
    whole = saved_model_pb2.SavedModel.FromString((tmp_path / "1" / "saved_model.pb").read_bytes())
    signature = whole.meta_graphs[0].signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    shapes = {name: [axis.size for axis in info.tensor_shape.dim] for name, info in signature.inputs.items()}
    assert shapes == {name: [-1, place + 1] for place, name in enumerate(inputs)} and set(signature.outputs) == {output}
    assert json.loads((tmp_path / "1" / "assets.extra" / "graphopt.json").read_text()) == {"made": "here"}


@pytest.mark.slow
def test_weights_may_have_any_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    names = ["/enc/W", "_W", "é", "a b", "1:0", "_w"]
    sizes = "float[48,48]"
    made = "".join(f"t{place + 1} = MatMul(t{place}, n{place})\n" for place in range(len(names)))
    proto = model(f"g ({sizes} t0) => ({sizes} t{len(names)}) {{ {made} }}")
    generator = torch.Generator().manual_seed(0)
    for place, name in enumerate(names):
        weight = (0.1 * torch.randn(48, 48, generator=generator)).numpy()
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
        proto.graph.node[place].input[1] = name
    graph = capture(proto, "onnx").graph
    inputs = {"t0": torch.randn(48, 48, generator=generator)}
    (found,) = run_in_tensorflow(graph, inputs)
    assert within_tolerance(plain_run(proto, inputs)[0], found)
    TensorFlow().export(graph, tmp_path, metadata={})
    (found,) = SavedModel(tmp_path, [f"t{len(names)}"])(inputs)
    assert within_tolerance(plain_run(proto, inputs)[0], found)


@pytest.fixture(scope="module")
def encoder_in_tensorflow() -> Any:
    pytest.importorskip("tensorflow")
    return graphopt.optimize(
        seeded(Encoder, 1), target="tensorflow", example_inputs={"ids": tokens(), "mask": padding()}
    )


@pytest.mark.slow
def test_what_was_written_is_replaced_and_nothing_else(encoder_in_tensorflow: Any, tmp_path: Path) -> None:
    for _ in range(2):
        encoder_in_tensorflow.export(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.json"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(GraphError, match="holds other files"):
        encoder_in_tensorflow.export(tmp_path / "full")
    with pytest.raises(UsageError, match="tensorflow writes no ONNX: opset"):
        encoder_in_tensorflow.export(tmp_path / "m", opset=17)
    with pytest.raises(GraphError, match="there is no folder"):
        encoder_in_tensorflow.export(tmp_path / "none" / "m")


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["m/2/saved_model.pb", "m/notes.txt", "m/1/assets.extra/tf_serving_warmup_requests"])
def test_files_of_the_user_are_not_damaged(encoder_in_tensorflow: Any, tmp_path: Path, theirs: str) -> None:
    """A second version, a note, requests to warm it up."""
    encoder_in_tensorflow.export(tmp_path / "m")
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(GraphError, match=rf"m holds {theirs[2:]}, which was not written with it"):
        encoder_in_tensorflow.export(tmp_path / "m")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("path", [".", "/", "..", "a/.."])
def test_a_path_without_a_name_is_refused(encoder_in_tensorflow: Any, path: str) -> None:
    with pytest.raises(UsageError, match=f"{path} has no name of its own"):
        encoder_in_tensorflow.export(path)


@pytest.mark.slow
def test_the_command_writes_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    onnx.save(model("g (float[n,2] x) => (y) {y = Relu(x)}"), tmp_path / "m.onnx")
    for _ in range(2):
        done("optimize", tmp_path / "m.onnx", "-o", tmp_path / "small", "--target", "tensorflow", "--no-measure")
    assert (tmp_path / "small" / "1" / "saved_model.pb").is_file() and (tmp_path / "small.json").is_file()


@pytest.mark.slow
def test_what_computes_something_else_is_not_written(
    encoder_in_tensorflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SavedModel.__call__
    monkeypatch.setattr(SavedModel, "__call__", lambda self, given: [1.01 * found for found in run(self, given)])
    with pytest.raises(GraphError, match="read again, what was written computes something else: on example 0"):
        encoder_in_tensorflow.export(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_requests_of_tensorflow_serving_fit_the_signature(encoder_in_tensorflow: Any, tmp_path: Path) -> None:
    """A PredictRequest holds what the signature wants, and its answer is a PredictResponse."""
    tf = pytest.importorskip("tensorflow")
    predict = pytest.importorskip("tensorflow_serving.apis.predict_pb2")
    metadata = pytest.importorskip("tensorflow_serving.apis.get_model_metadata_pb2")
    from tensorflow.core.protobuf import saved_model_pb2

    folder = encoder_in_tensorflow.export(tmp_path / "encoder")
    request = predict.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "encoder", "serving_default"
    inputs = {"ids": tokens(3, 5), "mask": padding(3, 5)}
    for name, tensor in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(tensor.numpy()))
    request = predict.PredictRequest.FromString(request.SerializeToString())

    whole = saved_model_pb2.SavedModel.FromString((folder / "1" / "saved_model.pb").read_bytes())
    (graph,) = whole.meta_graphs
    assert list(graph.meta_info_def.tags) == ["serve"]
    known = metadata.SignatureDefMap(signature_def=graph.signature_def)
    signature = known.signature_def[request.model_spec.signature_name]
    assert set(request.inputs) == set(signature.inputs)
    for name, proto in request.inputs.items():
        assert proto.dtype == signature.inputs[name].dtype
        assert tf.TensorShape(signature.inputs[name].tensor_shape).is_compatible_with(proto.tensor_shape)

    found = loaded(folder)(**{name: tf.constant(tf.make_ndarray(proto)) for name, proto in request.inputs.items()})
    response = predict.PredictResponse()
    for name, info in signature.outputs.items():
        assert found[name].dtype.as_datatype_enum == info.dtype
        response.outputs[name].CopyFrom(tf.make_tensor_proto(found[name].numpy()))
    with torch.no_grad():
        wanted = seeded(Encoder, 1)(**inputs)
    torch.testing.assert_close(
        torch.from_numpy(tf.make_ndarray(response.outputs["output"])), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("y = linear(linear(x[n,128], W[128,128]), W)", 128 * 128),
        ("y = conv(conv(x[n,64,5,5], W[64,64,3,3]), W)", 64 * 64 * 9),
        ("y = embedding(T[400,40], i[n,3]:int64)", 400 * 40),
        ("y, h, c = lstm(x[5,n,64], W[1,256,64], R[1,256,64])", 2 * 256 * 64),
    ],
)
def test_a_large_weight_is_a_variable_and_is_stored_once(text: str, weight: int, tmp_path: Path) -> None:
    """A graph is limited to 2 GB, so it holds none of it."""
    pytest.importorskip("tensorflow")
    TensorFlow().export(build("onnx", text), tmp_path, metadata={})
    data = (tmp_path / "1" / "variables" / "variables.data-00000-of-00001").stat().st_size
    assert weight * 4 <= data < 1.2 * weight * 4
    assert (tmp_path / "1" / "saved_model.pb").stat().st_size < 60_000


@pytest.mark.slow
def test_a_file_of_another_exporter_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    inputs = {"ids": tokens(), "mask": padding()}
    proto = exported(seeded(Encoder, 1), inputs, 17, dynamo=False)
    small = graphopt.optimize(proto, target="tensorflow", example_inputs=inputs)
    (wanted,) = plain_run(proto, inputs)
    assert within_tolerance(wanted, flat(small(**inputs)))
    assert (small.export(tmp_path / "m") / "1" / "saved_model.pb").is_file()
