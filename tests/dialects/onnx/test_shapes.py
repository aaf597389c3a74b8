"""Sizes that a graph computes of its own shapes: followed to numbers and names, and never further than they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.graph import Shape
from tests.models import model, plain_run


def shape_of(body: str, values: Mapping[str, Any], inputs: str = "float[b,n,32] x") -> Shape | None:
    """The shape that is known of y, "?" where ONNX's inference made up a name. `values`: int64 constants."""
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    proto = model(f"g ({inputs}) => (float y) {{ {body} }}", tensors)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    graph = OnnxGraph.from_model(proto)
    graph.verify()
    shape = graph.outputs[0].shape
    return None if shape is None else tuple("?" if str(size).startswith("unk__") else size for size in shape)


SIZES = "s = Shape(x) i = Gather(s, I) b = Unsqueeze(i, A) "


@pytest.mark.parametrize(
    ("body", "values", "expected"),
    [
        (SIZES + "t = Concat<axis = 0>(b, H) y = Reshape(x, t)", {"I": 0, "A": [0], "H": [-1, 4, 8]},
         ("b", "n", 4, 8)),
        (SIZES + "t = Concat<axis = 0>(b, H) y = Reshape(x, t)", {"I": 1, "A": [0], "H": [-1]}, ("n", "?")),
        (SIZES + "t = Concat<axis = 0>(H, b) y = Reshape(x, t)", {"I": -1, "A": [0], "H": [-1]}, ("?", 32)),
        ("s = Shape<start = 0, end = 2>(x) t = Concat<axis = 0>(s, H) y = Reshape(x, t)", {"H": [2, 16]},
         ("b", "n", 2, 16)),
        ("s = Shape(x) t = Slice(s, F, T) u = Concat<axis = 0>(t, H) y = Reshape(x, u)",
         {"F": [0], "T": [2], "H": [-1]}, ("b", "n", 32)),
        ("s = Shape(x) c = Cast<to = 6>(s) d = Cast<to = 7>(c) y = Expand(E, d)", {"E": [[[1]]]}, ("b", "n", 32)),
        ("y = Reshape(x, H)", {"H": [0, 0, 4, -1]}, ("b", "n", 4, 8)),
        ("y = Reshape(x, H)", {"H": [-1, 32]}, ("?", 32)),
        ("y = Reshape(x, H)", {"H": [-1]}, ("?",)),
    ],
)  # fmt: skip
def test_shapes_are_followed(body: str, values: dict[str, Any], expected: Shape) -> None:
    if "E" in values:
        body = body.replace("Expand(E,", "Expand(e,").replace("s = Shape", "e = Cast<to = 1>(E) s = Shape")
    assert shape_of(body, values) == expected


def test_what_is_unknown_stays_unknown() -> None:
    assert shape_of("y = Reshape(x, s)", {}, "float[b,n,32] x, int64[k] s") is None
    assert shape_of("y = Reshape(x, s)", {}, "float[b,n,32] x, int64[3] s") == ("?", "?", "?")
    assert shape_of("n = NonZero(x) t = Cast<to = 1>(n) y = Relu(t)", {}, "float[4,4] x") == (2, "?")


def test_sizes_that_are_numbers_become_constants() -> None:
    """The head size that attention is scaled by: the last axis, behind dynamic ones."""
    text = """g (float[b,n,8] x) => (float[b,n,8] y) {
        s = Shape(x) l = Slice(s, F, T) c = Cast<to = 1>(l) r = Sqrt(c) y = Div(x, r)
    }"""
    proto = model(text, {"F": torch.tensor([-1]), "T": torch.tensor([2**63 - 1])})
    graph = OnnxGraph.from_model(proto)
    graph.sweep()
    (div,) = graph.nodes
    scale = div.operands[1]
    assert div.kind == "div" and scale is not None and scale.shape == (1,)
    torch.testing.assert_close(graph.constant(scale), torch.tensor([8.0]).sqrt())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(graph.evaluate({"x": x}, graph.outputs), plain_run(proto, {"x": x}), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "body",
    [
        "y = Concat<axis = 1>(M, N)",
        "y = Gather<axis = 1>(M, I)",
        "y = Slice(P, F, T, A)",
        "r = Reshape(L, Q) y = Concat<axis = 1>(r, r)",
        "r = Unsqueeze(L, F) y = Concat<axis = 0>(r, r)",
        "b = Cast<to = 9>(L) y = Cast<to = 7>(b)",
    ],
)
def test_tables_of_numbers_and_truths_are_left_to_the_engine(body: str) -> None:
    """What is followed is a list: a rank above 1 would lie in another order."""
    values = {"M": [[1], [2]], "N": [[3], [4]], "I": [0], "P": [[1, 2, 3], [4, 5, 6]], "F": [1], "T": [2], "A": [1],
              "L": [1, 2, 3, 4], "Q": [2, 2]}  # fmt: skip
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    proto = model(f"g (float[2] x) => (float z) {{ {body} c = Cast<to = 1>(y) s = Mul(c, H) z = Sum(s, s) }}",
                  tensors | {"H": torch.tensor(0.5)})  # fmt: skip
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    graph, feeds = OnnxGraph.from_model(proto), {"x": torch.zeros(2)}
    torch.testing.assert_close(graph.evaluate(feeds, graph.outputs), plain_run(proto, feeds), rtol=0, atol=0)


def test_a_size_that_the_graph_returns_is_left_to_the_engine() -> None:
    text = "g (float[b,8] x) => (int64[1] y) { s = Shape(x) y = Slice(s, F, T) }"
    proto = model(text, {"F": torch.tensor([1]), "T": torch.tensor([2])})
    graph = OnnxGraph.from_model(proto)
    assert graph.outputs[0].name == "y"
    assert graph.evaluate({"x": torch.zeros(3, 8)}, graph.outputs)[0].tolist() == [8]


def test_emitted_nodes_get_shapes_with_the_names_of_axes() -> None:
    graph = OnnxGraph.empty({"x": (("batch", "seq", 8), torch.float32), "i": (("batch", "seq"), torch.int64)})
    x, i = graph.inputs
    table, weight = graph.add_constant(torch.zeros(9, 8)), graph.add_constant(torch.zeros(6, 8))
    assert graph.emit("linear", x, weight).shape == ("batch", "seq", 6)
    assert graph.emit("embedding", table, i).shape == ("batch", "seq", 8)
    assert graph.emit("transpose", x, perm=(0, 2, 1)).shape == ("batch", 8, "seq")
    assert graph.emit("add", x, graph.add_constant(torch.zeros(8))).shape == ("batch", "seq", 8)
    assert graph.emit("mean", x, axes=(-1,), keepdim=False).shape == ("batch", "seq")
    assert graph.emit("slice", x, axis=2, start=2, end=5).shape == ("batch", "seq", 3)
    assert graph.emit("onnx.Shape", x).shape == (3,)
    scale, zero = graph.emit_all("choose_qparams", x)
    assert (scale.shape, scale.dtype, zero.shape, zero.dtype) == ((), torch.float32, (), torch.uint8)
    quantized = graph.emit("quantize", x, scale, zero)
    assert (quantized.shape, quantized.dtype) == (("batch", "seq", 8), torch.uint8)
