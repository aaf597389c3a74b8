"""Groups of axes that shrink together: what they are, what locks them, and that both dialects find the same."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.analysis.groups import Group, components, groups
from graphopt.analysis.relations import relate
from graphopt.capture.sources import capture
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.axes import reshape_blocks
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.passes import Prune, Simplify
from graphopt.passes.prune.prune import OF_AMOUNT
from tests import models
from tests.language import build, run

# --- architectures -------------------------------------------------------------------------------------------------


class Mobile(nn.Module):
    """Depthwise conv, squeeze and excitation, a residual add, and a flatten into a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.depthwise = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.pool, self.head = nn.Conv2d(16, 8, 1), nn.MaxPool2d(4), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        y = F.relu6(self.depthwise(F.leaky_relu(self.expand(x))))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = self.head(self.pool(x + self.project(y)).flatten(1))
        return x


class Dense(nn.Module):
    """Concatenated features, a group norm, a grouped conv, a channel shuffle and a split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.mix, self.norm, self.grouped = nn.Conv2d(12, 16, 1), nn.GroupNorm(8, 16), nn.Conv2d(16, 8, 1, groups=4)
        self.left, self.right, self.head = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.grow(x))], 1)
        x = F.relu(self.grouped(F.relu(self.norm(self.mix(x)))))
        left, right = x.chunk(2, 1)
        x = self.head((F.relu(self.left(left)) + self.right(F.pad(right, [1, 1, 1, 1])[:, :, 1:-1, 1:-1])).mean((2, 3)))
        return x


class Spelled(nn.Module):
    """Attention by matmul and softmax, of a fused projection split into (3, heads, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.out = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(torch.tanh(self.inner(x))).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        heads = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, -1) @ value
        y: Tensor = self.out(heads.transpose(1, 2).reshape(*x.shape[:2], 32))
        return y


class Grouped(nn.Module):
    """Attention whose key heads are repeated for the queries that read them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 32), nn.Linear(6, 16), nn.Linear(6, 16)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        heads = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.out(heads.transpose(1, 2).reshape(*x.shape[:2], 32))
        return y


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    return models.seeded(transformers.LlamaForCausalLM, config)


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    return models.seeded(transformers.ViTForImageClassification, config)


def output(name: str) -> Decline:
    return Decline("axis_of_output", output=name)


Found = dict[str, tuple[str, int]]
"""Kind and size of each group that can shrink, by name."""

ARCHITECTURES: dict[str, tuple[Any, dict[str, Tensor], Found, dict[str, Decline]]] = {
    "encoder": (
        lambda: models.seeded(models.Encoder, 1),
        {"ids": models.tokens(), "mask": models.padding()},
        {"layers.0.attention.query": ("heads", 4), "layers.0.up": ("neurons", 64)},
        {"embedding": output("output")},
    ),
    "bert": (
        lambda: models.bert(1),
        {"input_ids": models.tokens(), "attention_mask": models.padding()},
        {"encoder.layer.0.attention.self.query": ("heads", 4), "encoder.layer.0.intermediate.dense": ("neurons", 64)},
        {"embeddings.word_embeddings": output("last_hidden_state"),
         "pooler.dense": output("pooler_output")},
    ),
    "gpt2": (
        models.gpt2,
        {"input_ids": models.tokens()},
        {"transformer.wte": ("width", 32),
         "transformer.h.0.attn.c_attn": ("heads", 4), "transformer.h.0.mlp.c_fc": ("neurons", 128),
         "transformer.h.1.attn.c_attn": ("heads", 4), "transformer.h.1.mlp.c_fc": ("neurons", 128)},
        {"lm_head": output("logits")},
    ),
    "llama": (
        llama,
        {"input_ids": models.tokens()},
        {"model.embed_tokens": ("width", 48), "model.layers.0.self_attn.q_proj": ("heads", 3),
         "model.layers.0.mlp.gate_proj": ("neurons", 64)},
        {"lm_head": output("logits")},
    ),
    "vit": (
        vit,
        {"pixel_values": models.images()},
        {"vit.embeddings.patch_embeddings.projection": ("width", 32),
         "vit.layers.0.attention.q_proj": ("heads", 4), "vit.layers.0.mlp.fc1": ("neurons", 64)},
        {"classifier": output("logits")},
    ),
    "convnet": (
        lambda: models.seeded(models.ConvNet),
        {"x": models.images()},
        {"stem": ("channels", 8), "conv1": ("channels", 8)},
        {"head": output("output")},
    ),
    "mobile": (
        lambda: models.seeded(Mobile),
        {"x": models.images()},
        {"stem": ("channels", 8), "expand": ("channels", 16), "squeeze": ("channels", 4)},
        {"head": output("output")},
    ),
    "dense": (
        lambda: models.seeded(Dense),
        {"x": models.images()},
        {"stem": ("channels", 8), "grow": ("channels", 4), "mix": ("channels", 4), "left": ("channels", 6)},
        {"head": output("output")},
    ),
    "spelled": (
        lambda: models.seeded(Spelled),
        {"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))},
        {"inner": ("neurons", 32), "qkv": ("heads", 4)},
        {"out": output("output")},
    ),
    "grouped": (
        lambda: models.seeded(Grouped),
        {"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))},
        {"query": ("heads", 2)},
        {"out": output("output")},
    ),
}  # fmt: skip


@cache
def architecture(name: str) -> nn.Module:
    module: nn.Module = ARCHITECTURES[name][0]()
    return module


@cache
def captured(name: str, dialect: str) -> Graph:
    """The simplified graph of an architecture, axis 0 of its inputs dynamic; clone it before a change."""
    graph = capture(architecture(name), dialect, example_inputs=ARCHITECTURES[name][1]).graph
    run(Simplify(), graph)
    return graph


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_amount_fits_every_architecture(name: str, dialect: str) -> None:
    """All groups of the kinds that it names shrink, and no other does; a kind that is not there is named in a note."""
    graph = captured(name, dialect).clone()
    found = [group for group in groups(graph) if group.locked is None]
    named = [group for group in found if group.kind in OF_AMOUNT]
    left = {site.path: Fraction(-(-group.size // 2), group.size) for group in named for site in group.producers}
    rows = {site.path: site.weight.shape[0] for site in graph.sites("linear", "conv") if site.weight is not None}
    notes = run(Prune(amount=0.5, round_to=1), graph).record.notes
    for site in graph.sites("linear", "conv"):
        if site.weight is not None:
            assert site.weight.shape[0] == rows[site.path] * left.get(site.path, 1)
    absent = {note.split(":")[0] for note in notes if note.endswith(": no group that may be cut")}
    assert absent == set(OF_AMOUNT) - {group.kind for group in named}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_the_groups_of_an_architecture(name: str, dialect: str) -> None:
    found = groups(captured(name, dialect))
    _, _, expected, locked = ARCHITECTURES[name]
    assert {g.name: (g.kind, g.size) for g in found if g.locked is None} == expected
    assert {g.name: g.locked for g in found if g.locked is not None} == locked


def test_both_dialects_name_the_same_sites() -> None:
    def sites(group: Group) -> tuple[Any, ...]:
        members = (group.producers, group.consumers, group.reductions)
        return group.name, *(sorted({node.path for node in nodes}) for nodes in members)

    for name in ("bert", "gpt2", "mobile"):
        fx, onnx = (groups(captured(name, dialect)) for dialect in ("fx", "onnx"))
        assert list(map(sites, fx)) == list(map(sites, onnx))


# --- one thing at a time -------------------------------------------------------------------------------------------


def kinds(text: str, dialect: str) -> list[tuple[str, int, Decline | None]]:
    return [(group.kind, group.size, group.locked) for group in groups(build(dialect, text))]


def test_a_chain_has_a_group_between_its_linears(dialect: str) -> None:
    text = "y = linear(relu(linear(x[batch,8], A[6,8], B[6])), C[5,6])"
    graph = build(dialect, text)
    inner, outer = groups(graph)
    first, last = graph.sites("linear")
    assert (inner.kind, inner.size, inner.locked) == ("neurons", 6, None)
    assert inner.producers == (first,) and inner.consumers == (last,) and inner.reductions == ()
    axes = {(axis.value, axis.axis): axis.units.tolist() for axis in inner.axes}
    assert axes == {
        (value, axis): [0, 1, 2, 3, 4, 5]
        for value, axis in (
            (first.required("weight"), 0), (first.required("bias"), 0), (first.result, 1),
            (last.input, 1), (last.required("weight"), 1),
        )
    }  # fmt: skip
    assert outer.locked == output("y")


UNKNOWN = {"fx": "aten.flip.default(h, dims=[1])", "onnx": "onnx.LpNormalization(h)"}


def test_names_the_operation_that_is_not_known(dialect: str) -> None:
    graph = build(dialect, f"h = linear(x[2,8], A[6,8])\ny = linear({UNKNOWN[dialect]}, C[5,6])")
    node = next(node for node in graph.nodes if "." in node.kind)
    assert groups(graph)[0].locked == Decline("axis_at_unknown_operation", op=node.kind, node=node.label)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("y = linear(softmax(linear(x[2,8], A[6,8])), C[5,6])", "axis_normalized"),
        ("y = linear(reshape(linear(x[batch,8], A[8,8]), S[2]:values(-1,4):int64), C[5,4])", "axis_split_or_merged"),
        ("y = add(linear(x[2,8], A[6,8]), z[2,6])", "axis_of_input"),
        ("y = linear(linear(x[2,8], A[1,8]), C[5,1])", "axis_of_one_unit"),
    ],
)
def test_says_why_a_group_is_locked(text: str, code: str, dialect: str) -> None:
    locked = kinds(text, dialect)[0][2]
    assert locked is not None and locked.code == code


def test_a_residual_width_is_one_group(dialect: str) -> None:
    found = kinds(
        "h = embedding(T[9,8], ids[batch,seq]:int64)\n"
        "n = layer_norm(h, G[8], B[8])\n"
        "h2 = add(h, linear(gelu(linear(n, U[12,8])), D[8,12]))\n"
        "y = linear(rms_norm(h2, R[8]), H[5,8])",
        dialect,
    )
    assert found == [("width", 8, None), ("neurons", 12, None), ("neurons", 5, output("y"))]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("h = slice(x[2,5,8], axis=1, start=4, end=5)\np = squeeze(h, axes=[1])", "pooler"),
        ("h = slice(x[2,5,8], axis=1, start=0, end=1)\np = layer_norm(relu(linear(h, A[8,8])), G[8], C[8])", "pooler"),
        ("p = slice(x[2,5,8], axis=1, start=0, end=2)", "neurons"),
        ("p = mean(x[2,5,8], axes=[1], keepdim=False)", "neurons"),
        ("p = relu(x[2,5,8])", "neurons"),
    ],
)
def test_a_pooler_reads_one_position_of_a_sequence(text: str, kind: str, dialect: str) -> None:
    graph = build(dialect, f"{text}\nq = relu(linear(p, W[16,8]))\ny = linear(q, V[3,16])")
    assert [group.kind for group in groups(graph) if group.size == 16] == [kind]


def test_a_tied_embedding_joins_what_it_ties(dialect: str) -> None:
    graph = build(dialect, "h = embedding(T[9,8], ids[batch,seq]:int64)\ny = linear(tanh(h), T)")
    width, vocabulary = groups(graph)
    assert width.locked is None and width.size == 8
    assert [axis.axis for axis in width.axes if axis.value.is_constant] == [1]
    assert vocabulary.locked == output("y")


def test_key_heads_go_with_the_queries_that_read_them(dialect: str) -> None:
    text = (
        "h = attention(linear(x[2,5,8], Q[24,8]), linear(x, K[12,8]), linear(x, V[12,8]), heads=6, kv_heads=3)\n"
        "y = linear(h, O[5,24])"
    )
    if dialect == "fx":  # which spells the heads out with reshapes
        assert kinds(text, dialect)[0] == ("heads", 3, None)
        return
    graph = build(dialect, text)
    heads = groups(graph)[0]
    units = {axis.value: axis.units.tolist() for axis in heads.axes}
    query, key, value, _ = graph.sites("linear")
    assert (heads.kind, heads.size) == ("heads", 3) and heads.producers == (query, key, value)
    assert units[query.result] == [unit for unit in range(3) for _ in range(8)]
    assert units[key.result] == [unit for unit in range(3) for _ in range(4)]


CUMSUM = {"fx": "aten.cumsum.default(h, dim=1)", "onnx": "onnx.CumSum(h, A[1]:values(1):int64)"}


def test_a_cumulative_sum_mixes_the_axis_it_is_told(dialect: str) -> None:
    """In ONNX that is an operand, which may as well be computed."""
    text = f"h = linear(x[2,8], W[6,8])\ny = linear({CUMSUM[dialect]}, C[5,6])"
    locked = kinds(text, dialect)[0][2]
    assert locked is not None and locked.code == "axis_summed_up"
    text = text.replace("dim=1", "dim=0").replace("values(1)", "values(0)")
    assert kinds(text, dialect)[0] == ("neurons", 6, None)


def test_a_cumulative_sum_along_a_computed_axis_is_unclear() -> None:
    text = "y = linear(onnx.CumSum(linear(x[2,8], W[6,8]), axis[1]:int64), C[5,6])"
    locked = kinds(text, "onnx")[0][2]
    assert locked is not None and locked.code == "axis_that_is_computed"


@pytest.mark.parametrize(
    "text",
    [
        "y = linear(matmul(matmul(h, transpose(h, perm=[0,2,1])), h), C[5,6])",
        "y = linear(matmul(linear(x, B[6,8]), transpose(h, perm=[0,2,1])), C[5,3])",
    ],
)
def test_a_product_of_computed_values_sums_over_the_units(text: str, dialect: str) -> None:
    """So that to zero the consumers' weights is not what to remove units is."""
    graph = build(dialect, f"h = linear(x[2,3,8], A[6,8])\n{text}")
    group = groups(graph)[0]
    assert (group.kind, group.size, group.locked) == ("neurons", 6, None)
    assert "matmul" in {node.kind for node in group.reductions}


def test_a_product_with_a_weight_sums_over_no_units_but_its_own(dialect: str) -> None:
    weight = "dequantize(W[6,5]:int8, S[6]:ones, axis=0)"
    graph = build(dialect, f"y = matmul(relu(linear(x[2,3,8], A[6,8])), {weight})")
    assert [(group.size, group.locked, group.reductions) for group in groups(graph)] == [(6, None, ())]


def test_heads_that_are_locked_are_called_heads(dialect: str) -> None:
    """Though the reshape that splits them carries no units then."""
    split = "transpose(reshape(linear(x, {}[24,8]), {}[4]:values(2,5,{}):int64), perm=[0,2,1,3])"
    graph = build(
        dialect,
        f"q = {split.format('Q', 'S', '6,4').replace('x,', 'x[2,5,8],')}\n"
        f"k = {split.format('K', 'T', '6,4')}\nv = {split.format('V', 'U', '6,4')}\n"
        "h = attention(q, k, v)\ny = linear(reshape(transpose(h, perm=[0,2,1,3]), R[3]:values(2,5,24):int64), O[5,24])"
        "\nreturn y, k",
    )
    heads = groups(graph)[:-1]
    assert [(group.kind, group.locked) for group in heads] == [("heads", output("k"))] * len(heads)
    assert sum(len(group.producers) for group in heads) == 3


def test_values_of_a_subgraph_are_locked() -> None:
    model = models.model(
        "g (float[2,8] x, bool c) => (float[2,6] y) { h = MatMul(x, A)"
        " y = If (c) <then_branch = t () => (float[2,6] a) { a = Relu(h) },"
        " else_branch = e () => (float[2,6] b) { b = Neg(h) }> }",
        {"A": torch.randn(8, 6)},
    )
    graph = OnnxGraph.from_model(model)
    locks = [reason for _, reason in relate(graph).locks]
    assert "onnx.If" in [reason.values["op"] for reason in locks if reason.code == "axis_read_in_subgraph"]


# --- the parts -----------------------------------------------------------------------------------------------------


def test_components_equal_those_of_a_search() -> None:
    draw = np.random.default_rng(0)
    for count, edges in ((1, 0), (50, 20), (200, 190), (300, 900)):
        a, b = draw.integers(0, count, (2, edges))
        neighbours: list[set[int]] = [set() for _ in range(count)]
        for i, j in zip(a, b, strict=True):
            neighbours[i].add(int(j))
            neighbours[j].add(int(i))
        expected = [-1] * count
        for start in range(count):
            waiting = [start] if expected[start] < 0 else []
            while waiting:
                item = waiting.pop()
                expected[item] = start
                waiting += [other for other in neighbours[item] if expected[other] < 0]
        assert components(count, a, b).tolist() == expected


def test_components_of_a_long_chain_take_few_rounds() -> None:
    order = np.random.default_rng(0).permutation(200_000)
    assert not components(len(order), order[:-1], order[1:]).any()


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (("b", "s", 32), ("b", "s", 4, 8), [([2], [2, 3]), ([0], [0]), ([1], [1])]),
        (("b", "s", 32), ("b*s", 32), [([2], [1]), ([0, 1], [0])]),
        ((2, 8, 3, 3), (2, 72), [([1, 2, 3], [1]), ([0], [0])]),
        (("b", 6, 4, 4), ("b", 3, 2, 16), [([2, 3], [3]), ([1], [1, 2]), ([0], [0])]),
        (("?", 8, "?"), ("?", 4, 2, "?"), [([0, 1, 2], [0, 1, 2, 3])]),
        (("n", 8, "h", "w"), ("n", 8, "h*w"), [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        (("n", 4, "t", 8), ("4*n", "t", 8), [([3], [2]), ([0, 1, 2], [0, 1])]),
        (("?", 8), ("?", 2, 4), [([1], [1, 2]), ([0], [0])]),
    ],
)
def test_reshapes_split_into_blocks(left: Any, right: Any, expected: Any) -> None:
    assert list(reshape_blocks(left, right)) == expected


def test_work_grows_linearly_with_depth() -> None:
    def work(layers: int) -> tuple[int, int]:
        lines = ["h0 = relu(x[batch,16])"]
        lines += [f"h{i + 1} = add(h{i}, linear(relu(linear(h{i}, A{i}[32,16])), B{i}[16,32]))" for i in range(layers)]
        relations = relate(build("onnx", "\n".join(lines)))
        return relations.count, sum(len(positions) for positions, _ in relations.links)

    few, some, many = work(4), work(8), work(16)
    assert [(c - b) for b, c in zip(some, many, strict=True)] == [2 * (b - a) for a, b in zip(few, some, strict=True)]
