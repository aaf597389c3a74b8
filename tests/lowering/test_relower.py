"""What came in quantized and is re-lowered: each site by itself, for the same integers."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.errors import GraphError, LoweringError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.lowering import relower
from graphopt.passes import FoldInt8
from graphopt.report.records import Relowering
from tests.language import build, run

X = {"x": torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))}
TEXT = """
    r = dequantize(quantize(x[n,4,6,6], S[]:values(0.03), Z[]:values({zero}):{kind}), S, Z)
    c = relu(conv(r, dequantize(W[8,4,3,3]:values(-90,3,77,20,-8):int8, V[8]:values({scale}), axis=0), B[8]))
    d = dequantize(quantize(c, T[]:values(0.4), U[]:values({low}):{kind}), T, U)
    e = reshape(quantize(add(d, d), R[]:values(0.8), U), N[2]:int64:values(-1,128))
    y = linear(dequantize(e, R, U), dequantize(P[5,128]:values(9,-70,33):int8, Q[5]:values({last}), axis=0))
"""
SIGNED = {"zero": -3, "low": -128, "kind": "int8", "last": 1}
UNSIGNED = {"zero": 125, "low": 0, "kind": "uint8", "last": 1}


def folded(text: str) -> Graph:
    graph = build("onnx", text)
    run(FoldInt8(), graph)
    return graph


@pytest.mark.parametrize("form", [SIGNED, UNSIGNED], ids=["int8", "uint8"])
def test_each_site_is_compared_with_itself(form: dict[str, object]) -> None:
    text = TEXT.format(**form, scale=0.01)
    captured, made = build("onnx", text), folded(text)
    assert {node.kind for node in made.nodes} >= {"conv_int8", "add_int8", "linear_int8"}
    found = relower.compare_sites(captured, made, OnnxRuntime(), X)
    assert len(found.distances) == 3 and not found.left_out
    assert found.furthest is not None and found.furthest[1] <= 1
    relower.require_within_one_step(found)


def test_a_site_that_computes_something_else_is_named() -> None:
    """Weights a tenth larger: some results are many steps away, those of the sites behind are not."""
    captured, made = build("onnx", TEXT.format(**SIGNED, scale=0.01)), folded(TEXT.format(**SIGNED, scale=0.011))
    found = relower.compare_sites(captured, made, OnnxRuntime(), X)
    wrong = [site for site, distance in found.distances.items() if distance > 1]
    (conv,) = (node.label for node in captured.nodes if node.kind == "conv")
    assert wrong == [conv] and found.differs > 0.05
    with pytest.raises(GraphError, match=f"given the same integers, {conv} is .* steps from what the file computes"):
        relower.require_within_one_step(found)


def test_float_results_are_held_to_the_tolerance() -> None:
    text = TEXT.format(**SIGNED, scale=0.01)
    captured, made = build("onnx", text), folded(TEXT.format(**SIGNED | {"last": 1.001}, scale=0.01))
    found = relower.compare_sites(captured, made, OnnxRuntime(), X)
    (linear,) = (node.label for node in captured.nodes if node.kind == "linear")
    assert found.distances[linear] == pytest.approx(10, rel=0.1)  # 1e-3 of the largest, where 1e-4 is the tolerance


def test_a_site_without_a_counterpart_is_told() -> None:
    text = TEXT.format(**SIGNED, scale=0.01)
    captured, other = build("onnx", text), build("onnx", text.replace("relu(conv", "tanh(conv"))
    found = relower.compare_sites(captured, other, OnnxRuntime(), X)
    (conv,) = (node.label for node in captured.nodes if node.kind == "conv")
    assert found.left_out == {conv: Decline("no_counterpart")} and len(found.distances) == 2
    found = relower.compare_sites(build("onnx", text), build("onnx", "y = relu(x[n,4,6,6])"), OnnxRuntime(), X)
    assert not found.distances and list(found.left_out.values()) == [Decline("no_counterpart")] * 3
    assert str(found) == "re-lowered, and no site was compared with what it was; not compared: Conv, Add, linear"


def test_a_file_that_is_re_lowered_is_held_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_ir import to_proto

    from graphopt.dialects.onnx import export as onnx_export
    from graphopt.dialects.onnx.graph import OnnxGraph

    graph = build("onnx", TEXT.format(**SIGNED, scale=0.01))
    assert isinstance(graph, OnnxGraph)
    file = to_proto(onnx_export.deployable(graph))
    made = graphopt.optimize(file, example_inputs=X)
    assert isinstance(made.report.relowering, Relowering) and len(made.report.relowering.distances) == 3
    assert any("3 sites give what they gave" in note for note in made.report.notes)
    assert made.report.to_dict()["relowering"]["distances"] == made.report.relowering.distances
    quantized_again = graphopt.optimize(file, "quantize{scheme=dynamic}", example_inputs=X)
    assert quantized_again.report.relowering is None  # a pass that may change numbers
    monkeypatch.setattr(relower, "compare_sites", lambda *given: Relowering({"somewhere": 3.0}))
    with pytest.raises(LoweringError, match="given the same integers, somewhere is 3 steps from"):
        graphopt.optimize(file, example_inputs=X)


def test_a_site_that_takes_up_a_batch_norm_is_held_to_both() -> None:
    from onnx_ir import to_proto

    from graphopt.dialects.onnx import export as onnx_export
    from graphopt.dialects.onnx.graph import OnnxGraph

    graph = build("onnx", """
        d = dequantize(x[n,2,5,5]:int8, S[]:values(0.03), Z[]:int8:zeros)
        c = conv(d, W[3,2,1,1]:seed1, -, stride=[1,1], padding=[0,0,0,0], dilation=[1,1])
        y = batch_norm(c, G[3]:values(40,3,9), B[3]:seed3, M[3]:seed4, V[3]:ones)
    """)
    assert isinstance(graph, OnnxGraph)
    given = {"x": torch.arange(-50, 50, dtype=torch.int8).reshape(2, 2, 5, 5)}
    made = graphopt.optimize(to_proto(onnx_export.deployable(graph)), example_inputs=given)
    assert not made.folded.sites("batch_norm")
    assert isinstance(made.report.relowering, Relowering) and len(made.report.relowering.distances) == 1
    assert made.report.relowering.furthest is not None and made.report.relowering.furthest[1] <= 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_no_result(wrong: float) -> None:
    expected = torch.tensor([1.0, 2.0, -torch.inf])
    assert relower._in_tolerances(expected, expected.clone()) == 0
    distance = relower._in_tolerances(expected, torch.tensor([1.0, wrong, -torch.inf]))
    with pytest.raises(GraphError, match="given the same integers, fc is inf steps from what the file computes there"):
        relower.require_within_one_step(Relowering({"fc": distance}))
