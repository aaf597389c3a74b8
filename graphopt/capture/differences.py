"""Whether a captured graph computes what the module does, and whether rounding or chance explains where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.graph import Feeds, Graph
from graphopt.numerics import metrics

ULPS = 8
"""Relative perturbation of the inputs that shows how much the graph amplifies rounding, in units of the dtype's eps."""

RANDOM_RUNS = 3
"""Further runs that tell which outputs are random: an output of few numbers may be the same twice by chance."""

AMPLIFIED = 4.0
"""An output may be this many times as far from the module's as it moves on perturbed inputs."""


@dataclass(frozen=True)
class Difference:
    """What differs, and whether it is an error: not where only integers differ, beside floats that agree."""

    what: str
    is_error: bool

    def __str__(self) -> str:
        return self.what


def found(graph: Graph, feeds: Feeds, expected: Sequence[Any], names: Sequence[str]) -> Difference | None:
    """How the outputs of a graph differ from the expected ones; None where they agree, or the engine does not run it.

    An output that differs from run to run is random, and held to nothing. Agree: within `metrics.tolerance`, or within
    what rounding makes of them (AMPLIFIED). Integers are chosen by floats, of which two may be near each other, so they
    may differ where there are floats, and all of these agree.
    """
    try:
        outputs = graph.evaluate(feeds, graph.outputs)
    except Exception:  # who runs the graph next says so
        return None
    apart = [place for place, (a, b) in enumerate(zip(expected, outputs, strict=True)) if not _agree(a, b)]
    for _ in range(RANDOM_RUNS if apart else 0):
        again = graph.evaluate(feeds, graph.outputs)
        apart = [place for place in apart if _agree(outputs[place], again[place])]
    if not apart:
        return None
    floats = [place for place in apart if _is_float(expected[place])]
    if floats:
        noise = _noise(graph, feeds, outputs)
        for place in floats:
            a, b = expected[place], outputs[place]
            if a.shape != b.shape or not _explained(a, b, noise[place]):
                return Difference(_described(a, b, names[place]), is_error=True)
        apart = [place for place in apart if place not in floats]
    if not apart:
        return None
    place = apart[0]
    has_floats = any(_is_float(one) for one in expected)
    return Difference(_described(expected[place], outputs[place], names[place]), is_error=not has_floats)


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return metrics.within_tolerance(a, b)
    return repr(a) == repr(b)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _noise(graph: Graph, feeds: Feeds, outputs: Sequence[Any]) -> list[float]:
    """By output, the largest distance that it moves on inputs that differ by a few units in the last place."""
    moved = [0.0] * len(outputs)
    for ulps in (ULPS, -ULPS):
        perturbed = {name: one * (1 + ulps * torch.finfo(one.dtype).eps) if one.is_floating_point() else one
                     for name, one in feeds.items()}  # fmt: skip
        for place, (a, b) in enumerate(zip(outputs, graph.evaluate(perturbed, graph.outputs), strict=True)):
            if _is_float(a) and _is_float(b) and a.shape == b.shape:
                distance = torch.nan_to_num((a.double() - b.double()).abs())
                moved[place] = max(moved[place], float(distance.amax()) if distance.numel() else 0.0)
    return moved


def _explained(a: Tensor, b: Tensor, noise: float) -> bool:
    """Whether two outputs are finite at the same places, and there as near each other as rounding may leave them."""
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return False
    kept = torch.isfinite(a)
    return metrics.within_tolerance(a[kept], b[kept], atol=max(AMPLIFIED * noise, metrics.tolerance(a.dtype)[1]))


def _described(a: Any, b: Any, name: str) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return f"output {name!r} is {type(b).__name__} in place of {type(a).__name__}"
    if a.shape != b.shape:
        return f"output {name!r} is {list(b.shape)} in place of {list(a.shape)}"
    if not a.is_floating_point():
        return f"output {name!r} differs at {int((a != b).sum())} of {a.numel()} places"
    largest = float(torch.nan_to_num(a.double(), posinf=0.0, neginf=0.0).abs().max())
    return f"output {name!r} is {metrics.max_error(a, b):.3g} away, of at most {largest:.3g}"
