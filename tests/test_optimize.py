"""optimize(): the pipeline that runs, what is noted and reported, and what an Optimized gives."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt import PassError, UsageError
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.comparing import compare
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError, LoweringError
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import Rule
from graphopt.measure import machine, timing
from graphopt.passes import LowRank, Quantize, Simplify, Sparsify
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments import Agree, Diff, Instrument
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline
from tests.models import ConvNet, Encoder, exported, images, model, padding, seeded, tokens

INPUTS = {"ids": tokens(), "mask": padding()}


@pytest.fixture(scope="module")
def encoder() -> onnx.ModelProto:
    """The encoder as a file, which is read faster than a module is traced."""
    return exported(seeded(Encoder), INPUTS, 23, dynamo=True)


def names(result: Any) -> list[str]:
    return [record.name for record in result.report.passes]


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (None, ["simplify", "fold-int8"]),
        ("", ["simplify", "fold-int8"]),
        ("simplify", ["simplify", "fold-int8"]),
        ("sparsify{amount=0.5},simplify", ["simplify", "sparsify", "simplify", "fold-int8"]),
        (Sparsify(amount=0.5), ["simplify", "sparsify", "fold-int8"]),
        ([LowRank(rank=0.25), Quantize(scheme="dynamic")], ["simplify", "low-rank", "quantize", "fold-int8"]),
        (Pipeline([Simplify(), Sparsify(amount=0.5)]), ["simplify", "simplify", "sparsify", "fold-int8"]),
    ],
    ids=["none", "empty", "simplify", "text", "one", "list", "pipeline"],
)
def test_the_passes_that_run(passes: Any, expected: list[str]) -> None:
    result = graphopt.optimize(seeded(ConvNet), passes, example_inputs=images())
    assert names(result) == expected


def test_nothing_asked_loses_nothing() -> None:
    module = seeded(Encoder)
    result = graphopt.optimize(module, example_inputs=INPUTS)
    assert not {"quantize", "linear_int8"} & set(result.report.ops_after)
    torch.testing.assert_close(result(**INPUTS), module(**INPUTS), rtol=0, atol=1e-5)
    assert result.report.cost_after.parameters <= result.report.cost_before.parameters
    assert all(record.agreement == [] or record.agreement[0].cosine > 0.999999 for record in result.report.passes)


def test_auto_is_static_with_calibration_and_dynamic_without(encoder: onnx.ModelProto) -> None:
    static = graphopt.optimize(encoder, "quantize", example_inputs=INPUTS, calibration=[INPUTS])
    dynamic = graphopt.optimize(encoder, "quantize", example_inputs=INPUTS)
    assert "choose_qparams" not in static.report.ops_after and "choose_qparams" in dynamic.report.ops_after
    assert static.report.ops_after["linear_int8"] == dynamic.report.ops_after["linear_int8"] == 12


def test_the_report_accounts_for_every_site(encoder: onnx.ModelProto) -> None:
    result = graphopt.optimize(
        encoder, "quantize{scheme=dynamic ignore=[layers.0,embedding]}", example_inputs=INPUTS
    )
    record = next(record for record in result.report.passes if record.name == "quantize")
    assert len(record.eligible) == record.changed == 6 and not record.declined
    assert all(label.startswith("layers.1.") for label in record.eligible)
    conv = graphopt.optimize(seeded(ConvNet), "quantize{scheme=dynamic}", example_inputs=images())
    record = next(record for record in conv.report.passes if record.name == "quantize")
    assert (len(record.eligible), record.changed) == (4, 1)
    assert {reason.split(";")[0] for reason in record.declined.values()} == {"onnxruntime has no fast dynamic conv"}
    assert record.agreement[0].sqnr > 20


def test_figures_of_the_report(encoder: onnx.ModelProto) -> None:
    result = graphopt.optimize(encoder, "quantize{scheme=dynamic}", example_inputs=INPUTS)
    report = result.report
    assert report.target == "onnxruntime" and report.source == "onnx.ModelProto"
    assert report.pipeline == "simplify,quantize{scheme=dynamic},fold-int8"
    linears = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert report.cost_before.flops == 2 * 14 * linears + 2 * 4 * 2 * 7 * 7 * 32
    assert report.cost_after.flops == report.cost_before.flops
    assert report.cost_before.bytes - report.cost_after.bytes > 2.5 * linears  # 4 bytes a weight become 1
    assert report.ops_before["linear"] == report.ops_after["linear_int8"] == 12
    assert set(report.versions) >= {"graphopt", "torch", "onnx", "onnxruntime"}
    assert "quantize" in str(report) and report.to_dict()["kernels"]["DynamicQuantizeMatMul"] == 6


def test_every_example_shape_is_compared(encoder: onnx.ModelProto) -> None:
    examples = [INPUTS, {"ids": tokens(1, 16), "mask": padding(1, 16)}]
    result = graphopt.optimize(encoder, "quantize{scheme=dynamic}", example_inputs=examples)
    assert len(result.feeds) == 2
    separate = [compare(result.captured, result, [example]) for example in examples]
    worst = min(one.outputs[0].cosine for one in separate)
    assert result.report.agreement[0].cosine == pytest.approx(worst, abs=1e-6)


def test_agree_can_be_left_out() -> None:
    result = graphopt.optimize(seeded(ConvNet), "sparsify{amount=0.5}", example_inputs=images(), agree=False)
    assert result.report.agreement == [] and all(record.agreement == [] for record in result.report.passes)


def test_instruments_watch_every_pass() -> None:
    diff = Diff()
    graphopt.optimize(seeded(ConvNet), "sparsify{amount=0.5}", example_inputs=images(), instruments=[diff])
    assert [name for name, _ in diff.steps] == ["simplify"]  # sparsify changes numbers, which a listing does not show


def test_the_diff_is_of_the_ops_before_and_after() -> None:
    result = graphopt.optimize(seeded(ConvNet), example_inputs=images())
    diff = result.diff()
    assert diff.kinds["batch_norm"] == (2, 0)
    assert diff.removed > 0 and diff.before == result.captured.text() and diff.after == result.folded.text()


def test_bench_times_original_control_and_optimized(monkeypatch: pytest.MonkeyPatch) -> None:
    result = graphopt.optimize(seeded(ConvNet), example_inputs=[images(), images(1)])
    seen: list[Tensor] = []

    def paired(candidates: Any, baseline: str, rounds: int, clock: Any, on_round: Any) -> Any:
        assert (list(candidates), baseline, rounds) == (["original", "control", "optimized"], "original", 3)
        seen.extend(call()[0] for call in candidates.values())
        return dict.fromkeys(candidates, timing.Ratio(1.0, 1.0, 1.0, rounds, 0, {}))

    monkeypatch.setattr(timing, "paired", paired)
    bench = result.bench(rounds=3)
    assert [shapes for shapes, _ in bench.rows] == ["x [2, 3, 8, 8]", "x [1, 3, 8, 8]"]
    assert all(set(ratios) == {"optimized", "control"} for _, ratios in bench.rows)
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-4, atol=1e-5)
    (row,) = result.bench(images(5), rounds=3).rows
    assert row[0] == "x [5, 3, 8, 8]"
    cores = machine.environment()["cores"]
    assert f"{cores} threads" in bench.header


def test_bench_without_inputs_is_refused() -> None:
    text = "g (float[n,4] x, string[n] s) => (float[n,4] y) { y = Relu(x) }"
    result = graphopt.optimize(model(text))
    with pytest.raises(UsageError, match=r"bench needs inputs"):
        result.bench()


class Breaks(Pass):
    """Claims to lose nothing, and doubles an output."""

    name = "breaks"
    stage = Stage.SIMPLIFY
    lossless = True

    def run(self, graph: Graph, context: Context) -> None:
        node = graph.outputs[0].producer
        assert node is not None
        again = graph.emit(node, *node.operands, at=node)
        graph.replace(node, graph.emit("add", again, again, at=node))


class Fails(Pass):
    """Changes the graph, and then fails."""

    name = "fails"
    stage = Stage.PRUNE

    def run(self, graph: Graph, context: Context) -> None:
        for node in graph.sites("linear"):
            graph.replace(node, graph.emit("linear", node.input, node.required("weight"), at=node))
        raise ValueError("half way")


@pytest.mark.parametrize("passes", [None, "quantize{scheme=dynamic}"])
def test_a_lowering_rule_that_changes_the_meaning_is_found_out(
    passes: str | None, encoder: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Rule("wrong", lambda op, x: op.gelu(x), lambda op, m: op.relu(m.x))
    monkeypatch.setattr(OnnxRuntime, "rules", lambda self, graph: ((wrong,),))
    with pytest.raises(LoweringError, match=r"computes something else: on example 0 .* output 'y' by \d"):
        graphopt.optimize(encoder, passes, example_inputs=INPUTS)


def test_a_lowered_graph_that_does_not_run_is_said_not_to(
    encoder: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Agree, lowered: Graph, graph: Graph) -> None:
        raise GraphError("there is no such kernel")

    monkeypatch.setattr(Agree, "moved", fails)
    with pytest.raises(LoweringError, match="the graph does not run: there is no such kernel"):
        graphopt.optimize(encoder, example_inputs=INPUTS)


def test_an_output_of_another_shape_has_moved() -> None:
    graph = OnnxGraph.from_model(model("g (float[2,2] x) => (float[n,2] y) { y = Relu(x) }"))
    lowered = graph.clone()
    (node,) = lowered.nodes
    lowered.replace(node, lowered.emit("concat", node.input, node.input, axis=0, at=node))
    agree = Agree(graph, [{"x": torch.ones(2, 2)}])
    assert agree.moved(lowered, graph) == "on example 0 output 'y' is [4, 2], not [2, 2]"


def test_a_random_model_is_held_to_nothing() -> None:
    text = "g (float[2,2] x) => (float[2,2] y) { r = RandomNormal<shape = [2,2]>()  y = Add(x, r) }"
    result = graphopt.optimize(model(text, opset=21))
    assert result.report.agreement[0].cosine < 1


class Watches(Instrument):
    def __init__(self) -> None:
        self.failures: list[str] = []

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> None:
        self.failures.append(f"{pass_.name}: {error}")


def test_a_pass_that_claims_too_much_is_found_out() -> None:
    with pytest.raises(PassError, match=r"pass breaks failed: .*is declared lossless.* output 'output'"):
        graphopt.optimize(seeded(ConvNet), [Breaks()], example_inputs=images())


def test_a_failed_pass_leaves_the_model_as_it_was() -> None:
    module, watch = seeded(ConvNet), Watches()
    expected = module(images())
    with pytest.raises(PassError, match=r"pass fails failed: ValueError: half way; to reproduce: ") as caught:
        graphopt.optimize(module, [Fails()], example_inputs=images(), instruments=[watch])
    assert watch.failures == ["fails: half way"]
    assert torch.equal(module(images()), expected)
    assert caught.value.pass_name == "fails" and caught.value.reproducer is not None
    saved = OnnxGraph.load(caught.value.reproducer + "/graph.onnx")
    torch.testing.assert_close(saved.evaluate({"x": images()}, saved.outputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_only_a_pass_that_rounds_lets_a_form_round_activations() -> None:
    """A file with int8 weights: low-rank finds nothing to split at rank 64, and what is left computes the same."""
    text = "g (float[n,64] x) => (float[n,64] y) { w = DequantizeLinear(W, s)  y = MatMul(x, w) }"
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 64), generator=draw).to(torch.int8)
    file, x = model(text, {"W": weight, "s": torch.tensor(0.01)}, opset=21), torch.randn(4, 64, generator=draw)
    wanted = x @ (weight.float() * 0.01)
    kept = graphopt.optimize(file, "low-rank{rank=64}", example_inputs=x)
    torch.testing.assert_close(torch.as_tensor(kept(x)["y"]), wanted, rtol=1e-4, atol=1e-4)
