"""A bundle says what is in it, and finds each damage."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import graphopt
from graphopt.errors import BundleError, GraphError, UsageError
from graphopt.measure.machine import environment
from graphopt.numerics import metrics
from graphopt.report.records import Report
from graphopt.result import Optimized
from graphopt.serving import Predictor, bundles, golden, manifest
from tests.cli.test_cli import write_model
from tests.models import model, padding, tokens
from tests.serving.conftest import WORDS, write_tokenizer

Copy = Callable[[Path], Path]


def facts(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return found


def rewrite(bundle: Path, **changes: Any) -> None:
    (bundle / "manifest.json").write_text(json.dumps(facts(bundle) | changes), encoding="utf-8")


def rehash(bundle: Path, *names: str) -> None:
    """As somebody does who changes a file on purpose."""
    files = facts(bundle)["files"]
    for name in names:
        content = (bundle / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(bundle, files=files)


# --- what is in it --------------------------------------------------------------------------------------------------


def test_the_manifest_holds_what_export_writes_and_more(classifier: Path) -> None:
    found = facts(classifier)
    assert set(Report().to_dict()) < set(found)
    assert found["pipeline"] == "simplify,quantize{scheme=dynamic},fold-int8"
    assert found["opset"] == 23 and found["engine"]["name"] == "onnxruntime"
    assert found["cpu"]["flags"] == environment()["flags"]
    assert set(found["files"]) == {one.name for one in classifier.iterdir()} - {"manifest.json"}
    assert found["golden"]["reference"] == "float" and 10 < found["golden"]["sqnr"] < 60


def test_dynamic_quantization_is_not_batch_invariant_and_floats_are(classifier: Path, encoder: Path) -> None:
    assert facts(classifier)["batch_invariant"] is False
    assert facts(encoder)["batch_invariant"] is True


def test_outputs_that_count_something_else_are_not_split_by_rows(tmp_path: Path) -> None:
    """Axis 0 of the output is open, and counts what is above 0 in all rows."""
    text = """g (float[b, 4] x) => (float[n] y) { zero = Constant<value = float {0.0}>()
        is_above = Greater(x, zero)  all = Constant<value = int64[1] {-1}>()
        flat = Reshape(x, all)  above = Reshape(is_above, all)  y = Compress<axis = 0>(flat, above) }"""
    onnx.save(model(text, {}), tmp_path / "m.onnx")
    bundle = graphopt.bundle(tmp_path / "m.onnx", tmp_path / "b", inputs=[{"x": np.array([[1, -2, 3, 4]], np.float32)}])
    assert json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["batch_invariant"] is None


def test_padding_is_measured(encoder: Path) -> None:
    found = facts(encoder)["padding"]
    assert found["invariant"] is True and found["axis"] == "seq" and set(found["values"]) == {"ids", "mask"}
    assert facts(encoder)["outputs"][0]["shape"][1] == "seq"  # the file itself has another name for it


def test_a_bundle_with_int8_has_a_portable_twin(classifier: Path) -> None:
    proto = onnx.load(classifier / "portable.onnx")
    assert {node.domain for node in proto.graph.node} == {""}
    assert {node.domain for node in onnx.load(classifier / "model.onnx").graph.node} > {""}
    found = graphopt.verify(classifier)
    assert found.portable_sqnr == pytest.approx(found.sqnr, abs=3)


def test_a_twin_that_computes_something_else_is_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = graphopt.optimize(write_model(tmp_path / "m.onnx"), "quantize{scheme=dynamic}", measure=False)
    export = Optimized.export

    def without_twin(self: Optimized, path: Path, *, portable: bool = False) -> Path:
        if portable:
            raise GraphError("a portable file would compute something else")
        return export(self, path)

    monkeypatch.setattr(Optimized, "export", without_twin)
    found = graphopt.verify(small.bundle(tmp_path / "b"))
    assert found.portable_sqnr is None and "no portable twin: a portable file would compute" in str(found)


def test_golden_cases_hold_no_padding(encoder: Path) -> None:
    cases = bundles.opened(encoder).cases
    assert len({case.inputs["ids"].shape for case in cases}) > 2
    assert all(case.inputs["mask"].all() for case in cases)


def test_a_bundle_replaces_a_bundle_and_nothing_else(model_file: Path, tmp_path: Path) -> None:
    given = [{"ids": tokens(), "mask": padding()}]
    first = graphopt.bundle(model_file, tmp_path / "b", inputs=given)
    assert facts(graphopt.bundle(model_file, first, name="second", inputs=given))["name"] == "second"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(GraphError, match=r"holds other files and no manifest\.json"):
        graphopt.bundle(model_file, tmp_path / "full")


@pytest.mark.parametrize("manifest", [None, "{}", "[1", '{"schema": 0, "files": {"model.onnx": {}}}'])
def test_a_bundle_that_holds_files_of_the_user_is_not_replaced(
    manifest: str | None, model_file: Path, tmp_path: Path
) -> None:
    bundle = graphopt.bundle(model_file, tmp_path / "b", inputs=[{"ids": tokens(), "mask": padding()}])
    (bundle / "notes.txt").write_text("mine", encoding="utf-8")
    if manifest is not None:
        (bundle / "manifest.json").write_text(manifest, encoding="utf-8")
    before = {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()}
    with pytest.raises(GraphError, match=r"b holds [a-z.]+, which was not written with it, so it is not replaced"):
        graphopt.bundle(model_file, bundle, inputs=[{"ids": tokens(), "mask": padding()}])
    assert {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()} == before


def test_weights_beside_the_file_come_along(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "m.onnx"
    onnx.save(onnx.load(model_file), file, save_as_external_data=True, location="w.bin", size_threshold=64)
    bundle = graphopt.bundle(file, tmp_path / "b", inputs=[{"ids": tokens(), "mask": padding()}])
    assert facts(bundle)["weights"] == ["w.bin"]
    assert graphopt.verify(bundle).sqnr > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../up"}, "name is '../up'"),
        ({"name": ""}, "letters, digits, dots and hyphens"),
        ({"tokenizer": "nowhere"}, r"nowhere holds no tokenizer\.json"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_what_cannot_be_bundled(options: Mapping[str, Any], message: str, model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        graphopt.bundle(model_file, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_another_models_tokenizer_is_refused(tmp_path: Path, classifier: Path) -> None:
    larger = write_tokenizer(tmp_path / "other", [*WORDS, "more", "words"])
    with pytest.raises(UsageError, match="has 50 tokens, and the model holds 48"):
        graphopt.bundle(classifier / "model.onnx", tmp_path / "b", tokenizer=larger)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.onnx", "portable.onnx", "golden.npz", "tokenizer.json"])
def test_a_flipped_byte_is_found(name: str, classifier: Path, copied: Copy) -> None:
    bundle = copied(classifier)
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    for read in (graphopt.verify, Predictor):
        with pytest.raises(BundleError, match=f"{name} is not the file that the bundle was made with"):
            read(bundle)


def test_a_missing_file_is_found(classifier: Path, copied: Copy) -> None:
    bundle = copied(classifier)
    (bundle / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"golden\.npz is missing"):
        Predictor(bundle)


def test_a_weight_that_changed_with_its_hash_is_found_by_the_golden_set(encoder: Path, copied: Copy) -> None:
    bundle = copied(encoder)
    proto = onnx.load(bundle / "model.onnx")
    largest = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(largest).copy()
    changed[0] *= 3
    largest.CopyFrom(onnx.numpy_helper.from_array(changed, largest.name))
    onnx.save(proto, bundle / "model.onnx")
    rehash(bundle, "model.onnx")
    with pytest.raises(BundleError, match="answers its golden inputs with an SQNR of"):
        graphopt.verify(bundle)


def test_a_wrong_opset_is_found(encoder: Path, copied: Copy) -> None:
    bundle = copied(encoder)
    proto = onnx.load(bundle / "model.onnx")
    proto.opset_import[0].version += 1
    onnx.save(proto, bundle / "model.onnx")
    rehash(bundle, "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is at opset 18, and manifest\.json says 17"):
        graphopt.verify(bundle)


def test_an_older_engine_is_refused(encoder: Path, copied: Copy) -> None:
    bundle = copied(encoder)
    rewrite(bundle, engine=facts(bundle)["engine"] | {"least": "99.1"})
    with pytest.raises(BundleError, match=r"needs onnxruntime 99\.1 or newer"):
        Predictor(bundle)


def test_flags_that_this_cpu_lacks_warn_and_the_golden_set_decides(encoder: Path, copied: Copy) -> None:
    bundle = copied(encoder)
    rewrite(bundle, cpu={"model": "another", "flags": "avx2 avx9000"})
    with pytest.warns(UserWarning, match="tuned for another with .*avx9000, which this CPU lacks"):
        Predictor(bundle)
    rewrite(bundle, golden=facts(bundle)["golden"] | {"sqnr": 300.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert graphopt.verify(bundle).missing_flags.split()[-1] == "avx9000"


def test_a_bundle_swapped_while_it_is_read(encoder: Path, copied: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, read = copied(encoder), bundles._read

    def swapping(folder: Path, name: str, most: int) -> bytes:
        content = read(folder, name, most)
        if name == "golden.npz":
            rewrite(bundle, name="another")
        return content

    monkeypatch.setattr(bundles, "_read", swapping)
    with pytest.raises(BundleError, match="was replaced while it was read"):
        bundles.opened(bundle)


def test_a_link_out_of_the_folder_is_refused(encoder: Path, copied: Copy, tmp_path: Path) -> None:
    bundle = copied(encoder)
    (bundle / "golden.npz").rename(tmp_path / "secret")
    (bundle / "golden.npz").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="leads out of the folder"):
        bundles.opened(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "of schema 2, and this graphopt reads 1"),
        ({"opset": "23"}, "opset is '23', and should be a whole number"),
        ({"opset": True}, "opset is True"),
        ({"inputs": {}}, "inputs is {}, and should be a list"),
        ({"engine": {"name": "onnxruntime"}}, "engine has no version"),
        ({"name": "a/b"}, "holds the name 'a/b'"),
        ({"model": "../model.onnx"}, r"has no hash of \.\./model\.onnx"),
        ({"files": {"../x": {"sha256": "", "bytes": 1}}}, r"holds the name '\.\.'"),
        ({"engine": {"name": "tvm", "version": "1", "least": "1"}}, "is for the engine 'tvm'"),
    ],
)
def test_a_manifest_that_lies(changes: Mapping[str, Any], message: str, encoder: Path, copied: Copy) -> None:
    bundle = copied(encoder)
    rewrite(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        Predictor(bundle)


# --- laws -----------------------------------------------------------------------------------------------------------


def test_indices_are_limited_by_the_table_that_they_choose_from(classifier: Path) -> None:
    """Not all kernels look for themselves: GatherBlockQuantized reads what lies behind its table."""
    predictor, mask = Predictor(classifier), [[1, 1]]
    assert predictor(input_ids=[[0, 47]], attention_mask=mask)["logits"].shape == (1, 3)
    for wrong in (48, -1, 2**40):
        with pytest.raises(UsageError, match=f"input_ids holds {wrong}, and the model knows 0 to 47"):
            predictor(input_ids=[[0, wrong]], attention_mask=mask)


def test_a_manifest_is_read_as_it_was_written(classifier: Path, encoder: Path) -> None:
    for bundle in (classifier, encoder):
        read = manifest.parsed((bundle / "manifest.json").read_bytes(), "here")
        assert manifest.parsed(read.to_json().encode(), "here") == read


def test_the_schema_takes_manifests_and_refuses_others(classifier: Path) -> None:
    """Without a validator: the schema requires what the reader requires, and no more."""
    schema, found = manifest.json_schema(), facts(classifier)
    assert set(schema["required"]) <= set(found)
    for key in schema["required"]:
        without = json.dumps({name: value for name, value in found.items() if name != key})
        with pytest.raises(BundleError, match=f"has no {key}"):
            manifest.parsed(without.encode(), "here")


JSON: list[Any] = [None, True, 0, -1, 10**30, 1.5, float("nan"), "", "a/b", [], [[]], [None], {}, {"a": 1}, {"a": []}]


@given(data=st.data())
def test_any_change_of_a_manifest_is_read_or_refused(classifier: Path, data: st.DataObject) -> None:
    found = facts(classifier)
    found[data.draw(st.sampled_from(sorted(manifest.json_schema()["properties"])))] = data.draw(st.sampled_from(JSON))
    try:
        manifest.parsed(json.dumps(found).encode(), "here")
    except BundleError as error:
        assert "\n" not in str(error)


@given(content=st.binary(max_size=60))
def test_any_bytes_are_no_golden_set_but_an_error(content: bytes) -> None:
    with pytest.raises(BundleError, match="no golden set"):
        golden.read(content, "here")


NUMBERS = arrays(np.float32, 5, elements=st.floats(-1e6, 1e6, width=32))


@given(NUMBERS, NUMBERS)
def test_sqnr_is_that_of_numerics(a: Any, b: Any) -> None:
    assert golden.sqnr({"y": a}, {"y": b}) == pytest.approx(metrics.sqnr(torch.from_numpy(a), torch.from_numpy(b)))
