"""Batches of inputs -> ranges of activations, in memory that does not grow with the number of batches."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from torch import Tensor

from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.ir.graph import Feeds, Flow, Graph, Shape, Value, tensors_digest
from graphopt.pipeline.batches import Batches, Input
from graphopt.pipeline.instruments.phases import watched
from graphopt.pipeline.lengths import Lengths, at_other_lengths

if TYPE_CHECKING:
    from graphopt.pipeline.instruments import Instrument
    from graphopt.pipeline.ranks import Ranks

MEMORY = Flow.memory
"""Most bytes of statistics that `Remembered` keeps."""


class Statistic(Protocol):
    """A statistic of a value over the batches, in memory that does not grow with them (`numerics.observe`)."""

    @property
    def nbytes(self) -> int:
        """What it holds once it has seen a batch."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch; the mask is True at real positions. Raises ValueError on NaN or infinity there."""

    def merge(self, other: Self) -> None:
        """Take in what another of its kind has seen, of other batches."""


S = TypeVar("S", bound=Statistic)


class NotFinite(ValueError):
    """An activation holds NaN or infinity; `node` is the path of the node that computes it."""

    def __init__(self, reason: str, node: str) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


class Calibration(Batches):
    """Batches, over which statistics of the values of a graph are taken."""

    def __init__(
        self,
        batches: Any,
        inputs: Sequence[Input],
        calibration_steps: int | None = None,
        watchers: Sequence[Instrument] = (),
    ) -> None:
        """batches, inputs, calibration_steps: the source, inputs and steps of `Batches`, which raises UsageError.
        watchers: notified after each batch."""
        super().__init__(batches, inputs, name="calibration", steps=calibration_steps)
        self.watchers = watchers
        self._ranks: Ranks | None = None
        self.further: tuple[Feeds, ...] = ()
        """Batches that follow those of the source."""
        self._lengths: dict[tuple[Shape | None, ...], Lengths | None] = {}

    def at_other_lengths(self, graph: Graph) -> Lengths | None:
        """`lengths.at_other_lengths` of the batches of the source, made once: with the first graph that asks, for all
        that take inputs of the same shapes."""
        key = tuple(value.shape for value in graph.inputs)
        if key not in self._lengths:
            self._lengths[key] = at_other_lengths(super().__iter__(), graph)
        return self._lengths[key]

    def over(self, ranks: Ranks) -> Calibration:
        """The same batches, of which each rank observes its part; statistics are merged over ranks, so that all have
        the same. What reads batches one by one (gradients) still reads all."""
        spread = copy.copy(self)
        spread._ranks = ranks
        return spread

    def part(self, index: int, parts: int) -> Calibration:
        part = super().part(index, parts)
        assert isinstance(part, Calibration)
        part.further = self.further[index::parts]
        return part

    @property
    def count(self) -> int | None:
        known = super().count
        return None if known is None else known + len(self.further)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from super().__iter__()
        yield from map(dict, self.further)

    def followed_by(self, further: Iterable[Feeds]) -> Self:
        """The same batches, and further ones behind them."""
        both = copy.copy(self)
        both.further = (*self.further, *further)
        return both

    def observe(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        """Fill a fresh statistic of each value over all batches, and give them in order; padding is left out.

        Padding is where an input that is a mask is 0 (`graphopt.analysis.masks.real_positions`). Statistics are filled
        in parts of at most `Flow.memory` bytes (or a single larger one). Each part is one run over the batches (for a
        model larger than memory, the next part continues from the previous layer). The graph must not change in
        between.
        Raises NotFinite where an activation holds NaN or infinity at a real position.
        """
        part: list[tuple[Value, S]] = []
        ranks = self._ranks
        own: Batches = self if ranks is None else self.part(ranks.data_index, ranks.data_count)
        flow, held, version = graph.flow(own), 0, graph.version
        for value, statistic in wanted:
            if part and held + statistic.nbytes > flow.memory:
                yield from self._fill(flow, part)
                part, held = [], 0
                assert graph.version == version, "the graph changed between parts of its statistics"
            part.append((value, statistic))
            held += statistic.nbytes
        if part:
            yield from self._fill(flow, part)

    def _fill(self, flow: Flow, part: list[tuple[Value, S]]) -> Iterator[S]:
        """Fill the statistics of a part, yield them in order, and keep no reference to those yielded."""
        fetch = list(dict.fromkeys(value for value, _ in part))
        masks = mask_inputs(self.inputs)
        with watched(self.watchers, "calibration", self.count) as advance:
            last = -1
            for number, feeds, tensors in flow.through(fetch):
                if number != last:
                    advance(f"batch {number}")
                last = number
                for place in [place for place, (value, _) in enumerate(part) if value in tensors]:
                    value = part[place][0]
                    try:
                        real = real_positions(value.shape, tensors[value], masks, feeds)
                        part[place][1].update(tensors[value], real)
                    except ValueError as error:
                        where = value.producer.label if value.producer is not None else value.name
                        raise NotFinite(f"on calibration batch {number}, {value.name!r}: {error}", where) from error
        while part:
            yield self._merged(part.pop(0)[1])

    def _merged(self, statistic: S) -> S:
        """A statistic over the batches of all ranks, merged in the order of ranks."""
        if self._ranks is None:
            return statistic
        merged, *others = self._ranks.gather_data(statistic)
        for other in others:
            merged.merge(other)
        return merged


class Remembered(Calibration):
    """Batches whose statistics are kept, up to MEMORY bytes, by name and kind of value, for graphs that are equal.

    graphs: a key that is equal for equal graphs; without it, all graphs are taken as clones of one.
    """

    def __init__(self, calibration: Calibration, graphs: Callable[[Graph], str] = lambda graph: "") -> None:
        self.__dict__.update(calibration.__dict__)
        self._graphs = graphs
        self._latest: tuple[Graph, int, str] | None = None
        self._known: dict[tuple[str, str, str], Any] = {}

    def followed_by(self, further: Iterable[Feeds]) -> Self:
        both = super().followed_by(further)
        name = "".join(tensors_digest(feeds) for feeds in both.further)
        both._graphs, both._latest = lambda graph: self._graphs(graph) + name, None
        return both

    def observe(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        if self._latest is None or self._latest[:2] != (graph, graph.version):  # what is only added changes no value
            self._latest = graph, graph.version, self._graphs(graph)
        name, order = self._latest[2], deque[tuple[tuple[str, str, str], S | None]]()

        def missing() -> Iterator[tuple[Value, S]]:
            for value, statistic in wanted:
                key = name, value.name, _fresh(statistic)
                order.append((key, self._known.get(key)))
                if order[-1][1] is None:
                    yield value, statistic

        for found in super().observe(graph, missing()):
            while (known := order[0][1]) is not None:
                order.popleft()
                yield known
            self._keep(order.popleft()[0], found)
            yield found
        yield from (known for _, known in order if known is not None)

    def _keep(self, key: tuple[str, str, str], statistic: Any) -> None:
        if sum(one.nbytes for one in self._known.values()) + statistic.nbytes <= MEMORY:
            self._known[key] = statistic


def _fresh(statistic: Any) -> str:
    """What an empty statistic is: its class, and all that it holds."""
    held = {name: one.tolist() if isinstance(one, Tensor) else one for name, one in vars(statistic).items()}
    return f"{type(statistic).__qualname__} {held}"
