"""`quantize` with activations of 4 bits, and with weights of 4 and 2 bits beside static activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph, Node
from graphopt.numerics.quantize import activation_parameters
from graphopt.passes import Quantize
from graphopt.passes.fold_int8 import FoldInt8
from graphopt.pipeline.target import Placement
from tests import models
from tests.language import FakeTarget, assert_outputs_equal, build, feeds, outputs, producer, run, stored

CHAIN = """
    a = relu(linear(x[4,16], A[16,16], b[16]))
    b = relu(linear(a, B[16,16]))
    c = relu(linear(b, C[16,16]))
    y = linear(c, D[8,16])
""".replace("b[16]", "E[16]")
SCHEMES = {"linear": ("static", "dynamic"), "conv": ("static",)}


def quantized(graph: Graph, target: Any = None, **options: Any) -> Any:
    calibration = [feeds(graph, seed) for seed in range(6)]
    return run(Quantize(scheme="static", smooth=False, **options), graph, target=target, calibration=calibration)


def bits_of(site: Node) -> tuple[int, int]:
    """Of what a site reads, and of its weight."""
    read, weight = (producer(site.required(name)) for name in ("x", "weight"))
    assert producer(read.required("x")).attributes["bits"] == read.attributes["bits"]
    return read.attributes["bits"], weight.attributes["bits"]


def test_inner_layers_have_4_bits_and_the_ends_8(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    context = quantized(graph, bits=4, activation_bits=4)
    assert [bits_of(site) for site in graph.sites("linear")] == [(8, 8), (4, 4), (4, 4), (8, 8)]
    notes = " ".join(context.record.notes)
    assert "no kernel for 4-bit activations" in notes and "first and last layers keep 8 bits" in notes
    inner = graph.sites("linear")[1]
    assert int(stored(producer(inner.required("weight")), "x").abs().max()) == 7
    integers = producer(inner.input).required("x")
    steps = producer(integers)
    x = steps.input
    (seen,) = graph.evaluate(feeds(graph), [x])
    scale, zero = stored(steps, "scale"), stored(steps, "zero_point").float()
    expected = ((seen / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    torch.testing.assert_close(graph.evaluate(feeds(graph), [inner.input])[0], expected, rtol=1e-6, atol=1e-6)
    assert len(set(expected.flatten().tolist())) > 8


def test_sites_that_are_named_have_what_they_are_given(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    first, *others = graph.sites("linear")
    named = {f"re:^{first.label}$": 4}
    quantized(graph, activation_bits=named, bits={f"re:^{first.label}$": 2, "linear": 8})
    assert [bits_of(site) for site in graph.sites("linear")] == [(4, 2), (8, 8), (8, 8), (8, 8)]
    assert len(others) == 3


def test_weights_alone_of_4_and_2_bits_beside_8(dialect: str) -> None:
    for bits, most in ((4, 7), (2, 1)):
        graph = build(dialect, CHAIN)
        quantized(graph, bits=bits)
        assert [bits_of(site) for site in graph.sites("linear")] == [(8, 8), (8, bits), (8, bits), (8, 8)]
        weight = stored(producer(graph.sites("linear")[1].required("weight")), "x")
        assert int(weight.abs().max()) == most
        before = outputs(graph)
        run(FoldInt8(), graph)
        assert len(graph.sites("linear_int8")) == 4 and not graph.sites("linear")
        torch.testing.assert_close(outputs(graph), before, rtol=1e-4, atol=1e-4)


def test_int8_ops_take_integers_of_4_bits(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    quantized(graph, activation_bits=4)
    original = graph.clone()
    run(FoldInt8(), graph)
    assert len(graph.sites("linear_int8")) == 4 and len(graph.sites("clip")) == 2
    assert all(node.attributes["bits"] == 8 for node in graph.sites("quantize", "dequantize"))
    assert_outputs_equal(graph, original, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e4), st.integers(0, 15))
def test_a_clip_makes_the_same_integers(seed: int, scale: float, zero: int) -> None:
    graph = build("fx", f"q = quantize(x[64], S[]:values({scale!r}), Z[]:uint8:values({zero}), bits=4)\n"
                  "y = dequantize(q, S, Z, bits=4)")  # fmt: skip
    x = {"x": torch.randn(64, generator=torch.Generator().manual_seed(seed)) * scale * 20}
    before = outputs(graph, x)
    run(FoldInt8(), graph)
    assert [node.kind for node in graph.nodes] == ["clip", "quantize", "dequantize"]
    torch.testing.assert_close(outputs(graph, x), before, rtol=0, atol=0)


def test_parameters_of_4_bits() -> None:
    assert activation_parameters(0.0, 30.0, bits=4) == (2.0, 0)
    assert activation_parameters(-15.0, 15.0, bits=4) == (2.0, 8)


def test_what_no_activation_can_have_is_an_error(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    with pytest.raises(UsageError, match="activations of 4 bits are int8 of a range that is known"):
        run(Quantize(scheme="dynamic", activation_bits={"linear": 4}), graph)
    target = FakeTarget(schemes=SCHEMES, placement=Placement())
    with pytest.raises(UsageError, match="toy reads quantize and dequantize of 8 bits alone, not of 4"):
        quantized(graph, target, activation_bits={"linear": 4})
    with pytest.raises(UsageError, match="static linear has weights of 8 or 7 bits here, not 4"):
        quantized(graph, target, bits={"linear": 4})


def test_a_graph_holds_them_through_files(dialect: str, tmp_path: Any) -> None:
    graph = build(dialect, CHAIN)
    quantized(graph, bits=4, activation_bits=4)
    path = tmp_path / ("graph.onnx" if dialect == "onnx" else "graph.pt2")
    graph.save(path)
    loaded = type(graph).load(path)
    assert loaded.text() == graph.text()
    torch.testing.assert_close(outputs(loaded), outputs(graph), rtol=0, atol=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.stem(x).relu()).relu().mean((2, 3))
        y: Tensor = self.head(self.down(self.up(h).relu()).relu())
        return y


@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm", "onednn"])
def test_targets_run_them(target: str, tmp_path: Any) -> None:
    net, x = models.seeded(Net), models.images(16)
    made = graphopt.optimize(
        net, "quantize{scheme=static bits=4 activation_bits=4}", target=target, example_inputs=x, calibration=[x],
        measure=False,
    )  # fmt: skip
    graph = made.transformed
    assert [bits_of(site) for site in graph.sites("conv", "linear")] == [(8, 8), (4, 4), (4, 4), (4, 4), (8, 8)]
    counts = made.report.ops_after
    assert counts["linear_int8"] == 3 and counts["conv"] == 1
    expected = graph.evaluate(made.feeds[0], graph.outputs)[0]
    signal, noise = expected.square().mean(), (made(x) - expected).square().mean()
    assert noise <= 1e-2 * signal  # a sum that is rounded the other way moves by a step of 4 bits
    assert any(f"no kernel for 4-bit activations on {target}" in note for note in made.report.passes[1].notes)
