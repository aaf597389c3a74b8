"""The FX dialect: each op emitted, run and read back; programs loaded, changed, saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.errors import GraphError
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import OPS
from graphopt.ir.rewrite import scalar
from tests.language import BITS, producer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def integers(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    """uint8 in all of its range; int8, of which weights are, as far as no product of the two saturates here."""
    info, half = torch.iinfo(dtype), 2 ** (BITS - 1)
    low, high = (-half, half - 1) if dtype is torch.int8 else (info.min, info.max)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SCALE, ZERO = torch.tensor(2.0**-5), torch.tensor(117, dtype=torch.uint8)  # a power of two: no rounding of 1 / scale
PER_ROW = torch.tensor([0.5, 0.25, 0.125, 1.0, 2.0])

Case = tuple[list[Tensor | None], dict[str, Any]]
CASES: dict[str, list[Case]] = {
    "linear": [([normal(2, 3, 4), normal(5, 4), normal(5)], {}), ([normal(2, 4), normal(5, 4)], {})],
    "conv": [
        ([normal(2, 4, 9), normal(6, 4, 3), normal(6)],
         {"stride": (2,), "padding": (1, 1), "dilation": (2,), "groups": 1}),
        ([normal(2, 4, 8, 8), normal(6, 2, 3, 3)],
         {"stride": (1, 2), "padding": (1, 0, 1, 0), "dilation": (1, 1), "groups": 2}),
        ([normal(1, 2, 5, 5, 5), normal(3, 2, 2, 2, 2), normal(3)],
         {"stride": (1, 1, 1), "padding": (0,) * 6, "dilation": (1, 1, 1), "groups": 1}),
    ],
    "conv_transpose": [
        ([normal(2, 4, 9), normal(4, 6, 3), normal(6)],
         {"stride": (2,), "padding": (1, 1), "output_padding": (1,), "dilation": (2,), "groups": 1}),
        ([normal(2, 4, 5, 6), normal(4, 3, 3, 3)],
         {"stride": (1, 2), "padding": (1, 0, 1, 0), "output_padding": (0, 0), "dilation": (1, 1), "groups": 2}),
        ([normal(1, 2, 3, 3, 3), normal(2, 3, 2, 2, 2), normal(3)],
         {"stride": (2, 2, 2), "padding": (0,) * 6, "output_padding": (0,) * 3, "dilation": (1, 1, 1), "groups": 1}),
    ],
    "lstm": [
        ([normal(5, 2, 3), normal(1, 16, 3), normal(1, 16, 4), normal(1, 32)], {}),
        ([normal(5, 2, 3), normal(2, 16, 3), normal(2, 16, 4), normal(2, 32), None, normal(2, 2, 4),
          normal(2, 2, 4, seed=1)], {"direction": "bidirectional"}),
        ([normal(5, 2, 3), normal(1, 16, 3), normal(1, 16, 4)], {"direction": "reverse"}),
    ],
    "gru": [
        ([normal(5, 2, 3), normal(1, 12, 3), normal(1, 12, 4), normal(1, 24)], {}),
        ([normal(5, 2, 3), normal(2, 12, 3), normal(2, 12, 4), normal(2, 24), None, normal(2, 2, 4)],
         {"direction": "bidirectional"}),
        ([normal(5, 2, 3), normal(1, 12, 3), normal(1, 12, 4), normal(1, 24), None, normal(1, 2, 4)],
         {"direction": "reverse", "reset_after": False}),
    ],
    "rnn": [
        ([normal(5, 2, 3), normal(1, 4, 3), normal(1, 4, 4), normal(1, 8)], {}),
        ([normal(5, 2, 3), normal(2, 4, 3), normal(2, 4, 4), normal(2, 8), None, normal(2, 2, 4)],
         {"direction": "bidirectional", "activation": "relu"}),
    ],
    "matmul": [([normal(2, 3, 4), normal(2, 4, 5)], {})],
    "attention": [
        ([normal(2, 4, 3, 8), normal(2, 4, 5, 8, seed=1), normal(2, 4, 5, 8, seed=2)], {}),
        ([normal(2, 4, 3, 8), normal(2, 2, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2), normal(2, 1, 3, 5) > -1],
         {"scale": 0.5}),
        ([normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1), normal(2, 4, 5, 8, seed=2)], {"causal": True}),
    ],
    "rotary": [
        ([normal(2, 4, 3, 8), normal(2, 3, 4), normal(2, 3, 4, seed=1)], {}),
        ([normal(2, 4, 3, 8), normal(1, 3, 2), normal(1, 3, 2, seed=1)], {"interleaved": True}),
        ([normal(2, 3, 16), normal(1, 3, 4), normal(1, 3, 4, seed=1)], {"heads": 2}),
        ([normal(2, 3, 16), normal(2, 3, 3), normal(2, 3, 3, seed=1)], {"heads": 2}),
    ],
    "layer_norm": [([normal(2, 3, 4), normal(4), normal(4, seed=1)], {"eps": 1e-6}),
                   ([normal(2, 3, 4), normal(3, 4)], {})],
    "rms_norm": [([normal(2, 3, 4), normal(4)], {"eps": 1e-6})],
    "max_pool": [
        ([normal(2, 3, 9)], {"kernel": (3,), "stride": (2,), "padding": (1, 1), "dilation": (2,), "ceil": True}),
        ([normal(2, 3, 8, 9)], {"kernel": (3, 2), "stride": (2, 3), "padding": (1, 0, 1, 0), "dilation": (1, 1)}),
        ([normal(2, 3, 6, 6)], {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 1, 1, 0), "dilation": (1, 1),
                                "ceil": True}),
        ([normal(1, 2, 5, 6, 7)], {"kernel": (2, 3, 1), "stride": (1, 2, 3), "padding": (0, 2, 0) * 2,
                                   "dilation": (1, 1, 1)}),
    ],
    "average_pool": [
        ([normal(2, 3, 9)], {"kernel": (3,), "stride": (2,), "padding": (1, 1), "include_pad": True}),
        ([normal(2, 3, 8, 9)], {"kernel": (3, 2), "stride": (2, 3), "padding": (1, 0, 1, 0), "ceil": True}),
        ([normal(2, 3, 6, 6)], {"kernel": (2, 2), "stride": (3, 3), "padding": (1, 1, 1, 1), "ceil": True,
                                "include_pad": True}),
        ([normal(2, 3, 6, 6)], {"kernel": (3, 3), "stride": (2, 2), "padding": (0, 1, 1, 0)}),
        ([normal(2, 3, 6, 6)], {"kernel": (3, 3), "stride": (2, 2), "padding": (0, 1, 1, 0), "ceil": True,
                                "include_pad": True}),
        ([normal(1, 2, 5, 6, 7)], {"kernel": (2, 3, 1), "stride": (1, 2, 3), "padding": (0,) * 6}),
    ],
    "batch_norm": [([normal(2, 3, 4, 4), normal(3), normal(3, seed=1), normal(3, seed=2), normal(3, seed=3) ** 2],
                    {"eps": 1e-3})],
    "embedding": [([normal(9, 4), torch.tensor([[0, 8], [3, 3]])], {}),
                  ([normal(9, 4), torch.tensor([1, 2], dtype=torch.int32)], {})],
    "gelu": [([normal(2, 4)], {}), ([normal(2, 4)], {"approximate": "tanh"})],
    "silu": [([normal(2, 4)], {})],
    "relu": [([normal(2, 4)], {})],
    "clip": [([normal(2, 4)], {"low": -0.5, "high": 0.7}), ([normal(2, 4)], {"low": 0.1}),
             ([normal(2, 4)], {"high": 6.0}), ([normal(2, 4)], {"low": 0.5, "high": -0.5}),
             ([integers(2, 4, dtype=torch.int32)], {"low": -3.0, "high": 2.0**30}),
             ([normal(2, 4).double()], {"low": 0.1, "high": 0.2})],
    "leaky_relu": [([normal(2, 4)], {}), ([normal(2, 4)], {"slope": 0.2})],
    "hard_sigmoid": [([normal(2, 4) * 5], {})],
    "hard_swish": [([normal(2, 4) * 5], {})],
    "add": [([normal(2, 1, 4), normal(3, 1)], {})],
    "mul": [([normal(2, 1, 4), normal(3, 1)], {})],
    "softmax": [([normal(2, 3, 4)], {"axis": 1})],
    "choose_qparams": [([normal(3, 4)], {}), ([torch.zeros(3)], {})],
    "row_scale": [([normal(2, 3, 4)], {}), ([torch.zeros(3, 2)], {"largest": 448.0})],
    "quantize": [
        ([normal(5, 4), SCALE, ZERO], {}),
        ([normal(5, 4) * 9, SCALE], {}),
        ([normal(5, 4) * 9, PER_ROW], {"axis": 0}),
        ([normal(3, 5, 2), PER_ROW, integers(5)], {"axis": 1}),
    ],
    "dequantize": [
        ([integers(5, 4), SCALE, ZERO], {}),
        ([integers(5, 4, dtype=torch.int8), SCALE], {}),
        ([integers(5, 4, dtype=torch.int8), PER_ROW], {"axis": 0}),
        ([integers(3, 5, 2), PER_ROW, integers(5, seed=1)], {"axis": 1}),
        ([integers(5, dtype=torch.int32), PER_ROW], {"axis": 0}),
    ],
    "linear_int8": [
        ([integers(2, 4), SCALE, ZERO, integers(5, 4, dtype=torch.int8), PER_ROW, normal(5)], {}),
        ([integers(2, 4), SCALE, ZERO, integers(5, 4, dtype=torch.int8), PER_ROW], {}),
    ],
    "conv_int8": [
        ([integers(2, 4, 8, 8), SCALE, ZERO, integers(5, 4, 3, 3, dtype=torch.int8), PER_ROW, SCALE * 64, ZERO],
         {"stride": (2, 2), "padding": (1, 1, 0, 1), "dilation": (1, 1)}),
        ([integers(2, 5, 8), SCALE, ZERO, integers(5, 1, 3, dtype=torch.int8), PER_ROW, SCALE * 64, ZERO, normal(5)],
         {"stride": (1,), "padding": (1, 1), "dilation": (1,), "groups": 5}),
    ],
    "add_int8": [([integers(2, 4), SCALE, ZERO, integers(2, 4, seed=1), SCALE / 2, ZERO, SCALE * 2, ZERO], {})],
    "identity": [([normal(2, 4)], {})],
    "reshape": [([normal(2, 6), torch.tensor([3, -1])], {})],
    "transpose": [([normal(2, 3, 4)], {"perm": (2, 0, 1)})],
    "cast": [([normal(2, 3)], {"dtype": torch.float64})],
    "slice": [([normal(2, 6)], {"axis": 1, "start": 1, "end": 4})],
    "concat": [([normal(2, 3), normal(2, 1)], {"axis": 1}), ([normal(2, 3)], {}),
               ([normal(2, 3), normal(4, 3), normal(1, 3)], {"axis": -2}),
               ([integers(2), integers(3)], {})],
    "pad": [([normal(2, 3)], {"padding": (0, 1, 2, 0), "value": 0.5}), ([normal(2, 3)], {"padding": (1, -1, -1, 0)}),
            ([integers(2, 3, 4, dtype=torch.int64)], {"padding": (1, 0, 0, 0, 2, 3), "value": -3.0})],
    "squeeze": [([normal(2, 1, 3)], {"axes": (1,)}), ([normal(1, 2, 1)], {"axes": (0, -1)})],
    "unsqueeze": [([normal(2, 3)], {"axes": (1,)}), ([normal(2, 3)], {"axes": (-1,)})],
    "pow": [([normal(2, 3).abs(), normal(3)], {})],
    "where": [([normal(2, 3) > 0, normal(2, 3), normal(3)], {})],
    "mean": [([normal(2, 3, 4)], {"axes": (1, 2), "keepdim": False}), ([normal(2, 3, 4)], {"axes": (-1,)})],
    **{op: [([normal(2, 3), normal(3) + 3], {})] for op in ("sub", "div")},
    **{op: [([normal(2, 3).abs() + 0.1], {})]
       for op in ("sqrt", "rsqrt", "reciprocal", "exp", "erf", "tanh", "sigmoid", "isnan")},
}  # fmt: skip


def operand_names(op: str, tensors: Sequence[Tensor | None]) -> tuple[str, ...]:
    """A name for each operand: those of a variadic op are numbered."""
    names = OPS[op].names(len(tensors))
    return tuple(f"{name}{index}" for index, name in enumerate(names)) if OPS[op].variadic else names


def emitted(
    op: str, tensors: list[Tensor | None], attributes: Mapping[str, Any]
) -> tuple[FxGraph, dict[str, Tensor]]:
    """A graph of one op whose operands are inputs (a shape is a constant), and feeds for it."""
    names = operand_names(op, tensors)
    feeds = {n: t for n, t in zip(names, tensors, strict=False) if t is not None and (op, n) != ("reshape", "shape")}
    graph = FxGraph.empty({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in feeds.items()})
    inputs: dict[str, Value | None] = {value.name: value for value in graph.inputs}
    if op == "reshape":
        inputs["shape"] = graph.add_constant(tensors[1])  # type: ignore[arg-type]
    results = graph.emit_all(op, *[inputs.get(name) for name in names], **attributes)
    graph.set_outputs(dict(zip(OPS[op].results, results, strict=True)))
    graph.verify()
    return graph, feeds


def reference(op: str, tensors: list[Tensor | None], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
    results = OPS[op].reference(*tensors, **attributes)
    return results if isinstance(results, tuple) else (results,)


def test_there_is_a_case_for_every_op() -> None:
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_a_op_is_emitted_run_and_read_back(op: str, case: Case) -> None:
    tensors, attributes = case
    graph, feeds = emitted(op, tensors, attributes)
    expected = reference(op, tensors, attributes)
    for found, value, wanted in zip(graph.evaluate(feeds, graph.outputs), graph.outputs, expected, strict=True):
        assert (value.shape, value.dtype) == (tuple(wanted.shape), wanted.dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    node = graph.outputs[0].producer
    assert node is not None and node.kind == op
    assert dict(node.attributes) == dict(OPS[op].attributes) | attributes
    assert [value for value in node.operands if value is not None and not value.is_constant] == list(graph.inputs)
    again = graph.emit_all(node, *node.operands)
    for found, wanted in zip(graph.evaluate(feeds, again), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_variadic_op_takes_one_operand_or_more() -> None:
    graph = FxGraph.empty({"x": ((2, 3), torch.float32), "y": ((2, 1), torch.float32)})
    x, y = graph.inputs
    node = producer(graph.emit("concat", x, y, x, axis=1))
    assert node.operands == (x, y, x)
    with pytest.raises(GraphError, match="concat has any number of values: read its operands"):
        node.operand("values")
    for operands in ((), (x, None)):
        with pytest.raises(GraphError, match="concat needs its operand 'values'"):
            graph.emit("concat", *operands)


def test_an_axis_a_node_where_several_are_added() -> None:
    tensors: list[Tensor | None] = [normal(2, 3)]
    graph, feeds = emitted("unsqueeze", tensors, {"axes": (3, 0, -4)})
    assert [node.attributes["axes"] for node in graph.nodes] == [(0,), (1,), (3,)]
    torch.testing.assert_close(
        graph.evaluate(feeds, graph.outputs), list(reference("unsqueeze", tensors, {"axes": (3, 0, -4)}))
    )
    with pytest.raises(GraphError, match="unsqueeze needs its axes"):
        graph.emit("unsqueeze", graph.inputs[0])


def test_a_clip_without_bounds_is_an_identity() -> None:
    graph, feeds = emitted("clip", [normal(2, 3)], {})
    assert [node.kind for node in graph.nodes] == ["identity"]
    assert torch.equal(graph.evaluate(feeds, graph.outputs)[0], normal(2, 3))


def test_an_embedding_takes_ids_of_any_integer_type() -> None:
    table, ids = normal(9, 4), torch.tensor([1, 2], dtype=torch.uint8)
    graph, feeds = emitted("embedding", [table, ids], {})
    assert torch.equal(graph.evaluate(feeds, graph.outputs)[0], table[[1, 2]])


def test_attention_over_three_axes_is_split_into_heads() -> None:
    tensors: list[Tensor | None] = [normal(2, 3, 8), normal(2, 5, 4, seed=1), normal(2, 5, 4, seed=2)]
    attributes = {"heads": 4, "kv_heads": 2}
    graph, feeds = emitted("attention", tensors, attributes)
    torch.testing.assert_close(graph.evaluate(feeds, graph.outputs), list(reference("attention", tensors, attributes)))
    assert len(graph.sites("attention")) == 1


def test_a_conv_pads_its_ends_differently() -> None:
    tensors: list[Tensor | None] = [normal(1, 2, 6, 5), normal(3, 2, 3, 2)]
    attributes = {"padding": (1, 0, 2, 1)}
    graph, feeds = emitted("conv", tensors, attributes)
    torch.testing.assert_close(graph.evaluate(feeds, graph.outputs), list(reference("conv", tensors, attributes)))


@pytest.mark.parametrize(
    ("operands", "attributes", "message"),
    [
        (["x"], {}, "linear needs its operand 'weight'"),
        (["x", "w", "w", "w"], {}, "there are 4 operands"),
        (["x", "w"], {"axis": 1}, r"no attribute \['axis'\]"),
        (["x", "v"], {}, "does not take these operands"),
    ],
)
def test_operands_that_do_not_fit_the_op_are_refused(
    operands: list[str], attributes: dict[str, Any], message: str
) -> None:
    graph = FxGraph.empty({"x": ((2, 4), torch.float32), "w": ((5, 4), torch.float32), "v": ((3, 3), torch.float32)})
    values = dict(zip("xwv", graph.inputs, strict=True))
    with pytest.raises(GraphError, match=message):
        graph.emit("linear", *[values[name] for name in operands], **attributes)
    with pytest.raises(GraphError, match=r"cannot emit 'aten\.lienar\.default'"):
        graph.emit("aten.lienar.default", values["x"])
    assert graph.nodes == []


# --- programs ------------------------------------------------------------------------------------------------------


def load(module: nn.Module, *inputs: Tensor, dynamic: bool = True, **names: Any) -> FxGraph:
    """The graph of a module; axis 0 of its inputs is dynamic, called batch."""
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs) if dynamic else None
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    graph = FxGraph.from_program(program, **names)
    graph.verify()
    return graph


def run(graph: FxGraph, *inputs: Tensor) -> list[Tensor]:
    return graph.evaluate(dict(zip(graph.input_names, inputs, strict=True)), graph.outputs)


def assert_same(graph: FxGraph, module: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module.eval()(*inputs))
    torch.testing.assert_close(run(graph, *inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(graph.module()(*inputs)), expected, rtol=1e-5, atol=1e-5)


class Lambda(nn.Module):
    """A module of one function, with tensors `w` (a parameter) and `b` (a buffer) beside it."""

    def __init__(self, function: Any, w: Tensor | None = None, b: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(w) if w is not None else None
        self.register_buffer("b", b)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)


X = normal(3, 4)
SPELLINGS = [
    ("linear", lambda m, x: torch.addmm(m.b, x, m.w)),
    ("linear", lambda m, x: x @ m.w + m.b),
    ("linear", lambda m, x: m.b + torch.mm(x, m.w)),
    ("linear", lambda m, x: F.linear(x, m.w.t()) + m.b),
    ("linear", lambda m, x: torch.matmul(x[None], m.w)),
    ("linear", lambda m, x: x @ m.w.t().t()),
]


@pytest.mark.parametrize(("op", "function"), SPELLINGS)
def test_spellings_of_a_linear_are_one_op_on_the_stored_matrix(op: str, function: Any) -> None:
    module = Lambda(function, normal(4, 5), normal(5))
    graph = load(module, X)
    (node,) = graph.sites(op)
    assert [n.kind for n in graph.nodes if n.kind not in ("linear", "unsqueeze", "aten.sym_size.int")] == []
    assert node.weight is not None and node.weight.data_ptr() == module.w.data_ptr()  # type: ignore[union-attr]
    assert node.weight.shape == (5, 4)
    assert_same(graph, module, X)


def test_a_product_of_two_values_stays_a_product() -> None:
    graph = load(Lambda(lambda m, x, y: x @ y), X, normal(4, 2), dynamic=False)
    assert [node.kind for node in graph.nodes] == ["matmul"]


def test_a_bias_is_not_taken_into_a_linear_that_others_read() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x @ m.w
        return y + m.b, y

    module = Lambda(forward, normal(4, 5), normal(5))
    graph = load(module, X)
    assert [node.kind for node in graph.nodes] == ["linear", "add"]
    assert_same(graph, module, X)


def test_tied_weights_stay_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight
            self.w = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.head(x) @ self.w  # type: ignore[no-any-return]

    graph = load(Tied(), torch.tensor([[1, 2], [3, 4]]))
    assert len(list(graph.constants())) == 1
    table = graph.sites("embedding")[0].required("table")
    assert {node.kind for node in table.users} == {"embedding", "linear"} and len(table.users) == 3
    assert graph.sites("linear")[1].required("weight").users == table.users


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, (4, 3), padding="same", dilation=2)
        self.norm = nn.BatchNorm2d(4)
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.drop(F.relu(self.norm(self.same(x))))
        return {"y": self.strided(y).mean((2, 3)), "x": x}


def test_a_convolutional_network() -> None:
    module, x = Convolutions(), normal(2, 3, 8, 8)
    module.norm.running_mean, module.norm.running_var = normal(4), normal(4, seed=1) ** 2
    graph = load(module, x, output_names=["features", "image"])
    assert [n.kind for n in graph.nodes] == ["conv", "batch_norm", "relu", "identity", "conv", "mean"]
    assert [n.path for n in graph.nodes if n.path] == ["same", "norm", "drop", "strided"]
    assert graph.nodes[0].attributes["padding"] == (3, 2, 3, 2)
    assert graph.output_names == ["features", "image"] and graph.outputs[1] == graph.inputs[0]
    assert [value.name for value in graph.outputs] == ["features", "x"]
    assert_same(graph, module, normal(5, 3, 8, 8))


def test_numbers_are_constants_that_rules_can_see() -> None:
    module = Lambda(lambda m, x: 2 - (x * 0.5 + 3) / 4, None)
    graph = load(module, X)
    assert [n.kind for n in graph.nodes] == ["mul", "add", "div", "sub"]
    half = graph.nodes[0].operands[1]
    assert half is not None and half.is_constant and half.dtype == torch.float32
    assert scalar(graph, half) == 0.5
    two = graph.nodes[3].operands[0]
    again = graph.emit("sub", two, graph.outputs[0])
    assert torch.equal(graph.evaluate({"x": X}, [again])[0], 2 - module(X))


def test_writing_into_a_slice_is_functional() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 0
        y += 1
        return y.view(-1)

    module = Lambda(forward)
    graph = load(module, X)
    assert all(node.signature is not None for node in graph.nodes)
    assert_same(graph, module, normal(7, 4))


def test_names_are_checked_and_kept() -> None:
    module = Lambda(lambda m, x, y: (x + y, None, 3))
    graph = load(module, X, X, input_names=["past.0.key", "past_0_key"], output_names=["sum"])
    assert graph.input_names == ["past.0.key", "past_0_key"]
    assert torch.equal(run(graph, X, X)[0], X * 2)
    assert torch.equal(graph.module()(X, X)[0], X * 2)
    with pytest.raises(GraphError, match="too few input names"):
        load(module, X, X, input_names=["x"])
    with pytest.raises(GraphError, match="no inputs for the names"):
        load(module, X, X, input_names=["x", "y", "z"])
    with pytest.raises(GraphError, match="returns 1 tensors"):
        load(module, X, X, output_names=["x", "y"])
    with pytest.raises(GraphError, match=r"no feed for the inputs \['past_0_key'\]"):
        graph.evaluate({"past.0.key": X}, graph.outputs)
    with pytest.raises(GraphError, match=r"feeds for \['z'\]"):
        graph.evaluate({"past.0.key": X, "past_0_key": X, "z": X}, graph.outputs)


def test_dynamic_axes_have_the_names_that_are_given() -> None:
    module = Lambda(lambda m, x: x.reshape(x.shape[0] * 2, 2).unsqueeze(0))
    graph = load(module, X, input_names=["x"], axis_names={"x": {0: "batch"}})
    assert graph.inputs[0].shape == ("batch", 4)
    assert graph.sites("reshape")[0].result.shape == ("2*batch", 2)
    for batch in (2, 5):
        assert_same(graph, module, normal(batch, 4))
    assert_same(graph.clone(), module, normal(6, 4))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))[0:]  # type: ignore[no-any-return]


def test_control_flow_is_opaque_and_runs() -> None:
    graph = load(Branches(), X, dynamic=False)
    (node,) = [node for node in graph.nodes if node.kind == "cond"]
    assert node.signature is None
    for x in (X.abs(), -X.abs()):
        assert_same(graph.clone(), Branches(), x)


def test_an_operation_with_several_results() -> None:
    module = Lambda(lambda m, x: torch.topk(x, 2).indices + torch.split(x, 2, 1)[1].long())
    graph = load(module, X, dynamic=False)
    topk, split = graph.nodes[0], graph.nodes[1]
    assert (topk.kind, split.kind) == ("aten.topk.default", "aten.split.Tensor")
    assert [len(node.results) for node in (topk, split)] == [2, 2]
    assert topk.results[1].producer == topk and topk.results[1].users == (graph.nodes[3],)
    values = graph.emit_all(topk, graph.emit("relu", graph.inputs[0]))
    assert len(values) == 2
    assert torch.equal(graph.evaluate({"x": X}, values[:1])[0], torch.topk(X.relu(), 2).values)
    assert graph.sweep() == 2
    graph.verify()
    assert_same(graph, module, X)


# --- changing ------------------------------------------------------------------------------------------------------


def two_layers() -> FxGraph:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    return load(module, X, input_names=["x"], output_names=["y"], axis_names={"x": {0: "batch"}})


def test_text_numbers_values_and_says_paths() -> None:
    assert two_layers().text() == (
        "%0 = linear(x[batch,4], [5,4], [5])  # 0\n"
        "%1 = relu(%0[batch,5])  # 1\n"
        "%2 = linear(%1[batch,5], [2,5], [2])  # 2\n"
        "return %2[batch,2]"
    )


def test_emitting_is_inert_and_replacing_counts() -> None:
    graph = two_layers()
    before, relu = graph.text(), graph.sites("relu")[0]
    gelu = graph.emit("gelu", relu.input, at=relu)
    graph.add_constant(torch.zeros(3))
    assert graph.version == 0
    assert gelu.producer is not None and gelu.producer.path == "1"
    clone = graph.clone()
    assert clone.sweep() == 1 and clone.text() == before and clone.version == 0
    graph.replace(relu, gelu)
    assert graph.version == 1 and [node.kind for node in graph.nodes] == ["linear", "gelu", "linear"]
    graph.sweep()
    graph.verify()
    assert len(list(graph.constants())) == 4
    weights = [site.weight for site in graph.sites("linear")]
    kept = [site.weight for site in clone.sites("linear")]
    assert [w.data_ptr() for w in weights if w is not None] == [w.data_ptr() for w in kept if w is not None]


def test_a_used_node_is_not_erased() -> None:
    graph = two_layers()
    with pytest.raises(GraphError, match="still used"):
        graph.erase(graph.sites("relu")[0])
    with pytest.raises(GraphError, match="still used"):
        graph.erase(graph.nodes[-1])


def test_a_constant_may_be_used_anywhere_and_be_an_output() -> None:
    graph = two_layers()
    first = graph.nodes[0]
    constant = graph.add_constant(torch.ones(4), "0.weight")
    transposed = graph.emit("transpose", graph.add_constant(normal(4, 5)), perm=(1, 0))
    assert transposed.is_constant and transposed.producer is None and transposed.shape == (5, 4)
    product = graph.emit("linear", graph.emit("mul", first.input, constant, at=first), transposed, at=first)
    graph.replace(first, product)
    graph.set_outputs({"y": graph.outputs[0], "c": constant, "x": graph.inputs[0]})
    graph.sweep()
    graph.verify()
    assert torch.equal(run(graph, X)[1], torch.ones(4)) and len(graph.clone().module()(X)) == 3


def test_verify_names_the_node_that_is_out_of_order() -> None:
    graph = two_layers()
    relu = graph.sites("relu")[0]
    graph.replace(relu, graph.emit("gelu", relu.input))
    with pytest.raises(GraphError, match=r"gelu.* was used before it has been defined"):
        graph.verify()


def test_signatures_tell_equal_computations() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return x + 1, x + 1, x + 1.0, x.relu(), torch.rand_like(x), F.dropout(x, 0.5, True), torch.empty(2).fill_(1)

    graph = load(Lambda(forward), X, dynamic=False)
    signatures = [value.producer.signature for value in graph.outputs if value.producer is not None]
    assert signatures[0] == signatures[1] and len(set(signatures[:4])) == 3 and signatures[4:6] == [None, None]


def test_gradients_reach_weights_inputs_and_what_is_between() -> None:
    graph = two_layers()
    first, second = graph.sites("linear")
    unused = graph.add_constant(normal(2))
    wanted = [first.required("weight"), second.input, graph.inputs[0], unused]
    with pytest.raises(GraphError, match="must be one element"):
        graph.gradients({"x": X}, lambda outputs: outputs[0], wanted)
    found = graph.gradients({"x": X}, lambda outputs: outputs[0].mean(), wanted)
    tensors = [
        graph.constant(node.required(name)) for node, name in ((first, "weight"), (first, "bias"), (second, "weight"))
    ]
    w1, b1, w2 = (tensor.clone().requires_grad_() for tensor in tensors if tensor is not None)
    x = X.clone().requires_grad_()
    hidden = F.linear(x, w1, b1).relu()
    total = F.linear(hidden, w2).mean()
    expected = torch.autograd.grad(total, [w1, hidden, x])
    torch.testing.assert_close(found, [*expected, torch.zeros(2)])


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_graph_is_the_same_graph(tmp_path: Path) -> None:
    graph = two_layers()
    first, relu, last = graph.nodes
    scale, zero = graph.emit_all("choose_qparams", first.result, at=relu)
    q = graph.emit("quantize", first.result, scale, zero, at=relu)
    graph.replace(relu, graph.emit("relu", graph.emit("dequantize", q, scale, zero, at=relu), at=relu))
    transposed = graph.emit("transpose", graph.add_constant(normal(5, 2)), perm=(1, 0))
    graph.replace(last, graph.emit("linear", last.input, transposed, at=last))
    graph.sweep()
    graph.save(tmp_path / "graph.pt2")
    loaded = FxGraph.load(tmp_path / "graph.pt2")
    loaded.verify()
    assert loaded.text() == graph.text() and "batch" in loaded.text()
    assert (loaded.input_names, loaded.output_names) == (["x"], ["y"])
    assert torch.equal(run(loaded, X)[0], run(graph, X)[0])
    assert torch.equal(loaded.module()(normal(9, 4))[0], graph.module()(normal(9, 4))[0])


def test_another_file_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"PK nothing")
    with pytest.raises(GraphError, match=r"no archive of torch\.export"):
        FxGraph.load(tmp_path / "broken.pt2")
    with pytest.raises(FileNotFoundError):
        FxGraph.load(tmp_path / "missing.pt2")


def test_foreign_quantization_is_read() -> None:
    ops, zeros = quantized_decomposed(), torch.zeros(4, dtype=torch.int64)

    def forward(m: Any, x: Tensor) -> Tensor:
        q = ops.quantize_per_tensor(x, 0.5, 3, 0, 255, torch.uint8)
        narrow = ops.quantize_per_tensor(x, 0.5, 3, 0, 127, torch.uint8)
        w = ops.dequantize_per_channel(m.b, m.w, zeros, 0, -127, 127, torch.int8)
        return ops.dequantize_per_tensor(q, 0.5, 3, 0, 255, torch.uint8) * w + narrow  # type: ignore[no-any-return]

    graph = load(Lambda(forward, PER_ROW[:4], integers(4, dtype=torch.int8)), X)
    quantize, narrow = graph.nodes[0], graph.nodes[1]
    assert quantize.kind == "quantize" and narrow.kind == "quantized_decomposed.quantize_per_tensor.default"
    zero = quantize.required("zero_point")
    assert zero.dtype == torch.uint8 and scalar(graph, zero) == 3
    channels, tensor = graph.sites("dequantize")
    assert channels.operand("zero_point") is None and channels.attributes["axis"] == 0
    assert tensor.required("scale") == quantize.required("scale") and tensor.required("zero_point") == zero


# --- architectures -------------------------------------------------------------------------------------------------


def counts(graph: Graph) -> dict[str, int]:
    kinds = [node.kind for node in graph.nodes]
    return {kind: kinds.count(kind) for kind in kinds}


class Returns(nn.Module):
    """A transformer that returns its first result as a tensor, and no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        given = {} if mask is None else {"attention_mask": mask}
        return self.model(x, **given, return_dict=True)[0]  # type: ignore[no-any-return]


def tiny(name: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, int]]:
    """A small transformer with seeded weights, inputs for it, and how often its ops occur."""
    import transformers as t

    torch.manual_seed(0)
    ids = torch.randint(0, 90, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    sizes: dict[str, Any] = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 16}
    model: nn.Module
    if name == "bert":
        model = t.BertModel(t.BertConfig(**sizes))
        return Returns(model), (ids, mask), {"linear": 12, "layer_norm": 5, "gelu": 2, "attention": 2, "embedding": 3}
    if name == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=90, n_positions=16, n_embd=16, n_layer=2, n_head=4, use_cache=False)
        )
        return Returns(model), (ids, mask), {"linear": 9, "layer_norm": 5, "attention": 2, "embedding": 2}
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, use_cache=False, **sizes))
        return Returns(model), (ids, mask), {"linear": 15, "silu": 2, "attention": 2, "embedding": 1}
    model = t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"))
    return Returns(model), (normal(2, 3, 32, 32),), {"conv": 6, "batch_norm": 6, "relu": 5, "add": 2}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "resnet"])
def test_an_architecture_has_its_ops_and_its_results(name: str) -> None:
    module, inputs, ops = tiny(name)
    axes = {axis: Dim.DYNAMIC for axis in range(2 if len(inputs) == 2 else 1)}
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=(axes,) * len(inputs))
    graph = FxGraph.from_program(program, axis_names={"x": {0: "batch", 1: "length"}})
    graph.verify()
    found = counts(graph)
    assert {op: found.get(op, 0) for op in ops} == ops
    assert all(site.weight is not None for site in graph.sites("linear", "conv"))
    longer = tuple(torch.cat([t, t[:1]]) for t in inputs)
    longer = tuple(torch.cat([t, t], 1) for t in longer) if len(inputs) == 2 else longer
    for batch in (inputs, longer):
        assert_same(graph, module, *batch)
    assert graph.clone().text() == graph.text()
