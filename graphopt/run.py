"""One run: passes, lowering, checks, and the way back where the result is slower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt.capture.signature import as_model
from graphopt.capture.sources import Captured, Feeds
from graphopt.errors import GraphError, LoweringError, PassError, UsageError, first_line
from graphopt.ir import cost
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, digest
from graphopt.lowering import relower
from graphopt.lowering.backend import Backend, Runner
from graphopt.lowering.never_slower import RERUNS, SpeedCheck, SpeedResult
from graphopt.pipeline.calibration import Calibration, Remembered
from graphopt.pipeline.context import Context, Loss
from graphopt.pipeline.instruments import Agree, Instrument, Reproduce, Verify
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline
from graphopt.pipeline.text import parse
from graphopt.report.declines import Reason
from graphopt.report.records import Report, count_kinds
from graphopt.result import Optimized, shapes_text, versions


@dataclass(frozen=True)
class _Input:
    """What came in, to compare with: a graph, how it runs if it does, and what the user should know of that."""

    graph: Graph
    runner: Runner | None
    notes: list[str]


@dataclass
class Run:
    """One call of `optimize`: what it was asked for, and the pipeline with all that follows it."""

    captured: Captured
    pipeline: Pipeline
    backend: Backend
    calibration: Calibration | None
    loss: Loss
    evaluate: Callable[[Any], float] | None
    threads: int | None
    agree: bool | None
    measure: bool
    instruments: Sequence[Instrument]

    def never_slower(self) -> Optimized:
        """The result; where it is slower than the input, sites that lose are reverted, and in the end all of them."""
        if not self._times():
            return self.run(self.pipeline)
        if self.calibration is not None:  # the pipeline may run again
            self.calibration = Remembered(self.calibration, digest)
        made = self.run(self.pipeline)
        feeds, notes = self.captured.feeds, list(self._input.notes)
        untouched, baseline = self._input.graph, self._input.runner
        if baseline is None:
            made.report.notes += notes
            return made
        check = self._speed_check(baseline)
        speed = check.time(made.runner, digest(made.lowered))
        reverted: dict[str, Decline] = {}
        for _ in range(RERUNS):
            lost = self._slowest_sites(check, made, speed)
            if not lost:
                break
            reverted |= lost
            try:
                made = self.run(self.pipeline, reverted)
            except (UsageError, PassError) as error:  # such as a budget that cannot be met without these sites
                notes.append(f"without the sites that made the model slower: {error}")
                break
            speed = check.time(made.runner, digest(made.lowered))
        simpler = ("the simplified float model", whole_pipeline(None, self.backend), None)
        for what, pipeline, lowered in (simpler, ("the input as it was", Pipeline([]), untouched)):
            if not speed.slower:
                break
            if str(pipeline) == made.report.pipeline:
                continue
            factor, shapes = min((speed.ratios[index].median, shapes_text(feeds[index])) for index in speed.slower)
            besides = f", even with {len(made.report.reverted)} sites as they were" if made.report.reverted else ""
            notes.append(f"{made.report.pipeline} makes the model slower here{besides}: it runs {factor:.2f} times as "
                         f"fast as the input at {shapes}. This is {what}")  # fmt: skip
            made = self.run(pipeline, lowered=lowered)
            speed = check.time(made.runner, digest(made.lowered))
        made.forget_state()
        made.report.notes += notes
        made.report.speed = [
            {"shapes": shapes_text(one), "median": ratio.median, "low": ratio.low, "high": ratio.high,
             "rounds": ratio.rounds, "steady": ratio.steady}
            for one, ratio in zip(feeds, speed.ratios, strict=True)
        ]  # fmt: skip
        return made

    def _times(self) -> bool:
        return bool(self.measure and self.captured.feeds and not self._unasked_for_its_size())

    @cached_property
    def _input(self) -> _Input:
        """The input as it was handed in; as it was captured, where the engine does not run that."""
        captured, notes = self.captured, list[str]()
        attempts: list[tuple[str, Callable[[], Graph]]] = [("the captured model", lambda: captured.graph)]
        if captured.untouched is not None:
            attempts.insert(0, ("the input itself", captured.untouched))
        for what, make in attempts:
            try:
                graph = make()
                runner = self._captured if graph is captured.graph else self.backend.compile(graph, self.threads)
                for one in self._examples:
                    runner(one)
                return _Input(graph, runner, notes)
            except Exception as error:  # the engine's own have no base of theirs
                notes.append(f"the speed is not over {what}, which does not run here ({first_line(error)})")
        return _Input(captured.graph, None, notes)

    @cached_property
    def _captured(self) -> Runner:
        return self.backend.compile(self.captured.graph, self.threads)

    def _speed_check(self, baseline: Runner) -> SpeedCheck:
        from graphopt.measure import cache, machine

        setting = {"graphopt": versions()["graphopt"], "engine": self.backend.engine(), "machine": machine.machine(),
                   "threads": self.threads, "input": digest(self._input.graph)}  # fmt: skip
        feeds = [self.backend.place(one) for one in self._examples]
        return SpeedCheck(baseline, lambda: self._captured, feeds, setting, cache.opened(), self.backend.clock)

    @property
    def _examples(self) -> list[Feeds]:
        """The example inputs, to be run: copies where the model writes to its inputs, for they belong to the user."""
        feeds = self.captured.feeds
        if not self.captured.graph.stateful:
            return feeds
        return [{name: tensor.clone() for name, tensor in one.items()} for one in feeds]

    def _slowest_sites(self, check: SpeedCheck, made: Optimized, speed: SpeedResult) -> dict[str, Decline]:
        """The sites to revert, by label, and why. Against the captured model, whose nodes have the sites' names."""
        if not speed.slower:
            return {}
        lossless = {one.name for one in self.pipeline.leaves() if one.lossless}
        records = [record for record in made.report.passes if record.name not in lossless]
        lost = check.slowest_sites(made.runner, digest(made.lowered), speed.slower, records)
        return {label: Decline("slower", before=1e6 * before, after=1e6 * after)
                for label, (before, after) in lost.items()}  # fmt: skip

    def run(
        self, pipeline: Pipeline, reverted: Mapping[str, Decline] | None = None, *, lowered: Graph | None = None
    ) -> Optimized:
        """Passes, lowering, the engine, and the account of it all. lowered: what the target is to run as it is."""
        captured, backend, original = self.captured, self.backend, self.captured.graph
        reverted, as_it_was = reverted or {}, lowered is not None
        target = backend.name if backend.cpu is None else f"{backend.name} ({backend.cpu})"
        report = Report(target=target, source=captured.source, pipeline=str(pipeline), versions=versions())
        report.notes += [*captured.notes, *backend.notes()]
        report.reverted = {label: Reason.of(why) for label, why in reverted.items()}
        large = self._is_large
        transformed = _Transformed()
        watchers: list[Instrument] = [*([] if large else [Reproduce()]), Verify(), *self.instruments, transformed]
        if large:
            reproducer = "instruments=[Reproduce(folder)] does"
            report.notes.append(f"above 2 GB: a pass that fails leaves no reproducer ({reproducer})")
        if self.measure and self._unasked_for_its_size():
            report.notes.append("above 2 GB: nothing is timed, and forms have a fixed order (agree=True times them)")
        reference = _agree(captured, large, self.agree, report, lambda: self._input.runner)
        if reference is not None:
            watchers.append(reference)
        evaluate = self.evaluate
        context = Context(
            target=backend,
            report=report,
            feeds=captured.feeds,
            calibration=self.calibration,
            loss=lambda outputs, batch: self.loss(captured.signature.rebuild(outputs), batch),
            evaluate=None if evaluate is None else lambda graph: evaluate(as_model(graph, captured.signature)),
            instruments=watchers,
            threads=self.threads,
            reverted=reverted,
        )
        report.cost_before, report.ops_before = context.cost(original), count_kinds(original.nodes)
        folded = pipeline.apply(original, context)
        if lowered is None:
            lowered = self._lower(folded, report)
        if reference is not None:
            try:
                reference.hold(lowered, folded)
            except GraphError as error:
                what = f"lowered for {backend.name}, the graph computes something else: {error}"
                raise LoweringError(what) from error
        if self._relowers(pipeline, large) and not as_it_was:
            self._hold_sites(folded, report)
        report.cost_after, report.ops_after = context.cost(folded), count_kinds(folded.nodes)
        made = Optimized(
            original, transformed.graph or folded, folded, lowered, report, backend, captured.signature, captured.feeds,
            self.threads,
        )  # fmt: skip
        if self._unasked_for_its_size():
            return made
        if not as_it_was:  # else nothing was promised
            backend.check(folded, made.runner)
        report.kernels = made.runner.kernels()
        if reference is not None:
            report.agreement = reference.compare(made.run_anew)
        made.forget_state()
        return made

    def _relowers(self, pipeline: Pipeline, large: bool) -> bool:
        """Whether what came in quantized is to come out with the same numbers, and can be held to that here.

        Files that others quantized are ONNX; a program of torch.export is held as a whole.
        """
        if self.backend.dialect != "onnx":
            return False
        runs = self.captured.feeds and self.backend.runs and self.agree is not False and (self.agree or not large)
        lossless = all(one.lossless for one in pipeline.leaves())
        return bool(runs) and lossless and relower.has_quantized_sites(self.captured.graph)

    def _hold_sites(self, folded: Graph, report: Report) -> None:
        """Each site by itself, at the first example inputs."""
        report.relowering = found = relower.compare_sites(
            self.captured.graph, folded, self.backend, self.captured.feeds[0]
        )
        report.notes.append(str(found))
        try:
            relower.require_within_one_step(found)
        except GraphError as error:
            what = f"re-lowered for {self.backend.name}, the file computes something else: {error}"
            raise LoweringError(what) from error

    def _lower(self, folded: Graph, report: Report) -> Graph:
        """The target's own operations, in the forms that run fastest here where that is measured."""
        chooser = self.backend.chooser(self.captured.feeds, self.threads) if self._times() else None
        lowered, logs = self.backend.lower(folded, chooser)
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

    @cached_property
    def _is_large(self) -> bool:
        return cost.Cost.of(self.captured.graph).bytes > cost.LARGE

    def _unasked_for_its_size(self) -> bool:
        """Whether the model is too large to be run unless that is asked for."""
        return self._is_large and not self.agree


class _Transformed(Instrument):
    """Keeps the graph as it is before the first lowering pass."""

    graph: Graph | None = None

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        if self.graph is None and pass_.stage is Stage.LOWER:
            self.graph = graph.clone()  # shares the weights


def whole_pipeline(passes: str | Pass | Iterable[Pass] | None, backend: Backend) -> Pipeline:
    """Simplify, the user's passes, then the target's own lowering."""
    from graphopt.passes import REGISTRY

    chosen: Iterable[Pass] = ()
    if isinstance(passes, str):
        chosen = parse(passes, REGISTRY).passes if passes.strip() else ()
    elif isinstance(passes, Pass):
        chosen = [passes]
    elif isinstance(passes, Iterable):
        chosen = list(passes)
    elif passes is not None:
        raise UsageError(f"passes: {passes!r} is a {type(passes).__name__}; give pass objects, or one text")
    for one in chosen:
        if not isinstance(one, Pass):
            raise UsageError(f"passes: {one!r} is a {type(one).__name__}; give pass objects, or one text")
    first = parse("simplify", REGISTRY).passes
    own = [] if next(iter(chosen), None) == first[0] else first
    return Pipeline([*own, *chosen, *parse(backend.pipeline(), REGISTRY).passes])


def _agree(
    captured: Captured, large: bool, agree: bool | None, report: Report, engine: Callable[[], Runner | None]
) -> Agree | None:
    if large and not agree:
        what = "outputs are not compared with the original, nor kernels counted"
        report.notes.append(f"above 2 GB: {what} (agree=True does both)")
        return None
    if agree is False or not captured.feeds:
        return None
    return Agree(captured.graph, captured.feeds, captured.signature.outputs, engine)
