"""Which outputs have sizes that depend on values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.analysis.data_sizes import sized_by_data
from graphopt.capture import capture
from tests.language import build


@pytest.mark.parametrize(
    ("text", "sized"),
    [
        ("y = relu(x[batch,4])", False),
        ("y = onnx.NonZero(x[batch,4])", True),
        ("y = relu(onnx.Compress(x[batch,4], m[4]:bool))", True),
        ("y = reshape(x[batch,4], onnx.Shape(x))", False),
        ("n = cast(onnx.ReduceMax(x[4], keepdims=1), dtype=int64)\ny = onnx.ConstantOfShape(n)", True),
        ("n = onnx.Shape(onnx.NonZero(x[batch,4]))\ny = onnx.ConstantOfShape(n)", True),
        ("n = onnx.NonZero(C[4]:ones)\ny = add(x[4], cast(n, dtype=float32))", False),
    ],
)
def test_onnx(text: str, sized: bool) -> None:
    assert sized_by_data(build("onnx", text)) == [sized]


def test_a_mask_that_is_read_by_integers_keeps_its_size() -> None:
    class Net(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return mask[torch.arange(mask.shape[0])[:, None], torch.arange(2)]

    graph = capture(Net(), "fx", example_inputs=torch.ones(3, 4, dtype=torch.bool)).graph
    assert "aten.index.Tensor" in [node.kind for node in graph.nodes] and sized_by_data(graph) == [False]


def test_torch() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x * 2, torch.nonzero(x > 0), x[x > 0]

    for dialect in ("onnx", "fx"):
        graph = capture(Net(), dialect, example_inputs=torch.randn(3, 4)).graph
        assert sized_by_data(graph) == [False, True, True]
