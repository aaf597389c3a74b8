"""A matmul whose weight is constant once constants are folded is a linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Product(nn.Module):
    """x times what `weight` makes of a matrix and a low-rank update, plus a row."""

    def __init__(self, weight: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = weight
        self.w, self.a, self.b, self.row = (
            nn.Parameter(torch.randn(shape)) for shape in ((8, 6), (8, 2), (2, 6), (6,))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.make(self.w, self.a, self.b) + self.row


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "updated": lambda w, a, b: w + a @ b,
    "in 16 bits": lambda w, a, b: w.half().float(),
    "an axis of one": lambda w, a, b: (w * 2)[None],
    "reshaped": lambda w, a, b: w.reshape(1, 8, 6),
    "scaled": lambda w, a, b: w / w.norm(dim=0, keepdim=True),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_of_folded_constants_is_a_linear(name: str) -> None:
    torch.manual_seed(0)
    module = Product(WEIGHTS[name]).eval()
    graph = capture(module, "fx", example_inputs=X).graph
    assert [node.kind for node in graph.nodes if node.kind != "transpose"] == ["linear"]
    (site,) = graph.sites("linear")
    assert site.weight is not None and site.weight.shape == (6, 8) and site.bias is not None
    torch.testing.assert_close(graph.evaluate({"x": X}, graph.outputs)[0], module(X), rtol=1e-5, atol=1e-5)


def test_a_weight_of_several_matrices_stays_a_matmul() -> None:
    torch.manual_seed(0)
    module = Product(lambda w, a, b: torch.stack([w, 2 * w])).eval()
    assert [node.kind for node in capture(module, "fx", example_inputs=X).graph.nodes] == ["matmul", "add"]
