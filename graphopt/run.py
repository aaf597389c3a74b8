"""One run: captured -> transformed -> folded -> lowered -> checked -> timed, and the way back where that is slower."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.capture.fx_conversion import to_fx
from graphopt.capture.onnx_conversion import to_onnx
from graphopt.capture.signature import Signature, as_model
from graphopt.capture.sources import Captured
from graphopt.errors import GraphError, LoweringError, PassError, UsageError, first_line, outer_door
from graphopt.ir import cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Feeds, Graph, digest, dtype_name, shapes_text
from graphopt.lowering import relower
from graphopt.lowering.backend import Backend, Runner
from graphopt.lowering.never_slower import RERUNS, SpeedCheck, SpeedResult
from graphopt.measure import cache, limits, machine, timing
from graphopt.passes.simplify import Simplify
from graphopt.pipeline import lengths
from graphopt.pipeline.batches import Batches
from graphopt.pipeline.calibration import Calibration, Remembered
from graphopt.pipeline.context import Context, TeacherGraph
from graphopt.pipeline.instruments import Agree, Instrument, Reproduce, Verify, phase, watched
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.ranks import SameGraphs
from graphopt.pipeline.runner import Pipeline, leaves
from graphopt.pipeline.shared import SharedPasses
from graphopt.pipeline.target import TimedBy
from graphopt.pipeline.zeros import KeptZeros
from graphopt.report import tables
from graphopt.report.agreements import worst_of_each
from graphopt.report.declines import Reason
from graphopt.report.records import Report, Shipped, count_kinds
from graphopt.result import Optimized, Trained, versions
from graphopt.training.meshes import Mesh, evaluated
from graphopt.training.meshes.evaluating import OnEveryRank


@dataclass(frozen=True)
class _Baseline:
    """What came in, to time against: a graph, its runner where it runs here, and what the user should know of that."""

    graph: Graph
    runner: Runner | None
    notes: list[str]


@dataclass
class _Attempt:
    """A result that was timed, and why it is not what was asked for, where it is not."""

    small: Optimized
    speed: SpeedResult
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One call of `optimize`: what it was asked for, and the phases that follow from it."""

    captured: Captured
    pipeline: Pipeline
    backend: Backend
    fallback: Pipeline
    """Without the passes that were asked for, where these make the model slower."""
    earlier: tuple[Pass, ...]
    """What earlier calls of a chain did to the model."""
    calibration: Calibration | None
    loss: Callable[..., Tensor]
    evaluate: Callable[[Any], float] | None
    threads: int | None
    agree: bool | None
    measure: bool
    instruments: Sequence[Instrument]
    training: Batches | None = None
    teacher: TeacherGraph | None = None
    checkpoint: Path | None = None
    sparse: Mapping[str, str] = field(default_factory=dict)
    """The zeros that earlier calls of a chain left, as `Optimized.sparse` has them."""
    shared: SharedPasses | None = None
    """What passes have left that ran for another target before, where there are several."""
    trial: Callable[[Graph], object] | None = None
    """Runs a lowered graph elsewhere before it is run in this process; raises a GraphoptError where it does not run."""
    original: Graph | None = None
    """The input as it runs on the target, where that is known (`originals`)."""
    asked: Report | None = None
    """Of the passes that were asked for, before any of their sites is reverted: once they have run."""
    mesh: Mesh | None = None
    """The processes that run this together: all of them the passes, rank 0 alone what follows."""
    _is_shared: bool = False
    """Whether all ranks are at the same phase now, so that each finds by itself what fails."""
    _trained: Trained | None = None
    """What the passes that train have left, where nothing but lowering follows."""

    # --- the whole ---------------------------------------------------------------------------------------------------

    def result(self) -> Optimized:
        """The result; where it is slower than the input, sites that lose are reverted, and in the end all of them."""
        mesh = self.mesh
        if mesh is None:
            return self._result()
        if not mesh.leads:
            return self._followed(mesh)
        try:
            small = self._result()
        except Exception as error:
            if not self._is_shared:
                failed = error
                mesh.first(lambda: _raised(failed))
            raise
        mesh.first(lambda: small.report)
        return small

    def _followed(self, mesh: Mesh) -> Optimized:
        """On the ranks that do not lead: the passes as often as rank 0 runs them, and its report."""
        if self.calibration is not None and self.is_timed:
            self.calibration = Remembered(self.calibration, digest)
        pipelines = {"asked": self.pipeline, "fallback": self.fallback, "none": Pipeline()}
        while not isinstance(told := mesh.first(_Step), Report):
            pipeline = pipelines[told.pipeline]
            report = self._report(pipeline, told.reverted)
            transformed, folded, sparse = self._transformed(pipeline, report, None, told.reverted)
            small = Optimized(
                self.captured.graph, transformed, folded, folded, report, self.backend, self.captured.signature,
                self.captured.feeds, self.threads, pipeline, self.earlier, self._trained, sparse, leads=False,
            )  # fmt: skip
        small.report = told
        return small

    def _lead(self, pipeline: Pipeline, reverted: Mapping[str, Decline]) -> None:
        """Tell the other ranks which passes run next."""
        if self.mesh is not None:
            name = "asked" if pipeline is self.pipeline else "fallback" if pipeline is self.fallback else "none"
            self.mesh.first(lambda: _Step(name, dict(reverted)))

    def _result(self) -> Optimized:
        if not self.is_timed:
            return self._optimized(self.pipeline)
        if self.calibration is not None and not isinstance(self.calibration, Remembered):  # it may run again
            self.calibration = Remembered(self.calibration, digest)
        small = self._optimized(self.pipeline)
        if self._baseline.runner is None:
            small.report.notes += self._baseline.notes
            return small
        check = self._speed_check(self._baseline.runner)
        attempt = self._timed(check, small, list(self._baseline.notes))
        if self.pipeline.is_trained:
            self._note_slower(attempt)
        else:
            attempt = self._without_losers(check, attempt)
            attempt = self._without_passes(check, attempt)
        small = attempt.small
        small.forget_state()
        small.report.notes += attempt.notes
        small.report.set_speed(map(shapes_text, self.captured.feeds), attempt.speed.ratios)
        known, taken = limits.known(), [ratio.seconds.get("optimized") for ratio in attempt.speed.ratios]
        if known is not None and None not in taken:
            small.set_roofline(known, [one[0] for one in taken if one is not None])
        return small

    @property
    def is_timed(self) -> bool:
        """Whether results are timed here: where that was asked for, and there is something to run."""
        return bool(self.measure and self.captured.feeds and not self._is_too_large_to_run)

    @property
    def is_lossy(self) -> bool:
        """Whether a pass that rounds was asked for, so that floats may be rounded too."""
        return rounds((*self.earlier, *self.pipeline.leaves()))

    def originals(self) -> Iterator[Graph]:
        """The input in the forms in which it may run on the target: as it was handed in, then as it was captured."""
        if self.captured.untouched is not None:
            yield self.captured.untouched()
        yield self.captured.graph

    def uncompressed(self) -> Optimized:
        """The input as it is, on the target."""
        assert self.original is not None  # the caller has found one that runs
        return self._optimized(Pipeline(), lowered=self.original)

    def lowered_at(self, precision: str, small: Optimized) -> Graph:
        """A result lowered once more, for floats in another precision. Raises LoweringError."""
        with outer_door(LoweringError, f"the graph cannot be lowered for {self.backend.name} in {precision}"):
            return self.backend.at(precision).lower(small.folded)[0]

    def original_at(self, precision: str) -> Graph:
        """The input as it is, for floats in another precision. Raises LoweringError."""
        assert self.original is not None  # the caller has found one that runs
        with outer_door(LoweringError, f"the model cannot be lowered for {self.backend.name} in {precision}"):
            return self.backend.at(precision).in_precision(self.original)

    def at(self, precision: str, small: Optimized, lowered: Graph) -> Optimized:
        """A result with floats in another precision, checked and compared with the original."""
        report = copy.copy(small.report)
        report.notes = [*report.notes, f"floats are computed in {precision}"]
        report.agreement, report.agreement_by_shapes = [], {}
        found = replace(small, backend=self.backend.at(precision), lowered=lowered, report=report)
        with outer_door(LoweringError, f"{self.backend.name} does not run the graph in {precision}"):
            report.kernels = found.runner.kernels()
        reference = self._reference(report)
        if reference is not None:
            self._compare(found, reference)
        found.forget_state()
        return found

    def release(self) -> None:
        """Drop the engine's programs of the input, and what results were compared with by length."""
        for name in ("_baseline", "_captured_runner", "_of_lengths"):
            self.__dict__.pop(name, None)

    def _optimized(
        self, pipeline: Pipeline, reverted: Mapping[str, Decline] | None = None, *, lowered: Graph | None = None
    ) -> Optimized:
        """All phases but timing, once. lowered: what the target is to run as it is, where nothing is to be lowered."""
        report = self._report(pipeline, reverted or {})
        reference = self._reference(report)
        self._lead(pipeline, reverted or {})
        self._is_shared = True
        transformed, folded, sparse = self._transformed(pipeline, report, reference, reverted or {})
        self._is_shared = False
        if pipeline is self.pipeline and not reverted:
            self.asked = report
        as_it_came = lowered is not None
        if lowered is None:
            lowered = self._lowered(pipeline, folded, report)
        if self.trial is not None and not as_it_came:
            self.trial(lowered)
        self._check_outputs(folded, lowered, reference)
        if self.captured.unknown:
            self._check_shapes(lowered)
        if self._is_held_by_sites(pipeline) and not as_it_came:
            self._check_sites(transformed, folded, report)
        small = Optimized(
            self.captured.graph, transformed, folded, lowered, report, self.backend, self.captured.signature,
            self.captured.feeds, self.threads, pipeline, self.earlier, self._trained, sparse,
        )  # fmt: skip
        if not self._is_too_large_to_run and not self.captured.unknown:
            self._check_kernels(small, reference, promised=not as_it_came)
            if pipeline.is_trained:
                self._check_metric(small)
        return small

    # --- captured -> transformed -> folded ---------------------------------------------------------------------------

    def _report(self, pipeline: Pipeline, reverted: Mapping[str, Decline]) -> Report:
        """The report as far as it is known before any pass."""
        backend, captured = self.backend, self.captured
        target = backend.name if backend.cpu is None else f"{backend.name} ({backend.cpu})"
        report = Report(target=target, source=captured.source, pipeline=str(pipeline), versions=versions())
        report.notes += [*captured.notes, *backend.notes()]
        report.reverted = {label: Reason.of(why) for label, why in reverted.items()}
        if self._is_large:
            report.notes.append("above 2 GB: a pass that fails leaves no reproducer "
                                "(instruments=[Reproduce(folder)] does)")  # fmt: skip
        if self.measure and self._is_too_large_to_run:
            report.notes.append("above 2 GB: nothing is timed, and forms have a fixed order (agree=True times them)")
        if self.mesh is not None:
            report.notes.append(f"run by {self.mesh.world} processes, mesh={self.mesh}")
        if self._is_too_large_to_run:
            report.notes.append("above 2 GB: outputs are not compared with the original, nor kernels counted "
                                "(agree=True does both)")  # fmt: skip
        return report

    def _reference(self, report: Report) -> Agree | None:
        """The original's outputs, for comparing with; None where nothing is to be compared."""
        captured = self.captured
        if self._is_too_large_to_run or self.agree is False or not captured.feeds:
            return None
        with (
            outer_door(LoweringError, f"{captured.source} does not run on its example inputs (or pass agree=False)"),
            phase(self.instruments, "run the original"),
        ):
            return Agree(captured.graph, captured.feeds, captured.signature.outputs)

    def _transformed(
        self, pipeline: Pipeline, report: Report, reference: Agree | None, reverted: Mapping[str, Decline]
    ) -> tuple[Graph, Graph, Mapping[str, str]]:
        """The graph after the passes that were asked for, and after the target's own; and its zeros that must stay."""
        kept = _BeforeLowering()
        mesh = self.mesh
        watchers: list[Instrument] = [] if self._is_large or (mesh is not None and not mesh.leads) else [Reproduce()]
        watchers += [Verify(), *([] if mesh is None else [SameGraphs(mesh)]), *self.instruments, kept]
        watchers += [] if reference is None else [reference]
        captured, loss, evaluate = self.captured, self.loss, self.evaluate
        context = Context(
            target=self.backend if mesh is None else TimedBy(self.backend, mesh.first),
            ranks=mesh,
            report=report,
            feeds=captured.feeds,
            made_up=captured.made_up,
            calibration=self.calibration,
            loss=lambda outputs, batch, **options: loss(captured.signature.rebuild(outputs), batch, **options),
            evaluate=None if evaluate is None else partial(_evaluated, evaluate, captured.signature, mesh),
            instruments=watchers,
            threads=self.threads,
            reverted=reverted,
            training=self.training,
            outputs=captured.signature.outputs,
            teacher=self.teacher,
            checkpoint=self.checkpoint,
            sparse={label: KeptZeros(pattern, None) for label, pattern in self.sparse.items()},
        )
        report.cost_before, report.ops_before = context.cost(captured.graph), count_kinds(captured.graph.nodes)
        folded = self._applied(pipeline, context, reference)
        if self.calibration is not None and self.calibration.note:
            report.notes.append(self.calibration.note)
        report.cost_after, report.ops_after = context.cost(folded), count_kinds(folded.nodes)
        return kept.graph or folded, folded, {label: zeros.pattern for label, zeros in context.sparse.items()}

    def _applied(self, pipeline: Pipeline, context: Context, reference: Agree | None) -> Graph:
        """The graph after all passes. Up to the last one that needs gradients they run on torch.fx, whatever the
        target; then the graph is converted, and simplified, as it is after a capture."""
        captured = self.captured
        on_torch = [any(leaf.needs_torch for leaf in leaves(one)) for one in pipeline.passes]
        last = max((place for place, one in enumerate(on_torch) if one), default=None)
        if last is None:
            context.original = captured.graph
            return self._through(pipeline, captured.graph, context)
        context.original = before = self._torch_form.graph
        first, rest = pipeline.passes[: last + 1], pipeline.passes[last + 1 :]
        trained = self._through(Pipeline(first), before, context)
        is_last = all(leaf.lossless or leaf.stage is Stage.LOWER for one in rest for leaf in leaves(one))
        if is_last and pipeline.is_trained:
            self._trained = Trained(trained, before, captured.state)
        if captured.graph.dialect == "fx":
            return Pipeline(rest).apply(trained, context)
        what = f"converted to {captured.graph.dialect}, the trained graph"
        with outer_door(LoweringError, f"{what} does not run"), phase(self.instruments, "convert"):
            converted = to_onnx(trained, captured.feeds)
            converted.scaled = trained.scaled
            moved = None if reference is None else reference.moved(converted, trained)
        if moved is not None:
            raise LoweringError(f"{what} computes something else: {moved}")
        tidy = [] if rest[:1] == (Simplify(),) else [Simplify()]
        return Pipeline([*tidy, *rest]).apply(converted, context)

    def _through(self, pipeline: Pipeline, graph: Graph, context: Context) -> Graph:
        if self.shared is None:
            return pipeline.apply(graph, context)
        return self.shared.apply(pipeline, graph, context)

    @cached_property
    def _torch_form(self) -> Captured:
        """The model as a graph that can be trained."""
        return to_fx(self.captured) if self.captured.torch_form is None else self.captured.torch_form()

    # --- folded -> lowered -> checked --------------------------------------------------------------------------------

    def _is_lossless(self, pipeline: Pipeline) -> bool:
        """Whether nothing may be rounded that the model does not round: no pass that rounds was asked for."""
        return not self.captured.rounds and not rounds((*self.earlier, *pipeline.leaves()))

    def _lowered(self, pipeline: Pipeline, folded: Graph, report: Report) -> Graph:
        """The target's own operators, in the forms that run fastest here where that is measured."""
        chooser = self.backend.chooser(self.captured.feeds, self.threads) if self.is_timed else None
        with (
            outer_door(LoweringError, f"the graph cannot be lowered for {self.backend.name}"),
            phase(self.instruments, "lower") as now,
            watched(self.instruments, "measure forms", None) as advance,
        ):
            if chooser is not None:
                chooser.watch(advance)
            lowered, logs = self.backend.lower(folded, chooser, lossless=self._is_lossless(pipeline))
            now.result = f"{len(lowered.nodes)} nodes"
        found = {} if chooser is None else chooser.measured
        report.notes += [] if chooser is None else chooser.notes
        report.choices += [
            {
                "rule": name,
                "sites": log.hits,
                "declined": {label: Reason.of(why) for label, why in log.declined.items()},
                "measured": found.get(name, []),
            }
            for name, log in logs.items()
            if log.hits or log.declined or found.get(name)
        ]
        return lowered

    def _check_outputs(self, folded: Graph, lowered: Graph, reference: Agree | None) -> None:
        """Raise LoweringError where lowering moved an output further than rounding explains."""
        if reference is None:
            return
        what = f"lowered for {self.backend.name}, the graph"
        with outer_door(LoweringError, f"{what} does not run"):
            try:
                moved = reference.moved(lowered, folded)
            except GraphError as error:
                raise LoweringError(f"{what} does not run: {error}") from error
        if moved is not None:
            raise LoweringError(f"{what} computes something else: {moved}")

    def _check_shapes(self, lowered: Graph) -> None:
        """Raise LoweringError where an output of a model that cannot be run has another shape or dtype than before."""
        for before, after in zip(self.captured.graph.outputs, lowered.outputs, strict=True):
            was, now = before.shape, after.shape
            sizes = () if was is None or now is None else zip(was, now, strict=False)
            ranks = was is not None and now is not None and len(was) != len(now)
            known = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
            if ranks or known or (None not in (before.dtype, after.dtype) and before.dtype != after.dtype):
                raise LoweringError(
                    f"lowered for {self.backend.name}, output {before.name!r} went from shape {was} and "
                    f"{dtype_name(before.dtype)} to shape {now} and {dtype_name(after.dtype)}"
                )

    def _is_held_by_sites(self, pipeline: Pipeline) -> bool:
        """Whether the model came in quantized, is to come out with the same numbers, and can be held to that here.

        That is for ONNX files, which others quantized; a program of torch.export is held as a whole.
        """
        asked = self.agree is not False and (self.agree or not self._is_large)
        if self.backend.dialect != "onnx" or not (self.captured.feeds and self.backend.runs and asked):
            return False
        return all(one.lossless for one in pipeline.leaves()) and relower.has_quantized_sites(self.captured.graph)

    def _check_sites(self, transformed: Graph, folded: Graph, report: Report) -> None:
        """Hold each quantized site by itself to what it was, at the first example inputs. Raises LoweringError.

        What it was is read from the transformed graph: all passes are lossless here, and one of them may have folded a
        batch norm into a site, which then means something else than in the file.
        """
        with outer_door(LoweringError, f"re-lowered for {self.backend.name}, a site does not run by itself"):
            report.relowering = relower.compare_sites(transformed, folded, self.backend, self.captured.feeds[0])
        report.notes.append(str(report.relowering))
        try:
            relower.require_within_one_step(report.relowering)
        except GraphError as error:
            what = f"re-lowered for {self.backend.name}, the file computes something else: {error}"
            raise LoweringError(what) from error

    def _check_kernels(self, small: Optimized, reference: Agree | None, *, promised: bool) -> None:
        """Compile, count the kernels that the engine built, and compare its outputs with the original's.

        promised: whether fewer int8 kernels than the graph promises are an error. Raises LoweringError.
        """
        report = small.report
        with (
            outer_door(LoweringError, f"{self.backend.name} does not run the lowered graph"),
            phase(self.instruments, "check") as now,
        ):
            if promised:
                self.backend.check(small.folded, small.runner)
            report.kernels = small.runner.kernels()
            moved = None
            if reference is not None:
                self._compare(small, reference)
                if promised:
                    rounds = self.backend.rounds(small.lowered)
                    can_run = self.captured.graph.dialect == self.backend.dialect
                    own = (lambda: self._captured_runner) if can_run else None
                    moved = reference.moved_by(small.run_anew, small.folded, rounds=rounds, own=own)
            small.forget_state()
            now.result = tables.closeness(report)
        if moved is not None:
            raise LoweringError(f"the file computes something else as {self.backend.engine()} optimizes it: {moved}")

    def _compare(self, small: Optimized, reference: Agree) -> None:
        """Report how far the result is from the original. Raises LoweringError where that is no number."""
        try:
            small.report.agreement_by_shapes, notes = reference.compare(small.run_anew)
        except GraphError as error:
            raise LoweringError(f"run by {self.backend.name}, the result fails: {error}") from error
        small.report.agreement = worst_of_each(small.report.agreement_by_shapes.values())
        small.report.notes += notes
        self._compare_lengths(small)

    def _compare_lengths(self, small: Optimized) -> None:
        """Report the same on calibration texts of several lengths, where the model takes tokens."""
        for length, reference in self._of_lengths:
            found, _ = reference.compare(small.run_anew)
            (small.report.agreement_by_length[length],) = found.values()  # one batch, so one set of shapes

    @cached_property
    def _of_lengths(self) -> list[tuple[str, Agree]]:
        """By length, what results are compared with on calibration texts: as they are, and cut or joined."""
        graph, calibration = self.captured.graph, self.calibration
        lossless = all(one.lossless for one in self.pipeline.leaves())
        if calibration is None or calibration.once or lossless or not lengths.takes_tokens(graph):
            return []
        others = calibration.at_other_lengths(graph)
        feeds = [next(iter(calibration)), *(others.batches if others else ())]
        return [(lengths.text(one), Agree(graph, [one], self.captured.signature.outputs)) for one in feeds]

    def _check_metric(self, small: Optimized) -> None:
        """Evaluate what was trained and what ships: the same metric is promised, and reported."""
        if self.evaluate is None or (self.mesh is not None and isinstance(self.evaluate, OnEveryRank)):
            return  # here rank 0 is alone
        signature = self.captured.signature
        trained = small.transformed if self._trained is None else self._trained.graph
        found = Shipped(*(
            float(self.evaluate(model))
            for model in (as_model(self.captured.graph, signature), as_model(trained, signature), small)
        ))  # fmt: skip
        small.report.shipped = found
        small.report.notes.append(str(found))

    # --- timed -------------------------------------------------------------------------------------------------------

    def _timed(self, check: SpeedCheck, small: Optimized, notes: list[str]) -> _Attempt:
        with (
            phase(self.instruments, "measure") as now,
            watched(self.instruments, "measure", timing.ROUNDS) as advance,
        ):
            speed = check.time(small.runner, digest(small.lowered), advance)
            now.result = tables.faster([vars(ratio) for ratio in speed.ratios])
        return _Attempt(small, speed, notes)

    def _without_losers(self, check: SpeedCheck, attempt: _Attempt) -> _Attempt:
        """Run again without the sites that make the model slower, while there are some, up to RERUNS times."""
        reverted: dict[str, Decline] = {}
        for _ in range(RERUNS):
            lost = self._slowest_sites(check, attempt)
            if not lost:
                break
            reverted |= lost
            with phase(self.instruments, "revert") as now:
                now.result = f"{len(reverted)} sites that are slower; once more without them"
            try:
                small = self._optimized(self.pipeline, reverted)
            except (UsageError, PassError) as error:  # such as a budget that cannot be met without these sites
                attempt.notes.append(f"without the sites that made the model slower: {error}")
                break
            attempt = self._timed(check, small, attempt.notes)
        return attempt

    def _without_passes(self, check: SpeedCheck, attempt: _Attempt) -> _Attempt:
        """While the result is slower than the input: the fallback pipeline, and then the input as it was."""
        simpler = (
            ("the input, simplified", self.fallback, None),
            ("the input as it was", Pipeline(), self._baseline.graph),
        )
        for what, pipeline, lowered in simpler:
            small, result = attempt.small, attempt.speed
            if not result.slower:
                break
            if str(pipeline) == small.report.pipeline:
                continue
            index = min(result.slower, key=lambda index: result.ratios[index].median)
            speed, shapes = result.ratios[index].median, shapes_text(self.captured.feeds[index])
            reverted = f", even with {len(small.report.reverted)} sites as they were" if small.report.reverted else ""
            attempt.notes.append(
                f"{small.report.pipeline} makes the model slower here{reverted}: it runs {speed:.2f} times as "
                f"fast as the input at {shapes}. This is {what}"
            )
            attempt = self._timed(check, self._optimized(pipeline, lowered=lowered), attempt.notes)
        return attempt

    def _note_slower(self, attempt: _Attempt) -> None:
        """What was trained is kept, since no faster model has learned what it has; the user hears of it."""
        for index in attempt.speed.slower:
            ratio, shapes = attempt.speed.ratios[index], shapes_text(self.captured.feeds[index])
            attempt.notes.append(
                f"warning: it runs {ratio.median:.2f} times as fast as the input at {shapes}, and is kept as it was "
                "trained; without the passes that do not pay there it would be trained again"
            )

    @cached_property
    def _baseline(self) -> _Baseline:
        """The input as it was handed in; as it was captured, where the engine does not run that."""
        captured, notes = self.captured, list[str]()
        candidates: list[tuple[str, Callable[[], Graph]]] = [("the captured model", lambda: captured.graph)]
        if self.original is not None:
            original = self.original
            candidates = [("the input itself", lambda: original)]
        elif captured.untouched is not None:
            candidates.insert(0, ("the input itself", captured.untouched))
        for what, make in candidates:
            try:
                graph = make()
                runner = self._captured_runner if graph is captured.graph else self.backend.compile(graph, self.threads)
                for feeds in self._examples:
                    runner(feeds)
                return _Baseline(graph, runner, notes)
            except Exception as error:  # exceptions of engines have no class in common
                notes.append(f"the speed is not over {what}, which does not run here ({first_line(error)})")
        return _Baseline(captured.graph, None, notes)

    @cached_property
    def _captured_runner(self) -> Runner:
        return self.backend.compile(self.captured.graph, self.threads)

    def _speed_check(self, baseline: Runner) -> SpeedCheck:
        setting = {
            "graphopt": machine.version("graphopt"),
            "engine": self.backend.engine(),
            "machine": machine.machine(),
            "threads": self.threads,
            "input": digest(self._baseline.graph),
        }
        feeds = [self.backend.place(one) for one in self._examples]
        return SpeedCheck(baseline, lambda: self._captured_runner, feeds, setting, cache.opened(), self.backend.clock)

    @property
    def _examples(self) -> list[Feeds]:
        """The example inputs, to be run: copies where the model writes to its inputs, for they belong to the user."""
        feeds = self.captured.feeds
        if not self.captured.graph.stateful:
            return feeds
        return [{name: tensor.clone() for name, tensor in one.items()} for one in feeds]

    def _slowest_sites(self, check: SpeedCheck, attempt: _Attempt) -> dict[str, Decline]:
        """The sites to revert, by label, and why. Against the captured model, whose nodes have the sites' names."""
        small, slower = attempt.small, attempt.speed.slower
        if not slower:
            return {}
        lossless = {one.name for one in self.pipeline.leaves() if one.lossless}
        records = [record for record in small.report.passes if record.name not in lossless]
        lost = check.slowest_sites(small.runner, digest(small.lowered), slower, records)
        return {label: Decline("slower", before=1e6 * before, after=1e6 * after)
                for label, (before, after) in lost.items()}  # fmt: skip

    # --- size --------------------------------------------------------------------------------------------------------

    @cached_property
    def _is_large(self) -> bool:
        return cost.Cost.of(self.captured.graph).bytes > cost.LARGE

    @property
    def _is_too_large_to_run(self) -> bool:
        """Whether the model is so large that it runs only where agree=True asks for that."""
        return self._is_large and not self.agree


def rounds(passes: Iterable[Pass]) -> bool:
    """Whether one of the passes rounds numbers, so that a target may round others."""
    return any(one.stage is Stage.QUANTIZE and not one.lossless for one in passes)


@dataclass(frozen=True)
class _Step:
    """Which passes all ranks run next, and what they leave as it is."""

    pipeline: str = ""
    reverted: Mapping[str, Decline] = field(default_factory=dict)


def _evaluated(evaluate: Callable[[Any], float], signature: Signature, mesh: Mesh | None, graph: Graph) -> float:
    """The metric of a graph, as rank 0 finds it."""
    return evaluated(evaluate, as_model(graph, signature), mesh)


def _raised(error: Exception) -> Report:
    raise error


class _BeforeLowering(Instrument):
    """Keeps the graph as it is before the first lowering pass: the transformed graph."""

    graph: Graph | None = None

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        if self.graph is None and pass_.stage is Stage.LOWER:
            self.graph = graph.clone()  # shares the weights
