"""`Optimized.module`: read, called like the original, trained further, exported again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import graphopt
from graphopt.dialects.fx.graph import FxGraph
from graphopt.numerics.metrics import within_tolerance
from graphopt.result import Optimized
from tests import models

TOKENS = {"input_ids": models.tokens(), "attention_mask": models.padding()}
COMBINED = "prune{neurons=0.25},low-rank{rank=0.5},quantize{scheme=static}"


def small(module: nn.Module, passes: str | None, example: Mapping[str, Tensor]) -> Optimized:
    return graphopt.optimize(module, passes, target="fbgemm", example_inputs=dict(example), calibration=[example])


def leaves(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def train(module: nn.Module, example: Mapping[str, Tensor], steps: int = 20) -> list[float]:
    """Push the first output to zero."""
    losses = []
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = leaves(module(**example))[0].pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_float_module_is_the_original() -> None:
    bert = models.bert()
    module = small(bert, None, TOKENS).module
    assert isinstance(module, fx.GraphModule) and not module.training
    found, expected = module(**TOKENS), bert(**TOKENS)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in bert.named_parameters()}
    own = dict(module.named_parameters())
    for name, parameter in bert.named_parameters():
        assert torch.equal(own[name], parameter) and own[name].data_ptr() != parameter.data_ptr(), name


def test_code_reads_in_module_paths() -> None:
    module = small(models.bert(), COMBINED, TOKENS).module
    code = str(module.code)
    assert "def forward(self, input_ids, attention_mask)" in code
    assert "encoder_layer_0_intermediate_dense = torch.ops.aten.linear.default(" in code
    assert 'getattr(self.encoder.layer, "0").intermediate.dense.input_rounded(' in code
    assert "return" in code and "BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state = " in code


@pytest.mark.slow
@pytest.mark.parametrize("passes", [None, COMBINED, "quantize{scheme=dynamic}"])
def test_it_trains_and_is_exported_and_optimized_again(passes: str | None) -> None:
    made = small(models.bert(), passes, TOKENS)
    module = made.module
    before = leaves(module(**TOKENS))
    for a, b in zip(leaves(made(**TOKENS)), before, strict=True):
        assert within_tolerance(a, b.detach(), rtol=0.02 if passes else 1e-4)
    module.train()
    assert not torch.equal(*(leaves(module(**TOKENS))[0] for _ in range(2)))  # dropout
    losses = train(module, TOKENS)
    assert losses[-1] < 0.9 * losses[0]
    unused = {name for name, one in module.named_parameters() if one.grad is None}
    assert all(name.startswith("pooler") for name in unused)  # the loss does not depend on it
    module.eval()
    assert torch.equal(*(leaves(module(**TOKENS))[0] for _ in range(2)))
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in TOKENS}
    program = torch.export.export(module, (), TOKENS, dynamic_shapes=shapes)
    other = {"input_ids": models.tokens(3, 9), "attention_mask": models.padding(3, 9)}
    for a, b in zip(leaves(program.module()(**other)), leaves(module(**other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = graphopt.optimize(program, target="fbgemm", example_inputs=TOKENS)
    for a, b in zip(leaves(again(**TOKENS)), leaves(module(**TOKENS)), strict=True):
        assert within_tolerance(a, b.detach(), rtol=0.02 if passes else 1e-4)
    if passes:  # the integers are found again
        count = made.report.ops_after["linear_int8"]
        assert again.report.ops_after["linear_int8"] == count


def test_dropout_and_norms_follow_the_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.fc, self.drop = nn.BatchNorm2d(3, momentum=0.3), nn.Linear(3, 64), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.drop(self.fc(self.bn(x).relu().mean((2, 3))))
            return y

    net = models.seeded(Net)
    module = small(net, None, {"x": models.images()}).module
    assert {name for name, _ in module.named_modules()} >= {"bn", "drop"}
    x = models.images(8)
    torch.testing.assert_close(module(x), net(x), rtol=1e-5, atol=1e-5)
    module.train(), net.train()
    y = module(x)
    share = (y == 0).float().mean()
    assert 0.3 < share < 0.7
    net(x)
    torch.testing.assert_close(module.bn.running_mean, net.bn.running_mean)  # type: ignore[union-attr]
    torch.testing.assert_close(module.bn.running_var, net.bn.running_var)  # type: ignore[union-attr]
    module.eval(), net.eval()
    torch.testing.assert_close(module(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", ["quantize{scheme=static}", "prune{channels=0.25},quantize{scheme=static}"])
def test_convs_train_further(passes: str) -> None:
    example = {"x": models.images()}
    made = small(models.seeded(models.ConvNet), passes, example)
    losses = train(made.module.train(), example)
    assert losses[-1] < 0.9 * losses[0]
    assert all(one.grad is not None for one in made.module.parameters())


def test_tied_weights_stay_tied() -> None:
    decoder = models.seeded(models.Decoder)
    module = small(decoder, None, {"ids": models.tokens()}).module
    names = [name for name, one in module.named_parameters() if one.shape == (models.VOCABULARY, models.WIDTH)]
    assert names == ["embedding.weight"]
    torch.testing.assert_close(module(models.tokens(3, 5)), decoder(models.tokens(3, 5)), rtol=1e-4, atol=1e-5)


def test_nested_results_and_numbers_come_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"a": (self.fc(x), [y + 1, 3]), "none": None, "same": x}

    net = models.seeded(Net)
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    found = small(net, None, {"x": x, "y": y}).module(y=y, x=x)
    (a, (b, number)), none = found["a"], found["none"]
    assert number == 3 and none is None and torch.equal(found["same"], x) and torch.equal(b, y + 1)
    torch.testing.assert_close(a, net(x, y)["a"][0])


def test_inputs_are_called_by_their_names() -> None:
    """Also by names that torch.fx would change, and by what two names have in common."""
    names = {"input": "input", "inputImage": "inputImage", "x:0": "x_0", "x.0": "x_0_", "class": "class_", "0": "v_0"}
    graph = FxGraph.empty({name: ((2,), torch.float32) for name in names})
    graph.set_outputs({f"y{index}": graph.emit("relu", value) for index, value in enumerate(graph.inputs)})
    given = {name: torch.full((2,), float(index)) for index, name in enumerate(names.values())}
    assert [float(one[0]) for one in graph.module()(**given)] == [float(index) for index in range(len(names))]
    assert [value.name for value in graph.inputs] == list(names)


def test_an_activation_that_is_rounded_twice() -> None:
    """To 8 bits for one reader, and from there to 4 bits for another."""
    graph = FxGraph.empty({"x": (("batch", 4), torch.float32)})
    scales = [graph.add_constant(torch.tensor(scale)) for scale in (0.01, 0.2)]
    (value,) = graph.inputs
    for scale, bits in zip(scales, (8, 4), strict=True):
        zero_point = graph.add_constant(torch.tensor(8, dtype=torch.uint8))
        integers = graph.emit("quantize", value, scale, zero_point, bits=bits)
        value = graph.emit("dequantize", integers, scale, zero_point, bits=bits)
    graph.set_outputs({"y": value})
    x = torch.linspace(-2, 2, 12).reshape(3, 4)
    expected = graph.evaluate({"x": x}, graph.outputs)[0]
    for learns in (False, True):
        assert torch.equal(graph.module(learn_scales=learns)(x)[0], expected)
