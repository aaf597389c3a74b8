"""Scales of channels between two convs: the same integers by one scale, or left as they are."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.graph import Graph
from graphopt.ir.qdq.per_channel_activations import share_one_scale
from tests.language import build


def chain(between: str, zero: int = 0, out: int = 4, weight: str = "K[4,1,3,3]", groups: int = 4) -> Graph:
    """A conv, what is `between`, integers with four scales, and a conv behind."""
    return build("onnx", f"""
        c = conv(x[2,3,6,6], dequantize(W[4,3,1,1]:values(90,-70,50,30,-20):int8, V[4]:values(0.01,0.02), axis=0), B[4])
        a = {between}
        q = quantize(a, S[4]:values(0.05,0.02,0.1,0.04), Z[4]:values({zero}):uint8, axis=1)
        d = dequantize(q, S, Z, axis=1)
        k = dequantize({weight}:values(40,-60,90,-20):int8, U[{out}]:values(0.02,0.01), axis=0)
        y = conv(d, k, groups={groups}, padding=[1,1,1,1])""")


@pytest.mark.parametrize(
    ("between", "zero"), [("relu(c)", 0), ("clip(c, low=0.0, high=30.0)", 0), ("clip(c, low=-30.0, high=30.0)", 128)]
)
@pytest.mark.parametrize("out", [4, 8])
def test_the_convs_take_the_scales_over(between: str, zero: int, out: int) -> None:
    graph = chain(between, zero, out, f"K[{out},1,3,3]")
    changed = graph.clone()
    share_one_scale(changed)
    changed.verify()
    (quantize,) = changed.sites("quantize")
    assert quantize.required("scale").rank == 0
    feeds = {"x": torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))}
    before, after = (one.evaluate(feeds, [one.sites("quantize")[0].result, *one.outputs]) for one in (graph, changed))
    assert before[0].equal(after[0]) and int(before[0].max()) - int(before[0].min()) > 100
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "graph",
    [chain("clip(c, low=0.0, high=6.0)"), chain("gelu(c)"), chain("relu(c)", 0, 6, "K[6,4,3,3]", 1)],
    ids=["a clip below what integers reach", "a gelu between", "channels that meet"],
)
def test_what_would_compute_something_else_stays(graph: Graph) -> None:
    before = graph.text()
    share_one_scale(graph)
    assert graph.text() == before
