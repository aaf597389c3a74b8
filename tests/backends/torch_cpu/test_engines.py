"""The targets onednn, fbgemm and torch-cpu: ops lowered, fused, packed, counted, run, and refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import target
from graphopt.backends.torch_cpu import runner as eager_runner
from graphopt.backends.torch_cpu.base import EagerTarget, require_engines
from graphopt.backends.torch_cpu.runner import EagerRunner
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import GraphError, LoweringError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import OPS
from graphopt.ir.rewrite import RuleLog
from graphopt.measure import timing
from graphopt.measure.cache import Timings
from graphopt.measure.timing import Ratio, Ratios
from graphopt.numerics.metrics import sqnr
from graphopt.result import Optimized
from tests.language import BITS
from tests.models import ConvNet, bert, gpt2, images, padding, quantize_weight, seeded, tokens

TARGETS = ("onednn", "fbgemm", "torch-cpu")
QLINEAR, QLINEAR_ADD = "onednn.qlinear_pointwise.default", "onednn.qlinear_pointwise.binary"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def backend(name: str) -> EagerTarget:
    found = target(name)
    assert isinstance(found, EagerTarget)
    return found


class Ops:
    """A graph in the making: int8 ops on x[batch,3,8], with weights whose products saturate nowhere here."""

    def __init__(self, *, static: bool, shape: tuple[int | str, ...] = ("batch", 3, 8)) -> None:
        self.graph = FxGraph.empty({"x": (shape, torch.float32)})
        self.x, self.static = self.graph.inputs[0], static

    def numbers(self, scale: float, zero_point: int) -> tuple[Value, Value]:
        zero = torch.tensor(zero_point, dtype=torch.uint8)
        return self.graph.add_constant(torch.tensor(scale)), self.graph.add_constant(zero)

    def quantized(self, x: Value) -> tuple[Value, ...]:
        numbers = self.numbers(0.04, 120) if self.static else self.graph.emit_all("choose_qparams", x)
        return self.graph.emit("quantize", x, *numbers), *numbers

    def linear(self, steps: tuple[Value, ...], out: int, bias: bool = True, seed: int = 0) -> Value:
        shape = steps[0].shape
        assert shape is not None
        weight, scale = map(self.graph.add_constant, quantize_weight(normal(out, int(shape[-1]), seed=seed), bits=BITS))
        b = self.graph.add_constant(normal(out, seed=seed)) if bias else None
        return self.graph.emit("linear_int8", *steps, weight, scale, b)

    def done(self, **outputs: Value) -> FxGraph:
        self.graph.set_outputs(outputs)
        return self.graph


def compiled(name: str, graph: Graph, cpu: str | None = None) -> tuple[Graph, dict[str, RuleLog], EagerRunner]:
    on = type(backend(name))(cpu=cpu)
    low, logs = on.lower(graph)
    runner = on.compile(low)
    on.check(graph, runner)
    return low, logs, runner


def assert_runs_as_the_ops_mean(graph: Graph, low: Graph, runner: EagerRunner, feeds: Mapping[str, Tensor]) -> None:
    expected, found = graph.evaluate(feeds, graph.outputs), runner(feeds)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if one.is_floating_point():
            # fbgemm chooses a zero point that may be one away from ONNX's formula: half a step on each product
            assert sqnr(one, other) > 35
        else:
            assert (one.int() - other.int()).abs().max() <= 1
    at_once = low.evaluate(feeds, low.outputs)
    torch.testing.assert_close(at_once, found, rtol=1e-6, atol=1e-6)


# --- linears -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("op", ["relu", "gelu", "gelu tanh", "silu", "hard_swish", "tanh", "add", "none"])
def test_a_linear_with_what_stands_behind_it(name: str, static: bool, op: str) -> None:
    ops = Ops(static=static)
    y = ops.linear(ops.quantized(ops.x), 8)
    if op == "add":
        y = ops.graph.emit("add", ops.x, y)
    elif op != "none":
        kind, _, approximate = op.partition(" ")
        attributes: dict[str, Any] = {"approximate": approximate} if approximate else {}
        y = ops.graph.emit(kind, y, **attributes)
    graph = ops.done(y=y)
    low, logs, runner = compiled(name, graph)
    kernels = runner.kernels()
    if name == "fbgemm":
        assert sum(kernels.get(kernel, 0) for kernel in backend(name).int8_kernels) == 1
    else:
        assert kernels[QLINEAR_ADD if op == "add" else QLINEAR] == 1
        assert {"aten.gelu.default", "aten.silu.default", "aten.tanh.default"}.isdisjoint(kernels)
        assert sum(log.hits for log in logs.values()) == 1
    for batch in (1, 5):
        assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(batch, 3, 8)})


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("post", [None, "relu", "gelu"])
def test_a_static_chain_stays_in_integers(name: str, post: str | None) -> None:
    ops = Ops(static=True)
    y = ops.linear(ops.quantized(ops.x), 16)
    y = y if post is None else ops.graph.emit(post, y)
    numbers = ops.numbers(0.05, 3 if post == "relu" else 90)
    steps = ops.graph.emit("quantize", y, *numbers)
    graph = ops.done(y=ops.linear((steps, *numbers), 4))
    low, _, runner = compiled(name, graph)
    # fbgemm has no gelu, and the linear at the end quantizes by itself what it reads
    quantizes = 1 if name != "fbgemm" or post != "gelu" else 0
    assert runner.kernels().get("aten.quantize_per_tensor.default", 0) == quantizes
    assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(2, 3, 8)})


@pytest.mark.parametrize("name", TARGETS)
def test_linears_on_one_value_are_merged_and_sliced(name: str) -> None:
    ops = Ops(static=False)
    steps = ops.quantized(ops.x)
    outputs = {f"y{out}": ops.linear(steps, out, bias=out != 8, seed=out) for out in (5, 8, 16)}
    graph = ops.done(**outputs)
    low, logs, runner = compiled(name, graph)
    assert logs["merge-linears"].hits == 3 and len(runner.promised) == 1
    assert [node.kind for node in low.nodes].count("slice") == 3
    assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(2, 3, 8)})


def test_what_is_not_finite_shows() -> None:
    """NaN goes through as it does in floats."""
    ops = Ops(static=False)
    graph = ops.done(y=ops.linear(ops.quantized(ops.x), 8))
    _, _, runner = compiled("onednn", graph)
    x = normal(2, 3, 8)
    x[0, 0, 0] = torch.nan
    assert runner({"x": x})[0].isnan().all()


def test_a_linear_with_a_computed_weight_runs_in_floats_and_says_so() -> None:
    ops = Ops(static=True)
    y = ops.linear(ops.quantized(ops.x), 8)
    site = y.producer
    assert site is not None
    operands = list(site.operands)
    operands[5] = ops.graph.emit("relu", operands[5], at=site)
    graph = ops.done(y=ops.graph.emit("linear_int8", *operands))
    for name in ("onednn", "fbgemm"):
        low, logs, runner = compiled(name, graph)
        assert list(logs["linear"].declined.values()) == [Decline("linear_bias_computed")]
        assert logs["linear-in-float"].hits == 1 and runner.promised == []
        assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(2, 3, 8)})


# --- convs and adds ------------------------------------------------------------------------------------------------


MOST = 2 ** (BITS - 1) - 1


def conv_graph(rank: int, *, groups: int = 1, padding: tuple[int, ...] = (), most: int = MOST) -> FxGraph:
    sizes = (7, 6, 5)[:rank]
    ops = Ops(static=True, shape=("batch", 4, *sizes))
    steps = ops.quantized(ops.x)
    weight, scale = quantize_weight(normal(8, 4 // groups, *(3,) * rank))
    weight = weight.clamp(-most, most)
    operands = [*steps, *map(ops.graph.add_constant, (weight, scale))]
    numbers = ops.numbers(0.2, 100)
    y = ops.graph.emit("conv_int8", *operands, *numbers, ops.graph.add_constant(normal(8)), padding=padding,
                         stride=(2,) * rank, groups=groups)  # fmt: skip
    return ops.done(y=y)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convs_of_every_rank_are_integer_kernels(name: str, rank: int) -> None:
    graph = conv_graph(rank, padding=(1,) * 2 * rank)
    low, _, runner = compiled(name, graph)
    assert len(runner.promised) == 1
    shape = (2, 4, 7, 6, 5)[: 2 + rank]
    assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(*shape)})


@pytest.mark.parametrize("name", TARGETS)
def test_uneven_padding_is_of_zero_points(name: str) -> None:
    graph = conv_graph(2, padding=(0, 1, 2, 1))
    low, _, runner = compiled(name, graph)
    assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(2, 4, 7, 6)})


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("cpu", "kernels"), [("avx2", 0), ("avx512_vnni", 1)])
def test_weights_whose_products_saturate_are_multiplied_in_floats(name: str, cpu: str, kernels: int) -> None:
    ops = Ops(static=True)
    steps = ops.quantized(ops.x)
    wide = torch.tensor([[100, -7, 3, 90, 65, -2, 1, 127]], dtype=torch.int8).repeat(8, 1)
    parameters = map(ops.graph.add_constant, (wide, torch.full((8,), 0.01)))
    linear = ops.done(y=ops.graph.emit("linear_int8", *steps, *parameters))
    for graph, x in ((linear, normal(2, 3, 8)), (conv_graph(2, most=127), normal(2, 4, 7, 6))):
        low, logs, runner = compiled(name, graph, cpu)
        assert len(runner.promised) == kernels
        reasons = [reason for log in logs.values() for reason in log.declined.values()]
        assert all(reason == Decline("saturates", max_abs=127, safe=64) for reason in reasons)
        assert bool(reasons) == (not kernels and name != "torch-cpu")  # which has floats among its forms
        if not kernels:  # what the integer kernels give is up to this machine
            assert_runs_as_the_ops_mean(graph, low, runner, {"x": x})


@pytest.mark.parametrize(("most", "kernels"), [(127, 0), (63, 1)])
def test_fbgemm_leaves_a_depthwise_conv_whose_sums_saturate_in_floats(most: int, kernels: int) -> None:
    """On CPUs too where no other products do."""
    graph = conv_graph(2, groups=4, most=most)
    low, logs, runner = compiled("fbgemm", graph, "avx512_vnni")
    assert len(runner.promised) == kernels
    reason = Decline("depthwise_saturates", max_abs=127, safe=63)
    assert list(logs["conv"].declined.values()) == ([] if kernels else [reason])
    assert_runs_as_the_ops_mean(graph, low, runner, {"x": normal(2, 4, 7, 6)})


@pytest.mark.parametrize("name", TARGETS)
def test_an_add_reads_all_of_uint8(name: str) -> None:
    """onednn.qadd of torch 2.13 would take 200 for -56."""
    ops = Ops(static=True, shape=("batch", 8))
    scale, zero = ops.numbers(1.0, 0)
    steps = ops.graph.emit("quantize", ops.x, scale, zero)
    graph = ops.done(y=ops.graph.emit("add_int8", steps, scale, zero, steps, scale, zero, *ops.numbers(2.0, 0)))
    low, _, runner = compiled(name, graph)
    x = torch.arange(200.0, 208.0)[None]
    assert_runs_as_the_ops_mean(graph, low, runner, {"x": x})
    assert torch.equal(runner({"x": x})[0], x.to(torch.uint8))


# --- whole models --------------------------------------------------------------------------------------------------


def optimized(module: nn.Module, name: str, scheme: str, feeds: Any, **given: Any) -> Optimized:
    calibration = [feeds] if scheme == "static" else None
    return graphopt.optimize(module, f"quantize{{scheme={scheme}}}", target=name, example_inputs=feeds,
                             calibration=calibration, measure=False, **given)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_the_kernels_of_real_transformers(name: str, scheme: str, model: str) -> None:
    feeds = {"input_ids": tokens(), "attention_mask": padding()}
    small = optimized(bert() if model == "bert" else gpt2(), name, scheme, feeds)
    runner = small.runner
    assert isinstance(runner, EagerRunner) and runner.unlowered == []
    sites = len(small.folded.sites("linear_int8"))
    assert sites == {"bert": 12 + 1, "gpt2": 8 + 1}[model]
    merged = 4 if model == "bert" else 0  # query, key and value of two layers are one each
    kernels = runner.kernels()
    assert sum(kernels.get(kernel, 0) for kernel in backend(name).int8_kernels) == sites - merged
    assert {"aten.addmm.default", "aten.mm.default"}.isdisjoint(kernels)
    expected, found = small.folded.evaluate(small.feeds[0], small.folded.outputs), runner(small.feeds[0])
    assert all(sqnr(one, other) > 30 for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", TARGETS)
def test_integers_are_pooled_over_more_positions_than_they_count(name: str, tmp_path: Path) -> None:
    """aten's max_pool2d refuses uint8 channels last from 128 positions on; here are 256."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = optimized(seeded(lambda: module), name, "static", x)
    assert small.runner.kernels()["quantized.max_pool2d.default"] == 1
    assert [node.kind for node in small.folded.nodes].count("max_pool") == 1
    path = small.export(tmp_path / "small.pt2")
    (feeds,) = small.feeds
    found = small.runner(feeds)
    torch.testing.assert_close(backend(name).compile(FxGraph.load(path))(feeds), found, rtol=0, atol=0)
    with torch.inference_mode():
        assert sqnr(module(x), found[0]) > 25


@pytest.mark.parametrize("name", TARGETS)
def test_the_kernels_of_a_convolutional_network(name: str, tmp_path: Path) -> None:
    small = optimized(seeded(ConvNet), name, "static", images())
    runner = small.runner
    assert isinstance(runner, EagerRunner)
    promised = small.folded.sites("linear_int8", "conv_int8", "add_int8")
    assert [site.kind for site in promised] == ["conv_int8"] * 3 + ["add_int8", "linear_int8"]
    kernels = runner.kernels()
    assert sum(kernels.get(kernel, 0) for kernel in backend(name).int8_kernels) == 5
    assert "aten.convolution.default" not in kernels
    path = small.export(tmp_path / "small.pt2")
    again = backend(name).compile(FxGraph.load(path))
    (feeds,) = small.feeds
    torch.testing.assert_close(again(feeds), runner(feeds), rtol=0, atol=0)
    loaded = torch.export.load(path).module()
    torch.testing.assert_close(loaded(*feeds.values()), runner(feeds)[0], rtol=1e-6, atol=1e-6)


def test_a_site_without_a_kernel_is_reported_and_stays_float() -> None:
    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.planted = nn.Linear(8, 8), nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.planted(self.first(x).double())
            return y

    small = optimized(seeded(Planted), "onednn", "dynamic", normal(4, 8))
    declined = next(record.declined for record in small.report.passes if record.name == "quantize")
    assert "float64" in declined["planted"] and small.runner.kernels()[QLINEAR] == 1


def test_fewer_kernels_than_promised_are_an_error() -> None:
    ops = Ops(static=True)
    graph = ops.done(y=ops.linear(ops.quantized(ops.x), 8))
    on = backend("onednn")
    runner = on.compile(on.lower(graph)[0])
    runner.promised.append("another")
    with pytest.raises(LoweringError, match=r"2 int8 kernels were promised and onednn runs 1 .* another"):
        on.check(graph, runner)
    with pytest.raises(LoweringError, match="no kernel for the int8 ops linear_int8"):
        on.check(graph, on.compile(graph))


def test_the_integers_are_those_of_the_onnx_target() -> None:
    feeds = {"input_ids": tokens(), "attention_mask": padding()}
    torch_one = optimized(bert(), "onednn", "dynamic", feeds)
    onnx_one = optimized(bert(), "onnxruntime", "dynamic", feeds)

    def rows(graph: Graph) -> list[bytes]:
        weights = [graph.constant(site.required("weight")) for site in graph.sites("linear_int8")]
        return sorted(row.contiguous().numpy().tobytes() for one in weights if one is not None for row in one)

    assert rows(torch_one.folded) == rows(onnx_one.folded)
    assert sqnr(torch_one(**feeds).last_hidden_state, onnx_one(**feeds).last_hidden_state) > 30


# --- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fastest", "kernel"),
    [
        (None, QLINEAR),
        ("fbgemm", "quantized.linear_dynamic.default"),
        ("fbgemm, apart", "quantized.linear_dynamic.default"),
        ("float", "aten.addmm.default"),
        ("float, apart", "aten.addmm.default"),
    ],
)
def test_measurement_takes_the_engine_of_a_site(
    fastest: str | None, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Ops(static=False)
    apart = fastest is not None and "apart" in fastest
    y = ops.linear(ops.quantized(ops.x), 8)
    graph = ops.done(y=ops.graph.emit("gelu", y) if apart else y)
    asked: list[list[str]] = []

    def script(
        candidates: Mapping[str, Any], *, baseline: str, rounds: int, **options: Any
    ) -> dict[str, Ratios]:
        asked.append(list(candidates))
        for calls in candidates.values():
            for call in calls:
                call()
        speeds = {name: 2.0 if name == fastest else 1.0 for name in candidates}
        return {name: Ratios(Ratio(one, one, one, rounds, 0, {}), ()) for name, one in speeds.items()}

    monkeypatch.setattr(timing, "paired_calls", script)
    on, feeds = backend("torch-cpu"), {"x": normal(2, 3, 8)}
    chooser = on.chooser([feeds])
    chooser.timings = Timings(tmp_path / "timings.sqlite")
    low, _ = on.lower(graph, chooser)
    runner = on.compile(low)
    on.check(graph, runner)
    assert runner.kernels()[kernel] == 1
    assert runner.promised == ([] if kernel.startswith("aten") else runner.promised)
    behind = ["onednn", "onednn, apart", "fbgemm, apart", "float, apart"]
    assert asked[0] == (behind if apart else ["onednn", "fbgemm", "float"])
    assert chooser.measured["linear-gelu" if apart else "linear"][0]["form"] == (fastest or "onednn")
    assert sqnr(graph.evaluate(feeds, graph.outputs)[0], runner(feeds)[0]) > 30


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16")
def test_bfloat16_linears_are_those_of_aten() -> None:
    module, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), normal(3, 8)
    for number, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=number)
    small = graphopt.optimize(module, "cast{dtype=bfloat16}", target="onednn", example_inputs=x, measure=False)
    assert small.report.kernels["aten.addmm.default"] == 2
    assert sqnr(module(x), small(x)) > 35


# --- running -------------------------------------------------------------------------------------------------------


def test_a_profile_names_nodes_by_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {"input_ids": tokens(), "attention_mask": padding()}
    small = optimized(bert(), "onednn", "dynamic", feeds)
    monkeypatch.setattr(eager_runner, "PROFILED", 1)
    seconds = small.runner.profile(small.feeds[0])
    sites = {site.path for site in small.folded.sites("linear_int8")}
    found = {path for path in sites if any(name.startswith(path + "/") for name in seconds)}
    assert all("key" in path or "value" in path for path in sites - found)  # those run inside the query
    assert all(taken >= 0 for taken in seconds.values())


def test_a_part_of_a_graph_is_cut_out() -> None:
    ops = Ops(static=False)
    steps = ops.quantized(ops.x)
    inner = ops.graph.emit("relu", ops.linear(steps, 8))
    graph = ops.done(y=ops.graph.emit("tanh", inner), z=ops.graph.emit("exp", ops.x))
    part = graph.extract([steps[0], steps[1], steps[2]], [inner])
    part.verify()
    assert [node.kind for node in part.nodes] == ["linear_int8", "relu"]
    assert part.inputs[0].shape == ("batch", 3, 8) and part.input_names == [value.name for value in steps]
    x = {"x": normal(2, 3, 8)}
    values = graph.evaluate(x, [*steps, inner])
    feeds = dict(zip(part.input_names, values[:3], strict=True))
    assert torch.equal(part.evaluate(feeds, part.outputs)[0], values[3])
    assert graph.nodes[-1].kind == "exp" and len(graph.nodes) == 6
    with pytest.raises(GraphError, match="reads x, which is no input of the part"):
        graph.extract([steps[0]], [inner])


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_a_module_on_another_device_is_refused_by_name(name: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].to("meta")
    with pytest.raises(UsageError, match=rf"target {name} runs on the CPU, and 1.weight is on meta: the module is "
                                         r"spread over cpu, meta; pass model.cpu\(\)"):  # fmt: skip
        graphopt.optimize(module, target=name, example_inputs=normal(2, 4))
    with pytest.raises(UsageError, match=r"an example input is on meta: move it with .cpu\(\)"):
        graphopt.optimize(nn.Linear(4, 4), target=name, example_inputs=normal(2, 4).to("meta"))


def test_an_engine_that_this_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    ops = Ops(static=True)
    graph = ops.done(y=ops.linear(ops.quantized(ops.x), 8))
    with pytest.raises(UsageError, match=r"target onednn needs torch's engine onednn, which this build lacks \(it has "
                                         r"qnnpack\)"):  # fmt: skip
        graphopt.optimize(nn.Linear(4, 4), target="onednn", example_inputs=normal(2, 4))
    with pytest.raises(LoweringError, match="engine fbgemm"):
        backend("fbgemm").compile(graph)
    with pytest.raises(UsageError, match="engine onednn"):
        require_engines("torch-cpu", ("onednn",))


def test_ops_have_the_same_meaning_everywhere() -> None:
    """The reference that all of the above is held to."""
    x, scale, zero = torch.tensor([[200]], dtype=torch.uint8), torch.tensor(0.5), torch.tensor(100, dtype=torch.uint8)
    y = OPS["linear_int8"].reference(x, scale, zero, torch.tensor([[2]], dtype=torch.int8), torch.tensor([0.25]))
    assert y.item() == 25.0
