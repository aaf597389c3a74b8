"""optimize() of what optimize() returned: the passes of both calls do what they do in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt import CaptureError, Optimized, UsageError
from tests.models import Encoder, model, padding, seeded, tokens

INPUTS = {"ids": tokens(), "mask": padding()}
TARGETS = {"onnx": "onnxruntime", "fx": "torch-cpu"}
PRUNE, QUANTIZE = "prune{neurons=0.25}", "quantize{scheme=static}"


@pytest.fixture(scope="module", params=list(TARGETS.values()), ids=list(TARGETS))
def pruned(request: pytest.FixtureRequest) -> Optimized:
    options: dict[str, Any] = {"target": request.param, "calibration": [INPUTS]}
    return graphopt.optimize(seeded(Encoder), PRUNE, example_inputs=INPUTS, **options)


def test_two_calls_do_what_one_does(pruned: Optimized) -> None:
    target = pruned.report.target
    options: dict[str, Any] = {"target": target, "calibration": [INPUTS]}
    at_once = graphopt.optimize(seeded(Encoder), f"{PRUNE},{QUANTIZE}", example_inputs=INPUTS, **options)
    chained = graphopt.optimize(pruned, QUANTIZE, **options)
    assert chained.report.kernels == at_once.report.kernels
    assert chained.lowered.text() == at_once.lowered.text()
    expected, found = (list(one.lowered.constants()) for one in (at_once, chained))
    for (_, a), (_, b) in zip(expected, found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(chained(**INPUTS), at_once(**INPUTS))


def test_signature_examples_and_provenance_are_kept(pruned: Optimized, tmp_path: Path) -> None:
    before = pruned.transformed.text()
    chained = graphopt.optimize(pruned, "quantize{scheme=dynamic}", target=pruned.report.target)
    assert chained.signature is pruned.signature and chained.feeds is pruned.feeds
    assert chained.report.source == f"tests.models.Encoder, optimized by graphopt: simplify,{PRUNE}"
    assert chained.report.pipeline == "quantize{scheme=dynamic},fold-int8"
    assert [pass_.name for pass_ in chained.applied] == ["simplify", "prune", "quantize"]
    assert chained.captured.text() == before == pruned.transformed.text()
    third = graphopt.optimize(chained, target=pruned.report.target, example_inputs=[{**INPUTS}])
    assert third.report.source.endswith(f"simplify,{PRUNE}, optimized by graphopt: quantize{{scheme=dynamic}}")
    assert third.report.kernels == chained.report.kernels and third.feeds is not pruned.feeds
    path = third.export(tmp_path / f"out{third.backend.suffix}")
    manifest = json.loads(path.with_name(path.name + ".json").read_text())
    assert manifest["source"] == third.report.source


def test_the_order_of_stages_holds_over_all_calls(pruned: Optimized) -> None:
    quantized = graphopt.optimize(pruned, "quantize{scheme=dynamic}", target=pruned.report.target)
    with pytest.raises(UsageError, match=r"prune \(PRUNE\) cannot stand after quantize \(QUANTIZE\); the right order"):
        graphopt.optimize(quantized, PRUNE, target=pruned.report.target)


def test_another_target_of_the_same_dialect(pruned: Optimized) -> None:
    if pruned.backend.dialect != "fx":
        pytest.skip("there is one engine of ONNX everywhere")
    options: dict[str, Any] = {"target": "fbgemm", "calibration": [INPUTS]}
    moved = graphopt.optimize(pruned, "quantize{scheme=dynamic}", **options)
    pipeline = f"{PRUNE},quantize{{scheme=dynamic}}"
    at_once = graphopt.optimize(seeded(Encoder), pipeline, example_inputs=INPUTS, **options)
    assert moved.report.target == "fbgemm" and moved.report.kernels == at_once.report.kernels
    assert torch.equal(moved(**INPUTS), at_once(**INPUTS))


def test_what_cannot_go_on(pruned: Optimized) -> None:
    (other,) = set(TARGETS.values()) - {pruned.report.target}
    with pytest.raises(UsageError, match=f"optimized for {pruned.report.target} is an? .*, and {other} takes"):
        graphopt.optimize(pruned, target=other)
    with pytest.raises(UsageError, match="dynamic_shapes says how a module is captured, and an Optimized is captured"):
        graphopt.optimize(pruned, target=pruned.report.target, dynamic_shapes={})
    with pytest.raises(CaptureError, match="the model has no input 'idz'; did you mean 'ids'"):
        graphopt.optimize(pruned, target=pruned.report.target, example_inputs={"idz": tokens()})


def test_a_call_that_ran_no_pass_is_not_named_in_the_source() -> None:
    simplified = graphopt.optimize(model("g (float[n,8] x) => (float[n,8] y) { y = Relu(x) }"))
    again = graphopt.optimize(simplified)
    assert again.own_passes == ()
    assert graphopt.optimize(again).report.source == "onnx.ModelProto, optimized by graphopt: simplify"


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_zeros_of_an_earlier_call_stay_while_a_later_one_trains(target: str) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"target": target, "measure": False}
    sparse = graphopt.optimize(network, "sparsify{amount=0.5}", example_inputs=x, **options)
    training: dict[str, Any] = {"training": [x], "teacher": network, **options}
    trained = graphopt.optimize(sparse, "distill{steps=3 lr=0.01}", **training)
    again = graphopt.optimize(trained, "distill{steps=3 lr=0.01}", **training)
    weights = [[site.weight for site in one.transformed.sites("linear")] for one in (sparse, trained, again)]
    for before, *after in zip(*weights, strict=True):
        assert before is not None and int((before == 0).sum()) == before.numel() // 2
        for weight in after:
            assert weight is not None and torch.equal(weight == 0, before == 0) and not torch.equal(weight, before)


def test_metadata_names_the_earlier_passes(tmp_path: Path) -> None:
    import onnx

    proto = model("g (float[n,8] x) => (float[n,8] y) { y = MatMul(x, W) }", {"W": torch.eye(8)})
    chained = graphopt.optimize(graphopt.optimize(proto, "sparsify{amount=0.5}"), "quantize{scheme=dynamic}")
    written = onnx.load(chained.export(tmp_path / "out.onnx"))
    stored = {entry.key: entry.value for entry in written.metadata_props}
    assert stored["graphopt.earlier"] == "simplify,sparsify{amount=0.5}"
    assert stored["graphopt.pipeline"] == "quantize{scheme=dynamic},fold-int8"
