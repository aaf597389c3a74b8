"""Mixed precision: which sites stay in higher precision, how many evaluations that takes, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.dialects.fx import run as fx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.numerics.observe import MinMax
from graphopt.passes import Quantize
from graphopt.passes.quantize.mixed import Goal, rank, sites_to_keep
from graphopt.pipeline.calibration import Calibration, Remembered
from graphopt.pipeline.context import Context
from graphopt.pipeline.damage import Reference, scan
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.report.records import Damage
from tests.language import build

LAYERS, WIDTH, BAD = 50, 16, 17


def chain(dialect: str, layers: int = LAYERS, bad: int | None = BAD) -> Graph:
    """Orthogonal linears, each behind a relu; the input of a bad one has a channel 3000 times smaller than the others,
    which its weight makes up for: one scale for the activation, or for a row of the weight, leaves nothing of the rest.
    """
    lines = [f"a{i} = relu(linear({f'a{i - 1}' if i else 'x[batch,16]'}, W{i}[16,16]))" for i in range(layers)]
    graph = build(dialect, "\n".join(lines))
    generator = torch.Generator().manual_seed(0)
    for index, site in enumerate(graph.sites("linear")):
        drawn = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        weight = torch.linalg.qr(drawn).Q.float() * math.sqrt(2)
        if bad is not None and index in (bad - 1, bad):
            weight[(slice(None), 3) if index == bad else 3] *= 3000 if index == bad else 1 / 3000
        graph.replace(site, graph.emit(site, site.input, graph.add_constant(weight, f"w{index}"), at=site))
    graph.sweep()
    return graph


def context_of(graph: Graph, batches: int = 4, size: int = 16) -> Context:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(size, WIDTH, generator=generator) for _ in range(batches)]
    return Context(calibration=Calibration(given, graph.inputs))


@dataclasses.dataclass
class Counted:
    """Samples that ran through graphs of a dialect."""

    samples: int = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, dialect: str) -> Counted:
    found = Counted()
    owner, name = (fx_run, "steps") if dialect == "fx" else (OnnxGraph, "evaluate")
    run = getattr(owner, name)

    def counting(graph: Any, feeds: Mapping[str, Tensor], *others: Any) -> Any:
        found.samples += len(next(iter(feeds.values())))
        return run(graph, feeds, *others)

    monkeypatch.setattr(owner, name, counting)
    return found


@pytest.mark.slow
def test_exactly_the_planted_layer_stays_within_twelve_evaluations(dialect: str, counted: Counted) -> None:
    graph = chain(dialect)
    before, context = graph.text(), context_of(graph)
    setting = Quantize(scheme="static", smooth=False, targets=Selector("linear"))
    kept = sites_to_keep(graph, setting, Goal(sqnr=15.0), context)
    assert [node.name for node in kept] == [graph.sites("linear")[BAD].name]
    assert graph.text() == before
    assert counted.samples <= 12 * 64  # two of them to calibrate
    assert "sqnr=15.0: 1 of 50 sites stay in higher precision" in context.record.notes[0]
    assert "0: SQNR" in context.record.notes[0] and "1: SQNR" in context.record.notes[0]
    (decline,) = kept.values()
    assert decline.code == "kept_for_goal" and decline.values["goal"] == "sqnr=15.0" and decline.values["sqnr"] < 15


def test_the_ranking_is_that_of_each_site_alone(dialect: str) -> None:
    graph = chain(dialect, layers=6, bad=3)
    context = context_of(graph, batches=3, size=48)
    setting = Quantize(scheme="static", smooth=False, rounding="nearest")
    ranked = rank(graph, setting, context, batches_of(context))
    alone = scan(graph, [setting], context_of(graph, batches=3, size=48))
    truth = {row.nodes: row.damage.sqnr for row in alone.rows if row.damage is not None}
    found = {tuple(node.name for node in unit.nodes): unit.sqnr for unit in ranked}
    assert found.keys() == truth.keys()
    assert next(iter(found)) == (graph.sites("linear")[3].name,)
    assert list(found.values()) == pytest.approx([truth[nodes] for nodes in found], abs=2.0)  # on a sixth


def test_where_the_batch_axis_is_fixed_sites_take_whole_batches(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[4,8,16], V[16,16])\ny = linear(transpose(a, perm=[1,0,2]), W[16,16])")
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(4, 8, 16, generator=generator) for _ in range(2)]
    context = Context(calibration=Calibration(batches, graph.inputs))
    setting = Quantize(scheme="static", smooth=False, rounding="nearest", bias_correction=False)
    ranked = rank(graph, setting, context, batches_of(context))
    for number, node in enumerate(graph.sites("linear")):
        changed = graph.clone()
        run_pass(
            dataclasses.replace(setting, targets=Selector.of(node)),
            changed, dataclasses.replace(context, record=Context().record, labels={}),
        )  # fmt: skip
        one = Reference(graph, [batches_of(context)[number]]).damage(changed).sqnr
        (unit,) = [unit for unit in ranked if unit.nodes == (node,)]
        assert unit.sqnr == pytest.approx(one, abs=1e-3)


def batches_of(context: Context) -> list[dict[str, Tensor]]:
    return list(context.batches())


def test_sites_of_one_weight_stay_together(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[batch,16], V[16,16])\nb = linear(relu(a), W[16,16])\ny = linear(b, V)")
    kept = sites_to_keep(graph, Quantize(scheme="static", smooth=False), Goal(sqnr=200.0), context_of(graph))
    assert set(kept) == set(graph.sites("linear"))
    context = context_of(graph)
    ranked = rank(graph, Quantize(scheme="static", smooth=False), context, batches_of(context))
    assert sorted(len(unit.nodes) for unit in ranked) == [1, 2]


def test_nothing_stays_where_the_goal_is_met_and_declined_sites_are_no_candidates(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[batch,16], V[16,16])\ny = linear(a, relu(W[16,16]))")
    context = context_of(graph)
    assert sites_to_keep(graph, Quantize(scheme="static", smooth=False), Goal(cosine=0.9), context) == {}
    assert "cosine=0.9: 0 of 1 sites" in context.record.notes[0]


def test_ignored_sites_are_no_candidates_and_by_site_options_hold(dialect: str) -> None:
    graph = chain(dialect, layers=4, bad=1)
    names = [node.name for node in graph.sites("linear")]
    setting = Quantize(scheme={f"node:{names[0]}": "dynamic", "linear": "static"}, ignore=Selector(f"node:{names[1]}"))
    context = context_of(graph)
    ranked = rank(graph, setting, context, batches_of(context))
    assert {node.name for unit in ranked for node in unit.nodes} == {names[0], names[2], names[3]}


def test_the_users_measure_decides(dialect: str) -> None:
    graph = chain(dialect, layers=6, bad=3)
    context = context_of(graph)
    batches = batches_of(context)
    expected = [graph.evaluate(feeds, graph.outputs)[0] for feeds in batches]

    def evaluate(changed: Graph) -> float:
        found = [changed.evaluate(feeds, changed.outputs)[0] for feeds in batches]
        return 1 - float(sum(((a - b).norm() / a.norm()) for a, b in zip(expected, found, strict=True)))

    context.evaluate = evaluate
    kept = sites_to_keep(graph, Quantize(scheme="static", smooth=False), Goal(max_drop=0.5), context)
    assert list(kept) == [graph.sites("linear")[3]]
    assert "(metric of the unchanged model 1)" in context.record.notes[0]


def test_goals() -> None:
    damage = Damage(sqnr=30.0, cosine=0.99, worst_cosine=0.9, metric=70.0)
    assert Goal(sqnr=30.0, cosine=0.99, max_drop=0.5).met(damage, 70.5)
    assert not Goal(max_drop=0.4).met(damage, 70.5)
    assert not Goal(sqnr=30.1).met(damage, None) and not Goal(cosine=0.991).met(damage, None)
    assert not Goal(sqnr=1.0).met(dataclasses.replace(damage, sqnr=math.nan), None)
    assert str(Goal(sqnr=30, max_drop=0.5)) == "sqnr=30 max_drop=0.5"
    assert not Goal().asked and Goal(cosine=0.5).asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sqnr": "high"}, "sqnr is 'high'; give a number or none"),
        ({"sqnr": math.nan}, "sqnr is nan"),
        ({"cosine": 1.5}, "cosine is 1.5; give a number of at least -1 and at most 1 or none"),
        ({"max_drop": -1}, "max_drop is -1; give a number of at least 0 or none"),
        ({"max_drop": True}, "max_drop is True"),
    ],
)
def test_no_such_goal(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantize(**options)


def test_refuses_a_goal_that_nothing_measures() -> None:
    graph = chain("onnx", layers=2, bad=None)
    with pytest.raises(UsageError, match="quantize: sqnr=30 is measured on batches: pass calibration="):
        sites_to_keep(graph, Quantize(), Goal(sqnr=30), Context())
    with pytest.raises(UsageError, match="quantize: max_drop=1 needs a measure of quality: pass evaluate="):
        sites_to_keep(graph, Quantize(), Goal(max_drop=1), context_of(graph))


def test_statistics_are_remembered_for_clones() -> None:
    graph = chain("onnx", layers=2, bad=None)
    given = context_of(graph).batches()
    remembered, value = Remembered(given), graph.sites("linear")[1].input
    (first,) = remembered.observe(graph, [(value, MinMax())])
    clone = graph.clone()
    (same,) = remembered.observe(clone, [(clone.sites("linear")[1].input, MinMax())])
    assert same is first
    (plain,) = given.observe(graph, [(value, MinMax())])
    assert first.range() == plain.range()
    (other,) = remembered.observe(graph, [(graph.inputs[0], MinMax())])
    assert other is not first


# --- in the pass ---------------------------------------------------------------------------------------------------


def test_quantize_leaves_the_planted_layer_in_float_and_says_why(dialect: str, counted: Counted) -> None:
    graph = chain(dialect, layers=8, bad=3)
    original, site, context = graph.clone(), graph.sites("linear")[3], context_of(graph)
    setting = Quantize(scheme="static", smooth=False, sqnr=15)
    run_pass(setting, graph, context)
    assert counted.samples == (2 + 1 + 2 + 4) * 64  # calibration, unchanged, ranking; and with 0, 4, 2 and 1 kept
    assert str(setting) == "quantize{scheme=static smooth=false sqnr=15}"
    record = context.report.passes[0]
    assert list(record.declined) == [site.label]
    assert record.declined[site.label].code == "kept_for_goal"
    assert len(record.eligible) == 8 and record.changed == 7
    assert Reference(original, batches_of(context)).damage(graph).sqnr >= 15
    assert len(graph.sites("quantize")) == 7


def test_optimize_takes_the_users_measure(tmp_path: Path) -> None:
    graph = chain("onnx", layers=6, bad=3)
    graph.save(tmp_path / "chain.onnx")
    batches = [feeds["x"] for feeds in batches_of(context_of(graph))]
    seen: list[float] = []

    def evaluate(model: Any) -> float:
        found = [model(x)["a5"] for x in batches]
        expected = [graph.evaluate({"x": x}, graph.outputs)[0] for x in batches]
        seen.append(1 - float(sum((a - b).norm() / a.norm() for a, b in zip(expected, found, strict=True))))
        return seen[-1]

    setting = Quantize(scheme="static", smooth=False, max_drop=0.5)
    small = graphopt.optimize(tmp_path / "chain.onnx", setting, calibration=batches, evaluate=evaluate)
    record = next(one for one in small.report.passes if one.name == "quantize")
    assert len(record.declined) == 1 and record.changed == 5
    assert seen[0] == 1 and len(seen) == 4  # the unchanged model; with none kept, with 3, and with 1
    with pytest.raises(UsageError, match="quantize: max_drop=1 needs a measure of quality: pass evaluate="):
        graphopt.optimize(tmp_path / "chain.onnx", "quantize{max_drop=1}", calibration=batches)


def test_where_all_must_stay_nothing_is_quantized() -> None:
    graph = chain("onnx", layers=2, bad=None)
    before, context = graph.text(), context_of(graph)
    run_pass(Quantize(scheme="static", smooth=False, sqnr=500), graph, context)
    assert graph.text() == before
    assert "sqnr=500: 2 of 2 sites stay in higher precision, which is all" in context.report.passes[0].notes[0]
