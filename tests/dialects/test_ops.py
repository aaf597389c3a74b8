"""Ops that hold in either dialect: the same text in both, variadic patterns, pools that no engine spells."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.fx.graph import FxGraph
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, rewrite
from tests.language import assert_outputs_equal, build, feeds, listing, outputs, weight_of


def test_text_is_the_same_in_both_dialects() -> None:
    text = """
        c = conv(x[2,3,9,9], W[4,3,3,3], stride=[2,2], padding=[1,0,1,0])
        m = max_pool(clip(c, low=0.0, high=6.0), kernel=[3,3], stride=[1,1], padding=[1,0,1,0], dilation=[1,1])
        a = average_pool(leaky_relu(c, slope=0.2), kernel=[3,3], stride=[1,1], padding=[1,0,1,0], include_pad=True)
        j = concat(hard_swish(m), hard_sigmoid(a), m, axis=1)
        p = pad(j, padding=[0,0,1,0,0,0,0,-1], value=0.5)
        y = squeeze(unsqueeze(mean(p, axes=[2,3]), axes=[2]), axes=[-1])
        return y
    """
    onnx, fx = build("onnx", text), build("fx", text)
    assert onnx.text() == fx.text()
    torch.testing.assert_close(outputs(onnx), outputs(fx), rtol=1e-5, atol=1e-5)


def _joined(op: Recorder, x: Any, y: Any) -> Pattern:
    return op.concat(op.relu(x), op.relu(y), axis=1)


def _relu_last(op: Builder, m: Match) -> Any:
    return op.relu(op.concat(m.x, m.y, axis=1))


def test_a_pattern_of_a_variadic_op_matches_as_many_operands(dialect: str) -> None:
    text = """
        two = concat(relu(x[2,3]), relu(z[2,1]), axis=1)
        three = concat(relu(x), relu(z), relu(x), axis=1)
        one = concat(relu(x), axis=1)
        rows = concat(relu(x), relu(x))
        return two, three, one, rows
    """
    graph, original = build(dialect, text), build(dialect, text)
    logs = rewrite(graph, [Rule("relu-last", _joined, _relu_last)])
    graph.sweep()
    assert logs["relu-last"].hits == 1
    assert listing(graph)[:2] == ["%0 = concat(x[2,3], z[2,1], axis=1)", "%1 = relu(%0[2,4])"]
    assert_outputs_equal(graph, original)


UNEVEN = [
    "max_pool(x[2,3,h,6], kernel=[2,3], stride=[2,2], padding=[0,1,1,0])",
    "max_pool(x[2,3,h,6], kernel=[2,3], stride=[2,2], padding=[0,1,1,0], ceil=True)",
    "max_pool(x[2,3,h,6], kernel=[3,3], stride=[1,1], padding=[2,2,2,2])",
    "average_pool(x[2,3,h,6], kernel=[2,3], stride=[2,2], padding=[0,1,1,0])",
    "average_pool(x[2,3,h,6], kernel=[2,3], stride=[2,2], padding=[0,1,1,0], ceil=True, include_pad=True)",
]


@pytest.mark.parametrize("text", UNEVEN)
@pytest.mark.parametrize("height", [5, 8])
def test_a_pool_that_pads_as_aten_cannot(text: str, height: int, tmp_path: Path) -> None:
    """It runs as ONNX Runtime has it, keeps its dynamic axis, and is saved and read."""
    graph = build("fx", "y = " + text)
    assert isinstance(graph, FxGraph)
    inputs = feeds(graph, h=height)
    assert len(graph.nodes) == 1 and graph.inputs[0].shape == (2, 3, "h", 6)
    torch.testing.assert_close(outputs(graph, inputs), outputs(build("onnx", "y = " + text), inputs))
    graph.save(tmp_path / "graph.pt2")
    loaded = FxGraph.load(tmp_path / "graph.pt2")
    assert loaded.text() == graph.text()
    assert torch.equal(outputs(loaded, inputs)[0], outputs(graph, inputs)[0])


def test_gradients_go_through_a_pool_that_pads_as_aten_cannot() -> None:
    graph = build("fx", "y = average_pool(x[1,1,5,5], kernel=[2,2], stride=[2,2], padding=[0,1,1,0], include_pad=True)")
    inputs = feeds(graph)

    def loss(results: list[Tensor]) -> Tensor:
        return (results[0] ** 2).sum()

    x = inputs["x"].clone().requires_grad_()
    expected = torch.autograd.grad((F.avg_pool2d(F.pad(x, (1, 0, 0, 1)), 2) ** 2).sum(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = graph.gradients(inputs, loss, [graph.inputs[0]])
    torch.testing.assert_close(found, list(expected))


def test_a_conv_that_pads_its_ends_differently_keeps_its_dynamic_axes() -> None:
    graph = build("fx", "y = conv(x[batch,3,h,6], W[4,3,3,3], stride=[2,1], padding=[0,1,1,0])")
    assert graph.inputs[0].shape == ("batch", 3, "h", 6)
    assert graph.outputs[0].shape is not None and graph.outputs[0].shape[:2] == ("batch", 4)
    wide = feeds(graph, batch=2, h=9)
    expected = F.conv2d(F.pad(wide["x"], (1, 0, 0, 1)), weight_of(graph.sites("conv")[0]), stride=(2, 1))
    torch.testing.assert_close(outputs(graph, wide)[0], expected, rtol=1e-5, atol=1e-5)
