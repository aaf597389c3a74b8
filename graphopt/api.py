"""The one call, and what it returns."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture.sources import Captured, Feeds, Signature, capture
from graphopt.ir import cost
from graphopt.ir.graph import Graph, GraphError, digest
from graphopt.lowering import relower as reemission
from graphopt.lowering.backend import Backend, LoweringError, Runner
from graphopt.lowering.never_slower import RERUNS, Trial, Verdict
from graphopt.pipeline.calibration import Calibration, Remembered
from graphopt.pipeline.instruments import Agree, Instrument, Reproduce, Verify
from graphopt.pipeline.passes import Context, Loss, Pass, PassError, Pipeline, Stage, UsageError, parse
from graphopt.report.records import GraphDiff, Report, count_kinds
from graphopt.sensitivities import as_model

if TYPE_CHECKING:
    from graphopt.measure.timing import Ratio

_VERSIONS = ("graphopt", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def optimize(
    model: Any,
    passes: str | Pass | Iterable[Pass] | None = None,
    *,
    target: str = "onnxruntime",
    example_inputs: Any = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    calibration: Any = None,
    calibration_steps: int | None = None,
    loss: Loss | None = None,
    evaluate: Callable[[Any], float] | None = None,
    cache: bool = False,
    threads: int | None = None,
    agree: bool | None = None,
    measure: bool | None = None,
    cpu: str | None = None,
    instruments: Sequence[Instrument] = (),
) -> Optimized:
    """Make a model smaller and faster on a target.

    model: nn.Module, ExportedProgram, fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph, or a path to .onnx or
    .pt2; it is not changed. passes: as text or objects; None only simplifies and lowers, which loses nothing.
    example_inputs: a batch (tensor, tuple or dict; torch or numpy), or a list of them for several shapes; needed for
    modules. dynamic_shapes: {input: {axis: name}}; left out, axis 0 of every input and axis 1 of integer inputs.
    calibration: any iterable of batches, for passes that look at activations. loss: (what the model returns, the
    batch) -> one number, for passes that follow gradients; None is the cross-entropy to the labels in the batches.
    evaluate: (a model that is called like the original) -> how good it is, more is better, for goals in that measure.
    threads: of the engine, None for its default.
    agree: compare outputs with the original after every pass; None does so up to 2 GB of weights. An ONNX file above
    that is not run at all unless asked, or calibrated, and then a section of its layers at a time; its weights are read
    one by one: memory holds a few copies of the largest.
    measure: time the forms that a pattern may take at the example inputs, and the result against the input: what makes
    it slower is put back. None does so unless the environment has GRAPHOPT_MEASURE=0, or `cpu` is given: the CPU that
    the result is for, where it is another one (avx2, avx512, avx512_vnni). Unmeasured, forms have a fixed order.
    instruments: further watchers of the pipeline, such as Dump or Progress.

    Raises UsageError for what cannot be asked, CaptureError for what cannot be captured, PassError when a pass fails,
    LoweringError when the engine builds less than promised, or the lowered graph computes something else.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads is {threads!r}; give a whole number, at least 1")
    backend = _target(target, cpu)
    backend.accept(model, example_inputs)
    measures = _measures(measure, backend)
    pipeline = _pipeline(passes, backend)
    with _few_collections():
        captured = capture(
            model, backend.dialect, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, cache=cache,
            run=agree or None,
        )  # fmt: skip
        data = None
        if calibration is not None:
            data = Calibration(calibration, captured.graph.inputs, calibration_steps, instruments)
        if measure and not captured.feeds:
            raise UsageError("measure=True needs example_inputs: there are none that the model runs on")
        job = _Job(captured, pipeline, backend, data, loss or cross_entropy, evaluate, threads, agree,
                   measures, instruments)  # fmt: skip
        return job.never_slower()


@dataclass(frozen=True)
class _Input:
    """What came in, to compare with: a graph, how it runs if it does, and what the user should know of that."""

    graph: Graph
    runner: Runner | None
    notes: list[str]


@dataclass
class _Job:
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
        """The result; where it is slower than the input, sites that lose are put back, and in the end all of them."""
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
        trial = self._trial(baseline)
        verdict = trial.verdict(made.runner, digest(made.lowered))
        put_back: dict[str, str] = {}
        for _ in range(RERUNS):
            lost = self._losers(trial, made, verdict)
            if not lost:
                break
            put_back |= lost
            try:
                made = self.run(self.pipeline, put_back)
            except (UsageError, PassError) as error:  # such as a budget that cannot be met without these sites
                notes.append(f"without the sites that made the model slower: {error}")
                break
            verdict = trial.verdict(made.runner, digest(made.lowered))
        simpler = ("the simplified float model", _pipeline(None, self.backend), None)
        for what, pipeline, lowered in (simpler, ("the input as it was", Pipeline([]), untouched)):
            if not verdict.slower:
                break
            if str(pipeline) == made.report.pipeline:
                continue
            speed, shapes = min((verdict.ratios[index].median, _shapes(feeds[index])) for index in verdict.slower)
            besides = f", even with {len(made.report.put_back)} sites as they were" if made.report.put_back else ""
            notes.append(f"{made.report.pipeline} makes the model slower here{besides}: it runs {speed:.2f} times as "
                         f"fast as the input at {shapes}. This is {what}")  # fmt: skip
            made = self.run(pipeline, lowered=lowered)
            verdict = trial.verdict(made.runner, digest(made.lowered))
        made.forget_state()
        made.report.notes += notes
        made.report.speed = [
            {"shapes": _shapes(one), "median": ratio.median, "low": ratio.low, "high": ratio.high,
             "rounds": ratio.rounds, "steady": ratio.steady}
            for one, ratio in zip(feeds, verdict.ratios, strict=True)
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
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                notes.append(f"the speed is not over {what}, which does not run here ({reason})")
        return _Input(captured.graph, None, notes)

    @cached_property
    def _captured(self) -> Runner:
        return self.backend.compile(self.captured.graph, self.threads)

    def _trial(self, baseline: Runner) -> Trial:
        from graphopt.measure import cache as timings
        from graphopt.measure import timing as measure

        setting = {"graphopt": _versions()["graphopt"], "engine": self.backend.engine(), "machine": measure.machine(),
                   "threads": self.threads, "input": digest(self._input.graph)}  # fmt: skip
        feeds = [self.backend.place(one) for one in self._examples]
        return Trial(baseline, lambda: self._captured, feeds, setting, timings.opened(), self.backend.clock)

    @property
    def _examples(self) -> list[Feeds]:
        """The example inputs, to be run: copies where the model writes to its inputs, for they belong to the user."""
        feeds = self.captured.feeds
        if not self.captured.graph.stateful:
            return feeds
        return [{name: tensor.clone() for name, tensor in one.items()} for one in feeds]

    def _losers(self, trial: Trial, made: Optimized, verdict: Verdict) -> dict[str, str]:
        """The sites to put back, by label, and why. Against the captured model, whose nodes have the sites' names."""
        if not verdict.slower:
            return {}
        lossless = {one.name for one in self.pipeline.leaves() if one.lossless}
        records = [record for record in made.report.passes if record.name not in lossless]
        lost = trial.losers(made.runner, digest(made.lowered), verdict.slower, records)
        return {label: f"slower when changed: {1e6 * after:.0f} us in place of {1e6 * before:.0f} us"
                for label, (before, after) in lost.items()}  # fmt: skip

    def run(
        self, pipeline: Pipeline, put_back: Mapping[str, str] | None = None, *, lowered: Graph | None = None
    ) -> Optimized:
        """Passes, lowering, the engine, and the account of it all. lowered: what the target is to run as it is."""
        captured, backend, original = self.captured, self.backend, self.captured.graph
        put_back, as_it_was = put_back or {}, lowered is not None
        target = backend.name if backend.cpu is None else f"{backend.name} ({backend.cpu})"
        report = Report(target=target, source=captured.source, pipeline=str(pipeline), versions=_versions())
        report.notes += [*captured.notes, *backend.notes()]
        report.put_back = dict(put_back)
        large = self._is_large
        unlowered = _Unlowered()
        watchers: list[Instrument] = [*([] if large else [Reproduce()]), Verify(), *self.instruments]
        watchers += [unlowered] if backend.dialect == "fx" else []
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
            put_back=put_back,
        )
        report.cost_before, report.words_before = context.cost(original), count_kinds(original.nodes)
        neutral = pipeline.apply(original, context)
        if lowered is None:
            lowered = self._lower(neutral, report)
        if reference is not None:
            try:
                reference.hold(lowered, neutral)
            except GraphError as error:
                what = f"lowered for {backend.name}, the graph computes something else: {error}"
                raise LoweringError(what) from error
        if self._writes_anew(pipeline, large) and not as_it_was:
            self._hold_sites(neutral, report)
        report.cost_after, report.words_after = context.cost(neutral), count_kinds(neutral.nodes)
        made = Optimized(
            original, neutral, lowered, report, backend, captured.signature, captured.feeds, self.threads,
            unlowered.graph or neutral,
        )  # fmt: skip
        if self._unasked_for_its_size():
            return made
        if not as_it_was:  # else nothing was promised
            backend.check(neutral, made.runner)
        report.census = made.runner.census()
        if reference is not None:
            report.agreement = reference.compare(made.run_anew)
        made.forget_state()
        return made

    def _writes_anew(self, pipeline: Pipeline, large: bool) -> bool:
        """Whether what came in quantized is to come out with the same numbers, and can be held to that here.

        Files that others quantized are ONNX; a program of torch.export is held as a whole.
        """
        if self.backend.dialect != "onnx":
            return False
        runs = self.captured.feeds and self.backend.runs and self.agree is not False and (self.agree or not large)
        lossless = all(one.lossless for one in pipeline.leaves())
        return bool(runs) and lossless and reemission.rounds_activations(self.captured.graph)

    def _hold_sites(self, neutral: Graph, report: Report) -> None:
        """Each site by itself, at the first example inputs."""
        report.reemission = found = reemission.compare(
            self.captured.graph, neutral, self.backend, self.captured.feeds[0]
        )
        report.notes.append(str(found))
        try:
            reemission.require_steps(found)
        except GraphError as error:
            what = f"written anew for {self.backend.name}, the file computes something else: {error}"
            raise LoweringError(what) from error

    def _lower(self, neutral: Graph, report: Report) -> Graph:
        """The target's own operations, in the forms that run fastest here where that is measured."""
        chooser = self.backend.chooser(self.captured.feeds, self.threads) if self._times() else None
        lowered, logs = self.backend.lower(neutral, chooser)
        found = {} if chooser is None else chooser.found
        report.notes += [] if chooser is None else chooser.notes
        report.choices += [
            {"rule": name, "sites": log.hits, "declined": log.declined, "measured": found.get(name, [])}
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


class _Unlowered(Instrument):
    """Keeps the graph as it is before the first lowering pass."""

    graph: Graph | None = None

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        if self.graph is None and pass_.stage is Stage.LOWER:
            self.graph = graph.clone()  # shares the weights


@dataclass
class BenchResult:
    """Ratios of one interleaved run: for each example shape, how many times faster than the original graph."""

    header: str
    rows: list[tuple[str, Mapping[str, Ratio]]] = field(default_factory=list)
    """(shapes, {"optimized": Ratio, "control": Ratio}); the control is the original against itself."""

    def __str__(self) -> str:
        from graphopt.report import text

        return text.bench(self)


@dataclass
class Optimized:
    """A model that was made smaller and faster. Call it as the original; `.report` says what was done to it."""

    original: Graph
    """The captured graph, before any pass."""
    graph: Graph
    """The graph of words after the passes, before the target's own operations were put in."""
    lowered: Graph
    """What the target runs."""
    report: Report
    backend: Backend
    signature: Signature
    feeds: list[Feeds]
    threads: int | None = None
    neutral: Graph | None = None
    """Of targets of PyTorch, the graph of words before lowering passes: linears by themselves, quantize and dequantize
    around float words. What `module` and packages are made of."""

    @cached_property
    def runner(self) -> Runner:
        """The lowered graph, compiled; above 2 GB of weights not before it is asked for."""
        return self.backend.compile(self.lowered, self.threads)

    def forget_state(self) -> None:
        """Let the next call start from what the model came with, where calls write to stored tensors."""
        if self.lowered.stateful:
            self.__dict__.pop("runner", None)

    def run_anew(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of a first call; feeds stay as they are."""
        self.forget_state()
        return self.runner({name: tensor.clone() for name, tensor in feeds.items()} if self.lowered.stateful else feeds)

    @cached_property
    def module(self) -> nn.Module:
        """The graph of words as a torch.fx.GraphModule (targets of PyTorch only), which stays the same object.

        Read its `.code`, call it as the original, train it further (train() and eval() work; integers are float
        parameters that each call rounds), trace it again with torch.export. It is not the fast form: calling this
        result, and what `export` writes, run the target's kernels. It has tensors of its own: to deploy what was
        trained, hand it to `optimize` again, which finds the integers in it.
        """
        return (self.neutral or self.graph).module(self.signature.rebuild)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the target: inputs and result as the original model has them; numpy in gives numpy out."""
        feeds, numpy = self.signature.bind(args, kwargs)
        results: list[Any] = self.runner(feeds)
        if numpy:
            results = [np.asarray(result) if isinstance(result, Tensor) else result for result in results]
        return self.signature.rebuild(results)

    def diff(self) -> GraphDiff:
        """The graph before and after, to print (text), to show in a terminal (rich) or in a notebook (html)."""
        return GraphDiff.of(self.original, self.graph)

    def bench(self, inputs: Any = None, *, rounds: int = 15) -> BenchResult:
        """Time against the original graph on the same engine, paired and interleaved, at each example shape.

        inputs: a batch or a list of batches; the example inputs by default. Raises UsageError without either, and
        where the engine does not run here.
        """
        from graphopt.measure.timing import environment, header, paired

        self.backend.require_runs()
        several = inputs if isinstance(inputs, list) else [] if inputs is None else [inputs]
        batches = [self.signature.bind((one,) if not isinstance(one, tuple) else one, {})[0] for one in several]
        if not (batches or self.feeds):
            raise UsageError("bench needs inputs: pass bench(inputs=<a batch>)")
        original = self.backend.compile(self.original, self.threads)
        machine = environment()
        result = BenchResult(header(machine, self.threads or int(machine["cores"])))
        for feeds in batches or self.feeds:
            placed = self.backend.place(feeds)
            calls = {name: partial(run, placed) for name, run in
                     {"original": original, "control": original, "optimized": self.runner}.items()}  # fmt: skip
            ratios = paired(calls, baseline="original", rounds=rounds, clock=self.backend.clock)
            result.rows.append((_shapes(feeds), {name: ratios[name] for name in ("optimized", "control")}))
        return result

    def graphsurgeon(self) -> Any:
        """The deployable model as an onnx_graphsurgeon.Graph, for surgery by hand; `optimize` takes it back."""
        return self.backend.graphsurgeon(self.lowered)

    def export(
        self,
        path: str | Path,
        *,
        opset: int | None = None,
        portable: bool = False,
        external_data: bool | None = None,
        aot: bool = False,
    ) -> Path:
        """Write the deployable file, and beside it NAME.json with the report's figures; returns the file's path.

        Targets of PyTorch write a torch.export archive (.pt2), which runs where graphopt is installed. aot: compile an
        AOTInductor package in its place, which `torch._inductor.aoti_load_package` runs without graphopt, with inputs
        by keyword; it needs a C++ compiler, and an example input.
        opset: version of the standard operators. portable: standard operators only, for any engine (slower on the
        target). external_data: keep weights in NAME.data; None decides by size. The same input, pipeline and versions
        give the same bytes. Raises GraphError where there is no folder, or one in a file's place, and naming the node
        that has no spelling at `opset`, and OSError where the disk is full; then nothing is written, and what was there
        stays.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise GraphError(f"there is no folder {path.parent}; make it first")
        manifest = path.with_name(path.name + ".json")
        for file in (path, manifest):
            if file.is_dir():
                raise GraphError(f"{file} is a folder; name another file")
        if aot and (opset is not None or portable or external_data is not None):
            raise UsageError("aot=True compiles for PyTorch: opset, portable and external_data are for ONNX files")
        if aot and not self.feeds:
            raise UsageError("aot=True needs example_inputs, for the compiler")
        graph, metadata = self.graph if portable else self.lowered, self._metadata(portable)
        unfinished = manifest.with_name(f".{manifest.name}.part")
        try:  # the manifest first, so that a full disk leaves an older pair of files as it was
            unfinished.write_text(json.dumps(self.report.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")
            if aot:
                (self.neutral or self.graph).package(path, self.feeds[0], metadata)
            else:
                self.backend.export(graph, path, opset=opset, external_data=external_data, metadata=metadata)
            unfinished.replace(manifest)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    def _metadata(self, portable: bool) -> dict[str, str]:
        """What stands in the file itself: all that decides its bytes, and no measured figure."""
        return {
            "graphopt.pipeline": self.report.pipeline,
            "graphopt.target": self.report.target + (" (portable)" if portable else ""),
            "graphopt.versions": json.dumps(self.report.versions, sort_keys=True),
            "graphopt.input": digest(self.original),
            "graphopt.choices": json.dumps({choice["rule"]: choice["sites"] for choice in self.report.choices}),
        }


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """The mean cross-entropy of logits (..., classes) to the integer labels (...) in a batch; -100 is left out.

    The logits are the output of that name, else the first one. Raises UsageError where the batch holds no labels.
    """
    labels = next((batch[name] for name in ("labels", "label") if isinstance(batch, Mapping) and name in batch), None)
    if labels is None:
        raise UsageError("no loss: pass loss=<function of (outputs, batch)>, or batches (dicts) that hold 'labels'")
    named = outputs if isinstance(outputs, Mapping) else {}
    logits = named.get("logits", next(iter(pytree.tree_leaves(outputs))))
    return F.cross_entropy(logits.flatten(0, -2).float(), torch.as_tensor(labels).flatten())


@contextmanager
def _few_collections() -> Iterator[None]:
    """Graphs are millions of small objects that live long: the collector's walks over them take a third of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _measures(asked: bool | None, backend: Backend) -> bool:
    """Whether to time forms and results. Raises UsageError where that is asked for and cannot be."""
    if asked and backend.cpu is not None:
        raise UsageError(f"cpu={backend.cpu} is another machine, which cannot be measured here: leave measure=True out")
    if asked:
        backend.require_runs()
    if asked is None:
        return os.environ.get("GRAPHOPT_MEASURE") != "0" and backend.times()
    return asked


def _shapes(feeds: Feeds) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feeds.items())


def _target(name: str, cpu: str | None = None) -> Backend:
    from graphopt.backends import target

    return target(name, cpu)


def _pipeline(passes: str | Pass | Iterable[Pass] | None, backend: Backend) -> Pipeline:
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


def _versions() -> dict[str, str]:
    from graphopt import __version__

    return {name: __version__ if name == "graphopt" else version(name) for name in _VERSIONS}
