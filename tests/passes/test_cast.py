"""cast: 16 bits wherever numbers fit."""

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import UsageError
from graphopt.passes import Cast
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.target import AnyTarget
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
from tests.models import model

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


def test_a_reshape_to_sizes_that_are_an_input() -> None:
    """Not even how many sizes there are is known."""
    text = "g (float[n,3,3] x, int64[k] sizes) => (float y) { all = Concat<axis = 0>(sizes, rest) y = Reshape(x, all) }"
    proto = model(text, {"rest": torch.tensor([-1])}, opset=17)
    given = {"x": torch.linspace(-1, 1, 18).reshape(2, 3, 3), "sizes": torch.tensor([3, 2])}
    small = graphopt.optimize(proto, "cast", example_inputs=given)
    torch.testing.assert_close(small(**given)["y"], given["x"].reshape(3, 2, -1), rtol=1e-2, atol=1e-2)


# --- numbers that do not fit ---------------------------------------------------------------------------------------

NORMALIZED = {
    "clip of the norm": "n = clip(sqrt(add(mul(x, x), Z[]:zeros)), low=1e-12)\ny = div(x, n)",
    "epsilon of the sum": "n = add(sqrt(mul(x, x)), E[]:values(1e-8))\ny = div(x, n)",
    "product with the reciprocal": "n = add(mul(x, x), E[]:values(1e-9))\ny = mul(x, reciprocal(n))",
    "a reshape between": "n = reshape(add(mul(x, x), E[]:values(1e-9)), S[2]:values(2,8):int64)\ny = div(x, n)",
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_an_epsilon_that_vanishes_stays_in_float32_up_to_the_division(dialect: str, name: str) -> None:
    """x is all zeros in its first row, so that 0 / 0 would be NaN; what comes after the division is cast again."""
    graph = build(dialect, NORMALIZED[name].replace("x,", "x[2,8],", 1) + "\nz = linear(y, W[4,8])\nreturn y, z")
    original = graph.clone()
    context = run(Cast(), graph)
    assert "vanishes_in_dtype" in declined(context)
    (site,) = graph.sites("linear")
    assert site.input.dtype == torch.float16
    x = torch.cat([torch.zeros(1, 8), torch.linspace(-1, 1, 8)[None]])
    for before, after in zip(*(one.evaluate({"x": x}, one.outputs) for one in (original, graph)), strict=True):
        torch.testing.assert_close(after, before, rtol=2e-3, atol=2e-3)


def test_what_comes_of_a_number_that_is_too_large_stays_in_float32(dialect: str) -> None:
    """Up to the softmax, behind which all is between 0 and 1."""
    graph = build(
        dialect,
        "m = mul(m[2,8], LOW[]:values(-1e9))\ns = add(relu(x[2,8]), m)\ny = linear(softmax(add(s, s)), W[4,8])",
    )
    context = run(Cast(), graph)
    assert declined(context) == ["beyond_dtype", "reads_unfit", "reads_unfit"]
    assert graph.sites("linear")[0].input.dtype == torch.float16
    seen = run(Cast(), build(dialect, "y = mul(add(x[2,8], x), BIG[]:values(1e9))"), calibration=[feeds(graph)])
    assert declined(seen) == ["beyond_dtype"]


def test_small_weights_and_large_bounds_are_harmless(dialect: str) -> None:
    """A few small weights are rounded to 0, as they are beside larger ones; no number of 16 bits is above 1e9."""
    graph = build(dialect, "h = linear(x[2,8], W[8,8])\ny = clip(h, low=0.0, high=1e9)")
    (site,) = graph.sites("linear")
    assert site.weight is not None
    site.weight[0] = 1e-12
    assert declined(run(Cast(), graph)) == []


def _guarded(draw: Any, inner: str) -> str:
    """A number that is never 0, as a constant keeps it from that: what models divide by."""
    epsilon = draw(st.sampled_from(["1e-12", "1e-8", "1e-3"]))
    size = draw(st.sampled_from([f"relu({inner})", f"mul({inner}, {inner})", f"sqrt(relu({inner}))"]))
    return str(draw(st.sampled_from([f"clip({size}, low={epsilon})", f"add({size}, E[]:values({epsilon}))"])))


@st.composite
def expressions(draw: Any, depth: int = 3) -> str:
    """Text of an expression over x and w: products, activations, divisions, and constants small and large."""
    if depth == 0:
        return str(draw(st.sampled_from(["x", "w"])))
    inner = draw(expressions(depth - 1))
    source = draw(st.sampled_from(["x", "w"]))
    number = draw(st.sampled_from(["0.5", "1e-8", "300", "1e9", "-1e9"]))
    return str(draw(st.sampled_from([
        f"add({inner}, C[]:values({number}))",
        f"mul({inner}, C[]:values({number}))",
        f"div({inner}, {_guarded(draw, source)})",
        f"mul({inner}, reciprocal({_guarded(draw, source)}))",
        f"add({inner}, {source})",
        f"linear({inner}, W[8,8])",
        f"tanh({inner})",
        f"softmax({inner})",
        f"reshape({inner}, S[2]:values(2,8):int64)",
    ])))  # fmt: skip


@given(expressions(), st.sampled_from(["fx", "onnx"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_cast_makes_nan_or_infinity_of_finite_numbers(text: str, dialect: str, calibrated: bool) -> None:
    """x and w have a row of zeros and one of numbers up to 4."""
    for name in ("x", "w"):
        text = re.sub(rf"\b{name}\b", f"{name}[2,8]", text, count=1)
    for name in ("C", "E", "W", "S"):  # each constant a name of its own
        for number in range(len(re.findall(rf"\b{name}\[", text))):
            text = re.sub(rf"\b{name}\[", f"{name}{number}[", text, count=1)
    graph = build(dialect, f"y = {text}")
    rows = torch.stack([torch.zeros(8), torch.linspace(-4, 4, 8)])
    examples = {value.name: rows for value in graph.inputs}
    (wanted,) = graph.evaluate(examples, graph.outputs)
    assume(bool(torch.isfinite(wanted).all()) and float(wanted.abs().max()) < 6e4)
    context = Context(feeds=[examples], target=AnyTarget())
    context.calibration = Calibration([examples], graph.inputs) if calibrated else None
    run_pass(Cast(), graph, context)
    (found,) = graph.evaluate(examples, graph.outputs)
    assert bool(torch.isfinite(found).all())
