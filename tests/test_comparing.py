"""Two models on the same batches: what is run, how outputs pair, and what the figures say."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from graphopt.comparing import compare
from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.pipeline.selectors import Selector
from graphopt.report.agreements import Agreement, agreement, worst
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


# --- sites ---------------------------------------------------------------------------------------------------------

THREE = """
    a = linear(x[batch,4], V[6,4]:seed1)
    b = relu(a)
    c = linear(b, W[6,6]:seed2)
    d = add(b, c)
    y = linear(d, U[3,6]:seed3)
"""


def changed(dialect: str, index: int, by: float, text: str = THREE) -> Graph:
    """The graph with one linear's weight multiplied."""
    graph = build(dialect, text)
    site = graph.sites("linear")[index]
    assert site.weight is not None
    weight = graph.add_constant(site.weight * by)
    graph.replace(site, graph.emit(site, site.input, weight, at=site))
    graph.sweep()
    return graph


def test_sites_show_where_error_comes_in(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.analysis.propagation.SITES_AT_ONCE", 2)
    found = compare(build(dialect, THREE), changed(dialect, 1, -1.0), BATCHES, sites=True).propagation
    assert found is not None
    assert [one.kind for one in found.sites] == ["linear", "relu", "linear", "add", "linear"]
    v, w, u = (one.weight.double().numpy() for one in build(dialect, THREE).sites("linear") if one.weight is not None)
    x = torch.cat(BATCHES).double().numpy()
    b = np.maximum(x @ v.T, 0)
    c = b @ w.T
    for at, (expected, other) in {2: (c, -c), 3: (b + c, b - c), 4: ((b + c) @ u.T, (b - c) @ u.T)}.items():
        noise = ((expected - other) ** 2).sum()
        cosine = (expected * other).sum() / math.sqrt((expected**2).sum() * (other**2).sum())
        assert found.sites[at].sqnr == pytest.approx(10 * math.log10((expected**2).sum() / noise), abs=1e-3)
        assert found.sites[at].cosine == pytest.approx(cosine, abs=1e-5)
    assert [one.sqnr for one in found.sites[:2]] == [math.inf, math.inf]
    assert [one.before for one in found.sites[:4]] == [math.inf, math.inf, math.inf, found.sites[2].sqnr]
    assert found.lost == found.sites[2] == found.noisiest
    assert not found.unpaired


def test_sites_of_a_quantized_graph_are_those_of_the_float_one(dialect: str) -> None:
    from graphopt.passes import Quantize
    from tests.language import run

    small = build(dialect, THREE)
    run(Quantize(scheme="dynamic", targets=Selector("linear")), small)
    inside = compare(build(dialect, THREE), small, BATCHES, sites=True).propagation
    assert inside is not None and inside.lost is None and not inside.unpaired
    assert [one.kind for one in inside.sites] == ["linear", "relu", "linear", "add", "linear"]
    assert all(20 < one.sqnr < 70 for one in inside.sites)


def test_what_does_not_pair_is_named(dialect: str) -> None:
    other = "a = linear(x[batch,4], V[5,4]:seed1)\ny = linear(relu(gelu(a)), U[3,5]:seed3)"
    first = "a = linear(x[batch,4], V[6,4]:seed1)\ny = linear(relu(relu(a)), U[3,6]:seed3)"
    inside = compare(build(dialect, first), build(dialect, other), BATCHES, sites=True).propagation
    assert inside is not None
    assert [one.kind for one in inside.sites] == ["linear"]
    assert Decline("result_shapes_differ", a=[2, 6], b=[2, 5]) in inside.unpaired.values()


def test_padding_is_no_part_of_a_site(dialect: str) -> None:
    graph, other = (
        build(dialect, f"""
            h = embedding(T[9,4]:{seed}, ids[batch,seq]:int64)
            y = linear(h, W[4,4]:seed2)
            m = add(mask[batch,seq]:int64, mask)
            return y, m
        """)
        for seed in ("seed1", "seed5")
    )
    tables = [one.constant(one.sites("embedding")[0].required("table")) for one in (graph, other)]
    ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])
    inside = compare(graph, other, [{"ids": ids, "mask": mask}], sites=True).propagation
    assert inside is not None
    expected, found = (table[[1, 2]].double() for table in tables if table is not None)
    sqnr = 10 * math.log10(float(expected.square().sum() / (expected - found).square().sum()))
    assert inside.sites[0].sqnr == pytest.approx(sqnr, abs=1e-4)


def test_nan_inside_is_a_lost_signal() -> None:
    found = compare(build("onnx", THREE), changed("onnx", 1, math.nan), BATCHES, sites=True).propagation
    assert found is not None and found.lost is not None
    assert found.lost == found.sites[2] == found.noisiest and math.isnan(found.lost.sqnr)


def test_sites_need_graphs() -> None:
    with pytest.raises(UsageError, match="sites are compared in graphs, and a Shifted has none"):
        compare(Shifted(0.0), build("onnx", TEXT), BATCHES, sites=True)


def test_sites_as_text_and_in_a_terminal() -> None:
    found = compare(build("onnx", THREE), changed("onnx", 1, -1.0), BATCHES, sites=True)
    lines = str(found).splitlines()
    assert any(line.split()[:2] == ["site", "op"] for line in lines)
    assert found.propagation is not None and found.propagation.lost is not None
    assert f"first below 10 dB: {found.propagation.lost.site}, -6.0 dB" in lines
    assert f"most noise is added by {found.propagation.lost.site}: it reads no noise, its result -6.0 dB" in lines
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(found)
    assert "first below 10 dB" in console.export_text()
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["propagation"]["lost"]["site"] == found.propagation.lost.site


def test_an_output_whose_size_depends_on_data_is_left_out_where_the_sizes_differ() -> None:
    chosen = "h = add(x[batch,4], C[4]:values({by}))\nn = onnx.NonZero(relu(h))\nreturn h, n"
    first, second = (build("onnx", chosen.format(by=by)) for by in (0.0, 0.5))
    found = compare(first, second, [torch.full((1, 4), -1.0), torch.tensor([[-0.2, 1.0, 1.0, 1.0]])])
    assert [one.output for one in found.outputs] == ["h", "n"] and found.left_out == {"n": 1}
    assert "not compared on 1 of them, as its size depends on data and differs: n" in str(found)
    fixed = build("onnx", "h = add(x[batch,4], C[4]:zeros)\nn = cast(concat(h, h, axis=1), dtype=int64)\nreturn h, n")
    with pytest.raises(UsageError, match="output 'n' has shape"):
        compare(fixed, build("onnx", "h = add(x[batch,4], C[4]:zeros)\nn = cast(h, dtype=int64)\nreturn h, n"), BATCHES)
