"""Whether the outputs agree with the original's after each pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.analysis.data_sizes import sized_by_data
from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.errors import GraphError
from graphopt.ir.graph import Feeds, Graph, shapes_text
from graphopt.numerics import metrics
from graphopt.pipeline.instruments.instrument import Instrument
from graphopt.pipeline.passes import Stage
from graphopt.report.agreements import Agreement, agreement, worst_of_each

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


QUANTIZED_MARGIN = 6.0
"""dB. When the tolerance is exceeded, the SQNR against the original may still drop by this much (6 dB = twice the
error): values that round to the neighbouring integer accumulate over layers. Where activations are quantized already,
an output may be this far below the noise floor, if that is less than metrics.QUANTIZED_SQNR.
"""

QUANTIZED_FLOOR = 10.0
"""SQNR (dB) that is always required: rounding does not make noise of a third of the signal."""

RANDOM_RUNS = 3
"""Further runs of the original that tell which outputs are random: few numbers may come out alike once."""

PERTURBATION = 8
"""Relative perturbation of the inputs that measures the noise floor, in units of the dtype's eps."""


LARGEST_ROUNDING = 1e-3
"""How far rounding of floats in an engine's kernels may move an output, as a share of its largest number."""

STEP, ROUNDINGS = 1 / 255, 2.0
"""By what share the scales of activations are made other, so that the largest integers round to the neighbour; and how
many times what an output then moves by it may be moved.
"""

Run = Callable[[Feeds], Sequence[Any]]
"""Outputs of feeds."""


class Agree(Instrument):
    """Compares the outputs on the example inputs with the original's after every pass that changed something.

    The record gets the worst figures over the examples; padding is left out where an input is a mask. Raises GraphError
    where a pass changes an output's shape, where it makes NaN or infinity of a finite number, where a lossy pass of the
    target's own moves an output to below QUANTIZED_FLOOR of what it was, and where a lossless pass
    moves an output of the last lossy pass (or of the original) by more than the tolerance:
    `numerics.metrics.tolerance`; in a quantized graph metrics.QUANTIZED_RTOL, QUANTIZED_MARGIN or
    metrics.QUANTIZED_SQNR, or what activations move it by that round to the neighbour; integers must stay equal.
    An output whose sizes depend on data (`sized_by_data`) may have another size; then a note says that it was not
    compared.
    Random outputs, which differ from run to run, are not checked.
    """

    def __init__(self, original: Graph, feeds: Sequence[Feeds], names: Sequence[str] | None = None) -> None:
        """names: of the outputs, in order, as the user knows them; by default the graph's own."""
        self.feeds = list(feeds)
        self.names = list(names) if names is not None else [value.name for value in original.outputs]
        self._shapes = [value.shape for value in original.outputs]
        self._sized = sized_by_data(original)
        self._masks = mask_inputs(original.inputs)
        self._rounds = bool(original.sites("quantize"))
        self._given = original.clone() if self._rounds else None
        self.original = self._outputs(original)
        self._random = self._random_outputs(original)
        self._accepted = self._latest = self.original

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        if not context.record.changes:
            return
        outputs = self._outputs(graph)
        by_shapes, notes = self._agreements(outputs, graph)
        context.record.agreement = worst_of_each(by_shapes.values())
        for note in notes:
            context.note(note)
        if not pass_.lossless:
            if pass_.stage is Stage.LOWER and (moved := self._below_floor(outputs)) is not None:
                raise GraphError(f"{pass_.name} may take rounding away and no more, and {moved}: use another target")
            self._accepted = outputs
        elif (moved := self._moved(self._accepted, outputs, graph)) is not None:
            raise GraphError(f"this pass is declared lossless, and {moved}")
        self._latest = outputs

    def resume(self, graph: Graph) -> None:
        self._accepted = self._latest = self._outputs(graph)

    def compare(self, run: Run) -> tuple[dict[str, list[Agreement]], list[str]]:
        """The original's outputs compared with those of `run` for the same feeds, by the shapes of these: the worst of
        each output among the examples of the same shapes. And notes on what was not compared.

        Raises GraphError where `run` makes NaN or infinity of a finite number, or changes an output's shape.
        """
        return self._agreements([list(run(feeds)) for feeds in self.feeds])

    def moved(self, lowered: Graph, graph: Graph) -> str | None:
        """See `moved_by`: of a graph that is run without the engine's optimizations."""
        moved = self.moved_by(lambda feeds: lowered.evaluate(feeds, lowered.outputs), graph)
        lowered.release()
        return moved

    def moved_by(
        self, run: Run, graph: Graph, *, rounds: bool = False, own: Callable[[], Run] | None = None
    ) -> str | None:
        """The first output that a run moves beyond the tolerance of a lossless pass, and by how much.

        graph: what the last pass left, and what is run is to compute. rounds: whether the run rounds activations to 8
        bits that are floats in `graph`; then metrics.QUANTIZED_SQNR is enough. own: makes a run of the original, by the
        same engine with the same optimizations; where that moves an output too, by no more than LARGEST_ROUNDING, an
        output may be moved by ROUNDINGS times as much. None where every output is within the tolerance, or where
        `graph` does not agree with itself, as it is random. Raises what the runs raise.
        """
        found = [list(run(feeds)) for feeds in self.feeds]
        moved = self._moved(self._latest, found, graph, rounds=rounds)
        if moved is None or self._moved(self._latest, self._outputs(graph), graph) is not None:
            return None
        return None if own is not None and self._is_moved_as_much(found, own()) else moved

    def _is_moved_as_much(self, found: list[list[Any]], own: Run) -> bool:
        """Whether each output is as near to what it was as the original's own is to the original."""
        for feeds, before, after, original in zip(self.feeds, self._latest, found, self.original, strict=True):
            for a, b, first, other in zip(before, after, original, own(feeds), strict=True):
                if not isinstance(a, Tensor) or metrics.within_tolerance(a, b):
                    continue
                if not metrics.within_tolerance(a, b, rtol=LARGEST_ROUNDING) or first.shape != other.shape:
                    return False
                most = ROUNDINGS * metrics.max_error(first, other)
                if not metrics.max_error(a, b) <= most:  # it is NaN where both hold one infinity
                    return False
        return True

    def _random_outputs(self, graph: Graph) -> set[str]:
        """The outputs that differ from run to run."""
        if all(node.signature is not None for node in graph.nodes):  # equal signatures compute equal results
            return set()
        runs = [self._outputs(graph) for _ in range(RANDOM_RUNS)]
        return {
            name
            for run in runs
            for expected, found in zip(self.original, run, strict=True)
            for name, a, b in zip(self.names, expected, found, strict=True)
            if isinstance(a, Tensor) and not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        }

    def _outputs(self, graph: Graph) -> list[list[Any]]:
        outputs = [graph.evaluate(feeds, graph.outputs) for feeds in self.feeds]
        graph.release()
        return outputs

    def _agreements(
        self, outputs: list[list[Any]], graph: Graph | None = None
    ) -> tuple[dict[str, list[Agreement]], list[str]]:
        """By shapes of the examples, one for each output that is a tensor (an ONNX model may also return sequences),
        and notes on the others.

        graph: what computed the outputs, to find where numbers stop being finite.
        """
        by_shapes: dict[str, list[list[Agreement]]] = {}
        notes: dict[str, str] = {}
        for number, (feeds, expected, found) in enumerate(zip(self.feeds, self.original, outputs, strict=True)):
            agreements: list[Agreement] = []
            by_shapes.setdefault(shapes_text(feeds), []).append(agreements)
            of_each = zip(self.names, self._shapes, self._sized, expected, found, strict=True)
            for name, shape, sized, a, b in of_each:
                if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
                    continue
                if a.shape != b.shape:
                    changed = f"output {name!r} went from {list(a.shape)} to {list(b.shape)}"
                    if not sized:
                        raise GraphError(f"the shape of {changed}")
                    notes[name] = f"the size of {changed}, as it depends on data: not compared"
                    continue
                real = real_positions(shape, a, self._masks, feeds)
                kept = (a, b) if real is None else (a[real], b[real])
                if count := _newly_not_finite(*kept):
                    raise GraphError(
                        f"on example {number}, {count} of the {kept[0].numel()} numbers of output {name!r} become NaN "
                        f"or infinite{_origin(graph, feeds)}: leave that out with ignore=[...]"
                    )
                agreements.append(agreement(name, a, b, real))
        return {shapes: worst_of_each(several) for shapes, several in by_shapes.items()}, list(notes.values())

    def _moved(
        self, before: list[list[Any]], after: list[list[Any]], graph: Graph, *, rounds: bool = False
    ) -> str | None:
        """The first output of `graph` that moves by more than rounding explains, and by how much; None where none."""
        rounds = rounds or self._rounds
        rtol = metrics.QUANTIZED_RTOL if _is_quantized(graph) else None
        rounded: list[list[list[Any]]] | None = None
        for number, (expected, found) in enumerate(zip(before, after, strict=True)):
            of_each = zip(self.names, self._sized, expected, found, self.original[number], strict=True)
            for place, (name, sized, a, b, first) in enumerate(of_each):
                if name in self._random or not isinstance(a, Tensor) or metrics.within_tolerance(a, b, rtol=rtol):
                    continue
                if a.shape != b.shape and sized:
                    continue
                if a.shape != b.shape:
                    return f"on example {number} output {name!r} is {list(b.shape)}, not {list(a.shape)}"
                if rtol is not None and metrics.within_one_step(a, b):
                    continue
                if rtol is not None and metrics.sqnr(first, b) > metrics.sqnr(first, a) - QUANTIZED_MARGIN:
                    continue
                if rounds and a.is_floating_point() and metrics.sqnr(a, b) > self._least:
                    continue
                if rtol is not None:  # of few numbers, the first may be near the original's by chance
                    if rounded is None:
                        rounded = [self._outputs(_rounded_otherwise(graph, factor)) for factor in (1 - STEP, 1 + STEP)]
                    own = self._outputs(graph)[number][place]
                    steps = [metrics.max_error(own, one[number][place]) for one in rounded]
                    if metrics.max_error(a, b) <= ROUNDINGS * max(steps):
                        continue
                allowed = f"{rtol or metrics.tolerance(a.dtype)[0]:.2g}" if a.is_floating_point() else "equal values"
                largest = float(torch.nan_to_num(a.double()).abs().max())
                return (
                    f"on example {number} it moves output {name!r} by {metrics.max_error(a, b):.3g}, "
                    f"of at most {largest:.3g} (relative tolerance: {allowed})"
                )
        return None

    def _below_floor(self, outputs: list[list[Any]]) -> str | None:
        """The first output that is further from what the last pass left than rounding explains; None where none is."""
        for number, (before, after) in enumerate(zip(self._latest, outputs, strict=True)):
            for name, a, b in zip(self.names, before, after, strict=True):
                is_float = isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape
                if name in self._random or not is_float or metrics.within_tolerance(a, b):
                    continue
                finite = torch.isfinite(a) & torch.isfinite(b)
                if (found := metrics.sqnr(a[finite], b[finite])) < QUANTIZED_FLOOR:
                    return (
                        f"on example {number} output {name!r} has an SQNR of {found:.1f} dB to what it was, and needs "
                        f"{QUANTIZED_FLOOR:.0f}"
                    )
        return None

    @cached_property
    def _least(self) -> float:
        """Least SQNR (dB) of an output in floats, where the original rounds activations."""
        return max(QUANTIZED_FLOOR, min(metrics.QUANTIZED_SQNR, self._noise_floor() - QUANTIZED_MARGIN))

    def _noise_floor(self) -> float:
        """The least SQNR (dB) of the original against itself on perturbed inputs."""
        runs = []
        if self._given is not None and any(one.is_floating_point() for feeds in self.feeds for one in feeds.values()):
            for ulps in (PERTURBATION, -PERTURBATION):
                given = self._given.clone()  # a run may write to its graph
                runs.append([given.evaluate(_perturbed(feeds, ulps), given.outputs) for feeds in self.feeds])
        found = [metrics.sqnr(a, b) for one in runs for before, after in zip(self.original, one, strict=True)
                 for a, b in zip(before, after, strict=True)
                 if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape]  # fmt: skip
        return min(found, default=math.inf)


def _newly_not_finite(before: Tensor, after: Tensor) -> int:
    """How many numbers are finite before, and NaN or infinite after."""
    if not after.is_floating_point() or bool(torch.isfinite(after).all()):
        return 0
    return int((torch.isfinite(before) & ~torch.isfinite(after)).sum())


def _origin(graph: Graph | None, feeds: Feeds) -> str:
    """', first at <node>', the first node of a graph that makes NaN or infinity of finite numbers; "" if not found."""
    if graph is None:
        return ""
    floats = [value for node in graph.nodes for value in node.results if value.dtype and value.dtype.is_floating_point]
    try:
        found = dict(zip(floats, graph.evaluate(feeds, floats), strict=True))
    except Exception:  # the engine may not return what lies inside a graph; the error itself says enough
        return ""
    bad = {value for value, tensor in found.items() if not bool(torch.isfinite(tensor).all())}
    for node in graph.nodes:
        constants = [graph.constant(value) for value in node.operands if value is not None and value.is_constant]
        given = all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in constants)
        if given and not bad.intersection(node.operands) and bad.intersection(node.results):
            return f", first at {node.label}"
    return ""


def _perturbed(feeds: Feeds, ulps: int) -> Feeds:
    """Float inputs multiplied by 1 + ulps * eps of their dtype; the others unchanged."""
    return {name: tensor * (1 + ulps * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor
            for name, tensor in feeds.items()}  # fmt: skip


def _rounded_otherwise(graph: Graph, factor: float) -> Graph:
    """A clone that quantizes activations by other scales, and dequantizes by those that they had."""
    other = graph.clone()
    for node in other.sites("quantize"):
        x, _, *rest = node.operands
        scale = node.required("scale")
        scaled = other.emit("mul", scale, other.add_constant(torch.tensor(factor, dtype=scale.dtype)), at=node)
        other.replace(node, other.emit(node, x, scaled, *rest, at=node))
    other.sweep()
    return other


def _is_quantized(graph: Graph) -> bool:
    """Whether a graph rounds what it computes: activations, or weights to at most 16 bits."""
    narrow = (tensor.dtype.itemsize < 4 and tensor.dtype is not torch.bool for _, tensor in graph.constants())
    return bool(graph.sites("quantize")) or any(narrow)
