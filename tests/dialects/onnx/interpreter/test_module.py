"""An ONNX graph as a module: ops stay ops, paths and names stay, and what has no form is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.capture import Captured, Signature, capture
from graphopt.capture.fx_conversion import to_fx, to_torch
from graphopt.errors import CaptureError
from tests.language import build, feeds
from tests.models import model
from tests.operators import built, normal

OPS = {
    "linear": "linear(x[2,n,8], W[6,8], B[6])",
    "matmul": "matmul(x, transpose(x, perm=[0,2,1]))",
    "embedding": "embedding(T[5,4], ids[2,n]:int64)",
    "conv": "conv(image[2,4,h,9], K[6,2,3,3], C[6], stride=[2,1], padding=[1,1,1,1], groups=2)",
    "max_pool": "max_pool(image, kernel=[3,3], stride=[2,2], padding=[1,1,1,1], dilation=[1,1], ceil=True)",
    "average_pool": "average_pool(image, kernel=[3,3], stride=[2,2], padding=[1,1,1,1], include_pad=True)",
    "attention": "attention(q[2,4,n,8], k[2,2,n,8], k, causal=True, scale=0.3)",
    "layer_norm": "layer_norm(x, G[8], H[8], eps=0.01)",
    "rms_norm": "rms_norm(x, G, eps=0.01)",
    "batch_norm": "batch_norm(image, S[4], R[4], M[4], V[4]:ones, eps=0.01)",
    "gelu": "gelu(x, approximate=tanh)",
    "silu": "silu(x)",
    "clip": "clip(x, low=-0.5, high=1.5)",
    "leaky_relu": "leaky_relu(x, slope=0.2)",
    "hard_sigmoid": "hard_sigmoid(x)",
    "hard_swish": "hard_swish(x)",
    "softmax": "softmax(x, axis=1)",
    "mean": "mean(x, axes=[1], keepdim=False)",
    "pow": "pow(x, P[]:values(2))",
    "rsqrt": "rsqrt(exp(x))",
    "where": "where(isnan(x), x, N[]:values(2))",
    "cast": "cast(x, dtype=float16)",
    "reshape": "reshape(x, A[3]:values(2,-1,4):int64)",
    "squeeze": "squeeze(unsqueeze(x, axes=[1]), axes=[1])",
    "slice": "slice(x, axis=-1, start=2, end=5)",
    "concat": "concat(x, x, axis=-1)",
    "pad": "pad(x, padding=[0,0,1,0,0,2], value=0.5)",
    "quantize": "quantize(x, Q[]:values(0.1), Z[]:values(3):uint8)",
    "dequantize": "dequantize(quantize(x, Q, -), Q, -)",
    "choose_qparams": "choose_qparams(x)",
    "row_scale": "row_scale(x)",
}


def converted(text: str) -> Captured:
    """The fx graph of a text."""
    graph = build("onnx", text)
    inputs, outputs = (tuple(value.name for value in values) for values in (graph.inputs, graph.outputs))
    signature = Signature(inputs, outputs, lambda found: dict(zip(outputs, found, strict=True)))
    return to_fx(Captured(graph, signature, [feeds(graph, n=4, h=7)], "a text"))


def test_an_op_stays_an_op() -> None:
    """Also on dynamic axes, and without another node in between."""
    text = "\n".join(f"{name}{', zero' if name == 'choose_qparams' else ''} = {line}" for name, line in OPS.items())
    graph = converted(f"{text}\nreturn {', '.join(OPS)}").graph
    made = dict(zip(OPS, graph.outputs, strict=True))
    assert {name: value.producer.kind if value.producer else "" for name, value in made.items()} == {n: n for n in OPS}
    assert {node.kind for node in graph.nodes} - set(OPS) == {"transpose", "exp", "isnan", "unsqueeze"}
    attributes = {node.kind: node.attributes for node in graph.nodes}
    assert attributes["conv"]["padding"] == (1, 1, 1, 1) and attributes["gelu"]["approximate"] == "tanh"
    assert graph.outputs[0].shape == (2, "n", 6) and graph.outputs[3].shape == (2, 6, "(((h - 1)//2)) + 1", 9)


def test_quantized_weights_keep_their_integers() -> None:
    graph = converted("""
        y = linear(x[n,8], dequantize(W[6,8]:int8, S[6]:ones, -, axis=0))
        z = dequantize(V[4,8]:uint8, T[4,2]:ones, -, axis=1, block=4, bits=4)
        return y, z
    """).graph
    assert [node.kind for node in graph.nodes] == ["dequantize", "linear", "dequantize"]
    first, _, second = graph.nodes
    assert first.attributes["axis"] == 0 and dict(second.attributes) == {"axis": 1, "block": 4, "bits": 4}
    assert str(first.native.target).startswith("quantized_decomposed")  # type: ignore[attr-defined]


def test_paths_and_parameters() -> None:
    """Nodes without a module path have their names for one; names that every module has are told apart."""
    text = """g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
        ["/encoder/type/MatMul"] a = MatMul(x, w)
        ["/encoder/type/Mul"] b = Mul(a, scale)
        ["/encoder/Relu"] c = Relu(b)
        [alone] d = Mul(c, half)
        ["/other/Mul"] e = Mul(d, scale)
        ["/other/Add"] y = Add(e, mask)
        ["/drop/Dropout"] z = Dropout(y, ratio)
    }"""
    tensors = {
        "w": normal(4, 4), "scale": torch.ones(4), "half": torch.tensor(0.5), "mask": normal(2, 4),
        "ratio": torch.tensor(0.25),
    }  # fmt: skip
    proto = model(text, tensors)
    graph = to_fx(capture(proto, "onnx", example_inputs={"x": normal(2, 4)})).graph
    assert [(node.kind, node.path) for node in graph.nodes][:6] == [
        ("linear", "encoder.type_"), ("mul", "encoder.type_"), ("relu", "encoder"), ("mul", "alone"), ("mul", "other"),
        ("add", "other"),
    ]  # fmt: skip
    module = to_torch(proto, {"x": normal(2, 4)})
    assert {name for name, _ in module.named_parameters()} == {
        "encoder.type_.weight", "encoder.type_.scale", "other.scale",
    }  # fmt: skip
    assert [one.p for one in module.modules() if isinstance(one, nn.Dropout)] == [0.25]


REFUSED = {
    "y = RandomNormalLike(x)\nz = Bernoulli(x)": r"onnx.RandomNormalLike \(.*\); onnx.Bernoulli \(.*\). Hand over",
    "y = NonZero(x)": "onnx.NonZero",
    'y = Resize<antialias = 1, mode = "linear">(x, , scales)': "onnx.Resize with antialias=1",
    "r = ReduceSum(x)\ns = Cast<to = 7>(r)\nt = Reshape(s, one)\ny = Expand(x, t)": "onnx.Expand .* depends on values",
}


@pytest.mark.parametrize("body", REFUSED, ids=["random", "sizes of values", "attribute", "shape of values"])
def test_what_has_no_form_is_named(body: str) -> None:
    tensors = {"scales": torch.tensor([1.0, 2.0, 2.0]), "one": torch.tensor([1])}
    proto = built("float[2,4,6] x", body, tensors, opset=20)
    with pytest.raises(CaptureError, match=REFUSED[body]):
        to_fx(capture(proto, "onnx", example_inputs={"x": normal(2, 4, 6)}))
