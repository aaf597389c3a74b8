"""quantize{scheme=dynamic granularity=row}: a scale for each row, so that no row's result depends on the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.backends import target
from graphopt.capture.onnx_conversion import to_onnx
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import PassError, UsageError
from graphopt.ir.graph import Graph
from graphopt.numerics.metrics import sqnr
from graphopt.passes import FoldInt8, Quantize
from graphopt.pipeline.runner import Pipeline
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from tests.language import BITS, FakeTarget, assert_unchanged, build, declined, feeds, listing, outputs, run

ROW = Quantize(scheme="dynamic", granularity="row")
TEXT = """
    a = relu(linear(x[batch,n,8], W[16,8]:seed1, B[16]:seed2))
    y = linear(a, V[8,16]:seed3)
"""
TARGETS = ("onnxruntime", "torch-cpu", "fbgemm", "onednn")


def test_a_linear_reads_rows(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8], B[4])")
    original = graph.clone()
    run(ROW, graph)
    assert listing(graph) == [
        "%0 = row_scale(x[2,8])",
        "%1 = quantize(x[2,8], %0[2,1], []:uint8)",
        "%2 = dequantize(%1[2,8]:uint8, %0[2,1], []:uint8)",
        "%3 = dequantize([4,8]:int8, [4], axis=0)",
        "%4 = linear(%2[2,8], %3[4,8], [4])",
        "return %4[2,4]",
    ]
    assert sqnr(outputs(original)[0], outputs(graph)[0]) > 35
    assert_unchanged(ROW, graph)


def test_linears_on_one_value_share_its_rows(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[4,8])\nb = linear(x, V[4,8])\ny = add(a, b)")
    run(ROW, graph)
    assert [len(graph.sites(kind)) for kind in ("row_scale", "quantize", "linear")] == [1, 1, 2]


def test_rows_fold_into_a_product_of_integers(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8], B[4])")
    run(ROW, graph)
    before = outputs(graph)
    run(FoldInt8(), graph)
    assert [node.kind for node in graph.nodes] == ["row_scale", "quantize", "linear_int8"]
    assert sqnr(before[0], outputs(graph)[0]) > 100
    assert_unchanged(FoldInt8(), graph)


# --- no row depends on the others -------------------------------------------------------------------------------------


@cache
def computed(where: str) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The quantized model: evaluated in a dialect, or on a target."""
    graph = build(where if where in ("fx", "onnx") else target(where).dialect, TEXT)
    run(replace(ROW, bits=BITS), graph)  # of 8 bits some would stay in float on this CPU, and sum in any order
    if where in ("fx", "onnx"):
        return partial(outputs, graph)
    run(FoldInt8(), graph)
    on = target(where)
    runner = on.compile(on.lower(graph)[0], threads=1)
    on.check(graph, runner)
    return runner


@pytest.mark.parametrize("where", TARGETS)
@settings(max_examples=15, deadline=None)
@given(draw=st.integers(0, 2**16), rows=st.integers(1, 4), factor=st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(where: str, draw: int, rows: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(draw)
    first, others = torch.randn(1, 3, 8, generator=generator), torch.randn(rows, 3, 8, generator=generator)
    (alone,), (together,) = (computed(where)({"x": x}) for x in (first, torch.cat([factor * others, first])))
    assert torch.equal(alone[0], together[-1]) and bool(together.isfinite().all())


@pytest.mark.parametrize("where", TARGETS)
def test_targets_compute_what_the_ops_mean(where: str) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0  # a row of zeros has a scale too
    (expected,), (found,) = (computed(one)({"x": x}) for one in (target(where).dialect, where))
    assert sqnr(expected, found) > 60


def test_standard_operators_compute_the_same_at_every_level_of_optimization() -> None:
    """ONNX Runtime fuses integer products with their scales, and reads a product of scales as one of a single row."""
    graph = build("onnx", TEXT)
    run(ROW, graph)
    run(FoldInt8(), graph)
    given_feeds = feeds(graph)
    for computes in target("onnxruntime").exported(graph, None).values():
        assert sqnr(outputs(graph, given_feeds)[0], computes(given_feeds)[0]) > 60


@settings(max_examples=25, deadline=None)
@given(draw=st.integers(0, 2**16), outlier=st.floats(1, 1e4))
def test_the_error_of_a_row_is_bounded_by_its_own_largest_number(draw: int, outlier: float) -> None:
    generator = torch.Generator().manual_seed(draw)
    x = torch.randn(4, 8, generator=generator)
    x[0] *= outlier
    graph = identity()
    (y,) = graph.evaluate({"x": x}, graph.outputs)
    assert bool(((y / 127 - x).abs().amax(1) <= 0.5001 * x.abs().amax(1) / 127).all())


@cache
def identity() -> Graph:
    """y = 127 x, whose weight rounding does not change."""
    graph = build("fx", "y = linear(x[4,8], W[8,8]:zeros)")
    site = graph.nodes[0]
    weight = graph.add_constant(torch.eye(8) * 127)
    graph.replace(site, graph.emit("linear", site.input, weight, at=site))
    run(ROW, graph)
    return graph


# --- the other dialect, text and bad input ----------------------------------------------------------------------------


def test_an_fx_graph_with_rows_becomes_onnx() -> None:
    graph, direct = build("fx", TEXT), build("onnx", TEXT)
    for one in (graph, direct):
        run(ROW, one)
    assert isinstance(graph, FxGraph)
    made = to_onnx(graph)
    given = feeds(graph)
    for y, expected in zip(made.evaluate(given, made.outputs), direct.evaluate(given, direct.outputs), strict=True):
        assert torch.allclose(y, expected, atol=1e-5)
    assert [node.kind for node in made.nodes] == [node.kind for node in direct.nodes]


def test_the_text_form() -> None:
    text = "quantize{scheme=dynamic granularity=row}"
    assert parse(text, {"quantize": Quantize}) == Pipeline([ROW]) and str(ROW) == text


@pytest.mark.parametrize("scheme", ["static", "weight-only"])
def test_rows_are_of_dynamic_activations(scheme: str) -> None:
    with pytest.raises(UsageError, match=f"granularity=row is of scheme=dynamic, not of {scheme}; leave out one"):
        parse(f"quantize{{scheme={scheme} granularity=row}}", {"quantize": Quantize})


def test_auto_is_dynamic_with_rows_and_calibration(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8])")
    run(Quantize(granularity="row"), graph, calibration=[feeds(graph)])
    assert len(graph.sites("row_scale")) == 1


@pytest.mark.parametrize(
    ("text", "targets"),
    [("y = conv(x[1,4,6,6], V[4,4,3,3])", "conv"), ("y = matmul(a[2,8], b[8,4])", "matmul")],
)
def test_other_ops_have_no_rows(dialect: str, text: str, targets: str) -> None:
    both = f"{text}\nz = linear(d[2,8], W[4,8])\nreturn y, z"
    graph = build(dialect, both)
    context = run(Quantize(scheme="dynamic", granularity="row", targets=Selector(targets, "linear")), graph)
    assert declined(context) == ["rows_of_linears"] and len(graph.sites("row_scale")) == 1


def test_a_target_without_rows_says_so(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[2,8], W[4,8])")
    toy = FakeTarget(schemes={"linear": ("dynamic",)}, granularities=("tensor",))
    with pytest.raises((UsageError, PassError), match="toy has kernels for dynamic activations of granularity tensor"):
        run(ROW, graph, target=toy)
