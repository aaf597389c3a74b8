"""A captured graph computes what the module does, or capture says that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture, differences
from graphopt.errors import CaptureError
from graphopt.ir.graph import Feeds, Graph
from tests.language import build

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def found(text: str, *expected: Tensor, dialect: str = "fx") -> differences.Difference | None:
    names = [f"y{place}" for place in range(len(expected))]
    return differences.found(build(dialect, text), {"x": X}, expected, names)


def test_what_agrees_is_no_difference(dialect: str) -> None:
    assert found("y = mul(x[2,4], C[]:values(2))", 2 * X, dialect=dialect) is None


def test_a_float_beyond_the_tolerance_is_an_error(dialect: str) -> None:
    difference = found("y = mul(x[2,4], C[]:values(2))", 2.001 * X, dialect=dialect)
    assert difference is not None and difference.is_error
    assert str(difference).startswith("output 'y0' is 0.00")
    difference = found("y = mul(x[2,4], C[]:values(2))", 2 * X[:1], dialect=dialect)
    assert difference == differences.Difference("output 'y0' is [2, 4] in place of [1, 4]", is_error=True)
    difference = found("y = mul(x[2,4], C[]:values(2))", torch.where(X > 0, torch.nan, 2 * X), dialect=dialect)
    assert difference is not None and difference.is_error


def test_what_amplifies_rounding_is_no_difference() -> None:
    """sin(1e4 x) moves by 1e-3 where x moves by an eps: no more can be asked."""
    text = "y = aten.sin.default(mul(x[2,4], C[]:values(10000)))"
    off = torch.sin(10000 * (X * (1 + 4 * torch.finfo(torch.float32).eps)))
    assert found(text, off) is None
    difference = found(text, off + 0.1)
    assert difference is not None and difference.is_error


def test_integers_may_differ_where_the_floats_they_come_from_agree() -> None:
    wrong = X.long()
    wrong[0, 0] += 1
    difference = found("n = cast(x[2,4], dtype=int64)\ny = relu(x)\nreturn y, n", X.relu(), wrong)
    assert difference == differences.Difference("output 'y1' differs at 1 of 8 places", is_error=False)
    difference = found("n = cast(x[2,4], dtype=int64)\nreturn n", wrong)
    assert difference is not None and difference.is_error


class _Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_capture_refuses_a_graph_that_computes_something_else(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine, or an exporter, that is wrong: here one that adds a thousandth."""

    def off(self: Graph, feeds: Feeds, fetch: Any) -> list[Tensor]:
        return [value + 1e-3 for value in right(self, feeds, fetch)]

    graph = type(capture(_Wrong(), dialect, example_inputs=X).graph)
    right = graph.evaluate
    monkeypatch.setattr(graph, "evaluate", off)
    with pytest.raises(
        CaptureError, match=rf"the {dialect} graph of .*_Wrong computes something else: output 'output' is"
    ):
        capture(_Wrong(), dialect, example_inputs=X)
    captured = capture(_Wrong(), dialect, example_inputs=X, check=False)
    assert captured.notes[-1].startswith("the captured graph does not compute what the module does: output 'output'")


def test_a_random_output_is_held_to_nothing_and_the_others_are() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(4)

    text = "y = aten.rand_like.default(x[2,4])\nz = mul(x, C[]:values(2))\nreturn y, z"
    assert found(text, X, 2 * X) is None
    difference = found(text, X, X)
    assert difference is not None and difference.is_error and "'y1'" in str(difference)
    assert graphopt.optimize(Noisy(), target="torch-cpu", example_inputs=X, measure=False).report.agreement
