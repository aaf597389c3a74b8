"""cast: 16 bits wherever numbers fit."""

from typing import Any

import pytest
import torch

from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import UsageError
from graphopt.passes import Cast
from graphopt.pipeline.selectors import Selector
from tests.language import (
    FakeTarget,
    assert_outputs_equal,
    assert_unchanged,
    build,
    declined,
    declines,
    feeds,
    listing,
    run,
)

TEXT = """
    h = gelu(linear(x[2,8], W[8,8], B[8]))
    n = layer_norm(add(h, x), G[8], C[8])
    y = linear(n, V[4,8])
    """


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_ops_and_weights_in_16_bits(dialect: str, dtype: Any, rtol: float) -> None:
    graph = build(dialect, TEXT)
    original = graph.clone()
    run(Cast(dtype=dtype), graph)
    short = f":{dtype}"
    assert listing(graph) == [
        f"%0 = cast(x[2,8], dtype={dtype})",
        f"%1 = linear(%0[2,8]{short}, [8,8]{short}, [8]{short})",
        f"%2 = gelu(%1[2,8]{short})",
        f"%3 = add(%2[2,8]{short}, %0[2,8]{short})",
        f"%4 = cast(%3[2,8]{short})",
        "%5 = layer_norm(%4[2,8], [8], [8])",
        f"%6 = cast(%5[2,8], dtype={dtype})",
        f"%7 = linear(%6[2,8]{short}, [4,8]{short})",
        f"%8 = cast(%7[2,4]{short})",
        "return %8[2,4]",
    ]
    assert_unchanged(Cast(dtype=dtype), graph)
    if (dialect, dtype) != ("onnx", "bfloat16"):  # which onnxruntime's CPU kernels do not add
        assert_outputs_equal(graph, original, rtol=rtol)


def test_what_calibration_sees_beyond_the_type_stays_in_float32(dialect: str) -> None:
    text = "h = linear(mul(x[2,8], S[1]:values(1e6)), W[8,8])\nt = tanh(h)\ny = linear(t, V[8,8])"
    graph = build(dialect, text)
    context = run(Cast(), graph, calibration=[feeds(graph)])
    assert declined(context) == ["beyond_dtype"] * 3
    assert [why.values["value"] for why in declines(context)] == ["weight", "input", "input"]
    assert declines(context)[0].values["max_abs"] == pytest.approx(1e6)
    assert (declines(context)[0].values["dtype"], declines(context)[0].values["largest"]) == ("float16", 65504)
    assert context.record.changed == 1 and context.record.notes == []
    graph = build(dialect, text)
    assert declined(run(Cast(dtype="bfloat16"), graph, calibration=[feeds(graph)])) == []


def test_without_calibration_that_is_said(dialect: str) -> None:
    (note,) = run(Cast(), build(dialect, TEXT)).record.notes
    assert note.startswith("no calibration")


def test_integers_and_ignored_sites_stay(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,8], W[8,8])\ni = add(n[2]:int64, n)\nreturn h, i")
    context = run(Cast(ignore=Selector("linear")), graph)
    assert context.record.eligible == [] and context.record.changes == 0


def test_attention_with_a_float_mask_stays_in_float32(dialect: str) -> None:
    graph = build(dialect, "y = attention(q[1,2,3,4], q, q, m[1,1,3,3])")
    assert declined(run(Cast(), graph)) == ["float_mask"]
    assert declined(run(Cast(dtype="bfloat16"), graph)) == []


def test_refuses_other_types(dialect: str) -> None:
    with pytest.raises(UsageError, match="cast: dtype is 'int8'; give float16 or bfloat16"):
        Cast(dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="toy has no kernels in bfloat16; there is float16"):
        run(Cast(dtype="bfloat16"), build(dialect, TEXT), target=FakeTarget(floats=("float16",)))


def test_tied_weights_are_stored_once(dialect: str) -> None:
    graph = build(dialect, "h = linear(x[2,8], W[8,8])\ny = linear(h, W)")
    run(Cast(), graph)
    first, second = graph.sites("linear")
    assert first.operand("weight") == second.operand("weight")
    assert {tensor.dtype for _, tensor in graph.constants()} == {torch.float16}


def test_a_reshape_keeps_the_shape_that_is_known() -> None:
    """Its sizes are computed, so that the number of heads is known of the one in float32 alone."""
    graph = build(
        "onnx",
        "n = onnx.Shape(x[batch,seq,8]:float32, start=0, end=2)\n"
        "sizes = concat(n, HEADS[2]:values(2,4):int64, axis=0)\n"
        "y = transpose(reshape(x, sizes), perm=[0,2,1,3])",
    )
    assert isinstance(graph, OnnxGraph)
    graph.refine_shapes()
    run(Cast(), graph)
    (found,) = graph.sites("reshape")
    assert (found.result.shape, found.result.dtype) == (("batch", "seq", 2, 4), torch.float16)
    assert graph.outputs[0].shape == ("batch", 2, "seq", 4)
