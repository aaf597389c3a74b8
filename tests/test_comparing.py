"""Two models on the same batches: what is run, how outputs pair, and what the figures say."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from graphopt.api import optimize
from graphopt.comparing import compare
from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph
from graphopt.ir.scaled import Scaled, dumps, loads
from graphopt.numerics.fold import fold_batch_norm
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize.channel_scaling import Scalable, rescale, scalable
from graphopt.pipeline.selectors import Selector
from graphopt.report.agreements import Agreement, agreement, worst
from tests.language import build, run

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


# --- sites that mean something else --------------------------------------------------------------------------------

NETWORKS = {
    "norm": """
        h = layer_norm(x[batch,4], G[4]:seed1, B[4]:seed2)
        a = linear(h, W[6,4]:seed3)
        y = linear(relu(a), V[3,6]:seed4)
    """,
    "linear": """
        a = linear(x[batch,4], W[6,4]:seed1, B[6]:seed2)
        r = relu(a)
        y = linear(r, V[5,6]:seed3)
    """,
    "gate": """
        u = linear(x[batch,4], W[6,4]:seed1)
        g = silu(linear(x, U[6,4]:seed2))
        h = mul(g, u)
        y = linear(h, V[5,6]:seed3)
    """,
}


def equalized(graph: Graph, sizes: Sequence[float]) -> Graph:
    """A clone whose channels are scaled wherever they can be."""
    clone = graph.clone()
    found = [one for site in clone.sites("linear") if isinstance(one := scalable(site), Scalable)]
    assert found
    rescale(clone, [(one, torch.tensor((list(sizes) * 9)[: one.channels])) for one in found])
    clone.sweep()
    return clone


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=3, deadline=None)
@given(sizes=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_what_was_scaled_is_compared_without_that(network: str, sizes: list[float]) -> None:
    for dialect in ("fx", "onnx"):
        graph = build(dialect, NETWORKS[network])
        other = equalized(graph, sizes)
        for a, b in ((graph, other), (other, graph), (other, equalized(other, sizes))):
            inside = compare(a, b, BATCHES, sites=True).propagation
            assert inside is not None and not inside.unpaired
            assert all(one.alike and one.sqnr > 60 for one in inside.sites), inside.sites


def test_a_file_keeps_what_was_scaled(tmp_path: Path) -> None:
    graph = build("onnx", NETWORKS["linear"])
    other = equalized(graph, [0.01, 30.0, 5.0])
    graph.save(tmp_path / "model.onnx")
    other.save(tmp_path / "equalized.onnx")
    small = optimize(tmp_path / "equalized.onnx", measure=False, example_inputs=BATCHES[0])
    small.export(tmp_path / "small.onnx")
    for path in ("equalized.onnx", "small.onnx"):
        inside = compare(tmp_path / "model.onnx", tmp_path / path, BATCHES, sites=True).propagation
        assert inside is not None and len(inside.sites) == 3
        assert all(one.alike and one.sqnr > 60 for one in inside.sites), inside.sites


@given(st.dictionaries(
    st.tuples(st.text(max_size=9), st.text(max_size=9), st.integers(0, 99)),
    st.builds(Scaled, st.lists(st.floats(2**-99, 2**99, width=32), min_size=1, max_size=5).map(torch.tensor),
              st.sampled_from([1, -1])),
))  # fmt: skip
def test_scales_are_read_as_they_were_written(scales: dict[Any, Scaled]) -> None:
    found = loads(dumps(scales))
    assert found.keys() == scales.keys()
    assert all(torch.equal(found[place].factors, one.factors) and found[place].axis == one.axis
               for place, one in scales.items())  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[1]", "null", '[["linear", "a", 0, 1, "?"]]', '[["linear", "a", 0, 2, "AACAPw=="]]',
        '[["linear", "a", 0, 1, "AACAvw=="]]', '[["linear", "a", 0, 1, "AAA="]]',
    ],
)  # fmt: skip
def test_metadata_that_says_nothing_is_not_read(text: str) -> None:
    assert loads(text) == {}


@pytest.mark.parametrize("quantized", [False, True])
def test_smoothed_sites_raise_no_alarm(quantized: bool) -> None:
    graph = build("onnx", NETWORKS["norm"])
    loud = [batch * torch.tensor([1.0, 50.0, 1.0, 0.1]) for batch in BATCHES]
    (norm,) = graph.sites("layer_norm")
    other = equalized(graph, [40.0, 0.1, 3.0, 1.0])
    if quantized:
        run(Quantize(targets=Selector("linear"), smooth=False), other, calibration=loud)
    inside = compare(graph, other, loud, sites=True).propagation
    assert inside is not None and inside.lost is None and not inside.unpaired
    assert inside.sites[0].site == norm.label and inside.sites[0].sqnr > 100


def test_a_permuted_linear_is_not_alike_and_raises_no_alarm(dialect: str) -> None:
    graph, order = build(dialect, THREE.replace("d = add(b, c)", "d = relu(c)")), torch.tensor([3, 0, 5, 1, 2, 4])
    other = graph.clone()
    first, second, _ = other.sites("linear")
    for site, weight in ((first, first.weight[order]), (second, second.weight[:, order])):  # type: ignore[index]
        other.replace(site, other.emit(site, site.input, other.add_constant(weight), at=site))
    found = compare(graph, other, BATCHES, sites=True)
    inside = found.propagation
    assert inside is not None and inside.lost is None
    assert [one.alike for one in inside.sites] == [False, False, True, True, True]
    assert inside.noisiest is None or inside.noisiest.alike
    assert all(one.before == math.inf for one in inside.sites[:3])
    lines = str(found).splitlines()
    assert sum("dB)" in line for line in lines) == 2
    assert any(line.startswith("in brackets: the sites that read it agree") for line in lines)


def test_noise_that_stays_is_an_alarm(dialect: str) -> None:
    inside = compare(build(dialect, THREE), changed(dialect, 0, -1.0), BATCHES, sites=True).propagation
    assert inside is not None and all(one.alike for one in inside.sites)
    assert inside.lost == inside.sites[0]


def test_a_site_that_is_returned_is_alike_whatever_reads_it(dialect: str) -> None:
    text = "a = linear(x[batch,4], W[6,4]:seed1)\ny = linear(a, V[3,6]:seed2)\nreturn a, y"
    graph, order = build(dialect, text), torch.tensor([3, 0, 5, 1, 2, 4])
    other = graph.clone()
    first, second = other.sites("linear")
    for site, weight in ((first, first.weight[order]), (second, second.weight[:, order])):  # type: ignore[index]
        other.replace(site, other.emit(site, site.input, other.add_constant(weight), at=site))
    inside = compare(graph, other, BATCHES, sites=True).propagation
    assert inside is not None and inside.lost == inside.sites[0] and inside.sites[0].alike


def test_a_conv_is_compared_behind_the_batch_norm_that_the_other_has_folded(dialect: str) -> None:
    norm = "G[3]:seed3, B[3]:seed4, M[3]:seed5, V[3]:ones"
    conv = "stride=[1,1], padding=[0,0,0,0], dilation=[1,1])"
    graph = build(dialect, f"""
        c = conv(x[batch,2,4,4], W[3,2,1,1]:seed1, -, {conv}
        n = batch_norm(c, {norm})
        y = conv(relu(x), W, -, {conv}
        return n, y
    """)  # whose weight has two readers, so that the norm is not folded
    other = graph.clone()
    (site, _), (behind,) = other.sites("conv"), other.sites("batch_norm")
    constants = [other.constant(value) for value in behind.operands[1:] if value is not None]
    folded = fold_batch_norm(site.weight, None, *constants, behind.attributes["eps"])  # type: ignore[arg-type, call-arg]
    stored = [other.add_constant(tensor) for tensor in folded]
    other.replace(behind, other.emit(site, site.input, *stored, at=site))
    other.sweep()
    batches = [torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))]
    for a, b in ((graph, other), (other, graph)):
        inside = compare(a, b, batches, sites=True).propagation
        assert inside is not None
        assert [(one.kind, one.sqnr > 60) for one in inside.sites] == [("conv", True), ("relu", True), ("conv", True)]


@dataclass
class Scores:
    first: Tensor
    parts: list[Tensor]


class ReturnsScores(nn.Module):
    def forward(self, x: Tensor) -> Scores:
        return Scores(x + 1, [x * 2])


def test_the_tensors_in_a_dataclass_are_compared() -> None:
    small = optimize(ReturnsScores(), example_inputs=torch.ones(2, 3))
    found = compare(ReturnsScores(), small, [torch.ones(2, 3)])
    assert [one.output for one in found.outputs] == ["first", "parts_0"]
