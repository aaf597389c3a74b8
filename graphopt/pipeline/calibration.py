"""Batches of inputs -> ranges of activations, in memory that does not grow with the number of batches."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from graphopt.analysis.masks import mask_inputs, real_positions
from graphopt.errors import UsageError, nearest, require_positive_integer, user_batches
from graphopt.ir.graph import Flow, Graph, Shape, Value, dtype_name

if TYPE_CHECKING:
    from graphopt.pipeline.instruments import Instrument

SAMPLES = 8
"""Samples that are cut from stacked arrays for one batch, where the graph leaves axis 0 open."""

MEMORY = Flow.memory
"""Most bytes of statistics that `Remembered` keeps."""


class Input(Protocol):
    """An input of a graph, as `graphopt.ir.graph.Value` declares it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Shape | None: ...

    @property
    def dtype(self) -> torch.dtype | None: ...


class Statistic(Protocol):
    """A statistic of a value over the batches, in memory that does not grow with them (`numerics.observe`)."""

    @property
    def nbytes(self) -> int:
        """What it holds once it has seen a batch."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch; the mask is True at real positions. Raises ValueError on NaN or infinity there."""


S = TypeVar("S", bound=Statistic)


class NotFinite(ValueError):
    """An activation holds NaN or infinity; `node` is the path of the node that computes it."""

    def __init__(self, reason: str, node: str) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


class Calibration:
    """Batches, each checked against the inputs of a graph when its turn comes."""

    def __init__(
        self,
        batches: Any,
        inputs: Sequence[Input],
        calibration_steps: int | None = None,
        watchers: Sequence[Instrument] = (),
    ) -> None:
        """batches: an iterable of batches (a DataLoader, a list, a Hugging Face dataset), an ONNX Runtime
        CalibrationDataReader, or stacked arrays by input name (an .npz file), with samples along axis 0.

        A batch is a dict by input name, a tuple in the order of the inputs, or a tensor; torch, numpy or lists. One
        without a batch axis (the row of a dataset) gets it. calibration_steps: most batches to use. watchers:
        notified after each batch.
        Raises UsageError, here or when a batch's turn comes, naming the batch and the input.
        """
        if calibration_steps is not None:
            require_positive_integer("calibration_steps", calibration_steps)
        self.inputs, self.steps, self.watchers = tuple(inputs), calibration_steps, watchers
        if isinstance(batches, Tensor | np.ndarray):
            batches = {self._only_input().name: batches}
        if isinstance(batches, Mapping):
            self._batches: Iterable[Any] = self._split(batches)
        elif hasattr(batches, "get_next"):
            self._batches = _Reader(batches)
        elif isinstance(batches, Iterable) and not isinstance(batches, str | bytes):
            self._batches = batches
        else:
            raise UsageError(f"calibration must be an iterable of batches, not a {type(batches).__qualname__}")
        self.once = isinstance(self._batches, Iterator)
        """Whether the batches come from a generator, which can be read only once."""
        self._used = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches as feeds: by input name, in the dtypes of the graph."""
        return (feeds for feeds, _ in self.with_batches())

    def with_batches(self) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """The feeds, each with the batch it was made from (which may hold labels besides)."""
        if self.once and self._used:
            raise UsageError(
                "the calibration batches are needed again, and a generator gives them once; pass a list or a DataLoader"
            )
        self._used, number = True, -1
        batches = user_batches("calibration batches", self._batches)
        for number, batch in enumerate(itertools.islice(batches, self.steps)):
            yield self._feeds(batch, f"calibration batch {number}"), batch
        if number < 0:
            used_up = " (a generator that was used up before? pass a list or a DataLoader)" if self.once else ""
            raise UsageError(f"calibration holds no batch{used_up}")

    def observe(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        """Fill a fresh statistic of each value over all batches, and give them in order; padding is left out.

        Padding is where an input that is a mask is 0 (`graphopt.analysis.masks.real_positions`). Statistics are filled
        in parts of at most `Flow.memory` bytes (or a single larger one). Each part is one run over the batches (for a
        model larger than memory, the next part continues from the previous layer). The graph must not change in
        between.
        Raises NotFinite where an activation holds NaN or infinity at a real position.
        """
        part: list[tuple[Value, S]] = []
        flow, held, version = graph.flow(self), 0, graph.version
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
        with ExitStack() as stack:
            told = [stack.enter_context(one.watch("calibration", self._count())) for one in self.watchers]
            last = -1
            for number, feeds, tensors in flow.through(fetch):
                for tell in told if number != last else ():
                    tell(f"batch {number}")
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
            yield part.pop(0)[1]

    def _count(self) -> int | None:
        """How many batches there are, where that is known."""
        known = len(self._batches) if isinstance(self._batches, Sized) else None
        return known if self.steps is None or known is None else min(known, self.steps)

    def _only_input(self) -> Input:
        if len(self.inputs) != 1:
            names = ", ".join(value.name for value in self.inputs)
            raise UsageError(f"calibration is one array, and the model has the inputs {names}; give a dict of arrays")
        return self.inputs[0]

    def _split(self, stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Stacked arrays as batches of the size that the graph fixes, or of SAMPLES."""
        self._require_names(stacked, "calibration")
        names = [value.name for value in self.inputs]
        arrays = {name: _tensor(stacked[name], f"calibration, input {name!r}") for name in names}
        lengths = {name: len(array) if array.dim() else None for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise UsageError(f"calibration: axis 0 must hold the same number of samples in every array, not {lengths}")
        total = next(iter(lengths.values())) or 0
        fixed = {value.shape[0] for value in self.inputs if value.shape and isinstance(value.shape[0], int)}
        size = min(fixed, default=SAMPLES)
        if fixed and (len(fixed) > 1 or total % size):
            sizes = " and ".join(str(one) for one in sorted(fixed))
            raise UsageError(f"calibration: {total} samples cannot be cut into batches of {sizes}, as the model is")
        others = {name: array for name, array in stacked.items() if name not in arrays and len(array) == total}
        cut: dict[str, Any] = arrays | others  # labels are cut along with the inputs
        return [
            {name: array[start : start + size] for name, array in cut.items()} for start in range(0, total, size)
        ]

    def _feeds(self, batch: Any, where: str) -> dict[str, Tensor]:
        named = self._named(batch, where)
        places = [f"{where}, input {value.name!r}" for value in self.inputs]
        tensors = [_tensor(named[value.name], place) for value, place in zip(self.inputs, places, strict=True)]
        ranks = [None if value.shape is None else len(value.shape) for value in self.inputs]
        if [tensor.dim() + 1 for tensor in tensors] == ranks:
            tensors = [tensor.unsqueeze(0) for tensor in tensors]
        fitted = map(_fitted, tensors, self.inputs, places)
        return {value.name: tensor for value, tensor in zip(self.inputs, fitted, strict=True)}

    def _named(self, batch: Any, where: str) -> Mapping[str, Any]:
        if isinstance(batch, Mapping):
            self._require_names(batch, where)
            return batch
        given = batch if isinstance(batch, tuple | list) else (batch,)
        if len(given) != len(self.inputs):
            names = ", ".join(value.name for value in self.inputs)
            raise UsageError(f"{where} holds {len(given)} tensors, and the model has the inputs {names}; give a dict")
        return {value.name: tensor for value, tensor in zip(self.inputs, given, strict=True)}

    def _require_names(self, batch: Mapping[str, Any], where: str) -> None:
        """Every input must be there; what a dataset has besides (labels, texts) is not read."""
        for value in self.inputs:
            if value.name not in batch:
                raise UsageError(f"{where} has no {value.name!r}{nearest(value.name, [str(name) for name in batch])}")


class Remembered(Calibration):
    """Batches whose statistics are kept, up to MEMORY bytes, by name and kind of value, for graphs that are equal.

    graphs: a key that is equal for equal graphs; without it, all graphs are taken as clones of one.
    """

    def __init__(self, calibration: Calibration, graphs: Callable[[Graph], str] = lambda graph: "") -> None:
        self.__dict__.update(calibration.__dict__)
        self._graphs = graphs
        self._latest: tuple[Graph, int, str] | None = None
        self._known: dict[tuple[str, str, str], Any] = {}

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


class _Reader:
    """An ONNX Runtime CalibrationDataReader as an iterable; from its beginning each time, where it can rewind."""

    def __new__(cls, reader: Any) -> Any:
        return super().__new__(cls) if hasattr(reader, "rewind") else iter(reader.get_next, None)

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Any]:
        self.reader.rewind()
        return iter(self.reader.get_next, None)


def _tensor(array: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(array).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{where}: a {type(array).__qualname__} is not an array of numbers ({error})") from error


def _fitted(tensor: Tensor, value: Input, where: str) -> Tensor:
    """The tensor in the dtype of its input; UsageError where shape, dtype or content is not what the graph takes."""
    shape, dtype = value.shape, value.dtype
    if shape is not None and (
        len(shape) != tensor.dim()
        or any(isinstance(size, int) and size != given for size, given in zip(shape, tensor.shape, strict=True))
    ):
        raise UsageError(f"{where} has shape {list(tensor.shape)}, and the model takes {_shape_text(shape)}")
    if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        raise UsageError(f"{where} holds {int(torch.isnan(tensor).sum())} NaN")
    if dtype is None or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if tensor.is_floating_point() != dtype.is_floating_point or not (
        tensor.is_floating_point() or torch.equal(cast.to(tensor.dtype), tensor)
    ):
        raise UsageError(f"{where} holds {dtype_name(tensor.dtype)}, and the model takes {dtype_name(dtype)}")
    return cast


def _shape_text(shape: Shape) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
