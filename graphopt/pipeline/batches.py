"""Whatever gives out batches -> checked feeds, each with its labels: for calibration, training and evaluation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from graphopt.capture.arguments import is_structure, leaves_of
from graphopt.capture.decode import named_leaves
from graphopt.capture.labels import LABELS, is_label
from graphopt.errors import UsageError, nearest, require_positive_integer, user_batches
from graphopt.ir.graph import Shape, dtype_name
from graphopt.ir.untouched import Untouched

SAMPLES = 8
"""Samples that are cut from stacked arrays for one batch, where the graph leaves axis 0 open."""


class Input(Protocol):
    """An input of a graph, as `graphopt.ir.graph.Value` declares it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Shape | None: ...

    @property
    def dtype(self) -> torch.dtype | None: ...


@dataclass(frozen=True)
class Argument:
    """An argument of a module, of which the name alone is known; what it is given for it are tensors."""

    name: str
    shape: None = None
    dtype: None = None


@dataclass(frozen=True)
class Batch:
    """One batch: what the graph is fed, what it should answer, and what the user gave."""

    feeds: dict[str, Tensor]
    """By input name, on the CPU, in the dtypes of the graph, with a batch axis."""
    labels: Any
    """A tensor, or a tuple or dict of several; None where there are none. Floats are float32 at most; one of a row has
    a batch axis as the feeds do. What is no array of numbers (texts) is as it was given."""
    raw: Any
    """The batch as the user gave it."""


class Batches:
    """Batches, each checked against the inputs of a graph when its turn comes."""

    def __init__(
        self, source: Any, inputs: Sequence[Input], *, name: str = "calibration", steps: int | None = None
    ) -> None:
        """source: an iterable of batches (a DataLoader, a list, a Hugging Face dataset), an ONNX Runtime
        CalibrationDataReader, or stacked arrays by input name (an .npz file), with samples along axis 0.

        A batch is a dict by input name (a BatchEncoding), a tuple or list in the order of the inputs, or a tensor;
        torch, numpy or lists; a list, tuple or dict of tensors in their place holds several inputs. One without a
        batch axis (the row of a dataset) gets it. Labels may stand beside the inputs: in a dict under a name of labels
        (`labels.LABELS`, or else all that `labels.is_label` finds), in a tuple or list after as many tensors as there
        are inputs, or after a dict of them.
        name: what messages call the batches, such as "training". steps: most batches to use.
        Raises UsageError, here or when a batch's turn comes, naming the batch and the input.
        """
        if steps is not None:
            require_positive_integer(f"{name}_steps", steps)
        self.name, self.inputs, self.steps = name, tuple(inputs), steps
        self.note: str | None = None
        """What was taken for labels by its place alone, once a batch was read; for the report."""
        if isinstance(source, Tensor | np.ndarray):
            source = {self._only_input().name: source}
        self._source = self._split(source) if isinstance(source, Mapping) else opened(source, name)
        self.once = isinstance(self._source, Iterator)
        """Whether the batches come from a generator, which can be read only once."""
        self._used = False
        self._part, self._whole = (0, 1), self

    @property
    def count(self) -> int | None:
        """How many batches there are, where that is known; of a part, how many it has."""
        try:
            known = len(self._source) if isinstance(self._source, Sized) else None
        except TypeError:  # the DataLoader of a stream has a length by its class only
            known = None
        if known is None or self.is_split:
            return known if self.steps is None or known is None else min(known, self.steps)
        known = known if self.steps is None else min(known, self.steps)
        index, parts = self._part
        return len(range(index, known, parts))

    @property
    def is_split(self) -> bool:
        """Whether the user has given each process of a mesh batches of its own: by a DistributedSampler."""
        return isinstance(getattr(self._source, "sampler", None), DistributedSampler)

    @property
    def repeats(self) -> bool:
        """Whether it gives every process of a mesh the same batches, as often as they are read under one seed."""
        return not self.once and not self.is_split and getattr(self._source, "generator", None) is None

    def part(self, index: int, parts: int) -> Batches:
        """Every `parts`-th batch, from `index` on: all that one process of a mesh reads, unless `is_split`."""
        part = copy.copy(self)
        part._part, part._whole = (index, parts), self._whole
        return part

    def begin(self, epoch: int) -> None:
        """An epoch is next, from 0: a DistributedSampler shuffles by its number."""
        if self.is_split:
            source: Any = self._source
            source.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches as feeds: by input name, in the dtypes of the graph."""
        return (batch.feeds for batch in self.with_batches())

    def with_batches(self) -> Iterator[Batch]:
        """The batches with their labels, and as the user gave them."""
        if self.once and self._whole._used:
            raise UsageError(
                f"the {self.name} batches are needed again, and a generator gives them once; pass a list or a "
                "DataLoader"
            )
        again, number = self._whole._used or self.once, -1
        self._whole._used = True
        for number, raw in self._numbered():
            yield self._checked(raw, f"{self.name} batch {number}")
        if number < 0 and self._part == (0, 1):
            used_up = " (a generator that was used up before? pass a list or a DataLoader)" if again else ""
            raise UsageError(f"{self.name} holds no batch{used_up}")

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        """The batches of this part, with their numbers among all. A DataLoader loads no others."""
        (index, parts), what = self._part, f"{self.name} batches"
        if parts == 1 or self.is_split:
            yield from enumerate(itertools.islice(user_batches(what, self._source), self.steps))
        elif _has_sampler(self._source):
            loader = _with_sampler(self._source, _Every(self._source.batch_sampler, index, parts, self.steps))
            yield from zip(itertools.count(index, parts), user_batches(what, loader))
        else:
            batches = enumerate(itertools.islice(user_batches(what, self._source), self.steps))
            yield from itertools.islice(batches, index, None, parts)

    # --- one batch ---------------------------------------------------------------------------------------------------

    def _checked(self, raw: Any, where: str) -> Batch:
        named, labels = self._parted(raw, where)
        places = [f"{where}, input {value.name!r}" for value in self.inputs]
        tensors = [_given(named[value.name], value, place) for value, place in zip(self.inputs, places, strict=True)]
        ranks = [None if value.shape is None else len(value.shape) for value in self.inputs]
        is_row = [tensor.dim() + 1 for tensor in tensors] == ranks
        if is_row:
            tensors = [tensor.unsqueeze(0) for tensor in tensors]
        fitted = map(_fitted, tensors, self.inputs, places)
        feeds = {value.name: tensor for value, tensor in zip(self.inputs, fitted, strict=True)}
        return Batch(feeds, _labels(labels, is_row), raw)

    def _parted(self, raw: Any, where: str) -> tuple[Mapping[str, Any], Any]:
        """The inputs by name, and the labels."""
        if isinstance(raw, Mapping):
            raw = self._with_leaves(raw)
            self._require_names(raw, where)
            return raw, self._named_labels(raw)
        given = raw if isinstance(raw, tuple | list) else (raw,)
        if given and isinstance(given[0], Mapping):
            named = self._with_leaves(given[0])
            self._require_names(named, where)
            return named, _unwrapped(given[1:]) if len(given) > 1 else self._named_labels(named)
        given, number = self._taken_apart(given), len(self.inputs)
        leading, rest = given[:number], given[number:]
        # Only an array is certain to be a tensor of its own: lists may be the rows of one.
        if len(leading) < number or (rest and not all(isinstance(one, Tensor | np.ndarray) for one in leading)):
            names = ", ".join(value.name for value in self.inputs)
            held = f"{len(given)} {'tensor' if len(given) == 1 else 'tensors'}"
            raise UsageError(f"{where} holds {held}, and the model has the inputs {names}; give a dict by these names")
        if rest and self._whole.note is None:
            names = ", ".join(value.name for value in self.inputs)
            inputs = f"the first is input {names}" if number == 1 else f"the first {number} are inputs {names}"
            self._whole.note = f"{self.name} batches hold {len(given)} tensors: {inputs}, the rest are labels"
        return {value.name: tensor for value, tensor in zip(self.inputs, leading, strict=True)}, _unwrapped(rest)

    def _taken_apart(self, given: Sequence[Any]) -> list[Any]:
        """The items of a batch; of those that hold several inputs, as long as there are any, what they hold."""
        found: list[Any] = []
        for one in given:
            apart = len(found) < len(self.inputs) and is_structure(one)
            found += leaves_of("", one).values() if apart else (one,)
        return found

    def _with_leaves(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch with the inputs that lie within its lists, dicts and caches."""
        names = {value.name for value in self.inputs}
        if names <= set(raw):
            return raw
        within = [named_leaves(str(key), value) for key, value in raw.items() if key not in names]
        return {**raw, **{name: leaf for leaves in within for name, leaf in leaves.items() if name in names}}

    def _named_labels(self, raw: Mapping[str, Any]) -> Any:
        inputs = {value.name for value in self.inputs}
        rest = {name: array for name, array in raw.items() if name not in inputs}
        named = next((name for name in LABELS if name in rest), None)
        if named is not None:
            return rest[named]
        found = {name: array for name, array in rest.items() if is_label(str(name))}
        return found if len(found) > 1 else next(iter(found.values()), None)

    def _require_names(self, raw: Mapping[str, Any], where: str) -> None:
        """Every input must be there; what a dataset has besides (ids, texts) is not read."""
        for value in self.inputs:
            if value.name not in raw:
                raise UsageError(f"{where} has no {value.name!r}{nearest(value.name, [str(name) for name in raw])}")

    # --- stacked arrays ----------------------------------------------------------------------------------------------

    def _only_input(self) -> Input:
        if len(self.inputs) != 1:
            names = ", ".join(value.name for value in self.inputs)
            raise UsageError(f"{self.name} is one array, and the model has the inputs {names}; give a dict of arrays")
        return self.inputs[0]

    def _split(self, stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Stacked arrays as batches of the size that the graph fixes, or of SAMPLES."""
        self._require_names(stacked, self.name)
        arrays = {value.name: _given(stacked[value.name], value, f"{self.name}, input {value.name!r}")
                  for value in self.inputs}  # fmt: skip
        lengths = {name: len(array) if array.dim() else None for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise UsageError(f"{self.name}: axis 0 must hold the same number of samples in every array, not {lengths}")
        total = next(iter(lengths.values())) or 0
        fixed = {value.shape[0] for value in self.inputs if value.shape and isinstance(value.shape[0], int)}
        size = min(fixed, default=SAMPLES)
        if fixed and (len(fixed) > 1 or total % size):
            sizes = " and ".join(str(one) for one in sorted(fixed))
            raise UsageError(f"{self.name}: {total} samples cannot be cut into batches of {sizes}, as the model is")
        cut: dict[str, Any] = dict(arrays)
        for name in (name for name in stacked if name not in arrays):  # labels are cut along with the inputs
            array = stacked[name]
            held = len(array) if isinstance(array, Sized) and getattr(array, "ndim", 1) > 0 else None
            if held == total:
                cut[name] = array
            elif is_label(str(name)):
                raise UsageError(f"{self.name}: {name!r} holds {held or 'no'} labels, for {total} samples")
        return [
            {name: array[start : start + size] for name, array in cut.items()} for start in range(0, total, size)
        ]


class _Every(Sampler[list[Any]]):
    """Every `parts`-th of the first `steps` batches of a batch sampler, from `index` on."""

    def __init__(self, batches: Any, index: int, parts: int, steps: int | None) -> None:
        self.batches, self.index, self.parts, self.steps = batches, index, parts, steps

    def __iter__(self) -> Iterator[list[Any]]:
        return itertools.islice(iter(self.batches), self.index, self.steps, self.parts)


def _has_sampler(source: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether a sampler chooses the batches: one of an iterable dataset has no say."""
    is_loader = isinstance(source, DataLoader) and source.batch_sampler is not None
    return is_loader and not isinstance(source.dataset, IterableDataset)


def _with_sampler(loader: DataLoader[Any], batches: Sampler[list[Any]]) -> DataLoader[Any]:
    """A DataLoader of the same samples in other batches."""
    return DataLoader(
        loader.dataset, batch_sampler=batches, num_workers=loader.num_workers, collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory, timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context, generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )  # fmt: skip


def opened(source: Any, name: str) -> Iterable[Any]:
    """What gives out batches, as an iterable. Raises UsageError, with the name of the source, for anything else."""
    if hasattr(source, "get_next"):
        return _Reader(source)
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return source
    by_row = hasattr(source, "__getitem__") and not isinstance(source, str | bytes)
    way_out = "; a dataset of rows goes into a torch.utils.data.DataLoader" if by_row else ""
    raise UsageError(f"{name} must be an iterable of batches, not a {type(source).__qualname__}{way_out}")


class _Reader:
    """An ONNX Runtime CalibrationDataReader as an iterable; from its beginning each time, where it can rewind."""

    def __new__(cls, reader: Any) -> Any:
        return super().__new__(cls) if hasattr(reader, "rewind") else iter(reader.get_next, None)

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Any]:
        self.reader.rewind()
        return iter(self.reader.get_next, None)


def _unwrapped(items: Sequence[Any]) -> Any:
    """The one item, all of several, or None."""
    return tuple(items) if len(items) > 1 else items[0] if items else None


def _labels(labels: Any, is_row: bool) -> Any:
    """Labels as tensors, as far as they are arrays of numbers."""
    if isinstance(labels, Mapping):
        return {name: _labels(one, is_row) for name, one in labels.items()}
    if isinstance(labels, tuple):
        return tuple(_labels(one, is_row) for one in labels)
    if labels is None:
        return None
    try:
        tensor = _on_cpu(labels)
    except (TypeError, ValueError, RuntimeError):
        return labels
    if tensor.dtype == torch.float64:  # which Python and numpy use where nothing is meant by it
        tensor = tensor.float()
    return tensor.unsqueeze(0) if is_row else tensor


def _given(array: Any, value: Input, where: str) -> Tensor:
    """What a batch holds for an input: as it is where that is of a type that torch lacks, such as texts."""
    is_untouched = value.dtype is None and not isinstance(value, Argument)
    return Untouched.of(array) if is_untouched else _tensor(array, where)


def _tensor(array: Any, where: str) -> Tensor:
    try:
        return _on_cpu(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{where}: a {type(array).__qualname__} is not an array of numbers ({error})") from error


def _on_cpu(array: Any) -> Tensor:
    """The array as a tensor on the CPU; what was made in inference mode is copied, as nothing trains on it."""
    tensor = torch.as_tensor(array).detach().cpu()
    return tensor.clone() if tensor.is_inference() else tensor


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
