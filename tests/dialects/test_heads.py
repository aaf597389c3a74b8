"""Attention as nn.MultiheadAttention and the layers around it spell it: one op, with its heads, in both dialects."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.analysis.groups import groups
from graphopt.capture.sources import capture
from graphopt.dialects.heads import raise_heads
from graphopt.ir.graph import Graph
from graphopt.passes import Prune, Simplify
from tests.language import build, outputs, run
from tests.models import exported, seeded

WIDTH, HEADS = 16, 4
MOVES = {"reshape", "transpose", "squeeze", "unsqueeze", "slice"}


@dataclass(frozen=True)
class Form:
    """How nn.MultiheadAttention is made and called."""

    heads: int = HEADS
    size: int = 4
    batch_first: bool = True
    bias: bool = True
    bias_kv: bool = False
    zero_attention: bool = False
    cross: str = "self"
    """self: one input; memory: keys and values of another; apart: three inputs, of three widths."""
    attn_mask: str = "none"
    padded: bool = False
    weights: str = "no"
    """no: need_weights is false; unused: they are computed and dropped; returned."""

    @property
    def is_raised(self) -> bool:
        return not self.zero_attention and self.weights != "returned"


class Attention(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        width = form.heads * form.size
        widths = {"kdim": width + 2, "vdim": width + 1} if form.cross == "apart" else {}
        self.form = form
        self.attention = nn.MultiheadAttention(
            width, form.heads, bias=form.bias, add_bias_kv=form.bias_kv, add_zero_attn=form.zero_attention,
            batch_first=form.batch_first, **widths,
        )  # fmt: skip
        for name, parameter in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Any:
        form = self.form
        if form.cross == "self":
            key = value = x
        elif form.cross == "memory":
            value = key
        mask = {
            "none": None, "bool": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
            "float": torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH),
        }[form.attn_mask]  # fmt: skip
        y, weights = self.attention(
            x, key, value, attn_mask=mask, key_padding_mask=padding if form.padded else None,
            need_weights=form.weights != "no",
        )  # fmt: skip
        return (y, weights) if form.weights == "returned" else y


LENGTH = 5


def inputs(form: Form, batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = form.heads * form.size
    widths = (width, width + 2, width + 1) if form.cross == "apart" else (width,) * 3
    shape = (batch, LENGTH) if form.batch_first else (LENGTH, batch)
    tensors = [torch.randn(*shape, size, generator=generator) for size in widths]
    padding = torch.zeros(batch, LENGTH, dtype=torch.bool)
    padding[0, 3:] = True
    return dict(zip(("x", "key", "value", "padding"), (*tensors, padding), strict=True))


def made(form: Form) -> nn.Module:
    """The module; the second half of its heads computes nothing."""
    module = seeded(Attention, form)
    attention: Any = module.attention
    width, live = form.heads * form.size, form.heads // 2 * form.size
    with torch.no_grad():
        parts = [attention.in_proj_weight, attention.in_proj_bias, attention.bias_k, attention.bias_v]
        parts += [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        for part in parts:
            if part is not None and form.heads > 1:
                axis = 2 if part.dim() == 3 else 0
                part.unflatten(axis, (-1, width)).narrow(axis + 1, live, width - live).zero_()
        if form.heads > 1:
            attention.out_proj.weight[:, live:] = 0
    return module


def captured(form: Form, dialect: str) -> tuple[nn.Module, Graph]:
    module, axis = made(form), 0 if form.batch_first else 1
    shapes = {"x": {axis: "batch"}, "key": {axis: "batch"}, "value": {axis: "batch"}, "padding": {0: "batch"}}
    graph = capture(module, dialect, example_inputs=inputs(form, 2), dynamic_shapes=shapes).graph
    run(Simplify(), graph)
    return module, graph


def check(form: Form, dialect: str) -> None:
    """The graph computes what torch does, at another batch too; half of the heads can go, as half compute nothing."""
    module, graph = captured(form, dialect)
    feeds = inputs(form, 3, seed=1)
    with torch.no_grad():
        found = module(**feeds)
    expected = list(found) if isinstance(found, tuple) else [found]
    feeds = {value.name: feeds[value.name] for value in graph.inputs}
    torch.testing.assert_close(outputs(graph, feeds), expected, rtol=1e-4, atol=1e-5)
    if not form.is_raised:
        return
    assert len(graph.sites("attention")) == 1 and not graph.sites("softmax")
    before = [tuple(site.weight.shape) for site in graph.sites("linear") if site.weight is not None]
    assert len(before) == 4
    if form.heads == 1:
        return
    assert [(group.size, group.locked) for group in groups(graph) if group.kind == "heads"] == [(form.heads, None)]
    run(Prune(heads=0.5, criterion="l2"), graph)
    after = [tuple(site.weight.shape) for site in graph.sites("linear") if site.weight is not None]
    assert after == [*((rows // 2, columns) for rows, columns in before[:3]), (before[3][0], before[3][1] // 2)]
    torch.testing.assert_close(outputs(graph, feeds), expected, rtol=1e-4, atol=1e-5)


FORMS = [
    Form(),
    Form(batch_first=False, weights="unused"),
    Form(cross="memory", attn_mask="bool", padded=True, bias=False),
    Form(cross="apart", bias_kv=True, weights="unused", padded=True),
    Form(weights="returned"),
    Form(zero_attention=True),
    Form(zero_attention=True, weights="unused"),  # keys and values end with one row for each of batch times heads
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_of_torch_is_raised_and_its_heads_go(form: Form, dialect: str) -> None:
    check(form, dialect)


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.builds(
        Form, heads=st.sampled_from([1, 2, 4]), size=st.integers(1, 5), batch_first=st.booleans(), bias=st.booleans(),
        bias_kv=st.booleans(), zero_attention=st.booleans(), cross=st.sampled_from(["self", "memory", "apart"]),
        attn_mask=st.sampled_from(["none", "bool", "float"]), padded=st.booleans(),
        weights=st.sampled_from(["no", "unused", "returned"]),
    )
)  # fmt: skip
def test_every_form_of_attention_computes_the_same(form: Form, dialect: str) -> None:
    check(form, dialect)


# --- layers ----------------------------------------------------------------------------------------------------------


def encoder(batch_first: bool, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 32, batch_first=batch_first, norm_first=norm_first, activation="gelu" if norm_first else "relu"
    )
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)


@pytest.mark.parametrize(("batch_first", "norm_first"), [
    (True, False), pytest.param(True, True, marks=pytest.mark.slow),
    pytest.param(False, False, marks=pytest.mark.slow), (False, True),
])  # fmt: skip
def test_an_encoder_keeps_no_moves_around_attention(batch_first: bool, norm_first: bool, dialect: str) -> None:
    """Where time comes first, it is swapped with the batch once before all layers, and once after them."""
    module, x = seeded(encoder, batch_first, norm_first), torch.randn(2, 5, WIDTH)
    graph = capture(module, dialect, example_inputs=x, dynamic_shapes={"src": {0: "first", 1: "second"}}).graph
    run(Simplify(), graph)
    kinds = collections.Counter(node.kind for node in graph.nodes)
    around = 0 if dialect == "onnx" else 4 * 2  # aten's attention has its heads apart
    assert kinds["transpose"] == (0 if batch_first else 2) + around
    assert not (MOVES - {"transpose"}) & set(kinds)
    assert kinds["attention"] == 2 and kinds["linear"] == 12
    longer = torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(outputs(graph, {"src": longer}), [module(longer)], rtol=1e-4, atol=1e-5)


def test_an_exported_encoder_has_attention_alone(tmp_path: Path) -> None:
    module, x = seeded(encoder, True, False), torch.randn(2, 5, WIDTH)
    small = graphopt.optimize(module, "prune{heads=0.5}", example_inputs=x, dynamic_shapes={"src": {0: "b", 1: "s"}})
    small.export(tmp_path / "small.onnx")
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node)
    assert kinds["Attention"] == 2
    assert not {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Gather", "Slice"} & set(kinds)
    assert small(torch.ones(1, 3, WIDTH)).shape == (1, 3, WIDTH)


def test_a_decoder_reads_its_memory(dialect: str) -> None:
    def decoder() -> nn.Module:
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True)
        return nn.TransformerDecoder(layer, 1)

    module = seeded(decoder)
    feeds = {"tgt": torch.randn(2, 5, WIDTH), "memory": torch.randn(2, 7, WIDTH)}
    shapes = {"tgt": {0: "batch", 1: "length"}, "memory": {0: "batch", 1: "keys"}}
    graph = capture(module, dialect, example_inputs=feeds, dynamic_shapes=shapes).graph
    run(Simplify(), graph)
    assert len(graph.sites("attention")) == 2 and len(graph.sites("linear")) == 10
    other = {"tgt": torch.randn(3, 4, WIDTH), "memory": torch.randn(3, 2, WIDTH)}
    torch.testing.assert_close(outputs(graph, other), [module(**other)], rtol=1e-4, atol=1e-5)
    run(Prune(heads=0.5), graph)
    assert [group.size for group in groups(graph) if group.kind == "heads"] == [2, 2]


@pytest.mark.parametrize("opset", [18, 20])
def test_an_encoder_is_raised_from_a_file(opset: int) -> None:
    module, x = seeded(encoder, True, False), torch.randn(2, 5, WIDTH)
    graph = capture(exported(module, {"src": x}, opset, True), "onnx", example_inputs=x).graph
    assert [site.attributes["heads"] for site in graph.sites("attention")] == [HEADS] * 2
    torch.testing.assert_close(outputs(graph, {"src": x}), [module(x)], rtol=1e-4, atol=1e-5)


# --- views -----------------------------------------------------------------------------------------------------------

PACKED = """
    p = linear(x[2,5,6], W[24,6], B[24])
    r = reshape(p, R[5]:values(2,5,3,2,4):int64)
    t = transpose(r, perm=[2,0,3,1,4])
"""
PACKED_BEHIND = PACKED.replace("(2,5,3,2,4)", "(2,5,2,4,3)").replace("[2,0,3,1,4]", "[4,0,2,1,3]")
TAKEN = "".join(
    f"{name} = squeeze(slice(t, axis=0, start={i}, end={i + 1}), axes=[0])\n" for i, name in enumerate("qkv")
)
JOINED = """
    a = attention(q, k, v)
    j = reshape(transpose(a, perm=[0,2,1,3]), J[3]:values(2,5,8):int64)
    y = linear(j, V[3,8])
"""
SPLIT = """
    q = transpose(reshape(linear(x[2,5,6], Q[8,6]), R[4]:values(2,5,2,4):int64), perm=[0,2,1,3])
    k = transpose(reshape(linear(x, K[8,6]), R), perm=[0,2,1,3])
    v = transpose(reshape(linear(x, U[8,6]), R), perm=[0,2,1,3])
"""
STAY = {
    "heads split and joined once": SPLIT + JOINED,
    "read before the heads are joined": PACKED + TAKEN + JOINED + "return y, a",
    "heads inside a head": SPLIT.replace("(2,5,2,4)", "(2,5,4,2)").replace("[0,2,1,3]", "[0,3,1,2]") + JOINED,
    "length and heads as one": SPLIT + JOINED.replace("(2,5,8)", "(2,10,4)").replace("V[3,8]", "V[3,4]"),
    "packed behind the heads": PACKED_BEHIND + TAKEN + JOINED,
    "a mask of which one axis is batch and heads": SPLIT + """
        q3 = reshape(q, S[3]:values(4,5,4):int64)
        k3 = reshape(k, S)
        v3 = reshape(v, S)
        s = add(matmul(q3, transpose(k3, perm=[0,2,1])), squeeze(m[4,1,5,5], axes=[1]))
        a = reshape(matmul(softmax(s), v3), A[4]:values(2,2,5,4):int64)
        j = reshape(transpose(a, perm=[0,2,1,3]), J[3]:values(2,5,8):int64)
    """,
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_no_attention_over_whole_heads_stays(name: str, dialect: str) -> None:
    graph = build(dialect, STAY[name])
    before, version = graph.text(), graph.version
    raise_heads(graph)
    graph.sweep()
    assert graph.text() == before and graph.version == version


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3), length=st.integers(1, 4), heads=st.integers(1, 3), size=st.integers(1, 3),
    time_first=st.booleans(), parts=st.permutations("qkv"), merged=st.booleans(), mask=st.booleans(),
)  # fmt: skip
def test_views_of_a_packed_projection_are_linears(
    dialect: str, batch: int, length: int, heads: int, size: int, time_first: bool, parts: list[str], merged: bool,
    mask: bool,
) -> None:  # fmt: skip
    """Whatever the sizes, also where several are equal: one attention over linears, which computes the same."""
    outer = (length, batch) if time_first else (batch, length)
    width = heads * size
    perm, swap = ("[2,1,3,0,4]", "[2,0,1,3]") if time_first else ("[2,0,3,1,4]", "[0,2,1,3]")
    text = f"""
        p = linear(x[{outer[0]},{outer[1]},5], W[{3 * width},5], B[{3 * width}])
        r = reshape(p, R[5]:values({outer[0]},{outer[1]},3,{heads},{size}):int64)
        t = transpose(r, perm={perm})
    """
    for index, part in enumerate(parts):
        text += f"{part} = squeeze(slice(t, axis=0, start={index}, end={index + 1}), axes=[0])\n"
    operands = f"q, k, v, M[1,1,{length},{length}]" if mask else "q, k, v"
    if merged:
        shape = f"S[3]:values({batch * heads},{length},{size}):int64"
        text += "".join(f"{part}3 = reshape({part}, {shape if part == 'q' else 'S'})\n" for part in "qkv")
        text += "s = matmul(q3, transpose(k3, perm=[0,2,1]))\n"
        text += f"s2 = add(s, M[1,{length},{length}])\n" if mask else "s2 = mul(s, TWO[]:values(2))\n"
        text += f"a3 = matmul(softmax(s2), v3)\na = reshape(a3, A[4]:values({batch},{heads},{length},{size}):int64)\n"
    else:
        text += f"a = attention({operands})\n"
    text += f"j = transpose(a, perm={swap})\ny = reshape(j, J[3]:values({outer[0]},{outer[1]},{width}):int64)"
    graph = build(dialect, text)
    before = outputs(graph)
    raise_heads(graph)
    graph.sweep()
    kinds = collections.Counter(node.kind for node in graph.nodes)
    assert kinds["attention"] == 1 and kinds["linear"] == 3 and kinds["softmax"] == 0
    torch.testing.assert_close(outputs(graph), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["8", "4,8"])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_norm_over_more_than_the_width_keeps_its_axes(where: str, shape: str, dialect: str) -> None:
    """Length and batch are equal, so that a norm over the wrong one of them has the same shapes."""
    norm = f"layer_norm({{}}, G[{shape}]:seed1, H[{shape}]:seed2)"
    text = f"""
        x2 = {norm.format("x[4,4,8]") if where == "before" else "relu(x[4,4,8])"}
        p = linear(x2, W[24,8], B[24])
        r = reshape(p, R[5]:values(4,4,3,2,4):int64)
        t = transpose(r, perm=[2,1,3,0,4])
        {TAKEN}
        j = reshape(transpose(attention(q, k, v), perm=[2,0,1,3]), J[3]:values(4,4,8):int64)
        y = linear({norm.format("j") if where == "behind" else "j"}, V[8,8])
    """
    graph = build(dialect, text)
    before = outputs(graph)
    raise_heads(graph)
    graph.sweep()
    assert len(graph.sites("linear")) == 4
    torch.testing.assert_close(outputs(graph), before, rtol=1e-4, atol=1e-5)
