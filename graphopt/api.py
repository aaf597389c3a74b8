"""The one call: what is asked for, turned into one run."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from graphopt.capture.sources import capture
from graphopt.errors import UsageError
from graphopt.lowering.backend import Backend
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Loss
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.loss import cross_entropy
from graphopt.pipeline.passes import Pass
from graphopt.result import Optimized
from graphopt.run import Run, whole_pipeline


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
    it slower is reverted. None does so unless the environment has GRAPHOPT_MEASURE=0, or `cpu` is given: the CPU that
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
    pipeline = whole_pipeline(passes, backend)
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
        job = Run(captured, pipeline, backend, data, loss or cross_entropy, evaluate, threads, agree,
                   measures, instruments)  # fmt: skip
        return job.never_slower()


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


def _target(name: str, cpu: str | None = None) -> Backend:
    from graphopt.backends import target

    return target(name, cpu)
