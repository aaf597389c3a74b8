"""Sensitivity: how much the outputs suffer when one site alone is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from graphopt.api import default_examples
from graphopt.backends import target as target_of
from graphopt.capture.folders import opened
from graphopt.capture.signature import as_model
from graphopt.capture.sources import capture
from graphopt.dialects.adapter import adapter
from graphopt.errors import PassError, UsageError, outer_door, user_code
from graphopt.passes import REGISTRY
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.damage import STEPS, scan
from graphopt.pipeline.instruments import Instrument, display
from graphopt.pipeline.loss import Loss, followed
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.selectors import Selector
from graphopt.pipeline.text import parse
from graphopt.report.records import Sensitivity


def sensitivity(
    model: Any,
    settings: str | Pass | Iterable[str | Pass],
    *,
    calibration: Any,
    evaluate: Callable[[Any], float] | None = None,
    target: str = "onnxruntime",
    sites: str | Iterable[str] | None = None,
    steps: int = STEPS,
    cache: str | Path | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration_steps: int | None = None,
    loss: Loss | None = None,
    custom_ops: Sequence[Any] = (),
    instruments: Sequence[Instrument] = (),
    verbose: bool | None = None,
) -> Sensitivity:
    """Measure how much the outputs of a model suffer when each site alone is changed.

    model, target, example_inputs, dynamic_shapes, calibration, calibration_steps, loss, custom_ops, verbose: as
    `optimize` takes them; the example inputs are the first batch of calibration where none are given.
    settings: passes with a `targets` option, as objects or text; each is tried on every site by itself.
    evaluate: (a model that is called like the original) -> how good it is, more is better; without it the order is
    that of the SQNR. sites: ops, module paths or patterns in place of the settings' own targets. steps: most batches
    to compare outputs on; passes see all of the calibration. cache: a file that keeps what was measured, see `scan`.
    Raises what `optimize` and `scan` raise: nothing but a GraphoptError.
    """
    with outer_door(UsageError, "sensitivity cannot use its arguments"):
        given = [settings] if isinstance(settings, str | Pass) else list(settings)
        passes = [leaf for one in given for leaf in (parse(one, REGISTRY).passes if isinstance(one, str) else [one])]
        instruments = display(verbose, instruments)
        backend = target_of(target)
        if custom_ops:
            adapter(backend.dialect).register(custom_ops)
        follow = followed(loss)
        score = None if evaluate is None else user_code("evaluate function", evaluate)
    model = opened(model)
    if example_inputs is None:
        example_inputs = default_examples(model, calibration=calibration)
    captured = capture(model, backend.dialect, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    signature = captured.signature
    with outer_door(_failed, f"{captured.source} cannot be scanned"):
        context = Context(target=backend, feeds=captured.feeds, instruments=instruments)
        context.loss = lambda outputs, batch: follow(signature.rebuild(outputs), batch)
        context.record.name = "sensitivity"
        if calibration is not None:
            context.calibration = Calibration(calibration, captured.graph.inputs, calibration_steps=calibration_steps)
        graph = parse("simplify", REGISTRY).apply(captured.graph, dataclasses.replace(context))
        return scan(
            graph,
            passes,
            context,
            sites=None if sites is None else Selector(sites),
            steps=steps,
            evaluate=None if score is None else lambda changed: score(as_model(changed, signature)),
            cache=None if cache is None else Path(cache),
        )


def _failed(reason: str) -> PassError:
    return PassError("sensitivity", reason)
