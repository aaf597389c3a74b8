"""Rotary embeddings and repeated heads, as exporters write them out, become ops; near misses stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture.sources import capture
from graphopt.dialects import repeated_heads
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import rotary
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.whole_slices import drop_whole_slices
from graphopt.dialects.raising import run_stages
from graphopt.ir.graph import Graph
from graphopt.ir.ops import OPS
from graphopt.ir.rewrite import rewrite
from tests.language import assert_outputs_equal, build, feeds, listing, outputs

TURNED = """
    {angles}
    f = slice({x}, axis=3, start=0, end=4)
    s = slice({x}, axis=3, start=4, end=8)
    r = concat(onnx.Neg(s), f, axis=-1)
    t = add(mul({x}, c), mul(r, d))
"""
ANGLES = """
    e = concat(a[{batch},3,4], a, axis=-1)
    c = unsqueeze(onnx.Cos(e), axes=[1])
    d = unsqueeze(onnx.Sin(e), axes=[1])"""


def raised(text: str) -> Graph:
    graph = build("onnx", text)
    original = graph.clone()
    hits = run_stages((rotary.STAGE,), graph)
    graph.sweep()
    assert hits.pop("rotary") == 1
    assert_outputs_equal(graph, original)
    return graph


@pytest.mark.parametrize("batch", [1, 2])
def test_turned_halves_are_a_rotary(batch: int) -> None:
    text = TURNED.format(angles=ANGLES.format(batch=batch), x="x[2,2,3,8]")
    assert listing(raised(text)) == [
        f"%0 = onnx.Cos(a[{batch},3,4])", f"%1 = onnx.Sin(a[{batch},3,4])",
        f"%2 = rotary(x[2,2,3,8], %0[{batch},3,4], %1[{batch},3,4])", "return %2[2,2,3,8]",
    ]  # fmt: skip


def test_the_rest_of_a_head_stays_by_itself() -> None:
    text = "h = slice(x[2,2,3,10], axis=3, start=0, end=8)\n" + TURNED.format(angles=ANGLES.format(batch=2), x="h")
    graph = raised(text + "y = concat(t, slice(x, axis=3, start=8, end=10), axis=-1)")
    assert listing(graph)[-2] == "%2 = rotary(x[2,2,3,10], %0[2,3,4], %1[2,3,4])"


def test_angles_come_from_a_table_of_the_positions() -> None:
    angles = """
        c = unsqueeze(embedding(C[9,8]:values(0.5), ids[2,3]:int64), axes=[1])
        d = unsqueeze(embedding(S[9,8]:values(0.1), ids), axes=[1])"""
    graph = build("onnx", TURNED.format(angles=angles, x="x[2,2,3,8]"))
    run_stages((rotary.STAGE,), graph)
    assert [site.required("table").shape for site in graph.sites("embedding")][-2:] == [(9, 4), (9, 4)]
    assert graph.sites("rotary")


@pytest.mark.parametrize(
    ("angles", "code"),
    [
        ("c = identity(C[1,1,3,8])\nd = identity(D[1,1,3,8])", "rotary_angles_differ"),
        ("c = identity(k[2,1,3,8])\nd = identity(l[2,1,3,8])", "rotary_angles_unknown"),
        ("e = concat(a[2,2,3,4], a, axis=-1)\nc = onnx.Cos(e)\nd = onnx.Sin(e)", "rotary_angles_by_head"),
    ],
)
def test_angles_that_are_no_halves_are_left(angles: str, code: str) -> None:
    graph = build("onnx", TURNED.format(angles=angles, x="x[2,2,3,8]"))
    log = rewrite(graph, rotary.STAGE.rules)["rotary"]
    assert not log.hits and {decline.code for decline in log.declined.values()} == {code}


@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 3])] * 3), broadcast=st.tuples(*[st.booleans()] * 3),
    dropped=st.integers(0, 3), constant=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_angles_of_any_layout_mean_the_same(
    sizes: tuple[int, int, int], broadcast: tuple[bool, bool, bool], dropped: int, constant: bool
) -> None:
    """x is (batch, heads, length, size), or (batch, length, heads, size): the angles say which, or are left alone."""
    shape = [1 if one else size for size, one in zip(sizes, broadcast, strict=True)]
    while dropped and shape and shape[0] == 1:
        shape, dropped = shape[1:], dropped - 1
    joined = str([*shape, 8]).replace(" ", "")
    if constant:
        angles = f"c = identity(A{joined}:values(0.5,0.3,-0.2,0.1))\nd = identity(B{joined}:values(0.1,-0.4,0.2,0.3))"
    else:
        half = str([*shape, 4]).replace(" ", "")
        angles = f"e = concat(a{half}, a, axis=-1)\nc = onnx.Cos(e)\nd = onnx.Sin(e)"
    batch, one, other = sizes
    original = build("onnx", TURNED.format(angles=angles, x=f"x[{batch},{one},{other},8]"))
    graph = original.clone()
    run_stages((rotary.STAGE,), graph)
    assert_outputs_equal(graph, original)
    full = [1] * (3 - len(shape)) + shape
    assert bool(graph.sites("rotary")) == (full[1:] in ([1, other], [one, 1]))


def test_halves_that_are_swapped_the_other_way_are_left() -> None:
    text = TURNED.format(angles=ANGLES.format(batch=1), x="x[2,2,3,8]").replace("onnx.Neg(s), f", "onnx.Neg(f), s")
    log = rewrite(build("onnx", text), rotary.STAGE.rules)["rotary"]
    assert {decline.code for decline in log.declined.values()} == {"rotary_halves_differ"}


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3)),
    interleaved=st.booleans(), joined=st.booleans(), each=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=15)
def test_a_rotary_written_out_for_older_opsets_is_the_same(
    sizes: tuple[int, int, int, int, int], interleaved: bool, joined: bool, each: bool
) -> None:
    batch, heads, length, pairs, rest = sizes
    size = 2 * (pairs + rest)
    shape = (batch, length, heads * size) if joined else (batch, heads, length, size)
    graph = OnnxGraph.empty({
        "x": (shape, torch.float32),
        **{name: ((batch if each else 1, length, pairs), torch.float32) for name in ("cos", "sin")},
    })  # fmt: skip
    attributes: dict[str, Any] = {"interleaved": interleaved, "heads": heads if joined else 0}
    graph.set_outputs({"y": graph.emit("rotary", *graph.inputs, **attributes)})
    given = feeds(graph)
    expected = OPS["rotary"].reference(*given.values(), **attributes)
    torch.testing.assert_close(outputs(graph, given)[0], expected)
    older = onnx_export.deployable(graph, 20)
    assert not {"RotaryEmbedding", "rotary__over_batch"} & {node.op_type for node in older.graph}
    torch.testing.assert_close(onnx_run.run(onnx_run.session(older), given)[0], expected)


# --- repeated heads --------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """Attention whose keys and values are repeated as transformers does it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def repeated(x: Tensor) -> Tensor:
            batch, heads, length, size = x.shape
            return x[:, :, None].expand(batch, heads, 2, length, size).reshape(batch, heads * 2, length, size)

        return F.scaled_dot_product_attention(query, repeated(key), repeated(value))


def test_heads_that_are_repeated_are_read_once(dialect: str) -> None:
    given = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    axes = {"query": {2: "q"}, "key": {2: "k"}, "value": {2: "k"}}
    graph = capture(Grouped(), dialect, example_inputs=given, dynamic_shapes=axes).graph
    (site,) = graph.sites("attention")
    assert [value.shape and value.shape[1] for value in (site.required("query"), site.required("key"))] == [4, 2]
    assert not [node for node in graph.nodes if "expand" in node.kind.lower()]
    longer = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    found = graph.evaluate(dict(zip(("query", "key", "value"), longer, strict=True)), graph.outputs)
    torch.testing.assert_close(found[0], Grouped()(*longer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "spread", "shape"),
    [("[1]", "2,2,2,5,8", "2,4,5,8"), ("[2]", "2,2,2,5,8", "2,2,10,8")],
    ids=["whole groups", "along the length"],
)
def test_what_repeats_otherwise_is_left(axes: str, spread: str, shape: str) -> None:
    """All heads one after the other belong to other queries than each head next to itself."""
    repeats = "\n".join(
        f"{name}r = reshape(onnx.Expand(unsqueeze({name}[2,2,5,8], axes={axes}), E[5]:int64:values({spread})), "
        f"S[4]:int64:values({shape}))"
        for name in "kv"
    )
    graph = build("onnx", f"{repeats}\ny = attention(q[2,{shape[2]},3,8], kr, vr)")
    before = listing(graph)
    assert run_stages((repeated_heads.STAGE,), graph) == {} and listing(graph) == before


# --- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        ("A[2]:int64:zeros, B[2]:int64:values(4294967296), D[2]:int64:values(0,1)", 0),
        ("A[1]:int64:zeros, B[1]:int64:values(4294967296), D[1]:int64:values(1), E[1]:int64:ones", 0),
        ("A[1]:int64:ones, B[1]:int64:values(4294967296), D[1]:int64:values(1)", 1),
        ("A[1]:int64:zeros, B[1]:int64:values(4294967296), D[1]:int64:values(1), E[1]:int64:values(2)", 1),
        ("A[1]:int64:zeros, B[1]:int64:values(3), D[1]:int64:values(1)", 1),
    ],
)
def test_a_slice_that_takes_all_is_dropped(bounds: str, left: int) -> None:
    graph = build("onnx", f"y = relu(onnx.Slice(x[b,s], {bounds}))")
    assert isinstance(graph, OnnxGraph)
    given = feeds(graph, b=2, s=5)
    expected = outputs(graph, given)
    drop_whole_slices(graph)
    assert len(graph.sites("onnx.Slice")) == left
    torch.testing.assert_close(outputs(graph, given), expected)
