"""Cutting groups: the smaller graph computes what the original does with the consumers' weights for the rest zeroed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from graphopt.analysis.groups import Group, groups
from graphopt.analysis.shrink import shrink
from graphopt.capture.sources import capture
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.graph import Graph
from graphopt.numerics.metrics import within_tolerance
from graphopt.passes import Simplify
from tests import models
from tests.analysis.test_groups import ARCHITECTURES, architecture, captured
from tests.language import build, feeds, outputs, run


def three_quarters(group: Group, seed: int = 0) -> Tensor:
    """A random three quarters of its units, one less at least."""
    count = min(group.size - 1, round(group.size * 0.75))
    return torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def removed(group: Group, keep: Tensor, weight: Any, axis: int) -> Tensor:
    """The positions along an axis of a weight of the graph that belong to units outside `keep`."""
    units = next(one.units for one in group.axes if one.value == weight and one.axis == axis)
    return ~torch.isin(units, torch.cat([keep, torch.tensor([-1])]))


def results_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        returned = module(**inputs)
    found = [returned] if isinstance(returned, Tensor) else list(returned.values())
    return [value for value in found if isinstance(value, Tensor)]


# --- architectures, held to torch ----------------------------------------------------------------------------------


def zeroed(module: nn.Module, group: Group, keep: Tensor) -> nn.Module:
    """The module with the columns of the group's consumers that read removed units set to zero."""
    module = copy.deepcopy(module)
    for consumer in group.consumers:
        inner: Any = module.get_submodule(consumer.path)
        gone = removed(group, keep, consumer.required("weight"), 1)
        weight = inner.weight.data
        (weight.mT if type(inner).__name__ == "Conv1D" else weight)[:, gone] = 0  # transformers' is stored (in, out)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cuts_each_group_alone(name: str, dialect: str) -> None:
    inputs, base = ARCHITECTURES[name][1], captured(name, dialect)
    cut = 0
    for index, listed in enumerate(groups(base)):
        if listed.locked is not None:
            continue
        graph = base.clone()
        group = groups(graph)[index]
        keep = three_quarters(group)
        expected = results_of(zeroed(architecture(name), group, keep), inputs)
        before = sum(tensor.numel() for _, tensor in graph.constants())
        shrink(graph, {group: keep})
        graph.verify()
        assert sum(tensor.numel() for _, tensor in graph.constants()) < before
        found = outputs(graph, inputs)
        if not group.reductions:  # what is normalized over fewer entries is something else
            assert all(within_tolerance(a, b) for a, b in zip(expected, found, strict=True)), group.name
        assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
        again = next((one for one in groups(graph) if one.name == group.name and one.locked is None), None)
        assert again is None or again.size == len(keep) or group.kind == "heads"
        cut += 1
    assert cut == len(ARCHITECTURES[name][2])


LONG = {"llama", "gpt2", "encoder", "unshuffle", "unbind", "gate", "doubled", "shuffle", "reflected", "channel pad"}
"""Architectures and operations that take seconds each, and whose kind others of the list stand for."""


def marked(cases: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Cases of a parametrized test, which end with their name; those of `LONG` are marked slow."""
    return (pytest.param(*case, marks=[pytest.mark.slow] if case[-1] in LONG else []) for case in cases)


@pytest.mark.parametrize("name", marked((name,) for name in ARCHITECTURES))
def test_cuts_all_groups_at_once(name: str, dialect: str) -> None:
    inputs, graph = ARCHITECTURES[name][1], captured(name, dialect).clone()
    expected = [tensor.shape for tensor in outputs(graph, inputs)]
    shrink(graph, {group: three_quarters(group) for group in groups(graph) if group.locked is None})
    graph.verify()
    wanted = [(value, value.shape) for node in graph.nodes for value in node.results if value.shape]
    found = graph.evaluate(inputs, [value for value, _ in wanted])
    assert [tensor.shape for tensor in outputs(graph, inputs)] == expected
    for (value, shape), tensor in zip(wanted, found, strict=True):  # what the graph says of shapes is so
        sizes = zip(shape or (), tensor.shape, strict=True)
        assert all(size == number for size, number in sizes if isinstance(size, int)), value.name


class Stream(nn.Module):
    """A residual stream of a width that is free, with norms, a pair of linears and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(models.VOCABULARY, width), nn.Parameter(torch.randn(7, width))
        self.first, self.last = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
        self.up, self.down, self.head = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place
        x = x + self.down(F.gelu(self.up(self.first(x))))
        y: Tensor = self.head(self.last(x))
        return y


def test_a_width_cut_equals_the_module_built_smaller(dialect: str) -> None:
    module, ids = models.seeded(Stream, 16), models.tokens()
    graph = capture(module, dialect, example_inputs={"ids": ids}).graph
    width = groups(graph)[0]
    keep = three_quarters(width)
    small = Stream(len(keep)).eval()
    for (name, target), source in zip(small.named_parameters(), module.parameters(), strict=True):
        left = source.data
        for axis in range(left.dim()):
            if left.shape[axis] == 16:
                left = left.index_select(axis, keep)
        assert target.shape == left.shape, name
        target.data = left
    assert (width.kind, width.size, len(width.reductions)) == ("width", 16, 2)
    shrink(graph, {width: keep})
    assert all(map(within_tolerance, results_of(small, {"ids": ids}), outputs(graph, {"ids": ids})))


def test_paths_stay(dialect: str) -> None:
    graph = captured("gpt2", dialect).clone()
    paths = {node.path for node in graph.nodes if node.op is not None}
    shrink(graph, {group: three_quarters(group) for group in groups(graph) if group.locked is None})
    assert {node.path for node in graph.nodes if node.op is not None} == paths


# --- one operation between two sites, held to torch ------------------------------------------------------------------


class Between(nn.Module):
    """A site, an operation, and a site that reads what it makes: convs for an image, linears for a sequence."""

    def __init__(self, operation: Callable[[Tensor], Tensor], image: bool) -> None:
        super().__init__()
        self.operation, self.first = operation, nn.Conv2d(3, 16, 1) if image else nn.Linear(8, 16)
        with torch.no_grad():
            made = operation(self.first(between(image)))
        self.last = nn.Conv2d(made.shape[1], 4, 1) if image else nn.Linear(made.shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.operation(self.first(x)))
        return y


def between(image: bool) -> Tensor:
    return torch.randn((2, 3, 8, 8) if image else (2, 5, 8), generator=torch.Generator().manual_seed(0))


def affine(norm: nn.Module) -> nn.Module:
    """A norm whose parameters tell its channels apart."""
    for parameter in norm.parameters():
        parameter.data = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    return norm


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    left, right = x.chunk(2, 1)
    return left, right


IMAGES: dict[str, tuple[Callable[[Tensor], Tensor], int | str]] = {
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), 4),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 16),
    "channel shuffle": (lambda x: x.view(-1, 4, 4, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8), 4),
    "glu": (lambda x: F.glu(x, 1), 8),
    "instance norm": (affine(nn.InstanceNorm2d(16, affine=True)), 16),
    "group norm": (affine(nn.GroupNorm(4, 16)), 4),
    "prelu": (affine(nn.PReLU(16)), 16),
    "channel pad": (lambda x: F.pad(x, (0, 0, 0, 0, 4, 4)), 16),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 16),
    "doubled": (lambda x: torch.cat([x, torch.relu(x)], 1), 16),
    "reversed halves": (lambda x: torch.cat([x[:, 8:], x[:, :8]], 1), 16),
    "gate": (lambda x: halves(x)[0] * halves(x)[1].sigmoid(), 8),
    "maxout": (lambda x: x.view(-1, 8, 2, 8, 8).amax(2), 8),
    "order": (lambda x: x.index_select(1, torch.tensor([3, 1, 0, 2, 5, 4, 7, 6])), 16),
    "stack": (lambda x: torch.stack([x, 2 * x], 1).mean(1), 16),
    "unbind": (lambda x: torch.stack([x, x.relu()], -1).unbind(-1)[1], 16),
    "interleaved": (lambda x: x.repeat_interleave(2, 1), 16),
    "roll in space": (lambda x: x.roll(1, 2), 16),
    "roll": (lambda x: x.roll(1, 1), "axis_"),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), "axis_repeated"),
    "cumsum": (lambda x: x.cumsum(1), "axis_summed_up"),
    "cumsum in space": (lambda x: x.cumsum(2), 16),
    "softmax": (lambda x: x.softmax(1), "axis_normalized"),
}
SEQUENCES: dict[str, tuple[Callable[[Tensor], Tensor], int | str]] = {
    "cumsum in time": (lambda x: x.cumsum(1), 16),
    "softmax in time": (lambda x: x.transpose(1, 2).softmax(-1).transpose(1, 2), 16),
    "glu": (lambda x: F.glu(x), 8),
    "padded in time": (lambda x: F.pad(x.mT, (1, 1), mode="reflect").mT, 16),
}
NO_SHAPES = {
    "unshuffle": "axis_split_or_merged",
    "roll in space": "axis_meets_another_size",
}
"""What the exporter to ONNX spells out without fixed shapes, and the code of the lock that it meets there."""


@pytest.mark.parametrize(
    ("image", "name"), marked([*((True, name) for name in IMAGES), *((False, name) for name in SEQUENCES)])
)
def test_follows_channels_through_an_operation(image: bool, name: str, dialect: str) -> None:
    """To its consumer, cutting as many units as expected, or up to the lock that is expected."""
    operation, expected = (IMAGES if image else SEQUENCES)[name]
    if dialect == "onnx":
        expected = NO_SHAPES.get(name, expected)
    module, x = models.seeded(Between, operation, image), between(image)
    graph = capture(module, dialect, example_inputs={"x": x}).graph
    run(Simplify(), graph)
    group = next(one for one in groups(graph) if one.name == "first")
    if isinstance(expected, str):
        assert group.locked is not None and group.locked.code.startswith(expected)
        return
    keep = three_quarters(group)
    assert (group.locked, group.size, group.reductions) == (None, expected, ())
    assert [consumer.path for consumer in group.consumers] == ["last"]
    reference = results_of(zeroed(module, group, keep), {"x": x})
    shrink(graph, {group: keep})
    graph.verify()
    assert all(map(within_tolerance, reference, outputs(graph, {"x": x})))


class Kept(nn.Module):
    """`Between` of what is left of its units, built smaller: a norm over fewer entries is another norm."""

    def __init__(self, module: Between, keep: Tensor) -> None:
        super().__init__()
        self.module, self.keep = module, keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.module.operation(self.module.first(x)[..., self.keep])
        return F.linear(y, self.module.last.weight[:, self.keep], self.module.last.bias)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "unit length": lambda x: F.normalize(x, dim=-1),
    "standard deviation": lambda x: x / x.std(-1, keepdim=True, correction=0),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "product": lambda x: (x @ x.mT) @ x,
}


@pytest.mark.parametrize("name", NORMS)
def test_names_what_sums_over_the_units_that_it_cuts(name: str, dialect: str) -> None:
    torch.manual_seed(0)
    module, x = Between(NORMS[name], image=False).eval(), between(False)
    graph = capture(module, dialect, example_inputs={"x": x}).graph
    run(Simplify(), graph)
    group = next(one for one in groups(graph) if one.name == "first")
    keep = three_quarters(group)
    assert (group.locked, group.size) == (None, 16) and group.reductions
    shrink(graph, {group: keep})
    graph.verify()
    assert all(map(within_tolerance, results_of(Kept(module, keep), {"x": x}), outputs(graph, {"x": x})))


# --- ops ---------------------------------------------------------------------------------------------------------

OPS = {
    "grouped-conv": "h = conv(relu(conv(x[2,4,6,6], A[8,4,1,1])), B[12,2,3,3], D[12], groups=4)\n"
    "y = linear(mean(h, axes=[2,3], keepdim=False), C[5,12])",
    "grouped-conv-of-many-channels": "h = conv(relu(conv(x[2,4,6,6], A[12,4,1,1])), B[18,6,3,3], D[18], groups=2)\n"
    "y = linear(mean(h, axes=[2,3], keepdim=False), C[5,18])",
    "shuffle": "h = relu(conv(x[2,4,3,3], A[12,4,1,1]))\n"
    "s = transpose(reshape(h, S[5]:values(2,2,6,3,3):int64), perm=[0,2,1,3,4])\n"
    "y = linear(mean(conv(reshape(s, R[4]:values(2,12,3,3):int64), B[5,12,1,1]), axes=[2,3], keepdim=False), C[5,5])",
    "shuffled-groups": "h = relu(conv(conv(x[2,4,3,3], A[16,4,1,1]), G[16,8,1,1], groups=2))\n"
    "s = transpose(reshape(h, S[5]:values(2,2,8,3,3):int64), perm=[0,2,1,3,4])\n"
    "t = conv(reshape(s, R[4]:values(2,16,3,3):int64), H[24,8,1,1], groups=2)\n"
    "y = linear(mean(relu(t), axes=[2,3], keepdim=False), C[5,24])",
    "slices": "h = linear(x[2,8], A[12,8])\ny = add(linear(relu(slice(h, axis=1, start=0, end=6)), B[5,6]),"
    " linear(slice(h, axis=1, start=6, end=12), C[5,6]))",
    "concat": "y = linear(concat(linear(x[2,8], A[6,8]), z[2,3], linear(x, B[4,8]), axis=1), C[5,13])",
    "pad": "y = linear(mul(pad(linear(x[2,8], A[8,8]), padding=[0,2,0,2], value=1.0), linear(x, B[12,8])), C[5,12])",
    "fold": "h = reshape(linear(x[2,3,8], A[12,8]), S[4]:values(2,3,4,3):int64)\n"
    "y = linear(reshape(transpose(h, perm=[0,1,3,2]), R[3]:values(2,3,12):int64), C[5,12])",
    "space": "y = linear(reshape(max_pool(conv(x[batch,3,4,4], A[6,3,1,1]), kernel=[2,2], stride=[2,2]),"
    " S[2]:values(-1,24):int64), C[5,24])",
    "attention": "q = linear(x[2,5,8], Q[24,8])\n"
    "y = linear(attention(q, linear(x, K[12,8]), linear(x, V[12,8]), heads=6, kv_heads=3), O[5,24])",
    "transposed-conv": "h = relu(conv(x[2,3,6,6], A[8,3,1,1]))\n"
    "y = conv(concat(conv_transpose(h, B[8,6,2,2], D[6], stride=[2,2]), z[2,3,12,12], axis=1), C[5,9,1,1])",
    "lstm": "h, a, b = lstm(x[5,2,3], A[1,24,3], B[1,24,6], D[1,48])\ny = linear(squeeze(h, axes=[1]), C[5,6])",
    "gru": "h, a = gru(x[5,2,3], A[1,18,3], B[1,18,6], D[1,36], -, linear(z[1,2,4], E[6,4]))\n"
    "y = linear(add(squeeze(h, axes=[1]), a), C[5,6])",
    "gru-reset-before": "h, a = gru(x[5,2,3], A[1,18,3], B[1,18,6], D[1,36], direction=reverse, reset_after=False)\n"
    "y = linear(squeeze(h, axes=[1]), C[5,6])",
    "layers": "h, a = rnn(x[5,2,3], A[2,6,3], B[2,6,6], direction=bidirectional, activation=relu)\n"
    "f = reshape(transpose(h, perm=[0,2,1,3]), S[3]:values(5,2,12):int64)\n"
    "i, b, c = lstm(f, E[2,24,12], F[2,24,6], G[2,48], direction=bidirectional)\n"
    "y = linear(reshape(transpose(i, perm=[0,2,1,3]), S), C[5,12])",
    "quantized": "y = linear(linear(x[2,8], dequantize(A[8,8]:int8, S[8]:ones, axis=0), B[8]), C[5,8])",
}


def zeroed_graph(graph: Graph, group: Group, keep: Tensor) -> None:
    """Set the consumers' weights for removed units to zero, in the graph."""
    for consumer in group.consumers:
        operands = list(consumer.operands)
        for place, axis in READ.get(consumer.kind, {1: 1}).items():
            weight = operands[place]
            tensor = None if weight is None else graph.constant(weight)
            assert weight is not None and tensor is not None
            if any((one.value, one.axis) == (weight, axis) for one in group.axes):
                tensor = tensor.clone()
                tensor.movedim(axis, 0)[removed(group, keep, weight, axis)] = 0
                operands[place] = graph.add_constant(tensor)
        graph.replace(consumer, *graph.emit_all(consumer.kind, *operands, at=consumer, **consumer.attributes))


READ = {"conv_transpose": {1: 0}, **{op: {1: 2, 2: 2} for op in ("lstm", "gru", "rnn")}}
"""By op, the operands that are weights, and the axis of each that reads the inputs."""


@pytest.mark.parametrize("name", OPS)
def test_cuts_what_ops_join(name: str, dialect: str) -> None:
    cut = 0
    for index, listed in enumerate(groups(build(dialect, OPS[name]))):
        if listed.locked is None:
            graph, reference = build(dialect, OPS[name]), build(dialect, OPS[name])
            keep = three_quarters(listed, seed=2)
            shrink(graph, {groups(graph)[index]: keep})
            graph.verify()
            zeroed_graph(reference, groups(reference)[index], keep)
            assert all(map(within_tolerance, outputs(reference, feeds(graph)), outputs(graph))), listed.name
            cut += 1
    assert cut


@pytest.mark.parametrize(
    ("name", "units"), [("grouped-conv", [4]), ("grouped-conv-of-many-channels", [6, 9]), ("shuffle", [6]),
                        ("shuffled-groups", [8, 4, 12])],
)  # fmt: skip
def test_units_of_groups_are_the_finer_ones(name: str, units: list[int], dialect: str) -> None:
    """Whole groups, or the same channel of each group; a shuffle takes a channel of each part."""
    found = [group for group in groups(build(dialect, OPS[name])) if group.kind == "channels"]
    assert [group.size for group in found if group.locked is None][: len(units)] == units


def test_units_of_a_state_that_is_an_input_stay(dialect: str) -> None:
    text = "h, a, b = lstm(x[5,2,3], A[1,24,3], B[1,24,6], D[1,48], -, s[1,2,6], t[1,2,6])\ny = squeeze(h, axes=[1])"
    (group,) = groups(build(dialect, text + "\nz = linear(y, C[5,6])\nreturn z"))[:1]
    assert group.locked is not None and group.locked.code == "axis_of_input"


# --- files, held to ONNX Runtime -------------------------------------------------------------------------------------

FILES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "group-norm": (
        "h = Conv(x, A) g = GroupNormalization<num_groups=4>(h, s, t) r = Relu(g) y = Conv(r, B)",
        {"A": (8, 4, 1, 1), "s": (8,), "t": (8,), "B": (5, 8, 1, 1)},
    ),
    "slice": (
        "h = Conv(x, A) p = Slice(h, starts, ends, axes) y = Conv(p, B)",
        {"A": (8, 4, 1, 1), "B": (5, 5, 1, 1)},
    ),
    "gather": ("h = Conv(x, A) p = Gather<axis=1>(h, order) y = Conv(p, B)", {"A": (8, 4, 1, 1), "B": (5, 6, 1, 1)}),
    "split": (
        "h = Conv(x, A) p, q = Split<axis=1>(h, parts) r = Concat<axis=1>(q, p) y = Conv(r, B)",
        {"A": (8, 4, 1, 1), "B": (5, 8, 1, 1)},
    ),
    "resize": (
        "h = Conv(x, A) p = Resize<mode=\"nearest\">(h, , , sizes) y = Conv(p, B)",
        {"A": (8, 4, 1, 1), "B": (5, 8, 1, 1)},
    ),
    "depth": ("h = Conv(x, A) p = DepthToSpace<blocksize=2>(h) y = Conv(p, B)", {"A": (8, 4, 1, 1), "B": (5, 2, 1, 1)}),
    "depth in rows": (
        "h = Conv(x, A) p = DepthToSpace<blocksize=2, mode=\"CRD\">(h) y = Conv(p, B)",
        {"A": (8, 4, 1, 1), "B": (5, 2, 1, 1)},
    ),
    "space": (
        "h = Conv(x, A) p = SpaceToDepth<blocksize=2>(h) y = Conv(p, B)",
        {"A": (8, 4, 1, 1), "B": (5, 32, 1, 1)},
    ),
    "deconv": (
        "h = ConvTranspose(x, A) p = Relu(h) y = Conv<auto_pad=\"SAME_UPPER\">(p, B)",
        {"A": (4, 8, 2, 2), "B": (5, 8, 1, 1)},
    ),
    "computed": (
        "h = Conv(x, A) n = Shape<start=0, end=1>(x) s = Concat<axis=0>(n, channels, rest) p = Reshape(h, s)"
        " t = Transpose<perm=[0, 2, 1]>(p) q = MatMul(t, C) y = Relu(q)",
        {"A": (8, 4, 1, 1), "C": (8, 5)},
    ),
}  # fmt: skip
INDICES = {
    "starts": [1, 1], "ends": [-2, 9], "axes": [1, 2], "order": [7, 0, 2, 2, -3, 1], "parts": [3, 5],
    "sizes": [2, 8, 9, 9], "channels": [8], "rest": [36],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_cuts_what_operators_of_files_join(name: str) -> None:
    text, shapes = FILES[name]
    draw = np.random.default_rng(0)
    tensors = {key: draw.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    tensors |= {key: np.array(value) for key, value in INDICES.items() if key in text}
    batch = 2 if name == "resize" else "batch"
    rank = 3 if name == "computed" else 4
    y = ", ".join(f"y{axis}" for axis in range(rank))
    model = models.model(f"g (float[{batch},4,6,6] x) => (float[{y}] y) {{ {text} }}", tensors)
    graph = OnnxGraph.from_model(model)
    group = next(one for one in groups(graph) if one.locked is None)
    keep = three_quarters(group)
    last = list(shapes)[-1]
    for consumer in group.consumers:
        axis = 0 if name == "computed" else 1
        gone = removed(group, keep, consumer.operands[1], 1).numpy()
        np.moveaxis(tensors[last], axis, 0)[gone] = 0
    for initializer in model.graph.initializer:
        if initializer.name == last:
            initializer.CopyFrom(numpy_helper.from_array(tensors[last], last))
    inputs = {"x": torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))}
    shrink(graph, {group: keep})
    graph.verify()
    assert group.consumers
    assert all(map(within_tolerance, models.plain_run(model, inputs), outputs(graph, inputs)))


# --- refusals ------------------------------------------------------------------------------------------------------

CHAIN = "y = linear(relu(linear(x[batch,8], A[6,8], B[6])), C[5,6])"


def test_keeping_all_changes_nothing(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    before, version = graph.text(), graph.version
    shrink(graph, {groups(graph)[0]: torch.arange(6)})
    assert (graph.text(), graph.version) == (before, version)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "would lose all of its 6 neurons"),
        ([2, 1], "must be sorted int64 in [0, 6)"),
        ([0, 0], "must be sorted int64 in [0, 6)"),
        ([4, 6], "must be sorted int64 in [0, 6)"),
    ],
)
def test_refuses_units_that_cannot_be_kept(units: list[int], message: str, dialect: str) -> None:
    graph = build(dialect, CHAIN)
    group = groups(graph)[0]
    with pytest.raises(ValueError) as error:
        shrink(graph, {group: torch.tensor(units, dtype=torch.int64)})
    assert message in str(error.value) and group.name in str(error.value)


def test_refuses_a_locked_group(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    with pytest.raises(ValueError, match=r"locked \(axis_of_output\) and cannot shrink"):
        shrink(graph, {groups(graph)[1]: torch.arange(2)})


def test_refuses_groups_of_the_graph_before_a_change(dialect: str) -> None:
    graph = build(dialect, CHAIN)
    group = groups(graph)[0]
    shrink(graph, {group: torch.arange(4)})
    with pytest.raises(ValueError, match="find its groups anew"):
        shrink(graph, {group: torch.arange(3)})


def test_refuses_to_empty_a_part(dialect: str) -> None:
    graph = build(dialect, OPS["slices"])
    before = graph.text()
    with pytest.raises(ValueError, match="would leave nothing of axis 1"):
        shrink(graph, {groups(graph)[0]: torch.arange(6)})
    assert graph.text() == before
