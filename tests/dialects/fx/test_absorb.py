"""What a module has learned, written back into the graph that made it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.rounded import Rounded
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.errors import GraphError
from graphopt.ir.graph import Value
from graphopt.passes import Quantize
from graphopt.passes.fold_int8 import FoldInt8
from graphopt.pipeline.selectors import PerSite
from tests import models
from tests.language import build, feeds, outputs, run
from tests.language import stored as constant

aten = torch.ops.aten
FLOAT = "y = linear(relu(linear(x[4,8], W[16,8], b[16])), V[6,16])"
SCHEMES = {
    "static": Quantize(scheme="static", smooth=False), "dynamic": Quantize(scheme="dynamic"),
    **{f"weight-only-{bits}": Quantize(scheme="weight-only", bits=bits) for bits in (8, 4, 2)},
    "zero-points": Quantize(scheme="weight-only", bits=4, symmetric=False),
    "static-4": Quantize(scheme="static", smooth=False, bits=PerSite({"linear": 4}),
                         activation_bits=PerSite({"linear": 4})),
}  # fmt: skip
WIDE = "y = linear(relu(linear(x[4,32], W[32,32], b[32])), V[6,32])"


def load(module: nn.Module, *inputs: Tensor) -> FxGraph:
    return FxGraph.from_program(torch.export.export(module.eval(), inputs))


def quantized(scheme: str, text: str = WIDE) -> FxGraph:
    graph = build("fx", text)
    run(SCHEMES[scheme], graph, calibration=[feeds(graph, seed) for seed in range(4)])
    return cast(FxGraph, graph)


def perturb(module: nn.Module, seed: int = 0, amount: float = 0.2) -> None:
    """Move every parameter, each by a share of its own size."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in module.parameters():
            one.add_(torch.randn(one.shape, generator=draw) * one.abs().mean() * amount)


def assert_absorbs(graph: FxGraph, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> None:
    """After absorb the graph computes what the module computes; a clone made before, what it computed before."""
    inputs = feeds(graph) if inputs is None else inputs
    clone, before, version = graph.clone(), outputs(graph, inputs), graph.version
    graph.absorb(module)
    expected = [one.detach() for one in module.eval()(**inputs)]
    graph.verify()
    torch.testing.assert_close(outputs(graph, inputs), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs(clone, inputs), before, rtol=0, atol=0)
    assert graph.version == version + 1 and clone.version == version
    assert not all(map(torch.equal, before, expected))


# --- round trips ---------------------------------------------------------------------------------------------------


def test_floats_go_back_in_their_layout_and_dtype() -> None:
    graph = cast(FxGraph, build("fx", FLOAT))
    weight = graph.sites("linear")[0].required("weight")
    turned = graph.add_constant(torch.randn(8, 16).t(), "turned")  # as Conv1D stores it
    site = graph.sites("linear")[0]
    graph.replace(site, graph.emit("linear", site.input, turned, site.bias, at=site))
    module = graph.module()
    perturb(module)
    assert_absorbs(graph, module)
    found = constant(graph.sites("linear")[0], "weight")
    assert found.stride() == (1, 16) and found.dtype == torch.float32 and weight.shape == (16, 8)
    half = cast(FxGraph, build("fx", "y = linear(x[2,4]:bfloat16, W[4,4]:bfloat16)"))
    module = half.module()
    perturb(module)
    half.absorb(module)
    assert constant(half.sites("linear")[0], "weight").dtype == torch.bfloat16


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_start_exactly_and_go_back_as_they_were_seen(scheme: str, learn: bool) -> None:
    graph = quantized(scheme)
    weights = [node for node in graph.sites("dequantize") if node.required("x").is_constant]
    module = graph.module(learn_scales=learn)
    torch.testing.assert_close(list(module(**feeds(graph))), outputs(graph), rtol=0, atol=0)
    names = dict(module.named_parameters())
    for node in weights:
        weight = names[graph.parameter(module, node.result) or ""]
        assert torch.equal(weight, graph.evaluate({}, [node.result])[0])
        rounded = module.get_submodule(f"{graph.parameter(module, node.result)}_rounded".replace("weight_1", "weight"))
        assert isinstance(rounded, Rounded)
    scales = [name for name in names if name.endswith("scale")]
    assert len(scales) == ((4 if scheme.startswith("static") else 2) if learn else 0)
    perturb(module)
    assert_absorbs(graph, module)
    for node in weights:
        assert constant(node, "x").dtype == (torch.uint8 if scheme == "zero-points" else torch.int8)
        largest = max(2 ** (node.attributes["bits"] - 1), 1)
        if scheme != "zero-points":
            assert int(constant(node, "x").abs().max()) <= largest
    before = [constant(node, "x").clone() for node in weights]
    graph.absorb(graph.module(learn_scales=learn))  # nothing was learned since
    assert all(torch.equal(constant(node, "x"), one) for node, one in zip(weights, before, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(SCHEMES)), st.booleans(), st.integers(0, 10**6), st.floats(0.01, 3.0))
def test_any_parameters_are_absorbed(scheme: str, learn: bool, seed: int, amount: float) -> None:
    graph = quantized(scheme)
    module = graph.module(learn_scales=learn)
    perturb(module, seed, amount)
    clone = graph.clone()
    clone.absorb(copy.deepcopy(module))
    inputs = feeds(graph, seed)
    torch.testing.assert_close(outputs(clone, inputs), [one.detach() for one in module(**inputs)], rtol=1e-6, atol=1e-6)
    assert graph.version == clone.version - 1


@pytest.mark.parametrize("learn", [False, True])
def test_quantized_regions_go_back(learn: bool) -> None:
    x = models.images(4)
    graph = load(models.seeded(models.ConvNet), x)
    run(Quantize(scheme="static"), graph, calibration=[{"x": x}])
    module = graph.module(learn_scales=learn)
    perturb(module)
    assert_absorbs(graph, module, {"x": x})
    folded = graph.clone()
    run(FoldInt8(), folded)
    assert len(folded.sites("conv_int8", "add_int8", "linear_int8")) >= 4
    torch.testing.assert_close(outputs(folded, {"x": x}), outputs(graph, {"x": x}), rtol=1e-4, atol=1e-4)
    module = folded.module(learn_scales=learn)  # int8 ops read the same constants
    perturb(module, seed=1)
    folded.absorb(module)
    expected = [one.detach() for one in module(x=x)]
    torch.testing.assert_close(outputs(folded, {"x": x}), expected, rtol=1e-4, atol=1e-4)


def test_a_bias_in_integers_is_a_bias() -> None:
    graph = cast(FxGraph, build("fx", """
        w = dequantize(W[8,8]:int8:values(3,-5,7), C[8]:ones, axis=0)
        y = linear(x[4,8], w, dequantize(B[8]:int32:values(40000,-3), S[8]:ones, axis=0))
    """))  # fmt: skip
    module = graph.module(learn_scales=True)
    assert {name for name, _ in module.named_parameters()} == {"weight", "weight_rounded.scale", "bias"}
    perturb(module)
    assert_absorbs(graph, module)


def test_weights_of_7_bits_stay_within_them() -> None:
    graph = build("fx", WIDE)
    run(Quantize(scheme="dynamic", bits=7), graph)
    module = cast(Any, graph).module()
    perturb(module, amount=3.0)
    graph.absorb(module)
    for node in graph.sites("dequantize"):
        if node.required("x").is_constant:
            assert int(constant(node, "x").abs().max()) == 63


def test_training_moves_integers_and_scales() -> None:
    graph = quantized("static")
    module, inputs = graph.module(learn_scales=True).train(), feeds(graph)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(**inputs)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert_absorbs(graph, module)


# --- batch norms ---------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """One batch norm, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.norm(self.conv(self.norm(x))),)


def test_statistics_go_back() -> None:
    net = models.seeded(Normed)
    x = models.images(8)
    graph = load(copy.deepcopy(net), x)  # which shares the tensors of its model
    module = graph.module()
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in net.named_parameters()}
    module.train(), net.train()
    module(x), net(x)
    assert_absorbs(graph, module, {"x": x})
    torch.testing.assert_close(outputs(graph, {"x": x}), list(net.eval()(x)), rtol=1e-5, atol=1e-5)
    first = graph.sites("batch_norm")[0]
    torch.testing.assert_close(constant(first, "mean"), dict(net.named_buffers())["norm.running_mean"])
    assert graph.parameter(module, first.required("weight")) == "norm.weight"
    assert graph.parameter(module, first.required("mean")) is None


# --- one parameter for a constant ----------------------------------------------------------------------------------


def test_whatever_reads_a_constant_reads_one_parameter() -> None:
    graph = load(models.seeded(models.Decoder), models.tokens())
    module = graph.module()
    tables = [name for name, one in module.named_parameters() if one.shape == (models.VOCABULARY, models.WIDTH)]
    assert len(tables) == 1
    embedding, head = graph.sites("embedding")[0], graph.sites("linear")[-1]
    for value in (embedding.required("table"), head.required("weight")):
        assert graph.parameter(module, value) == tables[0]
    perturb(module)
    assert_absorbs(graph, module, {graph.input_names[0]: models.tokens()})


def test_permuted_views_and_several_nodes_are_one_parameter() -> None:
    graph = FxGraph.empty({"x": ((4, 8), torch.float32), "ids": ((3,), torch.int64)})
    native = graph.native
    x, ids = graph.inputs
    weight = graph.add_constant(torch.randn(8, 8), "shared")
    turned = native.call(aten.permute.default, (weight.native, [1, 0]), {}, native.output)
    again = native.graph.create_node("get_attr", weight.native.target)  # type: ignore[union-attr]
    again.meta["val"] = weight.native.meta["val"]  # type: ignore[union-attr]
    native.output.prepend(again)
    views: list[Value] = [type(weight)(graph, node) for node in (turned, again)]
    y = graph.emit("linear", graph.emit("linear", x, weight), views[0])
    graph.set_outputs({"y": graph.emit("linear", y, views[1]), "z": graph.emit("embedding", weight, ids)})
    module = graph.module()
    assert len(list(module.parameters())) == 1
    name = next(name for name, _ in module.named_parameters())
    assert [graph.parameter(module, value) for value in (weight, *views)] == [name] * 3
    perturb(module)
    assert_absorbs(graph, module)


@pytest.mark.parametrize("turn", [False, True])
def test_dequantizes_of_one_weight_are_one_parameter(turn: bool) -> None:
    graph = cast(FxGraph, build("fx", "y = linear(linear(x[4,8], W[8,8]), V[8,8])"))
    first, second = graph.sites("linear")
    integers = graph.add_constant(torch.randint(-127, 128, (8, 8), dtype=torch.int8), "integers")
    integers_again: Value = integers
    if turn:
        node = graph.native.call(aten.permute.default, (integers.native, [1, 0]), {}, graph.native.output)
        integers_again = type(integers)(graph, node)
    scales = [graph.add_constant(torch.rand(8, generator=torch.Generator().manual_seed(0)) + 0.5) for _ in range(2)]
    for site, value, scale, axis in ((first, integers, scales[0], 0), (second, integers_again, scales[1], int(turn))):
        floats = graph.emit("dequantize", value, scale, at=site, axis=axis)
        graph.replace(site, graph.emit("linear", site.input, floats, at=site))
    graph.sweep()
    for learn in (False, True):
        module = graph.module(learn_scales=learn)
        assert len(list(module.parameters())) == 1 + learn
        assert len({graph.parameter(module, node.result) for node in graph.sites("dequantize")}) == 1
        perturb(module)
        assert_absorbs(graph, module)
    one, other = (constant(node, "scale") for node in graph.sites("dequantize"))
    assert torch.equal(one, other)


def test_what_else_reads_integers_reads_the_trained_ones() -> None:
    graph = cast(FxGraph, build("fx", """
        y = linear(x[4,8], dequantize(W[8,8]:int8:values(3,-5,7), s[8]:ones, axis=0))
        q = quantize(y, S[]:values(0.5), Z[]:uint8:values(120))
        z = dequantize(q, S, Z)
        rows = dequantize(embedding(W, ids[3]:int64), T[]:values(0.1))
        return z, q, rows
    """.replace("s[8]", "C[8]")))  # fmt: skip
    module = graph.module(learn_scales=True)
    torch.testing.assert_close(list(module(**feeds(graph))), outputs(graph), rtol=0, atol=0)
    perturb(module, amount=0.5)
    assert_absorbs(graph, module)


def test_a_scale_that_is_a_number_of_the_node_is_learned_too() -> None:
    ops = quantized_decomposed()

    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            q = ops.quantize_per_tensor(x, 0.1, 3, 0, 255, torch.uint8)
            return (ops.dequantize_per_tensor(q, 0.1, 3, 0, 255, torch.uint8),)

    graph = load(Net(), torch.ones(4))
    module = graph.module(learn_scales=True)
    ((name, scale),) = module.named_parameters()
    assert name == "input_rounded.scale"
    with torch.no_grad():
        scale.fill_(0.25)
    assert_absorbs(graph, module, {"x": torch.tensor([0.3, -2.0, 7.1, 90.0])})


def test_a_scale_that_something_else_reads_is_not_learned() -> None:
    graph = cast(FxGraph, build("fx", """
        y = dequantize(quantize(x[4,8], S[]:values(0.5), Z[]:uint8:values(120)), S, Z)
        z = mul(dequantize(quantize(y, T[]:values(0.25), Z), T, Z), S)
    """))  # fmt: skip
    assert [name for name, _ in graph.module(learn_scales=True).named_parameters()] == ["input_rounded_1.scale"]


def test_rows_and_float8_pass_gradients() -> None:
    graph = cast(FxGraph, build("fx", """
        h = linear(x[4,8], W[8,8])
        s = row_scale(h)
        y = linear(dequantize(quantize(h, s), s), V[8,8])
    """))  # fmt: skip
    site = graph.sites("linear")[1]
    floats = graph.add_constant(constant(site, "weight").to(torch.float8_e4m3fn))
    weight = graph.emit("dequantize", floats, graph.add_constant(torch.ones(8)), at=site, axis=0)
    graph.replace(site, graph.emit("linear", site.input, weight, at=site))
    module = graph.module(learn_scales=True)
    module(**feeds(graph))[0].square().sum().backward()
    assert len(list(module.parameters())) == 2
    assert all(one.grad is not None and bool(one.grad.any()) for one in module.parameters())
    perturb(module)
    assert_absorbs(graph, module)


# --- further values ------------------------------------------------------------------------------------------------


def test_any_values_are_returned_besides() -> None:
    graph = quantized("static")
    asked = [value for node in graph.nodes for value in node.results]
    asked += [graph.inputs[0], graph.sites("dequantize")[0].required("scale")]
    module = graph.module(also=asked)
    result, values = module(**feeds(graph))
    torch.testing.assert_close(list(result), outputs(graph), rtol=0, atol=0)
    torch.testing.assert_close(values, graph.evaluate(feeds(graph), asked), rtol=0, atol=0)
    perturb(module)
    assert len(graph.outputs) == 1
    graph.absorb(module)
    _, values = module(**feeds(graph))
    torch.testing.assert_close([v.detach() for v in values], graph.evaluate(feeds(graph), asked), rtol=1e-6, atol=1e-6)
    with pytest.raises(GraphError, match="no value of this graph"):
        graph.module(also=[graph.clone().outputs[0]])


def test_values_of_int8_ops_are_returned() -> None:
    graph = cast(FxGraph, build("fx", """
        q = quantize(x[4,8], S[]:values(0.05), Z[]:uint8:values(120))
        y = linear_int8(q, S, Z, W[8,8]:int8:values(3,-5,7), C[8]:ones)
        z = relu(y)
    """))  # fmt: skip
    asked = [graph.sites("linear_int8")[0].result, graph.sites("quantize")[0].result]
    module = graph.module(lambda results: {"last": results[0]}, also=asked, learn_scales=True)
    result, values = module(**feeds(graph))
    torch.testing.assert_close(result["last"], outputs(graph)[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values[0], graph.evaluate(feeds(graph), asked)[0], rtol=1e-6, atol=1e-5)
    perturb(module)
    graph.absorb(module)
    result, values = module(**feeds(graph))
    torch.testing.assert_close(outputs(graph)[0], result["last"].detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(graph.evaluate(feeds(graph), asked)[1], values[1])


# --- modes and places ----------------------------------------------------------------------------------------------


def test_it_trains_in_16_bits() -> None:
    graph = quantized("static")
    module = graph.module(learn_scales=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(**feeds(graph))[0].float().square().mean()
    loss.backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in module.parameters())


def test_tensors_that_are_created_follow_the_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            places = torch.arange(x.shape[1], device=x.device)
            return (self.table(places) + x + torch.full((4,), 2.0).to("cpu"),)

    graph = load(Net(), torch.ones(2, 5, 4))
    module = graph.module()
    moved = copy.deepcopy(module).to("meta")
    assert moved(torch.ones(2, 5, 4, device="meta"))[0].device.type == "meta"
    assert moved.to(torch.float64) is moved and "meta" in moved.code
    torch.testing.assert_close(module(torch.ones(2, 5, 4))[0], outputs(graph, {"x": torch.ones(2, 5, 4)})[0])


def test_a_long_chain_is_no_trouble() -> None:
    graph = FxGraph.empty({"x": ((2, 4), torch.float32)})
    y: Value = graph.inputs[0]
    for _ in range(1200):
        y = graph.emit("add", graph.emit("relu", y), graph.add_constant(nn.Parameter(torch.ones(4))))
    graph.set_outputs({"y": y})
    module = graph.module()
    module(torch.ones(2, 4))[0].sum().backward()
    assert sum(one.grad is not None for one in copy.deepcopy(module).parameters()) == 0
    perturb(module)
    assert_absorbs(graph, module)


# --- errors --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    graph = cast(FxGraph, build("fx", FLOAT))
    module, version, before = graph.module(), graph.version, outputs(graph)
    with pytest.raises(GraphError, match=r"not made by Graph\.module"):
        graph.absorb(nn.Sequential(module))
    with pytest.raises(GraphError, match=r"not made by Graph\.module"):
        graph.parameter(nn.Linear(2, 2), graph.outputs[0])
    other = cast(FxGraph, build("fx", FLOAT.replace("16", "12")))
    with pytest.raises(GraphError, match=r"v is float \[6, 12\], .* constant v is float \[6, 16\]"):
        graph.absorb(other.module())
    with torch.no_grad():
        next(iter(module.parameters())).fill_(torch.nan)
    with pytest.raises(GraphError, match="not finite after training"):
        graph.absorb(module)
    assert graph.version == version and all(map(torch.equal, outputs(graph), before))
    rounding = quantized("static")
    module = rounding.module()
    with torch.no_grad():
        next(iter(module.parameters())).fill_(torch.inf)
    with pytest.raises(GraphError, match="not finite after training"):
        rounding.absorb(module)
    onnx = build("onnx", FLOAT)
    for call in (onnx.module, lambda: onnx.absorb(module), lambda: onnx.parameter(module, onnx.outputs[0])):
        with pytest.raises(GraphError, match="is no module"):
            call()
