"""What other servers read: each config is parsed by the server's own format where that can be had."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

import graphopt
from graphopt.errors import BundleError, GraphError, UsageError
from graphopt.serving import golden
from graphopt.serving.bundles import opened
from graphopt.serving.repositories import KINDS, repository
from tests.cli.test_cli import done, refused


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "tensorflow" else kind for kind in sorted(KINDS)]
)
def test_each_kind_is_written_again_and_over_nothing_else(kind: str, encoder: Path, tmp_path: Path) -> None:
    if kind == "tensorflow":
        pytest.importorskip("tensorflow")
    for _ in range(2):
        repository(encoder, tmp_path / "out", kind)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(GraphError, match="holds other files"):
        repository(encoder, tmp_path / "full", kind)
    (tmp_path / "out" / "__pycache__").mkdir()  # of its Python code, where that has run
    (tmp_path / "out" / "__pycache__" / "app.cpython-311.pyc").touch()
    repository(encoder, tmp_path / "out", kind)
    mine = tmp_path / "out" / "encoder" / "2" / "model.onnx"  # another version
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(GraphError, match=r"out holds encoder/2/model.onnx, which was not written with it"):
        repository(encoder, tmp_path / "out", kind)
    assert mine.read_text(encoding="utf-8") == "mine"


def test_the_command(encoder: Path, tmp_path: Path) -> None:
    assert "written" in done("bundle", encoder, "--for", "triton", "-o", tmp_path / "t")
    assert "did you mean 'triton'?" in refused(2, "bundle", encoder, "--for", "tritn", "-o", tmp_path / "u")
    assert "give an .onnx file, or --for triton" in refused(2, "bundle", encoder, "-o", tmp_path / "u")
    assert "--name is for making a bundle" in refused(
        2, "bundle", encoder, "--for", "ray", "--name", "x", "-o", tmp_path / "u"
    )


def triton_config(file: Path) -> Any:
    """Parsed by Triton's own protobuf."""
    pytest.importorskip("grpc")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(file.read_text(encoding="utf-8"), model_config.ModelConfig())


def test_triton_batches_what_is_batch_invariant(encoder: Path, tmp_path: Path) -> None:
    folder = repository(encoder, tmp_path / "r", "triton") / "encoder"
    config = triton_config(folder / "config.pbtxt")
    assert config.name == "encoder" and config.max_batch_size == 32 and config.HasField("dynamic_batching")
    assert [(one.name, list(one.dims)) for one in config.input] == [("ids", [-1]), ("mask", [-1])]
    assert list(config.output[0].dims) == [-1, 32]
    assert config.parameters["intra_op_thread_count"].string_value.isdecimal()
    warm = config.model_warmup[0].inputs["ids"]
    content = np.fromfile(folder / "warmup" / warm.input_data_file, np.int64)
    assert list(warm.dims) == [content.size] and onnx.load(folder / "1" / "model.onnx").graph.input


def test_triton_gets_an_ensemble_with_the_tokenizer(classifier: Path, tmp_path: Path) -> None:
    folder = repository(classifier, tmp_path / "r", "triton")
    model = ast.parse((folder / "classifier_tokenizer" / "1" / "model.py").read_text(encoding="utf-8"))
    assert any(isinstance(one, ast.ClassDef) and one.name == "TritonPythonModel" for one in model.body)
    ensemble = triton_config(folder / "classifier_text" / "config.pbtxt")
    steps = ensemble.ensemble_scheduling.step
    assert [one.model_name for one in steps] == ["classifier_tokenizer", "classifier"]
    tokens = triton_config(folder / "classifier_tokenizer" / "config.pbtxt")
    assert {one.name for one in tokens.output} == set(steps[0].output_map) == {"input_ids", "attention_mask"}
    own = triton_config(folder / "classifier" / "config.pbtxt")
    assert own.max_batch_size == 0 and not own.HasField("dynamic_batching")  # rows depend on each other
    assert set(steps[1].input_map) == {one.name for one in own.input}
    assert set(steps[1].output_map) == {one.name for one in own.output} == {one.name for one in ensemble.output}


def test_openvino_gets_standard_operators(classifier: Path, tmp_path: Path) -> None:
    folder = repository(classifier, tmp_path / "r", "openvino")
    (entry,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_config_list"]
    known = {"name", "base_path", "batch_size", "model_version_policy", "shape", "layout", "nireq", "target_device",
             "plugin_config", "stateful", "allow_cache"}  # fmt: skip
    assert {"name", "base_path"} <= set(entry["config"]) <= known
    assert {node.domain for node in onnx.load(folder / "classifier" / "1" / "model.onnx").graph.node} == {""}


def test_openvino_without_a_twin_is_refused(classifier: Path, tmp_path: Path) -> None:
    bundle = graphopt.bundle(classifier / "model.onnx", tmp_path / "b")
    with pytest.raises(UsageError, match=r"has operators of com\.microsoft and no portable twin"):
        repository(bundle, tmp_path / "r", "openvino")
    assert not (tmp_path / "r").exists()


def test_kserve(encoder: Path, tmp_path: Path) -> None:
    folder = repository(encoder, tmp_path / "r", "kserve")
    service = yaml.safe_load((folder / "inference-service.yaml").read_text(encoding="utf-8"))
    assert service["apiVersion"] == "serving.kserve.io/v1beta1" and service["kind"] == "InferenceService"
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton"} and model["protocolVersion"] == "v2"
    assert model["resources"]["requests"] == model["resources"]["limits"]
    assert (folder / "repository" / "encoder" / "config.pbtxt").is_file()


def test_docker_holds_a_bundle_that_is_right(encoder: Path, tmp_path: Path) -> None:
    folder = repository(encoder, tmp_path / "r", "docker")
    assert graphopt.verify(folder / "models" / "encoder" / "1").sqnr > 100
    services = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert services["encoder"]["environment"]["GRAPHOPT_TOKEN"].startswith("${GRAPHOPT_TOKEN:?")
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    assert "torch" not in text.replace("pytorch", "") and 'CMD ["graphopt", "serve"' in text


def test_a_server_needs_no_torch() -> None:
    """So that its container, and each of its processes, is small."""
    program = (
        "import sys, graphopt.cli.app, graphopt.serving.server, graphopt.serving.predictor; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_ray(encoder: Path, tmp_path: Path) -> None:
    folder = repository(encoder, tmp_path / "r", "ray")
    assert graphopt.verify(folder / "bundle").sqnr > 100
    compile((folder / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


def test_tensorflow_without_the_package(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError, match=r"pip install 'graphopt\[tf\]'"):
        repository(encoder, tmp_path / "r", "tensorflow")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "classifier"])
def test_tensorflow_gets_a_saved_model_in_floats(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier's weights are int8; the golden outputs of both are those of the float model."""
    tf = pytest.importorskip("tensorflow")
    bundle: Path = request.getfixturevalue(name)
    done("bundle", bundle, "--for", "tensorflow", "-o", tmp_path / "r")
    signature = tf.saved_model.load(str(tmp_path / "r" / name / "1")).signatures["serving_default"]
    assert all(info.dtype.is_floating for info in signature.structured_outputs.values())
    for case in opened(bundle).cases:
        found = signature(**{key: tf.constant(array) for key, array in case.inputs.items()})
        for key, wanted in case.outputs.items():
            assert golden.sqnr({key: wanted}, {key: found[key].numpy()}) > (100 if name == "encoder" else 20)
    configs = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    from google.protobuf import text_format

    config = text_format.Parse((tmp_path / "r" / "models.config").read_text("utf-8"), configs.ModelServerConfig())
    (entry,) = config.model_config_list.config
    assert (entry.name, entry.base_path, entry.model_platform) == (name, f"/models/{name}", "tensorflow")
    facts = json.loads((tmp_path / "r" / f"{name}.json").read_text("utf-8"))
    assert any("TensorFlow computes in floats" in note for note in facts["notes"])


@pytest.mark.slow
def test_tensorflow_is_held_to_the_golden_set(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(golden, "replay", lambda run, cases: (3.0, [3.0]))
    with pytest.raises(BundleError, match=r"in TensorFlow, answers to the golden inputs have 3\.0 dB"):
        repository(classifier, tmp_path / "r", "tensorflow")
    assert not (tmp_path / "r").exists()
