"""The damage of each site's change alone: against numpy, with refusals, shared weights, a cache, and in the report."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import graphopt
from graphopt import sensitivity as measure
from graphopt.capture.sources import capture
from graphopt.errors import PassError, UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, digest
from graphopt.numerics import metrics
from graphopt.passes import LowRank, Prune, Quantize
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.damage import Reference, scan
from graphopt.pipeline.instruments import Instrument, Progress
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.report import html, terminal
from graphopt.report.declines import Reason
from graphopt.report.records import Damage, Report, Row, Sensitivity
from tests.language import build, feeds, outputs
from tests.models import seeded

TWO = """
    a = linear(x[batch,8], A[4,8])
    b = linear(x, B[4,8])
    y = add(a, b)
"""


@dataclass(frozen=True)
class Damp(Pass):
    """Multiply the weights of linears by 1 - amount."""

    name = "damp"
    stage = Stage.PRUNE

    amount: float | PerSite = 0.5
    """How much goes."""

    strict: bool = False
    """Whether it refuses to run where it changes nothing."""

    targets: Selector = Selector("linear")
    """Sites."""

    ignore: Selector = Selector()
    """Sites to leave."""

    def run(self, graph: Graph, context: Context) -> None:
        for site in context.sites(graph, self.targets, self.ignore):
            if site.kind != "linear" or site.weight is None:
                context.decline(site, f"{site.kind} cannot be damped")
                continue
            assert isinstance(self.amount, float)
            weight = graph.add_constant(site.weight * (1 - self.amount))
            graph.replace(site, graph.emit(site, site.input, weight, site.bias, at=site))
        if self.strict and context.record.declined:
            raise UsageError("nothing to damp")


def context_of(graph: Graph, batches: int = 3, **sizes: int) -> Context:
    given = [feeds(graph, seed, **sizes) for seed in range(batches)]
    return Context(calibration=Calibration(given, graph.inputs))


def numpy_damage(expected: list[Any], found: list[Any]) -> tuple[float, float, float]:
    """SQNR over all batches, mean and worst cosine of one output, by their definitions."""
    signal, noise = (sum(float((one.astype(np.float64) ** 2).sum()) for one in side)
                     for side in (expected, [a - b for a, b in zip(expected, found, strict=True)]))  # fmt: skip
    flat = [(a.ravel(), b.ravel()) for a, b in zip(expected, found, strict=True)]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in flat]
    return 10 * math.log10(signal / noise), sum(cosines) / len(cosines), min(cosines)


def assert_close(damage: Damage | None, expected: tuple[float, float, float]) -> None:
    assert damage is not None
    assert (damage.sqnr, damage.cosine, damage.worst_cosine) == pytest.approx(expected, rel=1e-4)


# --- what is measured ----------------------------------------------------------------------------------------------


def test_equals_a_computation_by_numpy(dialect: str) -> None:
    graph = build(dialect, TWO)
    found = scan(graph, [Damp(0.5), Damp(0.25)], context_of(graph))
    first, second = graph.sites("linear")
    weights = [node.weight.numpy() for node in (first, second) if node.weight is not None]
    xs = [feeds(graph, seed)["x"].numpy() for seed in range(3)]
    expected = [x @ (weights[0] + weights[1]).T for x in xs]
    assert [(row.nodes, row.setting) for row in found.rows] == [
        ((node.name,), str(setting)) for node in (first, second) for setting in (Damp(0.5), Damp(0.25))
    ]
    for index, node in enumerate((first, second)):
        for amount in (0.5, 0.25):
            changed = [y - amount * x @ weights[index].T for x, y in zip(xs, expected, strict=True)]
            assert_close(found.of(node)[str(Damp(amount))], numpy_damage(expected, changed))
    assert found.batches == 3 and found.baseline is None


def test_a_planted_sensitive_layer_comes_first(dialect: str) -> None:
    lines = ["x0 = linear(x[batch,8], W0[8,8])"]
    lines += [f"h{i} = linear(x{i}, W{i + 1}[8,8])\nx{i + 1} = add(x{i}, h{i})" for i in range(4)]
    graph = build(dialect, "\n".join(lines))
    planted = graph.sites("linear")[3]
    assert planted.weight is not None
    loud = graph.emit(planted, planted.input, graph.add_constant(planted.weight * 50), at=planted)
    graph.replace(planted, loud)
    assert loud.producer is not None
    found = scan(graph, [Damp(0.5)], context_of(graph), sites=Selector("re:."))
    assert found.ranking()[0].nodes == (loud.producer.name,)
    ranks = [row.damage.sqnr for row in found.ranking(Damp(0.5)) if row.damage]
    assert len(ranks) == 5 and ranks == sorted(ranks)


def test_padding_is_left_out(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch,seq,4], W[4,4])\nm = cast(attention_mask[batch,seq]:int64)\nreturn y, m")
    batch = feeds(graph, batch=2, seq=5)
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    batch["x"][:, 3:] = 1e6
    found = scan(graph, [LowRank(rank=1)], Context(calibration=Calibration([batch], graph.inputs)))
    clone = graph.clone()
    run_pass(LowRank(rank=1), clone, Context(calibration=Calibration([batch], graph.inputs)))
    real = batch["attention_mask"].bool()
    expected, changed = (one.evaluate(batch, one.outputs[:1])[0][real].numpy() for one in (graph, clone))
    assert_close(found.rows[0].damage, numpy_damage([expected], [changed]))


def test_the_worst_output_counts_and_integers_do_not(dialect: str) -> None:
    graph = build(dialect, TWO + "\n    n = cast(a, dtype=int64)\n    return y, b, n")
    first, second = graph.sites("linear")
    found = scan(graph, [Damp(0.5)], context_of(graph))
    assert found.of(second)["damp"].sqnr == pytest.approx(20 * math.log10(2))  # b itself, and not y
    assert found.of(first)["damp"].sqnr < math.inf
    only = build(dialect, "n = cast(linear(x[batch,8], A[4,8]), dtype=int64)")
    context = context_of(only)
    assert scan(only, [Damp(1.0)], context).rows[0].damage == Damage(0.0, 0.0, 0.0)


def test_a_change_that_moves_nothing_is_equal(dialect: str) -> None:
    graph = build(dialect, TWO)
    for row in scan(graph, [Damp(0.0)], context_of(graph)).rows:
        assert row.damage is not None and row.damage.sqnr == math.inf
        assert (row.damage.cosine, row.damage.worst_cosine) == pytest.approx((1, 1))


def test_nan_in_an_output_is_the_worst() -> None:
    graph = build("fx", TWO)
    first, second = graph.sites("linear")
    amounts = PerSite({f"node:{first.name}": 0.9, f"node:{second.name}": math.inf})
    found = scan(graph, [Damp(amounts)], context_of(graph))
    worst = found.ranking()[0]
    assert worst.nodes == (second.name,) and worst.damage is not None and math.isnan(worst.damage.sqnr)


def test_the_outputs_of_the_reference_need_not_be_kept(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build(dialect, TWO)
    kept = scan(graph, [Damp()], context_of(graph))
    monkeypatch.setattr("graphopt.pipeline.reference.MEMORY", 0)
    assert scan(graph, [Damp()], context_of(graph)).rows == kept.rows


def test_steps_limit_what_is_compared_and_not_what_passes_see(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[batch,8], A[4,8])")
    few, wide = feeds(graph, 0), feeds(graph, 1)
    wide["x"] *= 100
    setting = Quantize(scheme="static")
    found = scan(graph, [setting], Context(calibration=Calibration([few, wide], graph.inputs)), steps=1)
    clone = graph.clone()
    run_pass(setting, clone, Context(calibration=Calibration([few, wide], graph.inputs)))
    pair = [one.evaluate(few, one.outputs)[0] for one in (graph, clone)]
    assert found.batches == 1
    assert found.of(graph.nodes[0])[str(setting)].sqnr == pytest.approx(metrics.sqnr(*pair))


def test_the_graph_is_left_as_it_was(dialect: str) -> None:
    graph = build(dialect, TWO)
    before = digest(graph), graph.version
    scan(graph, [Damp(), LowRank(rank=1), Quantize()], context_of(graph))
    assert (digest(graph), graph.version) == before


# --- one site at a time --------------------------------------------------------------------------------------------


def test_a_selector_of_a_node_selects_no_other(dialect: str) -> None:
    graph = build(dialect, TWO + "    z = linear(y, C[2,4])")
    for node in graph.nodes:  # one of them is called linear, like the op
        assert [one for one in graph.nodes if one in Selector.of(node)] == [node]
        text = str(Quantize(targets=Selector.of(node)))
        assert graphopt.pipeline.parse(text, graphopt.passes.REGISTRY).passes[0] == Quantize(targets=Selector.of(node))


class Twice(nn.Module):
    """One linear that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))
        return y


def test_sites_that_share_a_weight_change_together(dialect: str) -> None:
    graph = capture(seeded(Twice), dialect, example_inputs=torch.randn(2, 8)).graph
    found = scan(graph, [LowRank(rank=2)], context_of(graph))
    shared = tuple(node.name for node in graph.sites("linear")[:2])
    assert [(row.site, row.nodes) for row in found.rows] == [
        ("shared", shared), ("head", (graph.sites("linear")[2].name,))
    ]  # fmt: skip
    clone = graph.clone()
    run_pass(LowRank(rank=2, targets=Selector("shared")), clone, context_of(graph))
    assert found.rows[0].damage == Reference(graph, [feeds(graph, seed) for seed in range(3)]).damage(clone)


class Pair(nn.Module):
    """Two weights in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x, self.a)), self.b)


def test_labels_tell_sites_of_one_path_apart(dialect: str) -> None:
    graph = capture(nn.Sequential(seeded(Pair), nn.Linear(8, 2)), dialect, example_inputs=torch.randn(2, 8)).graph
    found = scan(graph, [LowRank(rank=1)], context_of(graph))
    first, second, _ = graph.sites("linear")
    assert [row.site for row in found.rows] == [f"0 ({first.name})", f"0 ({second.name})", "1"]
    assert len({row.damage for row in found.rows}) == 3


def test_a_value_by_site_is_that_of_the_site(dialect: str) -> None:
    graph = build(dialect, TWO)
    first = graph.sites("linear")[0]
    found = scan(graph, [Damp(PerSite({Selector.of(first).terms[0]: 0.25}))], context_of(graph))
    plain = scan(graph, [Damp(0.25)], context_of(graph))
    assert [row.nodes for row in found.rows] == [(first.name,)]
    assert found.rows[0].damage == plain.rows[0].damage


def test_sites_stand_in_for_the_targets(dialect: str) -> None:
    graph = build(dialect, TWO)
    second = graph.sites("linear")[1]
    found = scan(graph, [Damp(), LowRank(rank=1)], context_of(graph), sites=Selector.of(second))
    assert [row.nodes for row in found.rows] == [(second.name,)] * 2


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_declined_sites_have_their_reason(dialect: str, strict: bool) -> None:
    graph = build(dialect, TWO)
    setting = Damp(strict=strict, targets=Selector("linear", "add"))
    found = scan(graph, [setting], context_of(graph))
    assert [(row.damage is None, row.declined) for row in found.rows] == [
        (False, ()), (False, ()), (True, ("add cannot be damped",))
    ]  # fmt: skip
    assert len(found.ranking()) == 2 and found.of(found.rows[2].site) == {}
    assert f"{setting} declined 1 x add cannot be damped: {found.rows[2].site}" in " ".join(str(found).split())


def test_a_site_of_no_group_is_a_row_of_its_own(dialect: str) -> None:
    """A conv is in no group of neurons, and the last linear's is locked: neither ends the scan."""
    text = "h = mean(relu(conv(x[batch,3,4,4], W[8,3,1,1])), axes=[2,3], keepdim=False)"
    graph = build(dialect, text + "\ny = linear(relu(linear(h, V[8,8])), U[3,8])")
    context = Context(calibration=Calibration([feeds(graph, batch=4)], graph.inputs))
    found = scan(graph, [Prune(neurons=0.5)], context)
    assert [reason.code for row in found.rows for reason in row.declined] == ["no_group", "axis_of_output"]
    assert len([row for row in found.rows if row.damage]) == 1


def test_nothing_but_refusals(dialect: str) -> None:
    graph = build(dialect, TWO)
    found = scan(graph, [Damp(targets=Selector("add"))], context_of(graph))
    assert found.ranking() == [] and "add cannot be damped" in str(found)
    assert "add cannot be damped" in shown(found)


@pytest.mark.parametrize(
    ("settings", "sites", "reason"),
    [
        ([], None, "needs at least one setting"),
        ([graphopt.passes.Simplify()], None, "simplify has no targets"),
        ([Damp(targets=Selector("encoder"))], None, "'encoder' selects no site"),
        ([Damp(ignore=Selector("encoder"))], None, "'encoder' selects no site"),
        ([Damp()], Selector("lineer"), "'lineer' selects no site of the model; did you mean 'linear'"),
        ([Quantize(targets=Selector("linear"), ignore=Selector("linear"))], None, "selects no site"),
        ([LowRank(params=0.5)], None, "params of low-rank{params=0.5} is a budget.*such as energy=0.9 or rank=0.25"),
        ([Prune(flops=0.5)], None, "flops of prune{flops=0.5} is a budget for the whole model.*such as neurons=0.5"),
    ],
)
def test_what_cannot_be_asked(settings: list[Pass], sites: Selector | None, reason: str, dialect: str) -> None:
    graph = build(dialect, TWO)
    with pytest.raises(UsageError, match=reason):
        scan(graph, settings, context_of(graph), sites=sites)


def test_batches_are_needed(dialect: str) -> None:
    graph = build(dialect, TWO)
    with pytest.raises(UsageError, match="calibration"):
        scan(graph, [Damp()], Context())
    with pytest.raises(UsageError, match="holds no batch"):
        scan(graph, [Damp()], Context(calibration=Calibration([], graph.inputs)))
    with pytest.raises(UsageError, match="steps is 0"):
        scan(graph, [Damp()], context_of(graph), steps=0)


@pytest.mark.parametrize("figure", [math.nan, None, "0.9", True, torch.zeros(2), torch.tensor(math.nan)], ids=str)
def test_evaluate_must_give_a_number(figure: Any, dialect: str) -> None:
    graph = build(dialect, TWO)
    with pytest.raises(UsageError, match="for the unchanged model; it must return one number"):
        scan(graph, [Damp()], context_of(graph), evaluate=lambda _: figure)
    calls = iter([1.0, 1.0, figure])
    second = graph.sites("linear")[1].name
    with pytest.raises(UsageError, match=f"for damp at {second}; it must return one number"):
        scan(graph, [Damp()], context_of(graph), evaluate=lambda _: next(calls))


def test_a_pass_that_fails_names_the_site(dialect: str) -> None:
    graph = build(dialect, TWO)
    with pytest.raises(PassError, match="damp failed: AssertionError"):
        scan(graph, [Damp(amount=1)], context_of(graph))


def test_a_pass_that_cannot_run_says_so_at_once() -> None:
    graph = build("fx", TWO)
    batches = [feeds(graph)]
    context = Context(calibration=Calibration(iter(batches), graph.inputs))
    with pytest.raises(UsageError, match="a generator gives them once"):
        scan(graph, [Quantize(scheme="static")], context)
    assert scan(graph, [Damp()], Context(calibration=Calibration(iter(batches), graph.inputs))).batches == 1


# --- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_a_number", [float, torch.tensor, np.float32], ids=["float", "torch", "numpy"])
def test_the_order_is_that_of_evaluate(dialect: str, as_a_number: Callable[[float], Any]) -> None:
    graph = build(dialect, TWO)
    first, second = graph.sites("linear")
    kept = first.weight

    def evaluate(changed: Graph) -> Any:
        weights = [site.weight for site in changed.sites("linear")]
        return as_a_number(1.0 if any(torch.equal(one, kept) for one in weights if one is not None) else 0.25)  # type: ignore[arg-type]

    found = scan(graph, [Damp(0.9)], context_of(graph), evaluate=evaluate)
    assert found.baseline == 1.0
    assert [(row.nodes, row.damage.metric if row.damage else None) for row in found.ranking()] == [
        ((first.name,), 0.25), ((second.name,), 1.0)
    ]  # fmt: skip


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.body(x)))}


@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm"])
@pytest.mark.parametrize("given", [torch.from_numpy, pytest.param(np.asarray, marks=pytest.mark.slow)])
def test_evaluate_is_given_a_model_like_the_original(target: str, given: Callable[..., Any]) -> None:
    module = seeded(Classifier)
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(x))["logits"].argmax(-1).numpy()
    kinds = set()

    def accuracy(model: Any) -> float:
        logits = model(x=given(x))["logits"]
        kinds.add(type(logits))
        return float((np.asarray(logits).argmax(-1) == labels).mean())

    found = measure(
        module, ["low-rank{rank=1}", LowRank(rank=2)], calibration={"x": x}, example_inputs=torch.from_numpy(x),
        evaluate=accuracy, target=target,
    )  # fmt: skip
    assert kinds == {type(given(x))} and found.baseline == 1.0
    assert found.settings == ["low-rank{rank=1}", "low-rank{rank=2}"]
    assert [row.site for row in found.rows] == ["body", "body", "head", "head"]
    assert all(row.damage is not None and row.damage.metric is not None for row in found.rows)
    only = measure(module, LowRank(rank=1), calibration={"x": x}, example_inputs=torch.from_numpy(x), sites="head")
    assert [row.site for row in only.rows] == ["head"]


def test_the_public_function_refuses_as_optimize_does() -> None:
    module, x = seeded(Classifier), torch.zeros(2, 8)
    with pytest.raises(UsageError, match="there is no pass 'lowrank'; did you mean 'low-rank'"):
        measure(module, "lowrank", calibration=[x], example_inputs=x)
    with pytest.raises(UsageError, match="there is no target"):
        measure(module, "quantize", calibration=[x], example_inputs=x, target="onnxruntim")
    with pytest.raises(UsageError, match="sensitivity needs calibration data"):
        measure(module, "quantize", calibration=None, example_inputs=x)


# --- cache ---------------------------------------------------------------------------------------------------------


class Counted:
    """An `evaluate` that counts, and may break at one of its calls."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.calls, self.breaks_at = 0, breaks_at

    def __call__(self, graph: Graph) -> float:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise KeyboardInterrupt
        return float(graph.evaluate(feeds(graph), graph.outputs)[0].sum())


CHAIN = "\n".join([f"y{i + 1} = linear({f'y{i}' if i else 'x[batch,8]'}, W{i}[8,8])" for i in range(4)])


def test_a_second_scan_measures_nothing_again(dialect: str, tmp_path: Path) -> None:
    graph, path = build(dialect, CHAIN), tmp_path / "cache.jsonl"
    settings = [Damp(), LowRank(rank=8), LowRank(rank=1)]  # the second is declined
    first, again = Counted(), Counted()
    found = scan(graph, settings, context_of(graph), evaluate=first, cache=path)
    assert first.calls == 1 + 4 * 2 and len(path.read_text().splitlines()) == 4 * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = scan(graph.clone(), settings, context_of(graph), evaluate=again, cache=path)
    assert cached == found and cached.to_dict() == found.to_dict()
    assert again.calls == 1
    assert {reason.code for row in cached.rows for reason in row.declined} == {"pair_not_smaller"}


def test_a_cached_row_of_another_format_is_not_read(dialect: str, tmp_path: Path) -> None:
    graph, path = build(dialect, CHAIN), tmp_path / "cache.jsonl"
    path.write_text(json.dumps({"key": "of an earlier format", "declined": "rank 8 of [8, 8]"}) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan(graph, [Damp()], context_of(graph), cache=path)
    assert len(path.read_text().splitlines()) == 1 + 4


def test_an_interrupted_scan_goes_on(dialect: str, tmp_path: Path) -> None:
    graph, path = build(dialect, CHAIN), tmp_path / "cache.jsonl"
    whole = scan(graph, [Damp()], context_of(graph), evaluate=Counted())
    with pytest.raises(KeyboardInterrupt):
        scan(graph, [Damp()], context_of(graph), evaluate=Counted(breaks_at=4), cache=path)
    rest = Counted()
    assert scan(graph, [Damp()], context_of(graph), evaluate=rest, cache=path) == whole
    assert rest.calls == 1 + 2


def test_a_damaged_cache_is_measured_again_with_one_warning(dialect: str, tmp_path: Path) -> None:
    graph, path = build(dialect, CHAIN), tmp_path / "cache.jsonl"
    whole = scan(graph, [Damp()], context_of(graph), evaluate=Counted(), cache=path)
    lines = path.read_text().splitlines()
    broken = json.loads(lines[1])
    broken["damage"]["sqnr"] = None
    path.write_text("\n".join(["\x00\xff{}", "[]", '"a"', lines[0], json.dumps(broken), lines[2], lines[3][:-9]]))
    rest = Counted()
    with pytest.warns(UserWarning, match="5 of 7 rows cannot be read") as warned:
        assert scan(graph, [Damp()], context_of(graph), evaluate=rest, cache=path) == whole
    assert len(warned) == 1 and rest.calls == 1 + 2
    last = Counted()
    with pytest.warns(UserWarning, match="5 of 9 rows"):
        scan(graph, [Damp()], context_of(graph), evaluate=last, cache=path)
    assert last.calls == 1  # the row after the one that was cut off is whole


def test_infinity_and_nan_survive_the_cache(tmp_path: Path) -> None:
    graph = build("fx", TWO)
    settings = [Damp(0.0), Damp(math.inf)]
    found = scan(graph, settings, context_of(graph), cache=tmp_path / "cache")
    again = scan(graph, settings, context_of(graph), cache=tmp_path / "cache")
    assert repr(again) == repr(found) and "inf" in repr(found) and "nan" in repr(found)
    json.loads((tmp_path / "cache").read_text().splitlines()[0], parse_constant=pytest.fail)


@pytest.mark.parametrize("changed", ["weights", "batches", "calibration", "evaluate", "target"])
def test_rows_of_something_else_are_not_used(changed: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    graph = build("onnx", CHAIN)
    context, evaluate, steps = context_of(graph), Counted(), 2
    scan(graph, [Damp()], context, evaluate=evaluate, steps=steps, cache=path)
    again: Counted | None = Counted()
    match changed:
        case "weights":
            graph = build("onnx", CHAIN.replace("W0", "V0"))
        case "batches":
            steps = 3
        case "calibration":
            context = context_of(graph, batches=4)
        case "evaluate":
            again = None
        case "target":
            context.target = dataclasses.make_dataclass("Target", [("name", str, "toy")])()
    scan(graph, [Damp()], context, evaluate=again, steps=steps, cache=path)
    assert again is None or again.calls == 5
    assert len(path.read_text().splitlines()) == 8


def test_a_cache_must_be_a_file(tmp_path: Path) -> None:
    graph = build("fx", TWO)
    with pytest.raises(UsageError, match="it is a folder"):
        scan(graph, [Damp()], context_of(graph), cache=tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        scan(graph, [Damp()], context_of(graph), cache=tmp_path / "none" / "cache")


def test_digest_tells_who_reads_which_weight(dialect: str) -> None:
    graph = build(dialect, TWO)
    assert digest(graph) == digest(build(dialect, TWO)) == digest(graph.clone())
    swapped = build(dialect, "a = linear(x[batch,8], B[4,8])\nb = linear(x, A[4,8])\ny = sub(a, b)")
    straight = build(dialect, "a = linear(x[batch,8], A[4,8])\nb = linear(x, B[4,8])\ny = sub(a, b)")
    assert not torch.equal(outputs(swapped)[0], outputs(straight)[0])
    assert digest(swapped) != digest(straight)


# --- showing -------------------------------------------------------------------------------------------------------


class Steps(Instrument):
    """What a long search says of itself."""

    def __init__(self) -> None:
        self.announced: list[tuple[str, int | None]] = []
        self.steps: list[str] = []

    @contextmanager
    def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
        self.announced.append((what, steps))
        yield self.steps.append


def test_instruments_see_every_row(dialect: str) -> None:
    graph, seen = build(dialect, TWO), Steps()
    context = context_of(graph)
    context.instruments = [Instrument(), seen]
    scan(graph, [Damp()], context)
    assert seen.announced == [("sensitivity", 2)]
    assert seen.steps == [f"damp at {node.name}" for node in graph.sites("linear")]


def test_progress_shows_a_bar_and_takes_it_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(console).watch("sensitivity", 2) as advance:
        advance("damp[bold] at a")
    assert isinstance(console.file, io.StringIO)
    assert "damp[bold] at a" in console.file.getvalue() and "50%" in console.file.getvalue()
    assert console.file.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


def shown(found: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def example(metric: bool = False, settings: int = 1) -> Sensitivity:
    texts = [f"damp{{amount=0.{number}}}" for number in range(1, settings + 1)]
    rows = [
        Row(f"layer.{site}", (f"n{site}",), text, Damage(10.5 + site, 0.9, 0.8, 0.25 if metric else None))
        for site in range(12)
        for text in texts
    ]
    refused = Row("head", ("n12",), texts[0], declined=(Reason.of(Decline("told", sentence="rank 8 of [8, 8]")),))
    return Sensitivity(texts, [*reversed(rows), refused], batches=8, baseline=0.75 if metric else None)


def test_one_setting_shows_all_figures() -> None:
    lines = str(example(metric=True)).splitlines()
    assert lines[0].split() == ["site", "SQNR", "cosine", "worst", "batch", "metric"]
    assert len(lines) == 2 + 12 + 1 + 4
    plain = str(example()).splitlines()
    assert plain[2].split() == ["layer.0", "10.5", "dB", "0.90000", "0.80000"]
    assert "metric of the unchanged model: 0.75; more is better" in lines
    assert lines[-2:] == ["setting: damp{amount=0.1}", "damp{amount=0.1} declined 1 x rank 8 of [8, 8]: head"]


def test_several_settings_are_columns() -> None:
    lines = str(example(settings=2)).splitlines()
    assert lines[0].split() == ["site", "setting", "1", "setting", "2"]
    assert lines[2].split() == ["layer.0", "10.5", "dB", "10.5", "dB"]
    assert "setting 2: damp{amount=0.2}" in lines
    assert "10.5 dB  0.25" in str(example(metric=True, settings=2))


def test_the_terminal_shows_the_same() -> None:
    text = shown(example())
    assert all(f"layer.{site}" in text for site in range(12)) and "declined 1 x rank 8 of [8, 8]: head" in text


def test_the_report_of_a_pass_that_looked_holds_the_table(dialect: str) -> None:
    graph = build(dialect, TWO)
    context = context_of(graph)
    found = scan(graph, [Damp()], context)
    assert context.record.sensitivity is found
    assert context.record.declined == {} and context.report.passes == []
    context.record.name, context.record.sensitivity = "sparsify", example()
    report = Report(passes=[context.record])
    for text in (str(report), shown(report), html.fragment(report)):
        assert "layer.9" in text and "sensitivity" in text
        assert "rank 8 of [8, 8]" in text
    assert "... 2 less sensitive" in str(report) and "... 2 less sensitive" in shown(terminal.report(report))
    assert "layer.11" in html.fragment(report)
    facts = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert facts["passes"][0]["sensitivity"]["rows"][0]["damage"]["sqnr"] == 21.5


def test_to_dict_is_standard_json() -> None:
    found = Sensitivity(["damp"], [Row("a", ("n",), "damp", Damage(math.inf, 1.0, 1.0))], 1)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0]["damage"]["sqnr"] == "inf"
