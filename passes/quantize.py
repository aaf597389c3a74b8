"""f(x, W, b)  ->  f(dequantize(quantize(x, s, z), s, z), dequantize(Wq, ws), b), with integers of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.graph import Graph, Node
from graphopt.islands import Islands
from graphopt.numerics.observe import MinMax
from graphopt.pipeline import Context, Pass, Selector, Stage, UsageError
from graphopt.weights import why_fixed


@dataclass(frozen=True)
class Quantize(Pass):
    """Round weights and activations to 8 bits: quantize and dequantize around float words (Jacob et al., 2018).

    Weights are int8, symmetric, one scale an output channel. Activations are uint8, one scale and zero point a value,
    for all sites that read it. Static convs have their results quantized too (behind a relu that follows), and so have
    the adds between them, so that a target finds closed islands. Declined: a weight that is not stored in float32, and
    a word that the target has no fast kernel for.
    """

    name = "quantize"
    stage = Stage.QUANTIZE

    scheme: str = "auto"
    """Where activation ranges come from: calibration (static) or each run (dynamic); auto is static if it can be."""

    observer: str = "minmax"
    """What calibration keeps of an activation: its smallest and largest value (minmax)."""

    targets: Selector = Selector("linear", "conv")
    """Sites to consider: words, module paths or patterns."""

    ignore: Selector = Selector()
    """Sites to leave in float."""

    def __post_init__(self) -> None:
        if self.scheme not in ("auto", "static", "dynamic"):
            raise UsageError(f"quantize: scheme is {self.scheme!r}; give auto, static or dynamic")
        if self.observer != "minmax":
            raise UsageError(f"quantize: observer is {self.observer!r}; give minmax")

    def run(self, graph: Graph, context: Context) -> None:
        islands = Islands(graph)
        for site in context.sites(graph, self.targets, self.ignore):
            scheme = self._scheme_of(site.kind, context)
            reason = _why_not(site) or _why_no_kernel(site.kind, scheme, context)
            if reason:
                context.decline(site, reason)
            else:
                islands.schemes[site] = scheme
        adds = islands.join_adds(self.ignore) if "static" in _legal("add", context) else 0
        if adds:
            context.note(f"{adds} adds between quantized convs are quantized too")
        wanted = [(value, MinMax()) for value in islands.observed()]
        seen = context.statistics(graph, wanted) if wanted else ()
        islands.measure({value: ends for (value, _), ends in zip(wanted, seen, strict=True)})
        islands.emit()

    def _scheme_of(self, word: str, context: Context) -> str:
        if self.scheme != "auto":
            return self.scheme
        return "static" if context.calibration is not None and "static" in _legal(word, context) else "dynamic"


def _legal(word: str, context: Context) -> tuple[str, ...]:
    """The schemes that have a fast kernel; every one where no target is given."""
    if context.target is None:
        return "static", "dynamic"
    schemes: tuple[str, ...] = context.target.schemes.get(word, ())
    return schemes


def _why_not(site: Node) -> str | None:
    if site.kind not in ("linear", "conv"):
        return f"{site.kind} has no form in 8 bits"
    weight = site.weight
    if weight is not None and weight.is_floating_point() and weight.dtype != torch.float32:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    return why_fixed(site)


def _why_no_kernel(word: str, scheme: str, context: Context) -> str | None:
    legal = _legal(word, context)
    if scheme in legal:
        return None
    more = "; static needs calibration" if "static" in legal and context.calibration is None else ""
    return f"{context.target.name} has no fast {scheme} {word}{more}"
