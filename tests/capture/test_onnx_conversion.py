"""An fx graph becomes an ONNX graph of the same ops, names and stored integers; what ONNX cannot hold is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture import onnx_conversion
from graphopt.capture.onnx_conversion import to_onnx
from graphopt.capture.sources import capture
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError
from graphopt.ir.graph import Graph
from graphopt.ir.ops import OPS
from graphopt.numerics.metrics import within_tolerance
from graphopt.passes import Cast, Quantize, Simplify
from tests.language import FakeTarget, build, feeds, outputs, run
from tests.models import plain_run

FLOATS = """
    l = linear(x[batch,4,8], W[8,8], B[8])
    t = matmul(l, z[batch,8,8])
    n = layer_norm(t, G[8], C[8], eps=0.001)
    r = rms_norm(n, H[8], eps=0.002)
    g = gelu(r)
    h = gelu(add(g, n), approximate=tanh)
    i = relu(sub(silu(h), clip(h, low=-0.3, high=0.5)))
    j = leaky_relu(mul(i, hard_sigmoid(h)), slope=0.2)
    k = softmax(hard_swish(j), axis=-1)
    u = squeeze(unsqueeze(slice(k, axis=2, start=2, end=6), axes=[1]), axes=[1])
    p = pad(concat(u, tanh(u), axis=2), padding=[0,0,1,0,0,-1], value=0.5)
    q = where(isnan(p), p, sigmoid(erf(p)))
    s = pow(exp(sqrt(reciprocal(add(mul(q, q), E[]:values(1))))), T[]:values(2))
    d = identity(div(transpose(s, perm=[0,2,1]), F[]:values(3)))
    m = mean(d, axes=[1], keepdim=False)
    e = embedding(A[6,8], ids[2,5]:int64)
    c = cast(reshape(e, S[2]:values(5,16):int64), dtype=float64)
    return d, m, c, j
"""
IMAGES = """
    c = conv(x[n,4,9,8], W[6,2,3,3], B[6], stride=[2,1], padding=[1,1,1,1], groups=2, dilation=[1,2])
    b = batch_norm(c, G[6], H[6], M[6], V[6]:values(1,2,3), eps=0.001)
    m = max_pool(b, kernel=[2,3], stride=[1,2], padding=[0,1,1,0], ceil=True)
    a = average_pool(b, kernel=[2,3], stride=[1,2], padding=[0,1,1,0], include_pad=True)
    u = max_pool(p[n,2,6,6]:uint8, kernel=[3,3], stride=[1,1], padding=[1,1,1,1])
    return m, a, u
"""
ATTENTION = """
    a = attention(q[b,4,s,8], k[b,2,t,8], v[b,2,t,8], m[b,1,s,t]:bool, scale=0.3)
    c = attention(q, q, q, causal=True)
    r = attention(q, k, v, n[b,1,1,t])
    o = rotary(p[2,4,6,8], cos[2,6,4], sin[2,6,4])
    return a, c, r, o
"""
QUANTIZED = """
    s, z = choose_qparams(x[batch,8])
    d = dequantize(quantize(x, s, z), s, z)
    w = dequantize(W[16,8]:values(1,-3,5):int8, U[16]:values(0.02,0.03), axis=0)
    a = relu(linear(d, w, B[16]))
    t = dequantize(quantize(a, T[]:values(0.01), O[]:values(0):uint8), T, O)
    b = linear(t, dequantize(X[8,16]:values(7,-8,5):int8, V[8,4]:values(0.02,0.03), axis=1, block=4, bits=4))
    c = linear(b, dequantize(Y[8,8]:values(1,9):uint8, Q[8,2]:ones, Z[8,2]:values(3):uint8, axis=1, block=4, bits=4))
    e = linear(c, dequantize(A[8,8]:values(1,-2,0):int8, R[8]:values(0.02,0.03), axis=0, bits=2))
    f = linear(e, dequantize(C[1,8]:values(63,-64,9):int8, K[1]:values(0.02), axis=0, bits=7))
    g = quantize(x, L[8]:values(0.02,0.03), M[8]:values(7,0):uint8, axis=1)
    i = dequantize(g, L, M, axis=1)
    j = embedding(dequantize(D[6,8]:values(1,-9,0):int8, P[6]:values(0.02,0.03), axis=0), ids[batch,2]:int64)
    h = row_scale(x, largest=448.0)
    k = dequantize(quantize(x, h), h)
    l = dequantize(quantize(x, h, O), h, O)
    return f, g, i, j, h, k, l
"""
FOLDED = """
    y = linear_int8(x[n,8]:uint8, S[]:values(0.2), Z[]:values(9):uint8, W[8,8]:values(1,-3):int8, V[8]:ones, B[8])
    a = add_int8(x, S, Z, k[n,8]:uint8, S, Z, T[]:values(0.2), O[]:values(99):uint8)
    c = conv_int8(i[n,3,8,8]:uint8, S, Z, C[4,3,3,3]:values(-63,33):int8, U[4]:values(0.1), T, O, D[4], stride=[2,2])
    return y, c, a
"""


RECURRENT = """
    h, s, t = lstm(x[5,n,3], A[1,24,3], B[1,24,6], D[1,48], gates=ifco)
    g, u = gru(x, E[1,18,3], F[1,18,6], G[1,36], gates=rzh)
    r, v = rnn(x, H[1,6,3], I[1,6,6], J[1,12])
    c = conv_transpose(i[n,4,5,5], K[4,2,2,2], L[2], stride=[2,2])
    return h, g, r, c
"""


@pytest.mark.parametrize("text", [FLOATS, IMAGES, ATTENTION, QUANTIZED, FOLDED, RECURRENT])
def test_ops_become_what_they_are_in_onnx(text: str) -> None:
    """To the letter what the same text builds in ONNX; and it computes what torch does."""
    graph, direct = build("fx", text), build("onnx", text)
    inputs, before = feeds(graph, n=2), graph.text()
    converted = to_onnx(graph, [inputs])
    assert graph.text() == before
    assert [value.name for value in converted.outputs] == graph.output_names  # type: ignore[attr-defined]
    for one in (direct, converted):
        run(Simplify(), one)
    assert converted.text() == direct.text()
    for ours, theirs in zip(outputs(converted, inputs), outputs(graph, inputs), strict=True):
        assert within_tolerance(theirs, ours)


def test_the_texts_hold_every_op() -> None:
    graphs = [build("fx", text) for text in (FLOATS, IMAGES, ATTENTION, QUANTIZED, FOLDED, RECURRENT)]
    assert {node.kind for graph in graphs for node in graph.nodes} == OPS.keys() - {"rsqrt"}


def test_a_root_that_onnx_writes_in_two_operators() -> None:
    graph = build("fx", "y = rsqrt(relu(x[batch,8]))")
    converted = to_onnx(graph)
    assert [node.kind for node in converted.nodes] == ["relu", "sqrt", "reciprocal"]
    assert torch.allclose(outputs(converted)[0], outputs(graph)[0])


# --- modules -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Names that clash once a framework makes identifiers of them, a layer that runs twice, a result in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Sequential(nn.Linear(8, 8), nn.ReLU6()), nn.Parameter(torch.randn(8, 6))
        self.register_buffer("logits", torch.randn(6))

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Any]:
        y = self.inner(self.inner(x)) @ self.table + self.logits
        return {"logits": y, "none": None, "hidden": (y.sum(-1), y.sum((1, 2)).unsqueeze(1) * ids)}


def block(dialect: str) -> Graph:
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 3, 8), "ids": torch.randint(0, 9, (2, 3))}
    graph = capture(Block().eval(), dialect, example_inputs=example).graph
    run(Simplify(), graph)
    return graph


def test_names_of_inputs_outputs_axes_and_modules_are_kept() -> None:
    graph, direct = block("fx"), block("onnx")
    converted = to_onnx(graph, [feeds(graph, batch=4, seq=5)])
    run(Simplify(), converted)
    assert [value.name for value in converted.outputs] == ["logits", "hidden.0", "hidden.1"]
    assert [(v.name, v.shape) for v in converted.inputs] == [("x", ("batch", 3, 8)), ("ids", ("batch", "seq"))]
    assert [value.shape for value in converted.outputs] == [value.shape for value in graph.outputs]
    assert converted.text() == direct.text()  # the matrix is read as it is stored, and paths are the modules'


def test_onnx_runtime_runs_it_as_torch_runs_the_module() -> None:
    graph = block("fx")
    run(Quantize(scheme="weight-only", bits=8), graph)
    converted, inputs = to_onnx(graph), feeds(graph, batch=2, seq=3)
    assert isinstance(converted, OnnxGraph) and len(converted.sites("dequantize")) == 2
    found, expected = plain_run(ir.to_proto(converted.model), inputs), graph.module()(**inputs)
    torch.testing.assert_close(found, [expected["logits"], *expected["hidden"]], rtol=1e-5, atol=1e-5)


# --- integers ------------------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> str:
    """The dequantize of a stored weight (out, 8) in the language of tests: bits, signs, blocks, zero points."""
    bits, out = draw(st.sampled_from([8, 7, 4, 2])), draw(st.integers(1, 4))
    block, shifted = draw(st.sampled_from([0, 2, 4])), draw(st.booleans())
    low, high = (0, 2**bits - 1) if shifted else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    dtype, shape = ("uint8", "int8")[not shifted], f"{out},{8 // block}" if block else f"{out}"
    name = draw(st.integers(0, 10**6))
    numbers = ",".join(map(str, draw(st.lists(st.integers(low, high), min_size=3, max_size=9))))
    zero = f"Z{name}[{shape}]:values({draw(st.integers(low, high))},{high}):uint8" if shifted else "-"
    scale = f"S{name}[{shape}]:values({draw(st.floats(1e-4, 10))},0.5)"
    spelled = f"axis=1, block={block}" if block else "axis=0"
    return f"dequantize(W{name}[{out},8]:values({numbers}):{dtype}, {scale}, {zero}, {spelled}, bits={bits})"


@given(st.lists(weights(), min_size=1, max_size=5))
@settings(max_examples=4, deadline=None)
def test_stored_integers_and_scales_are_the_same_to_the_bit(texts: list[str]) -> None:
    lines = [f"y{number} = linear(x[n,8], {text})" for number, text in enumerate(texts)]
    text = "\n".join([*lines, "return " + ", ".join(f"y{number}" for number in range(len(texts)))])
    graph, direct = build("fx", text), build("onnx", text)
    converted = to_onnx(graph, [feeds(graph)])
    assert converted.text() == direct.text()
    assert len(stored(converted)) == len(stored(direct)) >= 2 * len(texts)
    assert all(map(torch.equal, stored(converted), stored(direct)))


def stored(graph: Graph) -> list[Tensor]:
    """The integers, scales and zero points of weights, in order."""
    values = [value for node in graph.sites("dequantize") for value in node.operands if value is not None]
    return [tensor for value in values if (tensor := graph.constant(value)) is not None]


# --- errors --------------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y * 2


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(torch.relu(x))
        return y


class Counting(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


def test_what_the_exporter_refuses_is_named_with_its_path() -> None:
    graph = capture(Outer(Bessel()), "fx", example_inputs=torch.randn(2, 3)).graph
    with pytest.raises(GraphError, match=r"^aten\.special_bessel_j0\.default has no form in ONNX: .*\(block\)$"):
        to_onnx(graph)


def test_a_module_that_writes_to_its_buffers_is_refused() -> None:
    graph = capture(Outer(Counting()), "fx", example_inputs=torch.randn(2, 3)).graph
    with pytest.raises(GraphError, match=r"^aten\.copy_\.default has no form .*: it writes to .*\(block\)$"):
        to_onnx(graph)


def test_float8_is_refused() -> None:
    graph = build("fx", "y = relu(linear(x[n,32], W[32,32]))")
    target = FakeTarget(types=("float8",), schemes={"linear": ("dynamic",)})
    run(Quantize(scheme="dynamic", dtype="float8"), graph, target=target)
    with pytest.raises(GraphError, match=r"quantize has no form .* values in float8_e4m3fn"):
        to_onnx(graph)


def test_a_part_of_the_range_of_an_integer_is_refused() -> None:
    quantized_decomposed()
    graph = build("fx", "y = relu(x[n,8])")
    assert isinstance(graph, FxGraph)
    number = graph.inputs[0]
    value = graph.emit(
        "quantized_decomposed.quantize_per_tensor.default", number, scale=0.1, zero_point=0, quant_min=-127,
        quant_max=127, dtype=torch.int8,
    )  # fmt: skip
    graph.set_outputs({"q": value})
    with pytest.raises(GraphError, match=r"quantize_per_tensor\.default has no form .* a part of the range"):
        to_onnx(graph)


def test_a_graph_of_onnx_is_refused() -> None:
    with pytest.raises(GraphError, match=r"to_onnx takes a graph of the fx dialect, .* of the onnx dialect"):
        to_onnx(build("onnx", "y = relu(x[n,8])"))


def test_a_conversion_that_changes_something_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = build("fx", "y = linear(x[n,8], dequantize(W[4,8]:values(1,2):int8, S[4]:values(0.2), axis=0))")
    exported: Callable[[Any], Graph] = onnx_conversion._exported
    monkeypatch.setattr(onnx_conversion, "_exported", lambda graph: exported(other))
    with pytest.raises(GraphError, match="is quantized otherwise than before"):
        to_onnx(build("fx", "y = linear(x[n,8], dequantize(W[4,8]:values(1,3):int8, S[4]:values(0.2), axis=0))"))
    graph = build("fx", "y = relu(linear(x[n,8], W[4,8]))")
    other = build("fx", "y = linear(x[n,8], W[4,8])")
    with pytest.raises(GraphError, match="output 'y' moves by"):
        to_onnx(graph, [feeds(graph)])


def test_floats_of_16_bits_are_compared_as_such() -> None:
    graph = block("fx")
    run(Cast(dtype="float16"), graph)
    to_onnx(graph, [feeds(graph, batch=4, seq=5)])
