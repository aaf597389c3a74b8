"""One call of an operator: its values, what is stored in them, its attributes; and how a form of torch is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.errors import GraphError

Size = Any
"""An int, or the SymInt of a dynamic axis."""

MOST_STORED = 1024
"""Most entries of a stored tensor that is read as numbers."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Numbers:
    """A small tensor that a graph computes from shapes, in Python numbers: int, float, bool, SymInt, SymFloat."""

    array: NDArray[np.object_]
    dtype: torch.dtype

    @property
    def is_plain(self) -> bool:
        """Whether no number depends on a dynamic axis."""
        return not any(isinstance(item, torch.SymInt | torch.SymFloat) for item in self.array.flat)

    def tensor(self) -> Tensor:
        if self.is_plain:
            return torch.tensor(self.array.tolist(), dtype=self.dtype).reshape(self.array.shape)
        listed: list[Any] = list(self.array.flat)
        items = [torch.scalar_tensor(item, dtype=self.dtype) for item in listed]
        return torch.stack(items).reshape(self.array.shape) if self.array.ndim else items[0]


def numbers(items: Any, dtype: torch.dtype = torch.int64) -> Numbers:
    """The numbers in (nested lists of) Python numbers, or in an array of them."""
    return Numbers(np.asarray(items, dtype=object), dtype)


def numbers_of(tensor: Tensor | None) -> Numbers | None:
    """The numbers of a stored tensor; None where it has more than `MOST_STORED`. Not for a tensor that is traced."""
    if tensor is None or tensor.numel() > MOST_STORED:
        return None
    return Numbers(np.asarray(tensor.tolist(), dtype=object).reshape(tensor.shape), tensor.dtype)


Traced = Tensor | Numbers | None
"""What a node reads: None where an optional input is left out."""


@dataclass(frozen=True)
class Call:
    """A node and what it reads in one run."""

    kind: str
    label: str
    attributes: Mapping[str, Any]
    opset: int
    results: int
    """How many results are read."""
    given: Sequence[Traced]
    stored: Sequence[Numbers | None]
    """By input, the numbers of a tensor that the model stores; None where it has more than `MOST_STORED`, or is
    computed."""

    def __getitem__(self, index: int) -> Tensor:
        """Input `index` as a tensor."""
        tensor = self.optional(index)
        if tensor is None:
            raise self.refused(f"input {index} is left out")
        return tensor

    def optional(self, index: int) -> Tensor | None:
        """Input `index` as a tensor, None where it is left out."""
        value = self.given[index] if index < len(self.given) else None
        return value.tensor() if isinstance(value, Numbers) else value

    def tensors(self) -> list[Tensor]:
        """All inputs, each of which must be given."""
        return [self[index] for index in range(len(self.given))]

    def numbers(self, index: int) -> list[Any] | None:
        """Input `index` as a list of numbers, row by row; None where it is left out.

        Raises GraphError where it is computed of more than shapes, for then no trace knows it.
        """
        value = self.given[index] if index < len(self.given) else None
        if value is None:
            return None
        if isinstance(value, Numbers):
            return list(value.array.flat)
        known = self.stored[index]
        if known is None:
            raise self.refused(f"input {index} depends on values, and a trace knows sizes only")
        return list(known.array.flat)

    def required_numbers(self, index: int) -> list[Any]:
        found = self.numbers(index)
        if found is None:
            raise self.refused(f"input {index} is left out")
        return found

    def listed(self, name: str, index: int) -> list[Any] | None:
        """Numbers that are attribute `name` or, in later opsets, input `index`; None where they are neither."""
        return list(self.attributes[name]) if name in self.attributes else self.numbers(index)

    def attribute(self, name: str, default: T) -> T:
        found: T = self.attributes.get(name, default)
        return found

    def refused(self, why: str) -> GraphError:
        return GraphError(f"{self.kind} has no torch form here: {why} ({self.label})")


@dataclass(frozen=True)
class Form:
    """How torch computes an operator.

    apply returns the results: one value, or a tuple of them. only: by attribute, the values that it holds for.
    weights: what a parameter is called, by the input that reads it.
    """

    apply: Callable[[Call], Traced | tuple[Traced, ...]]
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    weights: Mapping[int, str] = field(default_factory=dict)

    def refusal(self, attributes: Mapping[str, Any]) -> str | None:
        """Why it does not hold for these attributes; None where it does."""
        for name, values in self.only.items():
            if name in attributes and attributes[name] not in values:
                return f"{name}={attributes[name]}"
        return None
