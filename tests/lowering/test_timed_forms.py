"""Which form of a choice runs. The engine is real; timing is scripted, so that nothing here takes time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Replace
from graphopt.lowering.timed_forms import GIVE_UP_BELOW, MIN_BLOCK_SECONDS, ROUNDS, Subgraph, TimedChooser
from graphopt.measure import machine, timing
from graphopt.measure.cache import UNSURE, Timings
from graphopt.measure.timing import Ratio, Ratios
from graphopt.report.records import Report
from tests.language import build
from tests.models import ConvNet, images, seeded

TEXT = """
    a = relu(linear(x[batch,16], W[16,16]))
    b = relu(linear(a, V[16,16]))
    y = relu(linear(b, U[4,16]))
"""
X = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


def _maximum(op: Builder, m: Match) -> Value:
    return op("onnx.Max", m.x, op.constant(torch.tensor(0.0)))


def _clip(op: Builder, m: Match) -> Value:
    return op("onnx.Clip", m.x, op.constant(torch.tensor(0.0)))


def _unknown(op: Builder, m: Match) -> Value:
    return op("com.microsoft.NoSuchOperator", m.x)


def _out_of_range(op: Builder, m: Match) -> Value:
    """Loads, and fails when it runs."""
    return op("onnx.Gather", m.x, op.constant(torch.tensor([10**6, 0])), axis=0)


def _wrong(op: Builder, m: Match) -> Value:
    return op.tanh(m.x)


def _nan(op: Builder, m: Match) -> Value:
    return op("onnx.Sqrt", op("onnx.Sub", op.constant(torch.tensor(-1.0)), op("onnx.Abs", m.x)))


def _declines(op: Builder, m: Match) -> Value:
    raise Declined("not on a Tuesday")


FORMS: dict[str, Replace | None] = {"Max": _maximum, "Relu": None, "Clip": _clip}


def rectifier(**forms: Replace | None) -> Choice:
    return Choice("rectifier", lambda op, x: op.relu(x), forms or FORMS)


@dataclass
class Judge:
    """In place of `timing.paired_calls`: runs each candidate once, and gives the ratios that it was told."""

    speeds: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    steady: bool = True
    rounds: Mapping[str, int] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    told: dict[str, Ratios] = field(default_factory=dict)
    until: Callable[[Ratios], bool] | None = None
    calls: list[int] = field(default_factory=list)

    def __call__(
        self, candidates: Mapping[str, Sequence[Callable[[], object]]], *, baseline: str, rounds: int, **options: Any
    ) -> dict[str, Ratios]:
        assert (baseline, rounds) == (next(iter(candidates)), ROUNDS)
        assert (options["min_block_seconds"], options["give_up_below"]) == (MIN_BLOCK_SECONDS, GIVE_UP_BELOW)
        self.asked.append(list(candidates))
        self.calls += [len(several) for several in candidates.values()]
        for several in candidates.values():
            for call in several:
                call()
        found = {name: self.speeds.get(name, (1.0, 1.0, 1.0)) for name in candidates}
        self.until = options["until"]
        self.told = {
            name: Ratios(Ratio(*one, self.rounds.get(name, rounds), 0, {}, self.steady), ())
            for name, one in found.items()
        }
        return self.told


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judge]:
    def install(
        speeds: Mapping[str, tuple[float, float, float]] | None = None,
        steady: bool = True,
        rounds: Mapping[str, int] | None = None,
    ) -> Judge:
        judge = Judge(speeds or {}, steady, rounds or {})
        monkeypatch.setattr(timing, "paired_calls", judge)
        return judge

    return install


def lowered(
    folder: Path, choice: Choice, feeds: Sequence[Mapping[str, Tensor]] = ({"x": X},), **options: Any
) -> tuple[Graph, TimedChooser]:
    """The graph of TEXT with one choice made by measuring."""
    target, graph = OnnxRuntime(), build("onnx", TEXT)
    values: dict[str, Any] = {"engine": "engine 1.0", "feeds": feeds, "compile": target.compile} | options
    chooser = TimedChooser(**values, timings=Timings(folder / "timings.sqlite"))
    made, _ = _Rectifies(choice).lower(graph, chooser)
    for one in feeds:
        torch.testing.assert_close(target.compile(made)(one), graph.evaluate(one, graph.outputs), rtol=1e-5, atol=1e-6)
    return made, chooser


class _Rectifies(OnnxRuntime):
    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def rules(self, graph: Graph) -> Sequence[Sequence[Choice]]:
        return ((self.choice,),)


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes if node.kind != "linear"]


def test_the_fastest_form_is_taken_where_it_wins_for_certain(tmp_path: Path, script: Any) -> None:
    judge = script({"Relu": (1.2, 1.1, 1.3), "Clip": (1.5, 1.4, 1.6)})
    made, chooser = lowered(tmp_path, rectifier())
    assert kinds(made) == ["clip"] * 3
    assert judge.asked == [["Max", "Relu", "Clip"]] * 2  # two patterns are alike
    first, last = chooser.measured["rectifier"]
    assert (first["sites"], last["sites"]) == (2, 1)
    assert first["form"] == "Clip" and first["sure"] and first["dropped"] == {}
    assert first["ratios"] == {"Max": (1.0, 1.0, 1.0), "Relu": (1.2, 1.1, 1.3), "Clip": (1.5, 1.4, 1.6)}


def test_the_ops_may_win(tmp_path: Path, script: Any) -> None:
    script({"Relu": (1.2, 1.1, 1.3)})
    assert kinds(lowered(tmp_path, rectifier())[0]) == ["relu"] * 3


@pytest.mark.parametrize("ratio", [(1.3, 0.99, 1.6), (1.3, 1.0, 1.6), (0.8, 0.7, 0.9)])
def test_a_tie_or_a_loss_goes_to_the_static_order(
    tmp_path: Path, script: Any, ratio: tuple[float, float, float]
) -> None:
    script({"Relu": ratio, "Clip": ratio})
    made, chooser = lowered(tmp_path, rectifier())
    assert kinds(made) == ["onnx.Max"] * 3
    assert chooser.notes == []


def test_a_wide_interval_does_not_hide_a_form_that_wins(tmp_path: Path, script: Any) -> None:
    script({"Relu": (1.2, 1.1, 1.3), "Clip": (1.5, 0.5, 2.6)})
    assert kinds(lowered(tmp_path, rectifier())[0]) == ["relu"] * 3


def test_an_unsteady_machine_takes_the_static_order_says_so_and_keeps_it_for_an_hour(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = script({"Clip": (1.4, 0.9, 2.1)}, steady=False)
    made, chooser = lowered(tmp_path, rectifier())
    assert kinds(made) == ["onnx.Max"] * 3
    (note,) = chooser.notes
    assert note == "measuring failed: the machine is busy; the static order stands for rectifier (2)"
    again, chooser = lowered(tmp_path, rectifier())
    assert again.text() == made.text() and chooser.notes == [note] and len(judge.asked) == 2
    later = time.time() + UNSURE + 1
    monkeypatch.setattr(time, "time", lambda: later)
    lowered(tmp_path, rectifier())
    assert len(judge.asked) == 4


@pytest.mark.parametrize(
    ("relu", "rounds", "clip", "taken"),
    [
        ((0.8, 0.7, 0.9), 6, (2.0, 1.9, 2.1), "clip"),
        ((0.5, 0.0, math.inf), 2, (2.0, 1.9, 2.1), "clip"),
        ((1.1, 0.9, 1.2), 6, (2.0, 1.9, 2.1), "clip"),
        ((0.8, 0.7, 0.9), 6, (0.8, 0.7, 0.9), "onnx.Max"),
        ((0.5, 0.0, math.inf), 2, (0.8, 0.7, 0.9), "onnx.Max"),
    ],
    ids=["lost", "gave up", "unsure", "both lost", "gave up and lost"],
)
def test_what_wins_or_loses_for_certain_does_so_on_an_unsteady_machine(
    tmp_path: Path, script: Any, relu: tuple[float, float, float], rounds: int, clip: tuple[float, float, float],
    taken: str,
) -> None:  # fmt: skip
    script({"Relu": relu, "Clip": clip}, steady=False, rounds={"Relu": rounds})
    made, chooser = lowered(tmp_path, rectifier())
    assert kinds(made) == [taken] * 3 and chooser.notes == []


def test_timing_may_end_where_winners_and_losers_are_certain(tmp_path: Path, script: Any) -> None:
    judge = script({"Relu": (0.8, 0.7, 0.9), "Clip": (2.0, 1.9, 2.1)})
    lowered(tmp_path, rectifier())
    assert judge.until is not None
    assert [judge.until(judge.told[form]) for form in ("Max", "Relu", "Clip")] == [False, True, True]


@pytest.mark.parametrize(
    ("form", "code", "text"),
    [
        (_unknown, "engine_refuses", "NoSuchOperator"),
        (_out_of_range, "engine_refuses", "out of data bounds"),
        (_wrong, "form_differs", "dB from the first form's"),
        (_nan, "form_differs", "nan dB from the first form's"),
        (_declines, "not on a Tuesday", "not on a Tuesday"),
    ],
)
def test_a_form_that_fails_is_dropped_with_its_reason(
    tmp_path: Path, script: Any, form: Replace, code: str, text: str
) -> None:
    judge = script({"bad": (9.0, 9.0, 9.0), "Clip": (1.5, 1.4, 1.6)})
    made, chooser = lowered(tmp_path, rectifier(Max=_maximum, bad=form, Clip=_clip))
    assert kinds(made) == ["clip"] * 3
    assert judge.asked == [["Max", "Clip"]] * 2
    for one in chooser.measured["rectifier"]:
        assert list(one["dropped"]) == ["bad"]
        assert one["dropped"]["bad"].code == code and text in one["dropped"]["bad"]
    _, again = lowered(tmp_path, rectifier(Max=_maximum, bad=form, Clip=_clip))  # from the cache
    assert [one["dropped"]["bad"].code for one in again.measured["rectifier"]] == [code] * 2


def test_where_the_first_form_fails_the_others_are_compared_with_the_next(tmp_path: Path, script: Any) -> None:
    judge = script()
    made, _ = lowered(tmp_path, rectifier(bad=_out_of_range, Max=_maximum, Clip=_clip))
    assert judge.asked == [["Max", "Clip"]] * 2
    assert kinds(made) == ["onnx.Max"] * 3


def test_one_form_that_is_left_needs_no_timing(tmp_path: Path, script: Any) -> None:
    judge = script()
    made, _ = lowered(tmp_path, rectifier(bad=_out_of_range, Clip=_clip))
    assert (kinds(made), judge.asked) == (["clip"] * 3, [])


def test_each_example_shape_is_a_call(tmp_path: Path, script: Any) -> None:
    judge = script()
    lowered(tmp_path, rectifier(), [{"x": X}, {"x": X[:1]}])
    assert set(judge.calls) == {2}


def test_what_was_measured_is_not_measured_again(tmp_path: Path, script: Any) -> None:
    script({"Clip": (1.5, 1.4, 1.6)})
    first, before = lowered(tmp_path, rectifier())
    judge = script({"Relu": (9.0, 9.0, 9.0)})
    again, after = lowered(tmp_path, rectifier())
    assert judge.asked == []
    assert again.text() == first.text() and after.measured == before.measured


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"engine": "engine 1.1"},
        {"feeds": [{"x": torch.cat([X, X])}]},
        {"feeds": [{"x": X}, {"x": X}]},
    ],
    ids=["threads", "engine", "shape", "shapes"],
)
def test_what_a_timing_depends_on_is_another_key(tmp_path: Path, script: Any, options: dict[str, Any]) -> None:
    script({"Clip": (1.5, 1.4, 1.6)})
    lowered(tmp_path, rectifier())
    judge = script()
    made, _ = lowered(tmp_path, rectifier(), **options)
    assert len(judge.asked) == 2 and kinds(made) == ["onnx.Max"] * 3


def test_other_flags_or_forms_are_another_key(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = script()
    lowered(tmp_path, rectifier())
    lowered(tmp_path, rectifier(Max=_maximum, Clip=_clip))
    assert len(judge.asked) == 4
    found = machine.environment()
    monkeypatch.setattr(machine, "environment", lambda: found | {"flags": "none"})
    lowered(tmp_path, rectifier())
    assert len(judge.asked) == 6


def test_unmeasured_the_first_form_is_taken() -> None:
    made, logs = _Rectifies(rectifier()).lower(build("onnx", TEXT))
    assert kinds(made) == ["onnx.Max"] * 3 and logs["rectifier"].hits == 3


def test_an_excerpt_reads_what_comes_from_outside_and_returns_what_goes_there() -> None:
    graph = build("onnx", "a = relu(x[2,3])\nb = tanh(a)\nc = add(b, a)\nreturn c, b")
    relu, tanh, add = graph.nodes
    excerpt = Subgraph.of(Match(tanh), [tanh, add])
    assert excerpt.inputs == (relu.result,)
    assert set(excerpt.outputs) == {tanh.result, add.result}
    inner = Subgraph.of(Match(relu), [relu, tanh])
    assert (inner.inputs, set(inner.outputs)) == ((graph.inputs[0],), {relu.result, tanh.result})


def test_a_signature_is_of_kinds_shapes_and_wiring_not_of_names() -> None:
    graph = build("onnx", "a = tanh(relu(x[2,3]))\nb = tanh(relu(a))\nc = relu(tanh(b))\nd = tanh(relu(W[4,3]))\n"
                          "return c, d")  # fmt: skip
    nodes = graph.nodes
    pairs = [Subgraph.of(Match(nodes[i + 1]), nodes[i : i + 2]).signature() for i in (0, 2, 4, 6)]
    assert pairs[0] == pairs[1] and len(set(pairs)) == 3


# --- through optimize ----------------------------------------------------------------------------------------------


@pytest.fixture
def always_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Timing in which the last form always wins, and the result is as fast as the input."""

    def script(
        candidates: Mapping[str, Any], *, baseline: str, rounds: int = 15, **options: Any
    ) -> dict[str, Ratios]:
        shapes = len(candidates[baseline])
        ratios = {name: Ratio(1.0, 1.0, 1.0, rounds, 0, {}) for name in candidates}
        if baseline != "input":
            ratios[list(candidates)[-1]] = Ratio(1.5, 1.4, 1.6, rounds, 0, {})
        return {name: Ratios(one, (one,) * shapes) for name, one in ratios.items()}

    monkeypatch.setattr(timing, "paired_calls", script)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


def test_a_second_run_writes_the_same_bytes_from_the_cache(
    always_equal: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "rules", lambda self, graph: ((rectifier(),),))
    reports: list[Report] = []
    for name in ("first", "second"):
        small = graphopt.optimize(seeded(ConvNet), example_inputs=images(), measure=True)
        small.export(tmp_path / f"{name}.onnx")
        reports.append(small.report)
        monkeypatch.setattr("graphopt.lowering.timed_forms.TimedChooser._compare_forms", None)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    assert reports[0].choices == reports[1].choices
    (choice,) = reports[0].choices
    assert {one["form"] for one in choice["measured"]} == {"Clip"} and choice["sites"] == 3
    assert b"1.5" not in "".join(
        one.value for one in onnx.load(tmp_path / "first.onnx").metadata_props if one.key == "graphopt.choices"
    ).encode()


@pytest.mark.parametrize("options", [{"measure": False}, {"cpu": "avx2"}])
def test_unmeasured_the_report_has_no_figures(
    always_equal: None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "rules", lambda self, graph: ((rectifier(),),))
    report = graphopt.optimize(seeded(ConvNet), example_inputs=images(), **options).report
    assert report.choices == [{"rule": "rectifier", "sites": 3, "declined": {}, "measured": []}]
    assert report.speed == [] and report.ops_after["relu"] == 3
