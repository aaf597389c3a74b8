"""The one call: what is asked for, turned into one run."""

from __future__ import annotations

import gc
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from graphopt.capture.arguments import several
from graphopt.capture.folders import opened, origin_of
from graphopt.capture.sources import Captured, capture, declared_inputs
from graphopt.dialects.adapter import adapter
from graphopt.errors import (
    CaptureError,
    GraphoptError,
    LoweringError,
    UsageError,
    outer_door,
    require_positive_integer,
    user_batches,
    user_code,
)
from graphopt.ir.graph import digest, tensors_digest
from graphopt.lowering.backend import Backend
from graphopt.measure import timing
from graphopt.passes import REGISTRY
from graphopt.pipeline.batches import Batches
from graphopt.pipeline.calibration import Calibration, Remembered
from graphopt.pipeline.context import TeacherGraph
from graphopt.pipeline.examples import first_batch
from graphopt.pipeline.instruments import Instrument, display, phase
from graphopt.pipeline.loss import Loss, followed
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.prompts import in_steps
from graphopt.pipeline.runner import Pipeline, leaves
from graphopt.pipeline.shared import SharedPasses, shared
from graphopt.pipeline.text import parse
from graphopt.racing.contest import Contest
from graphopt.racing.engines import Engines, engines, require_precision
from graphopt.result import Optimized, versions
from graphopt.run import Run, rounds
from graphopt.training import streams
from graphopt.training.checkpoints import held
from graphopt.training.meshes import Mesh, MeshSizes, accelerated
from graphopt.training.meshes import opened as opened_mesh
from graphopt.training.meshes.evaluating import OnEveryRank, on_every_rank
from graphopt.training.meshes.plans import chosen
from graphopt.training.settings import Settings


def optimize(
    model: Any,
    passes: str | Pass | Iterable[Pass] | None = None,
    *,
    target: str | Sequence[str] = "onnxruntime",
    within: float = 3.0,
    precision: str = "auto",
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    calibration_steps: int | None = None,
    training: Any = None,
    teacher: Any = None,
    checkpoint: str | Path | None = None,
    loss: Loss | None = None,
    evaluate: Callable[[Any], float] | None = None,
    cache: bool = False,
    threads: int | None = None,
    agree: bool | None = None,
    measure: bool | None = None,
    cpu: str | None = None,
    mesh: str | None = None,
    accelerator: Any = None,
    custom_ops: Sequence[Any] = (),
    instruments: Sequence[Instrument] = (),
    verbose: bool | None = None,
) -> Optimized:
    """Make a model smaller and faster on a target.

    model: nn.Module, ExportedProgram, fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph, a path to .onnx or
    .pt2 or to a Hugging Face folder, or what an earlier call returned (below); it is not changed. passes: as text or
    objects; None only simplifies and lowers, which loses nothing. target: the name of a target, see `graphopt targets`;
    "fastest" for the fastest of the CPU engines that are installed, or a list of targets for the fastest of those.
    All of them are raced on this machine, the uncompressed model on each among them, in processes of their own; an
    engine that fails, crashes or hangs on the model has a row in the report, and the others go on.
    within: how far the SQNR of the result may be below the best quantized candidate's in such a race, in dB.
    precision: what a target computes in where the model has float32 and a pass rounds (quantize, cast): float32,
    bfloat16 or float16; "auto" takes what is measured to be fastest within `within`. Of one target also written as
    "openvino{precision=bfloat16}".
    example_inputs: a batch (tensor, tuple or dict; torch or numpy), or a list of them for several shapes; None is the
    first batch of calibration, else of training. A module needs one of the three.
    dynamic_shapes: {input: {axis: name}}, or as torch.export takes it; left out, axis 0 of every input and axis 1 of
    integer inputs.
    cache: capture the decode step of a language model, with its key-value cache; the example inputs are prompts.
    calibration: any iterable of batches, for passes that read activations; calibration_steps: most batches to use.
    training: any re-iterable of batches, for the passes that train (`distill`, `finetune`); labels may stand beside the
    inputs. teacher: a module or an ONNX file for `distill` to learn from, in place of the model as it was.
    checkpoint: a folder where training is kept every few minutes; the same call goes on from there.
    loss: (what the model returns, the batch) -> one number, for passes that train or follow gradients; None is the
    cross-entropy to the labels in the batches. evaluate: (a model that is called like the original) -> how good it is,
    more is better: for goals in that measure, and to choose the best weights while training.
    threads: of the engine, None for its default.
    agree: compare outputs with the original after every pass; None does so up to 2 GB of weights. An ONNX file above
    2 GB is run only where agree=True or calibration asks for it, and then in sections of its layers; its weights are
    read one by one, and memory holds a few copies of the largest. With False, a module whose captured graph computes
    something else than the module is accepted with a note; it is an error otherwise.
    measure: time the forms that a pattern may take at the example inputs, and the result against the input; what makes
    it slower is reverted. None does so unless the environment has GRAPHOPT_MEASURE=0, or `cpu` is given. Without
    measuring, forms are tried in a fixed order. cpu: the CPU that the result is for, where it is another one than this
    (avx2, avx512, avx512_vnni, avx512_amx).
    mesh: how the run is spread over the processes of torchrun, such as "dp=2" or "dp=2,tp=2": dp, each process has its
    share of the batches; fsdp, and of every weight; tp, of every layer; pp, some of the layers; dp goes with one of
    the others. None is dp over all of them, "auto" chooses dp and fsdp by memory. Every process makes the same calls;
    rank 0 measures, lowers and writes. accelerator: an accelerate.Accelerator in place of it: the run is spread over
    its processes, and training goes through its DDP or its DeepSpeed. Its mixed_precision, device and
    gradient_accumulation_steps are those of the passes that train; an option that says something else is an error.
    custom_ops: what defines the custom operators of an ONNX file: libraries of onnxruntime (paths), functions of
    onnxscript, or the module onnxruntime_extensions; they stay known to the process. A file whose operators are not
    known is not run: passes that need no run work, and only the shapes of outputs are checked.
    instruments: further watchers of the pipeline, such as Dump.
    verbose: True writes a line for each pass and each other phase to stderr, with bars on a terminal; False writes
    nothing. None is True on a terminal and in a notebook, unless the logger `graphopt` is enabled for INFO: then, and
    everywhere else, the lines go to that logger alone, which is silent until `logging` is set up.

    An `Optimized` goes on where it stands: its transformed graph is what comes in, with its signature and, unless
    others are given, its example inputs. `optimize(optimize(m, "prune{...}"), "quantize")` does what
    `optimize(m, "prune{...},quantize")` does; the passes of all calls together must be in the order of the stages. The
    target may be another one of the same dialect. Figures of the report are against the model of this call, and so is
    what `distill` learns from, unless teacher= is given.

    Raises UsageError for what cannot be asked, CaptureError for what cannot be captured, PassError when a pass fails,
    LoweringError when the engine builds less than promised, or the lowered graph computes something else, RankError
    when another process fails or differs; nothing but a GraphoptError. An exception of the user's own code (calibration
    batches, loss, evaluate) becomes a UsageError that names it, with the exception as its `__cause__`.
    """
    earlier = model.applied if isinstance(model, Optimized) else ()
    with outer_door(UsageError, "optimize cannot use its arguments"):
        if threads is not None:
            require_positive_integer("threads", threads)
        for option, flag in (("agree", agree), ("measure", measure), ("verbose", verbose)):
            if not isinstance(flag, bool | None):
                raise UsageError(f"{option} is {flag!r}; give True, False or None")
        origin = model.origin if isinstance(model, Optimized) else origin_of(model)
        model = opened(model)
        if accelerator is None:
            processes = opened_mesh(mesh, _mesh_for(model) if mesh == "auto" else None)
        else:
            processes = accelerated.mesh_of(accelerator, mesh, checkpoint)
            passes = _trained_by(accelerator, passes)
        if processes is not None:
            accelerated.require_whole(training=training, calibration=calibration)
        leads = processes is None or processes.leads
        instruments = display(verbose if leads else False, instruments if leads else ())
        require_precision(precision)
        if isinstance(within, bool) or not isinstance(within, int | float) or not within >= 0:
            raise UsageError(f"within is {within!r}; give decibels, a number of at least 0")
        asked = engines(target, cpu, precision, model, example_inputs)
        backend = asked.backends[0]
        if custom_ops:
            if asked.is_several:
                raise UsageError("custom_ops= are known to this process alone, and a race runs each engine in its own: "
                                 "give one target")  # fmt: skip
            adapter(backend.dialect).register(custom_ops)
        measures = _measures(measure, backend)
        pipeline = whole_pipeline(passes, backend, earlier)
        is_lossy = rounds((*earlier, *pipeline.leaves()))
        _require_open(asked, is_lossy)
        is_race = asked.is_several or _is_race_of_precisions(asked, measures and processes is None, is_lossy)
        if is_race and processes is not None:
            raise UsageError("engines and precisions are raced by one process, and this is one of several: give one "
                             "target, without precision=")  # fmt: skip
        if asked.is_several and checkpoint is not None and _trains_for_each(pipeline):
            raise UsageError("checkpoint= keeps one training, and what is trained behind quantize, or behind a pass "
                             "that measures, is trained for each engine: give one target")  # fmt: skip
        for option, given in (("training", training), ("teacher", teacher), ("checkpoint", checkpoint)):
            if given is not None and not pipeline.is_trained:
                raise UsageError(f"{option}= is for passes that train, and there are none: add distill or finetune")
        if teacher is not None and all(leaf.name == "finetune" for leaf in pipeline.leaves() if leaf.trains):
            raise UsageError("teacher= is for distill, and finetune learns from labels: use distill, or leave it out")
    if asked.is_several and isinstance(calibration, Iterator):
        if calibration_steps is not None:
            require_positive_integer("calibration_steps", calibration_steps)
        # each dialect reads the batches for itself
        calibration = list(islice(user_batches("calibration batches", calibration), calibration_steps))
    with _few_collections(), _session(processes):
        if processes is not None:
            for package, own in versions().items():
                processes.require_same(f"the version of {package}", own, "start all processes in one environment")
        if example_inputs is None:
            example_inputs = default_examples(model, calibration=calibration, training=training)
            if processes is not None:
                given_inputs = example_inputs
                example_inputs = processes.first(lambda: given_inputs)
        call = _Call(
            model, passes, earlier, asked, example_inputs, dynamic_shapes, cache, calibration, calibration_steps,
            training, teacher, None if checkpoint is None else Path(checkpoint), followed(loss),
            None if evaluate is None else _guarded(evaluate), threads, agree, measure, measures,
            instruments, processes, SharedPasses() if asked.is_several else None,
        )  # fmt: skip
        if not is_race:
            run = call.run(backend)
            with call.guarded(run):
                small = run.result()
        else:
            contest = Contest(
                asked.backends, call.run, call.guarded, float(within), asked.precisions, threads, instruments,
                asked.absent,
            )  # fmt: skip
            small = contest.result() if measures else contest.first()
    small.origin = origin
    return small


@dataclass
class _Call:
    """What was asked for, and what several engines have in common: a model is captured once for each dialect, and what
    passes before quantizing do to it is done once."""

    model: Any
    passes: str | Pass | Iterable[Pass] | None
    earlier: tuple[Pass, ...]
    asked: Engines
    example_inputs: Any
    dynamic_shapes: Any
    cache: bool
    calibration: Any
    calibration_steps: int | None
    training: Any
    teacher: Any
    checkpoint: Path | None
    loss: Callable[..., Tensor]
    evaluate: Callable[[Any], float] | None
    threads: int | None
    agree: bool | None
    measure: bool | None
    measures: bool
    instruments: Sequence[Instrument]
    mesh: Mesh | None
    shared: SharedPasses | None
    """Of several engines, what passes before quantizing have left."""
    _captured: dict[str, Captured | GraphoptError] = field(default_factory=dict)
    _batches: dict[str, Calibration | None] = field(default_factory=dict)

    def run(self, backend: Backend) -> Run:
        """The run for one engine. Raises what its arguments, and the capture, raise."""
        captured = self._capture(backend)
        with outer_door(UsageError, "optimize cannot use its arguments"):
            batches = self._calibration(captured)
            if self.measure and not captured.feeds:
                raise UsageError("measure=True needs example_inputs: there are none that the model runs on")
        training = self.training
        return Run(
            captured,
            whole_pipeline(self.passes, backend, self.earlier),
            backend,
            training=None if training is None else Batches(training, captured.graph.inputs, name="training"),
            teacher=None if self.teacher is None else _teacher(self.teacher, captured),
            checkpoint=self.checkpoint,
            fallback=whole_pipeline(None, backend, self.earlier),
            earlier=self.earlier,
            sparse=self.model.sparse if isinstance(self.model, Optimized) else {},
            calibration=batches,
            loss=self.loss,
            evaluate=self.evaluate,
            threads=self.threads,
            agree=self.agree,
            measure=self.measures,
            instruments=self.instruments,
            shared=self.shared,
            mesh=self.mesh,
        )

    @contextmanager
    def guarded(self, run: Run) -> Iterator[None]:
        """Let nothing but a GraphoptError out of a run, whose checkpoints are in the folder for them."""
        if self.mesh is not None:
            _require_same(self.mesh, run, self.checkpoint)
        what = f"{run.captured.source} cannot be optimized by {run.pipeline} for {run.backend.name}"
        with outer_door(LoweringError, what), _checkpoint(self.checkpoint, run.pipeline, run.captured, self.mesh):
            yield

    def _capture(self, backend: Backend) -> Captured:
        """The model in the dialect of an engine, captured once, or the error of that."""
        found = self._captured.get(backend.dialect)
        if found is None:
            try:
                with phase(self.instruments, "capture") as now:
                    found = self._captured_for(backend)
                    now.result = f"{len(found.graph.nodes)} nodes"
            except GraphoptError as error:
                found = error
            self._captured[backend.dialect] = found
        if isinstance(found, GraphoptError):
            raise found
        return found

    def _captured_for(self, backend: Backend) -> Captured:
        if isinstance(self.model, Optimized):
            return _continued(self.model, backend, self.example_inputs, self.dynamic_shapes, self.cache)
        traced = self._captured.get("onnx")
        if isinstance(traced, Captured) and traced.torch_form is not None:  # backend.dialect is "fx": the same trace
            return traced.torch_form()
        return capture(
            self.model, backend.dialect, example_inputs=self.example_inputs, dynamic_shapes=self.dynamic_shapes,
            cache=self.cache, run=self.agree or None, check=self.agree is not False,
        )  # fmt: skip

    def _calibration(self, captured: Captured) -> Calibration | None:
        """The calibration batches, whose statistics the engines of one dialect have in common."""
        dialect = captured.graph.dialect
        if self.calibration is not None and dialect not in self._batches:
            source, steps = _in_steps(self.calibration, self.calibration_steps, captured)
            found = Calibration(source, captured.graph.inputs, steps, self.instruments)
            if self.mesh is not None:
                found = found.over(self.mesh)
            self._batches[dialect] = Remembered(found, digest) if self.asked.is_several else found
        return self._batches.get(dialect)


def _guarded(evaluate: Callable[[Any], float]) -> Callable[[Any], float]:
    """The user's evaluate function, whose errors are the user's; one for every rank stays so."""
    guarded = user_code("evaluate function", evaluate)
    return on_every_rank(guarded) if isinstance(evaluate, OnEveryRank) else guarded


def _mesh_for(model: Any) -> Callable[[int, int], MeshSizes]:
    """What mesh="auto" stands for. Raises UsageError for what is no module."""
    if not isinstance(model, nn.Module):
        raise UsageError('mesh="auto" chooses by the shapes of a module, and none was handed in: name a mesh')
    return partial(chosen, model)


def _trained_by(accelerator: Any, passes: str | Pass | Iterable[Pass] | None) -> str | Pass | Iterable[Pass] | None:
    """The passes, with the options of those that train as an Accelerator says. Raises UsageError where they differ."""

    def with_its(one: Any) -> Any:
        if isinstance(one, Pipeline):
            return replace(one, passes=tuple(map(with_its, one.passes)))
        return accelerated.agreed(one, accelerator) if isinstance(one, Settings) else one

    if isinstance(passes, str):
        passes = parse(passes, REGISTRY).passes if passes.strip() else ()
    if isinstance(passes, Pass):
        return cast(Pass, with_its(passes))
    return [with_its(one) for one in passes] if isinstance(passes, Iterable) else passes


def _session(mesh: Mesh | None) -> AbstractContextManager[None]:
    return nullcontext() if mesh is None else mesh.session()


def _require_same(mesh: Mesh, run: Run, checkpoint: str | Path | None) -> None:
    """Raise RankError, naming the first difference, where ranks are to do different things."""
    feeds = hashlib.sha256("".join(tensors_digest(one, "") for one in run.captured.feeds).encode()).hexdigest()
    same = "every process must make the same calls, on the same model, files and versions"
    for what, own in (
        ("the mesh", str(mesh)),
        ("the pipeline", str(run.pipeline)),
        ("the target", run.backend.name),
        ("the captured model", digest(run.captured.graph)),
        ("example_inputs", feeds),
        ("checkpoint", str(checkpoint)),
    ):
        mesh.require_same(what, own, same)
    for name, batches in (("calibration", run.calibration), ("training", run.training)):
        seen = _first_of(batches) if batches is not None and batches.repeats else None
        mesh.require_same(f"the {name} data", seen, "give every process the same batches, in one order: each reads its "
                          "share of them (a DistributedSampler cuts them beforehand)")  # fmt: skip


def _first_of(batches: Batches) -> str:
    """How many batches there are, where that is known, and what the first holds."""
    with streams.restored():
        torch.manual_seed(0)
        first = next(batches.with_batches())
    return f"{batches.count} batches, the first {tensors_digest(first.feeds, '')[:16]}"


def whole_pipeline(
    passes: str | Pass | Iterable[Pass] | None, backend: Backend, earlier: Sequence[Pass] = ()
) -> Pipeline:
    """Simplify, the passes that were asked for, then the target's own.

    earlier: what earlier calls did to the model, which counts for the order of stages; what is simplified already is
    not simplified first. Raises UsageError for what is no pass, and where the stages are out of order.
    """
    chosen: list[Pass] = []
    if isinstance(passes, str):
        chosen = list(parse(passes, REGISTRY).passes) if passes.strip() else []
    elif isinstance(passes, Pass):
        chosen = [passes]
    elif isinstance(passes, Iterable):
        chosen = list(passes)
    elif passes is not None:
        raise UsageError(f"passes: {passes!r} is a {type(passes).__name__}; give pass objects, or one text")
    for one in chosen:
        if not isinstance(one, Pass):
            raise UsageError(f"passes: {one!r} is a {type(one).__name__}; give pass objects, or one text")
    simplify = parse("simplify", REGISTRY).passes
    first = () if simplify[0] in (*earlier, *chosen[:1]) else simplify
    place = _place_of_simplify(chosen)
    asked = [*chosen[:place], *first, *chosen[place:], *parse(backend.pipeline(), REGISTRY).passes]
    Pipeline([*earlier, *asked])  # which checks the order
    return Pipeline(asked)


def default_examples(model: Any, **sources: Any) -> Any:
    """Example inputs from the first of the sources that gives its batches more than once; None where there is none.

    sources: batches, by what messages call them, such as calibration. Raises UsageError for a module where there is
    only a source that does not, since it cannot be traced without any.
    """
    given = {name: source for name, source in sources.items() if source is not None}
    again = {name: source for name, source in given.items() if not isinstance(source, Iterator)}
    if isinstance(model, Optimized) or not (again or (given and isinstance(model, nn.Module))):
        return None
    name, source = next(iter((again or given).items()))
    with streams.restored():
        return first_batch(model, source, name=name)


def _in_steps(calibration: Any, steps: int | None, captured: Captured) -> tuple[Any, int | None]:
    """Calibration as the graph takes it, and the most batches of it to use. steps: the most to use of what was given,
    which are prompts where the graph is a decode step."""
    if steps is not None:
        require_positive_integer("calibration_steps", steps)
    source = in_steps(calibration, captured.graph, captured.signature.outputs, "calibration", steps)
    return source, steps if source is calibration else None


@contextmanager
def _checkpoint(folder: str | Path | None, pipeline: Pipeline, captured: Captured, mesh: Mesh | None) -> Iterator[None]:
    """The folder for checkpoints, where one was given, for this run alone; rank 0 of a mesh holds it for all."""
    if folder is None:
        yield
        return
    own = held(Path(folder), {"pipeline": _whatever_accumulates(pipeline), "model": digest(captured.graph)})
    with ExitStack() as stack:
        if mesh is None:
            stack.enter_context(own)
        else:
            mesh.first(lambda: stack.enter_context(own))
        yield


def _whatever_accumulates(pipeline: Pipeline) -> str:
    """The text of a pipeline but for `accumulate`: several processes may take what one accumulates."""

    def text(one: Any) -> str:
        return str(replace(one, accumulate=1) if isinstance(one, Settings) else one)

    return ",".join(map(text, pipeline.leaves()))


def _teacher(model: Any, captured: Captured) -> TeacherGraph:
    """What distillation learns from, as a graph: of torch.fx where it is a module. Raises UsageError for a module in
    training mode, whose dropout would teach noise."""
    model = opened(model)
    if isinstance(model, nn.Module) and model.training:
        raise UsageError("the teacher is in training mode, and dropout would teach noise: call teacher.eval()")
    is_program = isinstance(model, torch.export.ExportedProgram) or Path(str(model)).suffix == ".pt2"
    dialect = "fx" if isinstance(model, nn.Module) or is_program else "onnx"
    try:
        names = [value.name for value in captured.graph.inputs]
        by_name = set(names) <= set(_input_names(model))
        examples = [dict(one) if by_name else tuple(one[name] for name in names) for one in captured.feeds]
        found = capture(model, dialect, example_inputs=examples or None)
    except CaptureError as error:
        raise CaptureError(f"teacher: {error}") from error
    return TeacherGraph(found.graph, found.signature.outputs)


def _input_names(model: Any) -> list[str]:
    """What a model calls its inputs: a module its arguments, anything else what it declares."""
    if isinstance(model, nn.Module):
        return list(inspect.signature(model.forward).parameters)
    return [one.name for one in declared_inputs(model)]


def _place_of_simplify(passes: Sequence[Pass]) -> int:
    """Where the model is simplified: first, but where weights are trained only before `quantize`, since batch norms
    that are folded train worse."""
    if not any(leaf.trains for one in passes for leaf in leaves(one)):
        return 0
    staged = (place for place, one in enumerate(passes) if any(leaf.stage >= Stage.QUANTIZE for leaf in leaves(one)))
    return next(staged, len(passes))


@outer_door(CaptureError, "the optimized model cannot be captured again")
def _continued(
    small: Optimized, backend: Backend, example_inputs: Any, dynamic_shapes: object, cache: bool
) -> Captured:
    """An optimized model as what comes in: its transformed graph, from which it is lowered again."""
    for option, given in (("dynamic_shapes", dynamic_shapes is not None), ("cache", cache)):
        if given:
            raise UsageError(f"{option} says how a module is captured, and an Optimized is captured: leave it out")
    if small.transformed.dialect != backend.dialect:
        raise UsageError(
            f"what was optimized for {small.backend.name} is an {small.transformed.dialect} graph, and {backend.name} "
            f"takes {backend.dialect}: optimize the original for {backend.name}"
        )
    feeds = small.feeds
    if example_inputs is not None:
        examples = several(example_inputs)
        feeds = [small.signature.bind(one if isinstance(one, tuple) else (one,), {})[0] for one in examples]
    done = ",".join(map(str, small.own_passes))
    same_engine = (small.backend.name, small.backend.cpu) == (backend.name, backend.cpu)
    return Captured(
        small.transformed.clone(),
        small.signature,
        feeds,
        f"{small.report.source}, optimized by graphopt: {done}" if done else small.report.source,
        untouched=(lambda: small.lowered) if same_engine else None,
    )


@contextmanager
def _few_collections() -> Iterator[None]:
    """Collect garbage rarely: it takes a third of the time, as graphs are millions of small objects that live long."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _require_open(asked: Engines, is_lossy: bool) -> None:
    """Raise UsageError for a precision that is no option: no pass rounds, or the one engine has no kernels for it."""
    for backend in asked.backends:
        precision = asked.precisions[backend.name]
        if precision in ("auto", "float32"):
            continue
        if not is_lossy:
            raise UsageError(
                f"precision={precision} rounds, and none of the passes does: add quantize or cast, or leave it out"
            )
        if len(asked.backends) == 1:
            backend.at(precision)


def _trains_for_each(pipeline: Pipeline) -> bool:
    """Whether a pass trains what several engines do not have in common."""
    own = pipeline.passes[len(shared(pipeline.passes)) :]
    return any(leaf.trains for one in own for leaf in leaves(one))


def _is_race_of_precisions(asked: Engines, measures: bool, is_lossy: bool) -> bool:
    """Whether the precision of one engine is still to be found, or held to `within`."""
    (backend,) = asked.backends
    precision = asked.precisions[backend.name]
    is_open = measures and len(backend.precisions) > 1 if precision == "auto" else precision != "float32"
    return is_lossy and is_open


def _measures(asked: bool | None, backend: Backend) -> bool:
    """Whether to time forms and results. Raises UsageError where that is asked for and cannot be."""
    if asked and backend.cpu is not None:
        raise UsageError(f"cpu={backend.cpu} is another machine, which cannot be measured here: leave measure=True out")
    if asked:
        backend.require_runs()
    if asked is None:
        return timing.is_on() and backend.times()
    return asked
