"""Floats between int8 linears in bfloat16: what is narrowed, what stays, and that numbers stay close."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.backends import target
from graphopt.backends.torch_cpu import bfloat16
from graphopt.backends.torch_cpu.base import EagerTarget
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.measure.machine import environment
from graphopt.numerics.metrics import sqnr
from tests.language import build, feeds

LEAST = torch.finfo(torch.float32).min
NUMBERS = "S[]:values(0.04), Z[]:uint8:values(120)"
LAYER = f"""
    q = quantize(x[2,6,16], {NUMBERS})
    h = linear_int8(q, S, Z, V[48,16]:int8:values(3,-2,5,1,-7), K[48]:values(0.02))
    a = transpose(reshape(slice(h, axis=2, start=0, end=16), N[4]:int64:values(2,6,2,8)), perm=[0,2,1,3])
    b = transpose(reshape(slice(h, axis=2, start=16, end=32), N), perm=[0,2,1,3])
    c = transpose(reshape(slice(h, axis=2, start=32, end=48), N), perm=[0,2,1,3])
    m = mul(hidden[2,1,1,6], L[]:values({LEAST}))
    t = reshape(transpose(attention(a, b, c, m), perm=[0,2,1,3]), M[3]:int64:values(2,6,16))
    p = quantize(t, S, Z)
    y = layer_norm(add(linear_int8(p, S, Z, W[16,16]:int8:values(2,-3,1), J[16]:values(0.02)), x), G[16]:ones, B[16])
    return y
"""
has_products = pytest.mark.skipif(
    bfloat16.FLAGS.isdisjoint(environment()["flags"].split()), reason="this CPU has no products in bfloat16"
)


def lowered() -> Graph:
    backend = target("onednn")
    assert isinstance(backend, EagerTarget)
    return backend.lower(build("fx", LAYER))[0]


def kinds(graph: Graph, dtype: torch.dtype) -> list[str]:
    return [node.kind for node in graph.nodes if node.results and node.result.dtype is dtype]


def test_what_follows_an_int8_linear_is_in_bfloat16() -> None:
    graph = lowered()
    bfloat16.narrow(graph)
    graph.verify()
    narrow = kinds(graph, torch.bfloat16)
    assert [narrow.count(kind) for kind in ("graphopt_onednn.linear.default", "attention", "layer_norm")] == [2, 1, 1]
    assert narrow.count("cast") == 2  # the residual, which comes from an input, and the mask
    assert [node.kind for node in graph.nodes if node.kind == "mul" and node.result.dtype is torch.float32] == ["mul"]
    assert [value.dtype for value in graph.outputs] == [torch.float32]


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "relu"])
def test_float_products_and_what_follows_them_are_in_bfloat16(name: str) -> None:
    graph = build("fx", f"y = layer_norm({name}(linear(x[2,16], W[16,16], A[16])), G[16]:ones, B[16])")
    narrow = graph.clone()
    bfloat16.narrow(narrow)
    narrow.verify()
    assert kinds(narrow, torch.bfloat16) == ["cast", "linear", name, "layer_norm"]
    given = feeds(graph)
    (expected,), (found,) = (one.evaluate(given, one.outputs) for one in (graph, narrow))
    assert found.dtype is torch.float32 and 35 < sqnr(expected, found) < math.inf


def test_a_graph_without_products_stays_as_it_is() -> None:
    graph = build("fx", "y = layer_norm(gelu(x[2,16]), G[16]:ones, B[16])")
    before = graph.text()
    bfloat16.narrow(graph)
    assert graph.text() == before


def test_a_number_that_bfloat16_does_not_hold_stays() -> None:
    text = f"""
        q = quantize(x[2,16], {NUMBERS})
        h = linear_int8(q, S, Z, V[16,16]:int8:values(3,-2), K[16]:values(0.02))
        y = add(h, E[]:values({LEAST}))"""
    backend = target("onednn")
    assert isinstance(backend, EagerTarget)
    graph = backend.lower(build("fx", text))[0]
    bfloat16.narrow(graph)
    assert [node.result.dtype for node in graph.sites("add")] == [torch.float32]


@has_products
@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_numbers_stay_close(masked: float) -> None:
    """Also of rows that are masked whole, whose mask is the least number of float32."""
    graph, narrow = lowered(), lowered()
    bfloat16.narrow(narrow)
    given = feeds(graph) | {"hidden": torch.full((2, 1, 1, 6), masked)}
    backend = target("onednn")
    assert isinstance(graph, FxGraph) and isinstance(narrow, FxGraph)
    (expected,), (found,) = (backend.compile(one)(given) for one in (graph, narrow))
    assert found.dtype is torch.float32 and bool(found.isfinite().all())
    assert 35 < sqnr(expected, found) < math.inf


def test_another_cpu_computes_in_float32() -> None:
    assert target("torch-cpu", "avx2").precisions == ("float32",)
    with pytest.raises(UsageError, match="does not compute in bfloat16"):
        target("torch-cpu", "avx2").at("bfloat16")
