"""A race as `optimize` runs it, with scripted speeds: what is taken, what the report says, and who is left out."""

from __future__ import annotations

import copy
import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.graph import Graph
from graphopt.lowering.backend import Backend
from graphopt.measure import memory
from graphopt.pipeline.instruments import Instrument
from graphopt.racing import contest
from graphopt.racing.contestant import Lost, room
from graphopt.report.records import Entrant
from graphopt.result import Optimized
from tests.racing import fakes
from tests.racing.conftest import FakeContestant, Stage

QUANTIZE = "quantize{scheme=dynamic}"


def optimized(program: torch.export.ExportedProgram, target: Any, passes: Any = QUANTIZE, **options: Any) -> Optimized:
    return graphopt.optimize(program, passes, target=target, **{"measure": True, **options})


def entrants(small: Optimized) -> dict[tuple[str, str, str], Entrant]:
    assert small.report.race is not None
    return {(one.engine, one.model, one.precision): one for one in small.report.race.entrants}


def test_takes_the_fastest_engine_and_reports_all(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds = {"fbgemm": 2.0, "healthy": 3.0, "healthy uncompressed": 1.5}
    small = optimized(program, ["fbgemm", "healthy"])
    assert small.backend.name == "healthy"
    found = entrants(small)
    assert list(found) == [(engine, model, "float32") for engine in ("fbgemm", "healthy")
                           for model in ("as asked", "uncompressed")]  # fmt: skip
    assert found["healthy", "as asked", "float32"].speed == (3.0, 3.0, 3.0)
    assert found["healthy", "uncompressed", "float32"].milliseconds == pytest.approx([1 / 1.5])
    assert [one["median"] for one in small.report.speed] == [3.0]
    assert "3.0 times as fast" in str(small)
    text = str(small.report)
    assert "race of the engines" in text and "uncompressed" in text and "taken" in text
    assert stage.open == 0 and stage.references == [(), (0.25,), (0.25,), (0.25,)]
    (roofline,) = small.report.roofline
    read = 2 * 16 * 32 + 2 * 4 * (16 + 32)  # bytes of weights, scales and biases, which take longer than the products
    assert roofline.least == pytest.approx({"int8": read / 1e9})
    assert roofline.share == pytest.approx(read / 1e9 / (0.001 / 3))
    assert "share of the machine's limit" in text


def test_the_uncompressed_model_wins_where_it_is_faster(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds = {"fbgemm": 2.0, "healthy": 1.2, "healthy uncompressed": 2.5}
    small = optimized(program, ["fbgemm", "healthy"])
    assert (small.backend.name, small.report.pipeline) == ("healthy", "")
    x = torch.randn(4, 16)
    torch.testing.assert_close(small(x), program.module()(x))
    assert small.report.passes == []


def test_the_input_itself_is_as_fast_as_the_input(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds = {"fbgemm": 0.5, "healthy": 0.5, "healthy uncompressed": 0.5}
    small = optimized(program, ["fbgemm", "healthy"])
    assert "as fast as the input" in repr(small) and "times as fast" not in repr(small)


def test_what_is_too_far_from_the_original_cannot_win(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds, stage.noise = {"fbgemm": 2.0, "healthy": 9.0}, {("healthy", "float32"): 0.1}
    small = optimized(program, ["fbgemm", "healthy"])
    assert small.backend.name == "fbgemm"
    found = entrants(small)["healthy", "as asked", "float32"]
    assert "dB below the best, and within=3" in found.why_out
    assert optimized(program, ["fbgemm", "healthy"], within=60).backend.name == "healthy"


def test_an_engine_that_does_not_run_has_a_row(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.lost = {"crashing": "its process died of signal 11 (SIGSEGV)", "hanging": "gave no answer in 60 s"}
    small = optimized(program, ["crashing", "hanging", "failing", "fbgemm"])
    assert small.backend.name == "fbgemm"
    rows = {one.engine: one.why_out for one in entrants(small).values()}
    assert "died of signal 11" in rows["crashing"] and "no answer in 60 s" in rows["hanging"]
    assert "no kernel" in rows["failing"]


def test_raises_what_the_first_engine_raised_where_none_runs(
    program: torch.export.ExportedProgram, stage: Stage
) -> None:
    stage.lost = {"crashing": "its process died of signal 11 (SIGSEGV)", "hanging": "gave no answer in 60 s"}
    with pytest.raises(LoweringError, match="crashing does not run the model"):
        optimized(program, ["crashing", "hanging"])


def test_the_passes_before_quantizing_run_once(program: torch.export.ExportedProgram, stage: Stage) -> None:
    class Seen(Instrument):
        names: list[str] = []  # noqa: RUF012

        def before(self, pass_: Any, graph: Any, context: Any) -> None:
            self.names.append(pass_.name)

    seen = Seen()
    optimized(program, ["fbgemm", "healthy"], f"sparsify{{amount=0.5}},{QUANTIZE}", instruments=[seen])
    assert [seen.names.count(name) for name in ("simplify", "sparsify", "quantize")] == [1, 1, 2]


def test_a_second_call_reads_the_cache(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds = {"fbgemm": 2.0, "healthy": 3.0}
    first = optimized(program, ["fbgemm", "healthy"])
    started, races = len(stage.started), stage.races
    second = optimized(program, ["fbgemm", "healthy"])
    assert (len(stage.started), stage.races) == (started, races)
    assert second.report.race == first.report.race


def test_without_measuring_the_first_engine_is_taken(program: torch.export.ExportedProgram, engines: None) -> None:
    small = optimized(program, ["healthy", "fbgemm"], measure=False)
    assert small.backend.name == "healthy"
    assert any("nothing is measured" in note and "healthy, fbgemm" in note for note in small.report.notes)
    assert "nothing was measured" in str(small.report)
    second = optimized(program, ["failing", "fbgemm"], measure=False)
    assert second.backend.name == "fbgemm"
    assert "no kernel" in entrants(second)["failing", "as asked", "-"].why_out


def test_without_inputs_the_first_engine_is_taken(
    program: torch.export.ExportedProgram, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHOPT_MEASURE")
    unknown = copy.copy(program)
    unknown._example_inputs = None
    small = optimized(unknown, ["healthy", "fbgemm"], measure=None)
    assert small.backend.name == "healthy" and stage.started == []
    with pytest.raises(UsageError, match="measure=True needs example_inputs"):
        optimized(unknown, ["healthy", "fbgemm"])


def test_too_little_memory_is_an_error(
    program: torch.export.ExportedProgram, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    with pytest.raises(UsageError, match=r"a race of 2 engines needs about 2\.00 GB .* and 1\.00 MB are free"):
        optimized(program, ["fbgemm", "healthy"])


@pytest.mark.slow
def test_candidates_that_do_not_fit_are_left_out(
    program: torch.export.ExportedProgram, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.speeds = {"rounding bfloat16": 3.0, "rounding": 2.0, "healthy": 9.0}
    monkeypatch.setattr(memory, "available", lambda: 1_200_000_000)
    small = optimized(program, ["rounding", "healthy"])
    assert (small.backend.name, small.backend.precision) == ("rounding", "float32")
    assert "want of memory" in entrants(small)["healthy", "as asked", "-"].why_out
    assert any("left out for want of memory: healthy as asked" in note for note in small.report.notes)
    small = optimized(program, "rounding")
    assert small.report.race is None and small.backend.precision == "float32"
    assert any("rounding as asked bfloat16" in note for note in small.report.notes)
    monkeypatch.setattr(memory, "available", lambda: 1_000)
    small = optimized(program, "rounding")
    assert small.backend.precision == "float32"
    assert any("nothing was raced for want of memory" in note for note in small.report.notes)
    assert not any("left out" in note for note in small.report.notes)
    assert optimized(program, "rounding", precision="bfloat16").backend.precision == "bfloat16"


def test_a_full_disk_is_an_error_of_graphopt(
    program: torch.export.ExportedProgram, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(UsageError, match=r"No space left on device.*set TMPDIR"):
            optimized(program, ["fbgemm", "healthy"])
    make = tempfile.TemporaryDirectory

    def full_inside(*arguments: Any, **options: Any) -> Any:
        folder = make(*arguments, **options)
        monkeypatch.setattr(tempfile, "mkdtemp", full)
        return folder

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full_inside)
    with pytest.raises(LoweringError, match=r"fbgemm does not run .*cannot be written \(No space left on device\)"):
        optimized(program, ["fbgemm", "healthy"])


def test_only_the_disk_is_blamed_for_what_it_did() -> None:
    """A library may raise an error of its own over that of the disk."""

    def lost(error: Exception, cause: Exception | None = None) -> Lost:
        with pytest.raises(Lost) as raised, room():
            raise error from cause
        return raised.value

    full = OSError(errno.ENOSPC, "No space left on device")
    for error, cause in ((full, None), (RuntimeError("unexpected pos 576 vs 534"), full)):
        found = lost(error, cause)
        assert found.transient and "cannot be written (No space left on device): make room" in str(found)
    found = lost(RuntimeError("no way to write this dtype"))
    assert not found.transient and str(found).endswith("writing it failed: RuntimeError: no way to write this dtype")
    assert lost(RuntimeError("std::bad_alloc")).transient and "TMPDIR" not in str(lost(RuntimeError("std::bad_alloc")))


def test_processes_end_once_lost_and_before_the_files_go(
    program: torch.export.ExportedProgram, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.lost_later = {"healthy": Lost("gave no answer in 60 s", transient=True)}
    folders, ended, running = list[Path](), list[bool](), list[tuple[int, list[str]]]()
    close, start, taken = FakeContestant.close, stage.contestant, contest.Contest._taken

    def started(backend: Any, graph: Any, feeds: Any, folder: Path, threads: Any, reference: Any) -> FakeContestant:
        folders.append(folder)
        return start(backend, graph, feeds, folder, threads, reference)

    def closed(self: FakeContestant) -> None:
        ended.append(all(folder.is_dir() for folder in folders))
        close(self)

    def after(self: contest.Contest, figures: Any) -> Optimized:
        running.append((stage.open, sorted(self._contestants)))
        return taken(self, figures)

    monkeypatch.setattr(contest, "Contestant", started)
    monkeypatch.setattr(FakeContestant, "close", closed)
    monkeypatch.setattr(contest.Contest, "_taken", after)
    optimized(program, ["fbgemm", "healthy"])
    assert running == [(2, ["fbgemm", "fbgemm uncompressed"])] and stage.open == 0
    assert ended == [True] * len(stage.started) and not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("transient", [True, False])
def test_a_loss_that_may_pass_is_not_kept(program: torch.export.ExportedProgram, stage: Stage, transient: bool) -> None:
    stage.lost_later = {"healthy": Lost("gave no answer in 60 s", transient=transient)}
    small = optimized(program, ["fbgemm", "healthy"])
    assert small.backend.name == "fbgemm"
    assert "gave no answer" in entrants(small)["healthy", "as asked", "float32"].why_out
    races = stage.races
    optimized(program, ["fbgemm", "healthy"])
    assert stage.races == races + transient


def test_a_reverted_quantize_sets_the_bar_that_was_asked_for(
    program: torch.export.ExportedProgram, stage: Stage
) -> None:
    """In one precision, what was asked for is slower than the input, and in the other far from it."""
    stage.speeds = {"optimized": 0.5, "rounding bfloat16": 9.0, "rounding uncompressed bfloat16": 9.0}
    stage.noise = {("rounding", "bfloat16"): 0.2}
    small = optimized(program, "rounding")
    assert small.backend.precision == "float32"
    race = small.report.race
    assert race is not None and race.least_sqnr is not None and 20 < race.least_sqnr < 60
    assert "within=3" in entrants(small)["rounding", "uncompressed", "bfloat16"].why_out


def test_precision_is_measured_where_a_pass_rounds(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds = {"rounding bfloat16": 3.0, "rounding": 2.0}
    small = optimized(program, "rounding")
    assert small.backend.precision == "bfloat16"
    assert any("floats are computed in bfloat16" in note for note in small.report.notes)
    stage.noise = {("rounding", "bfloat16"): 0.2}
    assert optimized(program, "rounding", f"sparsify{{amount=0.25}},{QUANTIZE}").backend.precision == "float32"


def test_precision_is_closed_without_a_pass_that_rounds(program: torch.export.ExportedProgram, stage: Stage) -> None:
    stage.speeds = {"rounding bfloat16": 3.0}
    small = optimized(program, ["rounding", "fbgemm"], None)
    assert {precision for _, _, precision in entrants(small)} == {"float32"}
    for target, options in (("rounding", {"precision": "bfloat16"}), ("rounding{precision=bfloat16}", {})):
        with pytest.raises(UsageError, match="precision=bfloat16 rounds, and none of the passes does"):
            optimized(program, target, None, **options)


def test_the_model_as_it_is_races_in_the_precision_of_its_graph(
    program: torch.export.ExportedProgram, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def in_precision(self: Backend, graph: Graph) -> Graph:
        asked.append(self.precision)
        return graph.clone()

    monkeypatch.setattr(fakes.Rounding, "in_precision", in_precision)
    optimized(program, "rounding")
    assert asked == ["bfloat16"]

    def fails(self: Backend, graph: Graph) -> Graph:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(fakes.Rounding, "in_precision", fails)
    with pytest.raises(LoweringError, match=r"the model cannot be lowered for rounding in bfloat16: .*no kernel"):
        optimized(program, "rounding", f"sparsify{{amount=0.25}},{QUANTIZE}")


@pytest.mark.parametrize("measure", [True, False])
def test_a_precision_that_was_asked_for_is_held_to_within(
    program: torch.export.ExportedProgram, stage: Stage, measure: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage.speeds = {"rounding": 9.0}
    small = optimized(program, "rounding{precision=bfloat16}", measure=measure)
    assert small.backend.precision == "bfloat16"
    if measure:
        monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "other"))
        stage.noise = {("rounding", "bfloat16"): 0.2}
        with pytest.raises(LoweringError, match=r"precision=bfloat16 gives .* below .* of float32, and within=2"):
            optimized(program, "rounding", within=2, precision="bfloat16", measure=measure, agree=True)


def test_exports_the_winner_and_how_to_load_it(
    program: torch.export.ExportedProgram, stage: Stage, tmp_path: Path
) -> None:
    stage.speeds = {"fbgemm": 2.0}
    small = optimized(program, ["fbgemm", "healthy"], threads=2)
    path = small.export(tmp_path / "small.pt2")
    facts = json.loads(path.with_name("small.pt2.json").read_text())
    assert facts["load"]["threads"] == 2 and "small.pt2" in facts["load"]["python"]
    assert facts["race"]["winner"] == 0
    with pytest.raises(UsageError, match=r"no \.pt2 file, and fbgemm writes \.pt2"):
        small.export(tmp_path / "small.onnx")
