"""Never slower: timing is scripted, so that a site loses where a test says so and nothing takes time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt import UsageError
from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.lowering import never_slower
from graphopt.lowering.backend import Runner
from graphopt.lowering.never_slower import RERUNS, compare_speed, slowest_sites
from graphopt.measure import timing
from graphopt.measure.cache import UNSURE
from graphopt.measure.timing import Ratio, Ratios
from graphopt.report.records import PassRecord
from graphopt.result import Optimized
from tests.models import ConvNet, Encoder, exported, images, padding, seeded, tokens

INPUTS = {"ids": tokens(), "mask": padding()}
DYNAMIC = "quantize{scheme=dynamic}"
FASTER, SLOWER = (1.5, 1.4, 1.6), (0.8, 0.7, 0.9)

Speeds = Callable[[dict[str, int]], tuple[float, float, float]]
"""How fast a result is over the input, by its kernels."""


@dataclass
class Scripted:
    """In place of `timing.paired_calls`, where the input takes part; choices among forms are ties."""

    speeds: Speeds
    verdicts: list[tuple[float, float, float]] = field(default_factory=list)
    steady: bool = True

    def __call__(
        self, candidates: Mapping[str, Any], *, baseline: str, rounds: int = timing.ROUNDS, **options: Any
    ) -> dict[str, Ratios]:
        ratios = dict.fromkeys(candidates, (1.0, 1.0, 1.0))
        shapes = len(candidates[baseline])
        if baseline == "input":
            runner: OrtRunner = candidates["optimized"][0].func
            ratios["optimized"] = self.speeds(runner.kernels())
            self.verdicts.append(ratios["optimized"])
        found = {name: Ratio(*one, rounds, 0, {}, self.steady) for name, one in ratios.items()}
        return {name: Ratios(one, (one,) * shapes) for name, one in found.items()}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Speeds], Scripted]:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))

    def install(speeds: Speeds) -> Scripted:
        scripted = Scripted(speeds)
        monkeypatch.setattr(timing, "paired_calls", scripted)
        return scripted

    return install


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Integer kernels whose names hold a text take 3 us, all else 2 us; a kernel's name tells whether it is one."""

    def install(losing: str) -> None:
        def seconds(runner: OrtRunner, feeds: Mapping[str, Tensor]) -> dict[str, float]:
            kinds = {node.name: node.op_type for node in runner.model.graph}
            integers = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
            return {name: 3e-6 if kind in integers and losing in name else 2e-6 / (1 + (kind in integers))
                    for name, kind in kinds.items() if name and kind in ("MatMul", *integers)}  # fmt: skip

        monkeypatch.setattr(OrtRunner, "profile", seconds)

    return install


@pytest.fixture(scope="module")
def encoder() -> onnx.ModelProto:
    return exported(seeded(Encoder), INPUTS, 20, dynamo=True)


def optimized(model: Any, passes: str | None = DYNAMIC, **options: Any) -> Optimized:
    return graphopt.optimize(model, passes, example_inputs=INPUTS, measure=True, **options)


def integers(kernels: Mapping[str, int]) -> int:
    return kernels.get("DynamicQuantizeMatMul", 0) + kernels.get("MatMulIntegerToFloat", 0)


def assert_computes(made: Optimized, tolerance: float) -> None:
    """What the module does; a file gives its output by name."""
    found = made(**INPUTS)
    found = found if isinstance(found, Tensor) else next(iter(found.values()))
    torch.testing.assert_close(found, seeded(Encoder)(**INPUTS), rtol=0, atol=tolerance)


def record(made: Optimized, name: str = "quantize") -> PassRecord:
    return next(one for one in made.report.passes if one.name == name)


def test_what_is_faster_stays(encoder: onnx.ModelProto, script: Any) -> None:
    scripted = script(lambda kernels: FASTER)
    made = optimized(encoder)
    assert len(scripted.verdicts) == 1
    assert made.report.reverted == {} and record(made).declined == {}
    assert made.report.speed == [
        {"shapes": "ids [2, 7], mask [2, 7]", "median": 1.5, "low": 1.4, "high": 1.6, "rounds": 15, "steady": True}
    ]
    assert not any("slower" in note for note in made.report.notes)


def test_a_loss_that_a_second_run_does_not_see_is_noise(encoder: onnx.ModelProto, script: Any) -> None:
    speeds = iter([SLOWER, FASTER])
    scripted = script(lambda kernels: next(speeds))
    made = optimized(encoder)
    assert scripted.verdicts == [SLOWER, FASTER] and made.report.reverted == {}
    assert made.report.speed[0]["median"] == 1.5 and made.report.kernels["DynamicQuantizeMatMul"] > 0


@pytest.mark.parametrize("source", ["module", "file"])
def test_a_site_that_loses_is_reverted(encoder: onnx.ModelProto, source: str, script: Any, profile: Any) -> None:
    """Of 12 linears, the two called up lose, both as much; half of the loss goes at a time."""
    scripted = script(lambda kernels: SLOWER if integers(kernels) > 10 else FASTER)
    profile(".up")
    made = optimized(seeded(Encoder) if source == "module" else encoder)
    lost = "slower when changed: 3 us in place of 2 us"
    assert made.report.reverted == {"layers.0.up": lost, "layers.1.up": lost}
    assert record(made).declined == made.report.reverted
    assert integers(made.report.kernels) == 10
    assert scripted.verdicts == [SLOWER, SLOWER] * 2 + [FASTER]  # one site, then the other
    assert made.report.speed[0]["low"] == 1.4
    assert_computes(made, 0.2)


def test_a_second_run_takes_verdicts_and_what_was_reverted_from_the_cache(
    encoder: onnx.ModelProto, script: Any, profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = script(lambda kernels: SLOWER if integers(kernels) > 10 else FASTER)
    profile(".up")
    first = optimized(encoder)
    timed = len(scripted.verdicts)
    monkeypatch.setattr(OrtRunner, "profile", None)
    second = optimized(encoder)
    assert len(scripted.verdicts) == timed
    assert second.report.reverted == first.report.reverted != {}
    assert second.report.speed == first.report.speed and second.lowered.text() == first.lowered.text()


def test_what_loses_on_an_unsteady_machine_is_reverted(encoder: onnx.ModelProto, script: Any, profile: Any) -> None:
    profile("nothing")
    script(lambda kernels: SLOWER if integers(kernels) else FASTER).steady = False
    made = optimized(encoder)
    assert not integers(made.report.kernels)


@pytest.mark.parametrize(
    ("low", "steady", "enough"), [(1.01, True, True), (0.99, True, False), (1.09, False, False), (1.3, False, True)]
)
def test_few_rounds_are_enough_for_what_is_clearly_faster(low: float, steady: bool, enough: bool) -> None:
    shape = Ratio(low + 0.1, low, low + 0.2, 6, 0, {}, steady)
    assert never_slower._faster(Ratios(shape, (shape,))) is enough


@pytest.mark.parametrize(("steady", "verdicts"), [(True, 1), (False, 2)], ids=["steady", "unsteady"])
def test_a_verdict_on_an_unsteady_machine_is_kept_for_an_hour(
    encoder: onnx.ModelProto, script: Any, monkeypatch: pytest.MonkeyPatch, steady: bool, verdicts: int
) -> None:
    scripted = script(lambda kernels: FASTER)
    scripted.steady = steady
    assert optimized(encoder).report.speed[0]["steady"] is steady
    optimized(encoder)
    assert len(scripted.verdicts) == 1
    later = time.time() + UNSURE + 1
    monkeypatch.setattr(time, "time", lambda: later)
    optimized(encoder)
    assert len(scripted.verdicts) == verdicts


class Batches:
    """Calibration that counts how often it is gone through."""

    times = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.times += 1
        yield from ({"ids": tokens(seed=seed), "mask": padding()} for seed in range(2))


@pytest.mark.slow
def test_statistics_are_kept_between_reruns(encoder: onnx.ModelProto, script: Any, profile: Any) -> None:
    """Two sites are reverted, one after the other; the batches are gone through as often as with none."""
    script(lambda kernels: FASTER)
    alone, again = Batches(), Batches()
    optimized(encoder, "quantize{scheme=static}", calibration=alone)
    script(lambda kernels: SLOWER if integers(kernels) > 10 else FASTER)
    profile(".up")
    made = optimized(encoder, "quantize{scheme=static targets=linear}", calibration=again)
    assert len(made.report.reverted) == 2
    assert again.times == alone.times > 0
    fresh = optimized(encoder, f"quantize{{scheme=static targets=linear ignore=[{', '.join(made.report.reverted)}]}}",
                      calibration=Batches())  # fmt: skip
    torch.testing.assert_close(made(**INPUTS), fresh(**INPUTS), rtol=0, atol=0)


@pytest.mark.slow
def test_after_six_reruns_it_is_the_simplified_float_model(
    encoder: onnx.ModelProto, script: Any, profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites lose, and one more goes at a time."""
    monkeypatch.setattr("graphopt.lowering.never_slower.SHARE", 1e-9)
    scripted = script(lambda kernels: SLOWER if integers(kernels) else FASTER)
    profile("")
    made = optimized(encoder)
    assert len(scripted.verdicts) == 2 * (1 + RERUNS) + 1
    assert made.report.pipeline == "simplify,fold-int8" and made.report.reverted == {}
    (note,) = [note for note in made.report.notes if "slower" in note]
    assert note == (
        f"simplify,{DYNAMIC},fold-int8 makes the model slower here, even with 6 sites as they were: it runs 0.80 times "
        "as fast as the input at ids [2, 7], mask [2, 7]. This is the input, simplified"
    )
    assert integers(made.report.kernels) == 0 and made.report.speed[0]["median"] == 1.5
    assert_computes(made, 1e-5)


def test_where_that_loses_too_it_is_the_input(encoder: onnx.ModelProto, script: Any, tmp_path: Path) -> None:
    before = OnnxRuntime().compile(graphopt.optimize(encoder, example_inputs=INPUTS, measure=False).captured).kernels()
    scripted = script(lambda kernels: SLOWER)
    made = optimized(encoder, None)
    assert len(scripted.verdicts) == 4  # simplify is not tried once more
    assert made.report.pipeline == "" and made.report.passes == []
    assert next(note for note in made.report.notes if "slower" in note).endswith("This is the input as it was")
    # The decomposed attention of the exporter's opset 20 is in the file again, where capture raised it.
    made.export(tmp_path / "same.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "same.onnx").graph.node}
    assert "Attention" not in kinds and "Softmax" in kinds and "Attention" in before
    assert made.report.ops_after == made.report.ops_before
    assert_computes(made, 1e-5)


def test_a_module_that_nothing_makes_faster_is_run_as_captured(script: Any) -> None:
    script(lambda kernels: SLOWER)
    made = graphopt.optimize(seeded(ConvNet), example_inputs=images(), measure=True)
    assert made.report.pipeline == "" and made.folded.text() == made.captured.text()
    torch.testing.assert_close(made(images()), seeded(ConvNet)(images()), rtol=0, atol=1e-5)


def test_a_pass_that_cannot_do_without_the_sites_that_lose_ends_the_reruns(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both groups of neurons that prune may cut make the model slower."""
    speeds = iter([SLOWER, SLOWER, FASTER])
    script(lambda kernels: next(speeds))
    monkeypatch.setattr("graphopt.lowering.never_slower.SHARE", 1.0)

    def profile(runner: OrtRunner, feeds: Mapping[str, Tensor]) -> dict[str, float]:
        is_whole = any(64 in value.shape for value in runner.model.graph.initializers.values() if value.shape)
        return dict.fromkeys(["layers.0.up/MatMul", "layers.1.up/MatMul"], 2e-6 if is_whole else 3e-6)

    monkeypatch.setattr(OrtRunner, "profile", profile)
    made = optimized(seeded(Encoder), "prune{neurons=0.5}", calibration=[INPUTS])
    assert made.report.pipeline == "simplify,fold-int8"
    failed, fell_back = made.report.notes[-2:]
    assert failed.startswith("without the sites that made the model slower: prune: no group of neurons can shrink")
    assert fell_back.endswith("This is the input, simplified")


class Engine(Runner):
    """Takes these seconds by node, at each feed."""

    def __init__(self, *seconds: Mapping[str, float]) -> None:
        self.seconds = list(seconds)

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return []

    def kernels(self) -> dict[str, int]:
        return {}

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        return self.seconds[int(feeds["n"])]


FEEDS = [{"n": torch.tensor(0)}, {"n": torch.tensor(1)}]


def test_losers_are_those_with_most_of_the_loss_summed_over_nodes_and_feeds() -> None:
    before = Engine({"a/MatMul": 1.0, "b/x": 1.0, "c/x": 1.0, "d/x": 1.0}, {"a/MatMul": 1.0, "b/x": 2.0})
    after = Engine({"a/MatMul/fused": 0.5, "a/Cast": 4.0, "b/x": 2.0, "c/x": 1.1, "d/x": 9.0, "e/x": 9.0},
                   {"a/MatMul": 1.0, "b/x": 2.0})  # fmt: skip
    quantize = PassRecord("quantize", "quantize", eligible=["a", "b", "c", "d"])
    quantize.decline("d", "no kernel")
    assert slowest_sites(after, before, FEEDS, [quantize]) == {"a": (2.0, 5.5)}
    assert slowest_sites(before, after, FEEDS, [quantize]) == {}
    assert slowest_sites(Engine({}, {}), Engine({}, {}), FEEDS, [quantize]) == {}


def test_a_shape_that_loses_must_be_the_same_in_both_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio(high: float) -> Ratio:
        return Ratio(high, high, high, 15, 0, {})

    runs = iter([(0.8, 1.2), (1.2, 0.8), (0.8, 0.8), (1.2, 0.8)])

    def script(candidates: Any, *, baseline: str, clock: Any, on_round: Any, until: object = None) -> dict[str, Ratios]:
        assert baseline == "input" and [len(several) for several in candidates.values()] == [2, 2]
        return {"optimized": Ratios(ratio(1.0), tuple(map(ratio, next(runs))))}

    monkeypatch.setattr(timing, "paired_calls", script)
    engine = Engine({}, {})
    assert compare_speed(engine, engine, FEEDS).slower == ()
    found = compare_speed(engine, engine, FEEDS)
    assert found.slower == (1,) and [one.median for one in found.ratios] == [1.2, 0.8]


def test_an_input_that_the_engine_does_not_run_is_timed_as_captured(script: Any) -> None:
    """At opset 23, the exporter writes a mask of one row for all queries, which onnxruntime refuses."""
    script(lambda kernels: FASTER)
    made = optimized(exported(seeded(Encoder), INPUTS, 23, dynamo=True))
    (note,) = [note for note in made.report.notes if "not over" in note]
    assert note.startswith("the speed is not over the input itself, which does not run here (")
    assert made.report.speed[0]["median"] == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": True, "cpu": "avx2"}, "cpu=avx2 is another machine, .* leave measure=True out"),
        ({"cpu": "avx1024"}, "there is no cpu 'avx1024'; give avx2, avx512, avx512_vnni"),
        ({"measure": True, "target": "tensorrt"}, "tensorrt does not run here"),
        *(({"threads": n}, f"threads is {n}; give a whole number, at least 1") for n in (0, -1, True)),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graphopt.optimize(seeded(ConvNet), example_inputs=images(), **options)


def test_nothing_is_measured_of_what_does_not_run() -> None:
    text = "g (float[n,4] x, string[n] s) => (float[n,4] y) { y = Relu(x) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    with pytest.raises(UsageError, match="measure=True needs example_inputs"):
        graphopt.optimize(model, measure=True)


def test_a_named_cpu_is_in_the_report_and_in_the_file(tmp_path: Path) -> None:
    made = graphopt.optimize(seeded(ConvNet), example_inputs=images(), cpu="avx2")
    made.export(tmp_path / "small.onnx")
    properties = {one.key: one.value for one in onnx.load(tmp_path / "small.onnx").metadata_props}
    assert made.report.target == properties["graphopt.target"] == "onnxruntime (avx2)"
