"""The fbgemm target: int8 linears lowered, packed, counted, run and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from graphopt.backends.torch_cpu.fbgemm import DYNAMIC as DYNAMICS
from graphopt.backends.torch_cpu.fbgemm import STATIC as STATICS
from graphopt.backends.torch_cpu.fbgemm import Fbgemm, pack
from graphopt.backends.torch_cpu.runner import EagerRunner
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import RuleLog
from graphopt.passes import REGISTRY
from graphopt.passes.quantize.quantize import Quantize
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import Pipeline
from graphopt.pipeline.text import parse
from tests.language import BITS
from tests.models import quantize_weight

DYNAMIC, STATIC = str(DYNAMICS[0]), str(STATICS[0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def lowered(graph: FxGraph) -> tuple[FxGraph, dict[str, RuleLog]]:
    low, logs = Fbgemm().lower(graph)
    assert isinstance(low, FxGraph)
    return low, logs


def linear_graph(*, static: bool, bias: bool = True, sites: int = 1) -> FxGraph:
    """linear_int8 ops that share one quantized input x[batch,3,8]."""
    graph = FxGraph.empty({"x": (("batch", 3, 8), torch.float32)})
    x = graph.inputs[0]
    if static:
        numbers = torch.tensor(0.04), torch.tensor(120, dtype=torch.uint8)
        parameters: tuple[Value, ...] = tuple(map(graph.add_constant, numbers))
    else:
        parameters = graph.emit_all("choose_qparams", x)
    steps = graph.emit("quantize", x, *parameters)
    outputs: dict[str, Value] = {}
    for site in range(sites):
        weight, weight_scale = map(graph.add_constant, quantize_weight(normal(5, 8, seed=site), bits=BITS))
        b = graph.add_constant(normal(5, seed=site)) if bias else None
        outputs[f"y{site}"] = graph.emit("linear_int8", steps, *parameters, weight, weight_scale, b)
    graph.set_outputs(outputs)
    return graph


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("static", "kernel"), [(False, DYNAMIC), (True, STATIC)])
def test_a_quantize_goes_into_the_kernel(static: bool, kernel: str, bias: bool) -> None:
    graph = linear_graph(static=static, bias=bias)
    low, logs = lowered(graph)
    assert logs["linear"].hits == 1
    operation = "graphopt_fbgemm.linear_static.default" if static else "graphopt_fbgemm.linear_dynamic.default"
    assert [node.kind for node in low.nodes] == [operation]
    runner = Fbgemm().compile(low)
    Fbgemm().check(graph, runner)
    assert runner.kernels()[kernel] == 1
    for batch in (1, 6):
        feeds = {"x": normal(batch, 3, 8)}
        expected = graph.evaluate(feeds, graph.outputs)
        # fbgemm may choose the zero point one step away from ONNX's formula: half a step on each product
        torch.testing.assert_close(runner(feeds), expected, rtol=1e-5, atol=1e-5 if static else 0.03)
        torch.testing.assert_close(low.evaluate(feeds, low.outputs), runner(feeds), rtol=0, atol=0)


def test_packing_keeps_the_integers_and_the_scales() -> None:
    weight, scale = quantize_weight(normal(6, 16))
    bias = normal(6)
    engine = torch.backends.quantized.engine
    steps, found = torch.ops.quantized.linear_unpack(pack(weight, scale, bias))
    assert torch.equal(steps.int_repr(), weight) and torch.equal(found, bias)
    assert torch.equal(steps.q_per_channel_scales(), scale.double())
    assert torch.backends.quantized.engine == engine


def test_a_transposed_weight_is_packed_as_it_is_seen() -> None:
    graph = linear_graph(static=True, bias=False)
    site = graph.sites("linear_int8")[0]
    assert site.weight is not None
    stored = graph.add_constant(site.weight.t().contiguous())
    operands = list(site.operands)
    operands[3] = graph.emit("transpose", stored, perm=(1, 0))
    feeds = {"x": normal(2, 3, 8)}
    expected = graph.evaluate(feeds, graph.outputs)
    graph.replace(site, graph.emit(site, *operands))
    runner = Fbgemm().compile(lowered(graph)[0])
    torch.testing.assert_close(runner(feeds), expected, rtol=1e-5, atol=1e-5)


def test_integers_read_by_other_parameters_are_what_they_stand_for() -> None:
    graph = linear_graph(static=True)
    site = graph.sites("linear_int8")[0]
    scale = graph.add_constant(torch.tensor(0.05))
    graph.replace(site, graph.emit("linear_int8", site.input, scale, *site.operands[2:]))
    low, _ = lowered(graph)
    feeds = {"x": normal(2, 3, 8)}
    runner = Fbgemm().compile(low)
    torch.testing.assert_close(runner(feeds), graph.evaluate(feeds, graph.outputs), rtol=1e-5, atol=1e-5)


def test_a_weight_that_the_graph_computes_is_declined() -> None:
    graph = linear_graph(static=True)
    site = graph.sites("linear_int8")[0]
    operands = list(site.operands)
    operands[4] = graph.emit("relu", operands[4], at=site)
    graph.replace(site, graph.emit("linear_int8", *operands))
    assert list(lowered(graph)[1]["linear"].declined.values()) == [Decline("weight_not_stored_per_channel")]


class Block(nn.Module):
    """Attention and a feed-forward layer, with dropout, over x (batch, length, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down, self.norm, self.drop = (
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.LayerNorm(32),
            nn.Dropout(0.2),
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for f in (self.query, self.key, self.value)]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        x = self.norm(x + self.drop(self.out(y)))
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


def block() -> tuple[Block, FxGraph]:
    torch.manual_seed(0)
    module = Block().eval()
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.export.export(module, (normal(2, 5, 32),), dynamic_shapes=(axes,))
    return module, FxGraph.from_program(program, output_names=["y"], axis_names={"x": {0: "batch", 1: "length"}})


def test_a_transformer_block_end_to_end(tmp_path: Path) -> None:
    module, graph = block()
    backend = Fbgemm()
    context = Context(target=backend)
    quantized = Pipeline([Quantize(scheme="dynamic")]).apply(graph, context)
    folded = parse(backend.pipeline(), REGISTRY).apply(quantized, context)
    assert isinstance(folded, FxGraph)
    low, _ = lowered(folded)
    runner = backend.compile(low)
    assert isinstance(runner, EagerRunner) and runner.unlowered == []
    backend.check(folded, runner)
    kernels = runner.kernels()
    assert kernels[DYNAMIC] == 4  # query, key and value are one
    assert not {"aten.addmm.default", "aten.mm.default", "aten.alias.default", "aten.clone.default"} & set(kernels)
    backend.export(low, tmp_path / "small.pt2", metadata={"pipeline": "quantize"})
    extra = {"graphopt.pipeline": ""}
    loaded = torch.export.load(tmp_path / "small.pt2", extra_files=extra).module()
    again = backend.compile(FxGraph.load(tmp_path / "small.pt2"))
    for shape in ((1, 3, 32), (3, 9, 32)):
        x = normal(*shape)
        (found,) = runner({"x": x})
        with torch.no_grad():
            expected = module(x)
        assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999
        torch.testing.assert_close(again({"x": x})[0], found, rtol=0, atol=0)
        torch.testing.assert_close(loaded(x)[0], found, rtol=0, atol=0)
    assert extra["graphopt.pipeline"] == "quantize" and again.kernels() == kernels
    assert (tmp_path / "small.pt2").stat().st_size < 40_000 + sum(p.numel() for p in module.parameters()) * 4


def test_a_float_graph_runs_as_it_is() -> None:
    module, graph = block()
    text = graph.text()
    runner = Fbgemm().compile(graph)
    x = normal(2, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(runner({"x": x})[0], module(x), rtol=1e-5, atol=1e-5)
    Fbgemm().check(graph, runner)
    assert graph.text() == text


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    counted: list[int] = []
    runner = Fbgemm().compile(linear_graph(static=True), threads=1)
    assert isinstance(runner, EagerRunner)
    run = runner._run
    runner._run = lambda *inputs: counted.append(torch.get_num_threads()) or run(*inputs)  # type: ignore[func-returns-value]
    runner({"x": normal(1, 3, 8)})
    assert counted == [1] and torch.get_num_threads() == before


def test_an_archive_has_no_opset_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    graph = linear_graph(static=True)
    with pytest.raises(UsageError, match=r"torch\.export archive"):
        Fbgemm().export(graph, tmp_path / "x.pt2", metadata={}, opset=20)
    with pytest.raises(OSError):
        Fbgemm().export(graph, tmp_path / "missing" / "x.pt2", metadata={})
    assert list(tmp_path.iterdir()) == []
