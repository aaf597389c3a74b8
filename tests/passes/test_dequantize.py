"""dequantize: integers -> the floats that they stand for, and activations that are not rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from graphopt.ir.ops.quantization import integer_range
from graphopt.passes import Dequantize, FoldInt8, Quantize
from graphopt.pipeline.selectors import Selector
from tests.language import assert_outputs_equal, assert_unchanged, build, declined, feeds, listing, producer, run

PAIR = "d = dequantize(quantize(x[2,8], S[]:values(0.1), Z[]:uint8), S, Z)"


def test_a_pair_goes_and_a_stored_weight_becomes_floats(dialect: str) -> None:
    graph = build(dialect, PAIR + "\ny = linear(d, dequantize(W[4,8]:int8, V[4]:ones, axis=0))")
    context = run(Dequantize(), graph)
    assert [node.kind for node in graph.nodes] == ["clip", "linear"]
    assert dict(graph.nodes[0].attributes) == {"low": 0.0, "high": pytest.approx(25.5)}
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
    assert sorted(node.kind for node in graph.nodes) == ["clip", "relu", "transpose"]


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
    assert [node.kind for node in graph.nodes] == ["clip", "linear", "relu"]
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


WHOLE = (0.0, 25.5)
FRONTS = [
    ("exp(x[2,8])", WHOLE), ("relu(x[2,8])", (None, 25.5)), ("transpose(relu(x[2,8]), perm=[1,0])", (None, 25.5)),
    ("sigmoid(x[2,8])", None), ("clip(x[2,8], low=0.0, high=6.0)", None), ("clip(x[2,8], low=-1.0)", WHOLE),
    ("clip(x[2,8], low=-0.04, high=25.54)", None), ("clip(x[2,8], low=-0.06, high=25.5)", (0.0, None)),
]  # fmt: skip


@pytest.mark.parametrize(("front", "bounds"), FRONTS)
def test_a_bound_is_left_out_where_the_op_in_front_is_no_wider(
    front: str, bounds: tuple[float | None, float | None] | None, dialect: str
) -> None:
    """To half a step, which is what rounding would move it by."""
    graph = build(dialect, f"y = exp(dequantize(quantize({front}, S[]:values(0.1), Z[]:uint8), S, Z))")
    before = [site.result for site in graph.sites("clip")]
    run(Dequantize(), graph)
    made = [site.attributes for site in graph.sites("clip") if site.result not in before]
    assert [(one["low"], one["high"]) for one in made] == ([] if bounds is None else [pytest.approx(bounds)])


def test_a_range_for_each_channel_is_declined(dialect: str) -> None:
    graph = build(dialect, "y = relu(dequantize(quantize(x[2,2], S[2]:values(0.1,0.2), axis=1), S, axis=1))")
    before = listing(graph)
    assert declined(run(Dequantize(), graph)) == ["range_not_stored"]
    assert listing(graph) == before


def test_a_range_that_is_computed_from_other_numbers_is_declined(dialect: str) -> None:
    graph = build(dialect, """
        s, z = choose_qparams(x[2,8])
        y = relu(dequantize(quantize(exp(x), s, z), s, z))""")  # fmt: skip
    assert declined(run(Dequantize(), graph)) == ["range_not_stored"]


RANGES = [("int8", 8), ("uint8", 8), ("int8", 4), ("uint8", 4), ("int16", 8)]


@settings(max_examples=40, deadline=None)
@drawn(
    kind=st.sampled_from(RANGES),
    scale=st.sampled_from([0.001, 0.1, 0.25, 3.0]),
    share=st.floats(0, 1),
    front=st.sampled_from(["identity", "relu", "clip", "sigmoid", "tanh"]),
    spread=st.sampled_from([0.5, 40.0, 2000.0]),
)
def test_floats_are_within_half_a_step_of_the_integers(
    kind: tuple[str, int], scale: float, share: float, front: str, spread: float
) -> None:
    """Whatever the range and whatever lies in front: rounding goes, and saturation stays."""
    dtype, bits = getattr(torch, kind[0]), kind[1]
    least, largest = integer_range(dtype, bits)
    zero = torch.tensor(round(least + share * (largest - least))).to(dtype)
    graph = build("fx", "y = identity(x[4,16])")
    (x,) = graph.inputs
    if front != "identity":
        x = graph.emit(front, x, **({"low": -1.0, "high": 6.0} if front == "clip" else {}))
    parameters = graph.add_constant(torch.tensor(scale)), graph.add_constant(zero)
    y = graph.emit("dequantize", graph.emit("quantize", x, *parameters, bits=bits), *parameters, bits=bits)
    graph.set_outputs({"y": y})
    given = {"x": spread * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))}
    (rounded,) = graph.evaluate(given, graph.outputs)
    run(Dequantize(), graph)
    assert not graph.sites("quantize", "dequantize")
    (found,) = graph.evaluate(given, graph.outputs)
    assert float((found - rounded).abs().max()) <= 0.5 * scale * (1 + 1e-3) + 1e-6 * spread


@pytest.mark.parametrize("quantize", QUANTIZED, ids=str)
def test_nothing_but_the_rounding_of_weights_is_left(quantize: Quantize, dialect: str) -> None:
    """Whatever the scheme, the graph computes in floats with the weights that the integers stand for."""
    graph = build(dialect, "y = linear(relu(linear(x[2,32], W[32,32])), V[4,32], B[4])")
    run(quantize, graph, calibration=[feeds(graph)])
    weights = [producer(site.required("weight")).result for site in graph.sites("linear")]
    floats = graph.evaluate(feeds(graph), weights)
    run(Dequantize(), graph)
    assert {node.kind for node in graph.nodes} - {"clip"} == {"linear", "relu"}
    assert len(graph.sites("clip")) == (2 if quantize.scheme == "static" else 0)
    for site, wanted in zip(graph.sites("linear"), floats, strict=True):
        assert site.weight is not None and torch.equal(site.weight, wanted)
