"""Modules that draw random numbers: captured at an opset that the engine runs, never frozen, the rest exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.kernels import newest_opset
from tests.models import model, seeded

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda y: y + torch.randn_like(y),
    "rand": lambda y: y + torch.rand(y.shape[0], 8),
    "randint": lambda y: y + torch.randint(0, 50, y.shape),
    "bernoulli": lambda y: y * torch.bernoulli(torch.sigmoid(y)),
    "multinomial": lambda y: y.gather(1, torch.multinomial(torch.softmax(y, -1), 1)),
    "dropout": lambda y: F.dropout(y, 0.5, training=True),
}


class Drawing(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x)
        return y, DRAWS[self.kind](y)


@pytest.mark.parametrize("kind", DRAWS)
def test_a_module_that_draws_stays_random_and_its_rest_exact(kind: str) -> None:
    module, x = seeded(lambda: Drawing(kind)), torch.randn(64, 8)
    small = graphopt.optimize(module, "quantize{scheme=dynamic}", example_inputs=x)
    assert next(one for one in small.report.passes if one.name == "quantize").changed == 1
    assert not any("does not compute" in note for note in small.report.notes)
    first, second = small(x), small(x)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    torch.testing.assert_close(first[0], module(x)[0], rtol=0, atol=0.05)


def test_the_newest_opset_with_a_kernel_for_each_operator_is_found() -> None:
    plain = OnnxGraph.from_model(model("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }", opset=23))
    assert newest_opset(plain.model) == 23
    text = "g (float[n,4] x) => (float[n,4] y) { r = RandomNormalLike(x)  y = Add(x, r) }"
    assert newest_opset(OnnxGraph.from_model(model(text, opset=23)).model) == 21


def test_a_file_is_lifted_as_far_as_the_engine_runs_it() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { r = RandomNormalLike(x)  z = Relu(x)  y = Mul(z, r) }"
    small = graphopt.optimize(model(text, opset=15), example_inputs={"x": torch.randn(2, 4)})
    assert isinstance(small.captured, OnnxGraph) and small.captured.opset == 21
