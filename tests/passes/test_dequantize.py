"""dequantize: integers -> the floats that they stand for, and activations that are not rounded."""

from __future__ import annotations

import pytest
import torch

from graphopt.passes import Dequantize, FoldInt8, Quantize
from graphopt.pipeline.selectors import Selector
from tests.language import assert_outputs_equal, assert_unchanged, build, feeds, listing, producer, run

PAIR = "d = dequantize(quantize(x[2,8], S[]:values(0.1), Z[]:uint8), S, Z)"


def test_a_pair_goes_and_a_stored_weight_becomes_floats(dialect: str) -> None:
    graph = build(dialect, PAIR + "\ny = linear(d, dequantize(W[4,8]:int8, V[4]:ones, axis=0))")
    context = run(Dequantize(), graph)
    assert listing(graph) == ["%0 = linear(x[2,8], [4,8])", "return %0[2,4]"]
    assert all(tensor.dtype == torch.float32 for _, tensor in graph.constants())
    assert context.record.changed == 2 and not context.record.declined
    assert_unchanged(Dequantize(), graph)


def test_what_moves_integers_moves_floats(dialect: str) -> None:
    graph = build(dialect, """
        q = quantize(x[2,3,8], S[]:values(0.1), Z[]:uint8)
        y = dequantize(transpose(q, perm=[0,2,1]), S, Z)
        z = relu(dequantize(q, S, Z))
        return y, z""")  # fmt: skip
    run(Dequantize(), graph)
    assert sorted(node.kind for node in graph.nodes) == ["relu", "transpose"]


def test_scales_at_run_time_go_too(dialect: str) -> None:
    graph = build(dialect, """
        s, z = choose_qparams(x[2,8])
        y = relu(dequantize(quantize(x, s, z), s, z))""")  # fmt: skip
    run(Dequantize(), graph)
    assert listing(graph) == ["%0 = relu(x[2,8])", "return %0[2,8]"]


def test_integers_from_elsewhere_stay(dialect: str) -> None:
    graph = build(dialect, """
        a = dequantize(i[2,8]:uint8, S[]:values(0.1), Z[]:uint8)
        b = dequantize(quantize(x[2,8], S, Z), T[]:values(0.2), Z)
        c = dequantize(pad(quantize(x, S, Z), padding=[0,1,0,1]), S, Z)
        return a, b, c""")  # fmt: skip
    before = listing(graph)
    context = run(Dequantize(), graph)
    assert listing(graph) == before
    assert {reason.code for reason in context.record.declined.values()} == {"integers_from_elsewhere"}
    assert any(reason.values["maker"] == "i" for reason in context.record.declined.values())


def test_int8_ops_become_float_ops(dialect: str) -> None:
    graph = build(dialect, "y = relu(linear(x[2,8], W[4,8], B[4]))")
    original = graph.clone()
    run(Quantize(scheme="static", bits=7), graph, calibration=[feeds(graph)])
    run(FoldInt8(), graph)
    assert graph.sites("linear_int8")
    run(Dequantize(), graph)
    assert [node.kind for node in graph.nodes] == ["linear", "relu"]
    assert_outputs_equal(graph, original, rtol=0.05)


def test_what_is_ignored_stays(dialect: str) -> None:
    graph = build(dialect, PAIR + "\ny = relu(d)")
    before = listing(graph)
    run(Dequantize(ignore=Selector("dequantize")), graph)
    assert listing(graph) == before


QUANTIZED = [
    Quantize(scheme="static", bits=7), Quantize(scheme="static", activation_bits=4), Quantize(scheme="dynamic", bits=7),
    Quantize(scheme="weight-only"), Quantize(scheme="weight-only", bits=4, block=16),
    Quantize(scheme="weight-only", bits=4, block=16, symmetric=False),
]  # fmt: skip


@pytest.mark.parametrize("quantize", QUANTIZED, ids=str)
def test_nothing_but_the_rounding_of_weights_is_left(quantize: Quantize, dialect: str) -> None:
    """Whatever the scheme, the graph computes in floats with the weights that the integers stand for."""
    graph = build(dialect, "y = linear(relu(linear(x[2,32], W[32,32])), V[4,32], B[4])")
    run(quantize, graph, calibration=[feeds(graph)])
    weights = [producer(site.required("weight")).result for site in graph.sites("linear")]
    floats = graph.evaluate(feeds(graph), weights)
    run(Dequantize(), graph)
    assert {node.kind for node in graph.nodes} == {"linear", "relu"}
    for site, wanted in zip(graph.sites("linear"), floats, strict=True):
        assert site.weight is not None and torch.equal(site.weight, wanted)
