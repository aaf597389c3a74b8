"""Two models on the same batches: what is run, how outputs pair, and what the figures say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.compare import agreement, compare, worst
from graphopt.pipeline import UsageError
from graphopt.report import Agreement
from tests.language import build

TEXT = "y = linear(x[batch,4], W[3,4]:seed1)"
BATCHES = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


class Shifted(nn.Module):
    """Adds to every entry."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Named(Shifted):
    def forward(self, x: Tensor) -> Any:
        return {"logits": x + self.by, "hidden": (x, [2 * x], None)}


def test_a_graph_equals_itself(dialect: str) -> None:
    graph = build(dialect, TEXT)
    found = compare(graph, graph.clone(), BATCHES)
    (one,) = found.outputs
    assert (one.sqnr, one.max_error, one.top1, found.batches) == (math.inf, 0.0, 1.0, 3)
    assert one.cosine == pytest.approx(1)


def test_figures_are_those_of_the_definition() -> None:
    found = compare(Shifted(0.0), Shifted(0.5), BATCHES)
    (one,) = found.outputs
    noise = 8 * 0.25
    assert one.sqnr == pytest.approx(min(10 * math.log10(float(x.double().square().sum()) / noise) for x in BATCHES))
    flat = [(x.flatten().numpy(), (x + 0.5).flatten().numpy()) for x in BATCHES]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in flat]
    assert one.cosine == pytest.approx(min(cosines), rel=1e-5)
    assert one.max_error == pytest.approx(0.5, rel=1e-6)
    assert one.output == "output" and one.top1 == 1.0


def test_top1_is_over_all_rows() -> None:
    class Flipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x if len(x) == 2 else x

    found = compare(Shifted(0.0), Flipped(), [torch.eye(2), torch.eye(6), torch.eye(2)])
    assert found.outputs[0].top1 == pytest.approx(6 / 10)
    assert compare(Shifted(0.0), Shifted(0.0), [torch.ones(3)]).outputs[0].top1 is None


def test_nested_outputs_are_named_by_where_they_are() -> None:
    found = compare(Named(0.0), Named(1.0), BATCHES)
    assert [one.output for one in found.outputs] == ["logits", "hidden_0", "hidden_1_0"]
    assert found.outputs[1].sqnr == math.inf


@pytest.mark.parametrize("batch", [torch.ones(2, 4), (torch.ones(2, 4),), {"x": torch.ones(2, 4)}])
def test_modules_take_batches_as_they_come(batch: Any) -> None:
    assert compare(Shifted(0.0), Shifted(0.0), [batch]).outputs[0].sqnr == math.inf


def test_a_module_against_a_graph_whose_inputs_have_other_names() -> None:
    graph = build("onnx", "y = add(a[batch,4], b[batch,4])")

    class Sum(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    batches = [{"a": BATCHES[0], "b": BATCHES[1].double()}]
    assert compare(Sum(), graph, batches).outputs[0].sqnr == math.inf


def test_a_path_and_an_optimized_model(tmp_path: Path) -> None:
    import graphopt

    path = tmp_path / "model.onnx"
    build("onnx", TEXT).save(path)
    small = graphopt.optimize(str(path))
    (one,) = compare(str(path), small, BATCHES).outputs
    assert one.output == "y" and one.sqnr > 100


def test_steps_limit_the_batches() -> None:
    assert compare(Shifted(0.0), Shifted(0.0), BATCHES, steps=2).batches == 2
    assert compare(build("onnx", TEXT), build("onnx", TEXT), BATCHES, steps=1).batches == 1


@pytest.mark.parametrize(
    ("a", "b", "batches", "message"),
    [
        (Shifted(0), Shifted(0), [], "there is no batch to compare on"),
        (Shifted(0), Shifted(0), torch.ones(2), "must be an iterable of batches, not one Tensor"),
        (Shifted(0), Shifted(0), 3, "must be an iterable of batches"),
        (Shifted(0), Named(0), BATCHES, "the outputs do not pair: output and logits, hidden_0, hidden_1_0"),
        (Shifted(0), nn.Flatten(0), BATCHES, r"output 'output' has shape \[2, 4\] in one model and \[8\]"),
        (Shifted(0), "text".split, BATCHES, "cannot compare a builtin_function_or_method"),
    ],
)
def test_refuses(a: Any, b: Any, batches: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(a, b, batches)


def test_a_result_without_tensors_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(UsageError, match="returns a NoneType without a tensor"):
        compare(Silent(), Silent(), BATCHES)


def test_worst_takes_each_figure_and_holds_nan_for_worse() -> None:
    seen = [Agreement("y", 30.0, 0.9, 1.0), Agreement("y", 20.0, 0.95, 3.0)]
    assert worst(seen) == Agreement("y", 20.0, 0.9, 3.0)
    figures = worst([*seen, Agreement("y", math.nan, math.nan, math.nan), seen[0]])
    assert all(map(math.isnan, (figures.sqnr, figures.cosine, figures.max_error)))


def test_agreement_of_different_shapes_is_an_error() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        agreement("y", torch.ones(2), torch.ones(3))


def test_comparison_as_text() -> None:
    lines = str(compare(Named(0.0), Named(0.0), BATCHES)).splitlines()
    assert lines[0].split() == ["output", "SQNR", "cosine", "max", "error", "top-1"]
    assert lines[2].split() == ["logits", "equal", "1.00000", "0", "100.0", "%"]
    assert lines[-1] == "over 3 batches; SQNR and cosine are of the worst"
