"""Each instrument around small passes: what it keeps, and what it refuses."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from graphopt.errors import GraphError, PassError, UsageError
from graphopt.ir.graph import Feeds, Graph
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments import (
    Agree,
    Diff,
    Dump,
    Instrument,
    Log,
    Progress,
    Reproduce,
    Timing,
    Verify,
    display,
    phase,
    watched,
)
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline, run_pass
from graphopt.pipeline.selectors import Selector
from graphopt.report.agreements import worst_of_each
from tests.language import build, feeds

TEXT = "h = linear(x[batch,4], W[8,4]:seed1)\ny = linear(h, V[3,8]:seed2)"


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply every weight."""

    name = "scale"
    stage = Stage.SIMPLIFY
    lossless = True

    by: float = 1.0
    """The factor."""

    targets: Selector = Selector("linear")
    """Sites."""

    def run(self, graph: Graph, context: Context) -> None:
        for site in context.sites(graph, self.targets):
            assert site.weight is not None
            stored = graph.add_constant(site.weight * self.by)
            graph.replace(site, graph.emit("linear", site.input, stored, at=site))


@dataclass(frozen=True)
class LossyScale(Scale):
    """As Scale, and says that it loses something."""

    name = "lossy-scale"
    lossless = False


@dataclass(frozen=True)
class LoweringScale(Scale):
    """As LossyScale, among the passes of a target."""

    name = "lowering-scale"
    stage = Stage.LOWER
    lossless = False


@dataclass(frozen=True)
class Nothing(Pass):
    """Changes nothing."""

    name = "nothing"
    stage = Stage.SIMPLIFY

    def run(self, graph: Graph, context: Context) -> None: ...


@dataclass(frozen=True)
class Shorten(Pass):
    """Put an activation behind the output, and so one more line."""

    name = "shorten"
    stage = Stage.SIMPLIFY

    def run(self, graph: Graph, context: Context) -> None:
        last = graph.nodes[-1]
        graph.replace(last, graph.emit("relu", graph.emit(last, *last.operands, at=last), at=last))


def examples(graph: Graph) -> list[dict[str, Tensor]]:
    return [feeds(graph, 0, batch=2), feeds(graph, 1, batch=5)]


def run(graph: Graph, *passes: Pass, instruments: list[Instrument]) -> Context:
    context = Context(feeds=examples(graph), instruments=instruments)
    Pipeline(passes).run(graph, context)
    return context


# --- Agree ---------------------------------------------------------------------------------------------------------


def test_a_lossy_pass_records_the_worst_figures(dialect: str) -> None:
    graph = build(dialect, TEXT)
    original = graph.clone()
    context = run(graph, LossyScale(by=0.9), Nothing(), instruments=[Agree(graph, examples(graph))])
    (found,) = context.report.passes[0].agreement
    # Both weights by 0.9: the output by 0.81, so the noise is 0.19 of the signal on every input.
    assert found.sqnr == pytest.approx(-20 * math.log10(0.19), abs=1e-3)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    largest = max(float(original.evaluate(one, original.outputs)[0].abs().max()) for one in examples(original))
    assert found.max_error == pytest.approx(0.19 * largest, rel=1e-4)
    assert context.report.passes[1].agreement == []


def test_a_lossless_pass_beyond_tolerance_is_an_error(dialect: str) -> None:
    graph = build(dialect, TEXT)
    with pytest.raises(PassError) as caught:
        run(graph, Scale(by=1.001), instruments=[Agree(graph, examples(graph))])
    assert caught.value.pass_name == "scale"
    assert "on example 0 it moves output" in str(caught.value)
    assert "relative tolerance: 0.0001" in str(caught.value)


def test_outputs_are_called_as_the_user_does(dialect: str) -> None:
    graph = build(dialect, TEXT)
    context = run(graph, LossyScale(by=0.9), instruments=[Agree(graph, examples(graph), ["logits"])])
    assert [found.output for found in context.report.passes[0].agreement] == ["logits"]


def test_a_lossless_pass_within_tolerance_passes() -> None:
    graph = build("onnx", TEXT)
    context = run(graph, Scale(by=1 + 1e-6), instruments=[Agree(graph, examples(graph))])
    assert context.report.passes[0].agreement[0].sqnr > 100


def test_small_losses_do_not_add_up() -> None:
    """Each step is within 1e-4, the second is not within it of the original."""
    graph = build("onnx", TEXT)
    timing = Timing()
    with pytest.raises(PassError):
        run(graph, Scale(by=1 + 4e-5), Scale(by=1 + 4e-5), instruments=[timing, Agree(graph, examples(graph))])
    assert len(timing.seconds) == 2


def test_lossless_is_measured_from_the_last_lossy_pass() -> None:
    graph = build("onnx", TEXT)
    context = run(graph, LossyScale(by=0.5), Scale(by=1.0), instruments=[Agree(graph, examples(graph))])
    assert [record.agreement[0].sqnr for record in context.report.passes] == [pytest.approx(2.499, abs=1e-3)] * 2


def test_a_lossy_pass_of_the_targets_own_is_held_to_the_floor_of_rounding(dialect: str) -> None:
    graph = build(dialect, TEXT)
    run(graph, LoweringScale(by=1.1), instruments=[Agree(graph, examples(graph))])
    graph = build(dialect, TEXT)
    with pytest.raises(PassError, match=r"lowering-scale may take rounding away.*'y' has an SQNR of .* needs 10"):
        run(graph, LoweringScale(by=1.2), instruments=[Agree(graph, examples(graph))])


def test_a_quantized_graph_is_held_to_one_step() -> None:
    quantized = "w = dequantize(W[3,4]:seed1:int8, S[3]:ones, axis=0)"
    text = f"{quantized}\nh = linear(x[batch,4], w)\ny = linear(h, V[3,3]:seed2)"
    for factor, refused in ((1.005, False), (1.02, True)):
        graph = build("onnx", text)
        scale = Scale(by=factor, targets=Selector(graph.sites("linear")[1].label))
        agree: list[Instrument] = [Agree(graph, examples(graph))]
        if refused:
            with pytest.raises(PassError, match=r"relative tolerance: 0\.0078"):
                run(graph, scale, instruments=agree)
        else:
            run(graph, scale, instruments=agree)


@pytest.mark.parametrize(("factor", "alone", "rounding"), [(1.0, True, True), (1.02, False, True), (1.1, False, False)])
def test_kernels_that_round_activations_are_held_to_30_db(factor: float, alone: bool, rounding: bool) -> None:
    """1.02 is noise of 34 dB, and 1.1 of 20 dB."""
    graph = build("onnx", "w = dequantize(W[3,4]:seed1:int8, S[3]:ones, axis=0)\ny = linear(x[batch,4], w)")
    agree = Agree(graph, examples(graph))

    def noisy(feeds: Feeds) -> list[Tensor]:
        return [factor * torch.as_tensor(y) for y in graph.evaluate(feeds, graph.outputs)]

    assert (agree.moved_by(noisy, graph) is None) == alone
    assert (agree.moved_by(noisy, graph, rounds=True) is None) == rounding


def test_a_quantized_original_is_held_to_what_it_makes_of_the_last_bits_of_its_inputs(dialect: str) -> None:
    """At 0.5, between two integers, one bit decides; at 0.4 none does."""
    graph = build(dialect, "h = linear(x[batch,1], W[1,1]:ones)\nq = quantize(h, S[]:ones, Z[]:zeros:uint8)\n"
                           "y = dequantize(q, S, Z)")  # fmt: skip
    near, far = ([{"x": torch.tensor([[number], [30.0]])}] for number in (0.5, 0.4))
    run(graph.clone(), Scale(by=1 + 2e-6), instruments=[Agree(graph, near)])
    for by, batches in ((1.3, far), (1.5, near)):
        with pytest.raises(PassError, match="it moves output"):
            run(graph.clone(), Scale(by=by), instruments=[Agree(graph, batches)])


@pytest.mark.parametrize("ranges", ["stored", "computed"])
def test_a_quantized_graph_may_move_as_far_as_its_activations_round(dialect: str, ranges: str) -> None:
    """The output is 127 - 2 * 64, by chance what the original has. By a scale of 256 / 255 it would be 127 - 2 * 63."""
    scale = {"stored": "q = quantize(x[batch,3], S[]:ones, Z[]:zeros:uint8)\nf = dequantize(q, S, Z)",
             "computed": "s, z = choose_qparams(x[batch,3])\nf = dequantize(quantize(x, s, z), s, z)"}  # fmt: skip
    graph = build(dialect, f"{scale[ranges]}\ny = linear(f, V[1,3]:values(1,-2,0))")
    agree = Agree(graph, [{"x": torch.tensor([[127.49, 63.745, 255.0]])}])
    for moved, refused in ((3.9, False), (4.1, True)):

        def elsewhere(feeds: Feeds, by: float = moved) -> list[Tensor]:
            return [torch.as_tensor(y) + by for y in graph.evaluate(feeds, graph.outputs)]

        assert (agree.moved_by(elsewhere, graph) is not None) == refused


@settings(max_examples=30, deadline=None)
@given(moved=st.floats(2e-4, 4e-3), own=st.floats(0, 4e-3))
def test_an_engine_may_move_an_output_as_it_moves_the_originals(moved: float, own: float) -> None:
    """Twice as much, and no more than 1e-3: rounding of floats explains no more."""
    graph = build("onnx", "y = linear(x[batch,4], W[3,4]:seed1)")
    agree = Agree(graph, examples(graph))

    def by(share: float, feeds: Feeds) -> list[Tensor]:
        return [(1 + share) * torch.as_tensor(y) for y in graph.evaluate(feeds, graph.outputs)]

    assert agree.moved_by(partial(by, moved), graph) is not None
    found = agree.moved_by(partial(by, moved), graph, own=lambda: partial(by, own))
    if abs(moved - 1e-3) > 1e-5 and abs(moved - 2 * own) > 1e-5:  # where float32 does not decide
        assert (found is None) == (moved < min(1e-3, 2 * own))


def test_integer_outputs_stay_equal() -> None:
    @dataclass(frozen=True)
    class Wrong(Pass):
        name = "wrong"
        stage = Stage.SIMPLIFY
        lossless = True

        def run(self, graph: Graph, context: Context) -> None:
            last = graph.nodes[-1]
            graph.replace(last, graph.emit("add", last.operands[0], graph.add_constant(torch.tensor([2])), at=last))

    graph = build("onnx", "y = add(x[batch]:int64, ONE[1]:ones:int64)")
    with pytest.raises(PassError, match="tolerance: equal values"):
        run(graph, Wrong(), instruments=[Agree(graph, examples(graph))])


def test_no_pass_changes_the_shape_of_an_output(dialect: str) -> None:
    @dataclass(frozen=True)
    class Narrow(Pass):
        name = "narrow"
        stage = Stage.SIMPLIFY

        def run(self, graph: Graph, context: Context) -> None:
            last = graph.nodes[-1]
            whole = graph.emit(last, *last.operands, at=last)
            graph.replace(last, graph.emit("slice", whole, axis=1, start=0, end=2, at=last))

    graph = build(dialect, TEXT)
    with pytest.raises(PassError, match=r"went from \[2, 3\] to \[2, 2\]"):
        run(graph, Narrow(), instruments=[Agree(graph, examples(graph))])


CHOSEN = """
    h = linear(x[batch,4], W[3,4]:seed1)
    n = onnx.NonZero(relu(h))
    return h, n
"""


def test_an_output_whose_size_depends_on_data_may_have_another_size() -> None:
    """The other outputs are compared, and a note names it."""
    graph = build("onnx", CHOSEN)
    feeds = [{"x": torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])}]

    @dataclass(frozen=True)
    class Shift(Pass):
        name = "shift"
        stage = Stage.SIMPLIFY

        def run(self, graph: Graph, context: Context) -> None:
            (site,) = graph.sites("linear")
            one = graph.add_constant(torch.ones(3))
            graph.replace(site, graph.emit("linear", site.input, site.required("weight"), one, at=site))

    context = Context(feeds=feeds, instruments=[Agree(graph, feeds)])
    Pipeline([Shift()]).run(graph, context)
    (record,) = context.report.passes
    assert [found.output for found in record.agreement] == ["h"]
    (note,) = record.notes
    assert note.startswith("the size of output 'n' went from [2, ") and note.endswith("not compared")


def test_no_pass_makes_nan_or_infinity_of_finite_numbers(dialect: str) -> None:
    """Lossy or not. The error names where they come from."""

    @dataclass(frozen=True)
    class Overflow(Pass):
        name = "overflow"
        stage = Stage.SIMPLIFY

        def run(self, graph: Graph, context: Context) -> None:
            site = graph.nodes[-1]
            product = graph.emit(site, *site.operands, at=site)
            short = graph.emit("cast", product, at=site, dtype=torch.float16)
            graph.replace(site, graph.emit("cast", short, at=site, dtype=torch.float32))

    graph = build(dialect, "y = mul(relu(x[2,4]), BIG[]:values(1e6))")
    with pytest.raises(PassError, match="on example 0, 8 of the 8 numbers of output 'y' become NaN or infinite, first"):
        run_on(graph, Overflow(), {"x": torch.ones(2, 4)})
    finite = {"x": torch.full((2, 4), -1.0)}
    run_on(build(dialect, "y = mul(relu(x[2,4]), BIG[]:values(1e6))"), Overflow(), finite)
    given = {"x": torch.full((2, 4), math.inf)}
    run_on(build(dialect, "y = mul(relu(x[2,4]), BIG[]:values(1e6))"), Overflow(), given)


def run_on(graph: Graph, pass_: Pass, feeds: dict[str, Tensor]) -> None:
    Pipeline([pass_]).run(graph, Context(feeds=[feeds], instruments=[Agree(graph, [feeds])]))


def test_compare_takes_any_runner() -> None:
    graph = build("onnx", TEXT)
    agree = Agree(graph, examples(graph))
    halved: Callable[..., list[Tensor]] = lambda one: [0.5 * y for y in graph.evaluate(one, graph.outputs)]  # noqa: E731
    by_shapes, notes = agree.compare(halved)
    (found,) = worst_of_each(by_shapes.values())
    assert notes == []
    assert found.output == "y" and found.sqnr == pytest.approx(20 * math.log10(2), abs=1e-6)


# --- Verify, Timing, Diff, Dump, Progress --------------------------------------------------------------------------


def test_verify_finds_what_a_pass_broke() -> None:
    @dataclass(frozen=True)
    class Break(Pass):
        name = "break"
        stage = Stage.SIMPLIFY

        def run(self, graph: Graph, context: Context) -> None:
            native = graph.model.graph  # type: ignore[attr-defined]
            last = native[-1]
            native.remove(last)
            native.insert_before(native[0], last)

    graph = build("onnx", TEXT)
    with pytest.raises(PassError, match=r"pass break failed at .*before anything defines it"):
        run(graph, Break(), instruments=[Verify()])


def test_timing_keeps_the_seconds_of_each_pass() -> None:
    timing = Timing()
    context = run(build("onnx", TEXT), Nothing(), Shorten(), instruments=[timing])
    assert timing.seconds == [(record.text, record.seconds) for record in context.report.passes]
    assert [line.split()[-1] for line in str(timing).splitlines()] == ["nothing", "shorten", "total"]


def test_diff_keeps_what_changed(dialect: str) -> None:
    diff = Diff()
    run(build(dialect, TEXT), Nothing(), Shorten(), Scale(), instruments=[diff])
    assert [name for name, _ in diff.steps] == ["shorten"]
    assert diff.steps[0][1].kinds == {"relu": (0, 1)}
    assert str(diff).startswith("shorten\n") and "+ %2 = relu(%1[batch,3])" in str(diff)


def test_dump_writes_a_file_for_each_change(tmp_path: Path) -> None:
    graph = build("onnx", TEXT)
    before = graph.text()
    run(graph, Nothing(), Shorten(), Scale(), Shorten(), instruments=[Dump(tmp_path / "dump")])
    files = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "dump").iterdir()}
    assert sorted(files) == ["000_original.txt", "002_shorten.txt", "004_shorten.txt"]
    assert files["000_original.txt"] == before + "\n"
    assert files["004_shorten.txt"] == graph.text() + "\n"


def test_progress_prints_one_line_a_pass() -> None:
    console = Console(file=io.StringIO(), width=40)
    run(build("onnx", TEXT), Scale(by=1.0), Shorten(), instruments=[Progress(console)])
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [" ".join(line.split()[:-2]) for line in lines] == ["scale 2 of 2 sites", "shorten 1 change"]


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=100), file


def test_progress_shows_what_runs_inside_what_and_takes_it_away() -> None:
    console, file = terminal()
    progress, threads = Progress(console), threading.active_count()
    with phase([progress], "lower") as now, watched([progress], "measure", 2) as advance:
        now.result = "7 nodes"
        advance("a [bold] site")
        assert threading.active_count() == threads  # which would disturb what is timed
    shown = file.getvalue()
    assert "measure: a [bold] site" in shown and "50%" in shown
    assert re.search(r"lower +7 nodes +\d+\.\d\d s", shown)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and comes back


@pytest.mark.parametrize("error", [UsageError("wrong"), RuntimeError("broken"), KeyboardInterrupt()])
def test_progress_gives_the_terminal_back_when_a_pass_fails(error: BaseException) -> None:
    class Failing(Nothing):
        def run(self, graph: Graph, context: Context) -> None:
            raise error

    console, file = terminal()
    with pytest.raises((UsageError, PassError, KeyboardInterrupt)):
        run(build("onnx", TEXT), Failing(), instruments=[Progress(console)])
    assert file.getvalue().count("\x1b[?25h") == 1


def test_what_is_printed_stays_on_stdout_while_bars_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console, file = terminal()
    with Progress(console).running("evaluate"):
        print('{"json": 1}')
    assert capsys.readouterr().out == '{"json": 1}\n' and "json" not in file.getvalue()


def test_log_has_a_line_for_each_pass_and_phase(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "graphopt"):
        run(build("onnx", TEXT), Scale(by=1.0), Shorten(), instruments=[Log()])
        with phase([Log()], "check"), watched([Log()], "calibration", 2) as advance:
            advance("batch 0")
    lines = [(record.levelname, re.sub(r"\d+\.\d s", "0.0 s", record.getMessage())) for record in caplog.records]
    assert lines == [
        ("DEBUG", "scale begins"), ("INFO", "scale: 2 of 2 sites, 0.0 s"),
        ("DEBUG", "shorten begins"), ("INFO", "shorten: 1 change, 0.0 s"),
        ("DEBUG", "check begins"), ("DEBUG", "calibration: 1 of 2, batch 0"), ("INFO", "check: 0.0 s"),
    ]  # fmt: skip


def test_a_phase_that_fails_is_not_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graphopt"), pytest.raises(ValueError), phase([Log()], "check"):
        raise ValueError
    assert not caplog.records


@pytest.mark.parametrize(
    ("verbose", "is_terminal", "level", "kinds"),
    [
        (False, True, logging.INFO, []),
        (None, False, logging.WARNING, [Log]),
        (None, True, logging.WARNING, [Log, Progress]),
        (None, True, logging.INFO, [Log]),
        (True, False, logging.WARNING, [Log, Progress]),
    ],
)
def test_what_a_run_says_and_where(
    verbose: bool | None, is_terminal: bool, level: int, kinds: list[type], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    with caplog.at_level(level, "graphopt"):
        assert [type(one) for one in display(verbose)] == kinds
        own = Progress()
        assert [type(one) for one in display(verbose, [own])] == [Progress, *(one for one in kinds if one is Log)]


def test_nothing_is_said_without_being_asked(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import graphopt

    build("onnx", TEXT).save(tmp_path / "model.onnx")
    graphopt.optimize(tmp_path / "model.onnx", measure=False)
    assert capfd.readouterr() == ("", "")
    graphopt.optimize(tmp_path / "model.onnx", measure=False, verbose=True)
    said = capfd.readouterr()
    assert said.out == "" and [line.split()[0] for line in said.err.splitlines()][:2] == ["capture", "run"]
    with pytest.raises(UsageError, match="verbose is 'yes'; give True, False or None"):
        graphopt.optimize(tmp_path / "model.onnx", verbose="yes")  # type: ignore[arg-type]


def test_should_run_leaves_passes_out() -> None:
    class Some(Timing):
        def should_run(self, pass_: Pass) -> bool:
            return pass_.name == "shorten"

    some = Some()
    run(build("onnx", TEXT), Nothing(), Shorten(), instruments=[some])
    assert [name for name, _ in some.seconds] == ["shorten"]


# --- Reproduce -----------------------------------------------------------------------------------------------------


def failing(graph: Graph, folder: Path | None) -> PassError:
    """The error of a pass that is lossless by its own account, and is not."""
    inputs = examples(graph)
    calibration = Calibration([inputs[0]], graph.inputs)
    instruments = [Reproduce(folder), Verify(), Agree(graph, inputs)]
    context = Context(feeds=inputs, calibration=calibration, instruments=instruments)
    with pytest.raises(PassError) as caught:
        run_pass(Scale(by=2.0), graph, context)
    return caught.value


def test_reproduce_keeps_what_the_pass_was_given(dialect: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    graph = build(dialect, TEXT)
    expected = graph.evaluate(examples(graph)[0], graph.outputs)
    error = failing(graph, tmp_path / "again")
    assert error.reproducer == str(tmp_path / "again") and str(error).endswith(f"to reproduce: {tmp_path / 'again'}")
    facts = json.loads((tmp_path / "again/pass.json").read_text())
    assert (facts["pass"], facts["dialect"], facts["target"]) == ("scale{by=2.0}", dialect, None)
    assert "moves output" in facts["error"]
    loaded = type(graph).load(tmp_path / f"again/graph.{dialect}")
    first = load_file(tmp_path / "again/feeds/000.safetensors")
    assert torch.allclose(loaded.evaluate(first, loaded.outputs)[0], expected[0], rtol=1e-6, atol=1e-6)
    assert len(list((tmp_path / "again/feeds").iterdir())) == 2
    assert len(list((tmp_path / "again/calibration").iterdir())) == 1


def test_reproduce_makes_a_folder_on_failure_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(build("onnx", TEXT), Shorten(), instruments=[Reproduce()])
    assert list(tmp_path.iterdir()) == []
    error = failing(build("onnx", TEXT), None)
    assert error.reproducer is not None and Path(error.reproducer).parent == tmp_path


def test_a_process_has_one_folder_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, others, foreign = (tmp_path / name for name in ("graphopt-failed-1-a", "graphopt-failed-2-b", "graphopt-own"))
    for folder in (old, others, foreign):
        folder.mkdir()
    for folder in (old, foreign):
        os.utime(folder, (0, 0))
    last = [failing(build("onnx", TEXT), None).reproducer for _ in range(3)][-1]
    assert last is not None and set(tmp_path.iterdir()) == {others, foreign, Path(last)}
    assert (Path(last) / "pass.json").is_file()


def test_the_command_in_the_readme_fails_in_the_same_way(tmp_path: Path) -> None:
    from graphopt.passes import LowRank

    graph = build("onnx", "y = linear(x[batch,8], W[8,8]:seed1)")

    class Refuse(Instrument):
        def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
            raise GraphError("refused")

    context = Context(feeds=examples(graph), instruments=[Reproduce(tmp_path), Refuse()])
    with pytest.raises(PassError):
        run_pass(LowRank(rank=2), graph, context)
    readme = (tmp_path / "README").read_text()
    assert "GraphError: refused" in readme
    found = subprocess.run(shlex.split(readme.strip().splitlines()[-1]), capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "low-rank{rank=2} runs without an error now\n"), found.stderr
