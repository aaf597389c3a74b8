"""One node while it is translated: what it reads as tensors of TensorFlow, in the layout that its form asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from graphopt.dialects.onnx.tensors import to_numpy
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph, Node, Value

T = TypeVar("T")

INLINE = 1024
"""Most entries of a stored tensor that stands in the graph itself, where TensorFlow folds it; larger ones are
variables, which lie in files of their own: a graph holds 2 GB at most."""


@dataclass(frozen=True)
class ChannelsLast:
    """A result (N, *space, C) of what the graph has as (N, C, *space): TensorFlow's convs on a CPU know no other."""

    tensor: Any


@dataclass(frozen=True)
class Form:
    """How TensorFlow computes a node.

    apply: (the package, the call) -> the results: one tensor, or a tuple of them. elementwise: whether entries stand
    where they stood, so that it computes in any layout.
    """

    apply: Callable[[Any, Call], Any]
    elementwise: bool = False


def to_last(rank: int) -> list[int]:
    """The permutation from channels behind the batch to channels last."""
    return [0, *range(2, rank), 1]


def from_last(rank: int) -> list[int]:
    """Its inverse."""
    return [0, rank - 1, *range(1, rank - 1)]


def axis_in_last(axis: int, rank: int) -> int:
    """Where an axis lies when channels are last."""
    return to_last(rank).index(axis % rank)


class Stored:
    """The stored tensors of a graph, each kept once in each order of axes that is read."""

    def __init__(self, tf: Any, graph: Graph) -> None:
        self.tf, self.graph = tf, graph
        self.variables: list[Any] = []
        self._kept: dict[tuple[Value, tuple[int, ...]], Any] = {}

    def get(self, value: Value, perm: Sequence[int] = ()) -> Any:
        """A stored tensor with its axes in another order, which is how it is saved."""
        key = value, tuple(perm)
        if key not in self._kept:
            tensor = self.graph.constant(value)
            if tensor is None:
                raise LoweringError(f"tensorflow has no tensors of the type of {value.name}")
            self._kept[key] = self._keep(to_numpy(tensor.permute(*perm) if perm else tensor), value.name)
        return self._kept[key]

    def _keep(self, array: Any, name: str) -> Any:
        with self.tf.init_scope():  # outside the function that is traced
            if array.size <= INLINE:
                return self.tf.constant(array)
            # TensorFlow takes names of ASCII alone that begin with a letter or a digit.
            plain = re.sub(r"[^A-Za-z0-9]", "_", name)
            variable = self.tf.Variable(array, trainable=False, name=f"v{len(self.variables)}_{plain}")
            self.variables.append(variable)
            return variable


class Values:
    """What a trace has computed so far, by value, in one or both layouts; a stored tensor when it is first read."""

    def __init__(self, stored: Stored) -> None:
        self.tf, self.graph, self.stored = stored.tf, stored.graph, stored
        self._plain: dict[Value, Any] = {}
        self._channels_last: dict[Value, Any] = {}

    def set(self, value: Value, found: Any) -> None:
        if isinstance(found, ChannelsLast):
            self._channels_last[value] = found.tensor
        else:
            self._plain[value] = found

    def is_channels_last(self, value: Value) -> bool:
        """Whether it was computed with channels last."""
        return value in self._channels_last and value not in self._plain

    def plain(self, value: Value) -> Any:
        if value not in self._plain:
            if value in self._channels_last:
                found = self._channels_last[value]
                self._plain[value] = self.tf.transpose(found, from_last(found.shape.rank))
            else:
                self._plain[value] = self.stored.get(value)
        return self._plain[value]

    def channels_last(self, value: Value) -> Any:
        if value not in self._channels_last:
            plain = self.plain(value)
            self._channels_last[value] = self.tf.transpose(plain, to_last(plain.shape.rank))
        return self._channels_last[value]


@dataclass(frozen=True)
class Call:
    """A node and what it reads."""

    node: Node
    values: Values
    by_channels_last: bool = False
    """Whether operands are given with channels last."""
    attributes: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", self.node.attributes)

    def __len__(self) -> int:
        return len(self.node.operands)

    def __getitem__(self, index: int) -> Any:
        """Operand `index`. Raises LoweringError where it is left out."""
        value = self.value(index)
        if value is None:
            raise self.refused(f"operand {index} is left out")
        return self._broadcast_channels_last(value) if self.by_channels_last else self.values.plain(value)

    def _broadcast_channels_last(self, value: Value) -> Any:
        """An operand of fewer axes is broadcast: it gets the missing ones in front first."""
        tf, rank = self.values.tf, self.node.result.rank
        assert rank is not None  # of a result that is computed with channels last
        missing = rank - (value.rank or 0)
        if missing == 0:
            return self.values.channels_last(value)
        plain = self.values.plain(value)
        if not value.rank:
            return plain
        return tf.transpose(tf.reshape(plain, tf.concat([[1] * missing, tf.shape(plain)], 0)), to_last(rank))

    def value(self, index: int) -> Value | None:
        return self.node.operands[index] if index < len(self) else None

    def rank(self, index: int) -> int:
        """The number of axes of operand `index`, which is not read for that."""
        value = self.value(index)
        if value is None or value.rank is None:
            raise self.refused(f"the rank of operand {index} is not known")
        return value.rank

    def optional(self, index: int) -> Any | None:
        return None if self.value(index) is None else self[index]

    def tensors(self) -> list[Any]:
        """All operands, each of which must be given."""
        return [self[index] for index in range(len(self))]

    def is_channels_last(self, index: int) -> bool:
        """Whether an operand was computed with channels last."""
        value = self.value(index)
        return value is not None and self.values.is_channels_last(value)

    def channels_last(self, index: int) -> Any:
        """Operand `index` with channels last."""
        value = self.value(index)
        if value is None:
            raise self.refused(f"operand {index} is left out")
        return self.values.channels_last(value)

    def permuted(self, index: int, perm: Sequence[int]) -> Any:
        """Operand `index` with its axes in another order: a weight is stored so, and not transposed at each run."""
        value = self.value(index)
        if value is not None and value.is_constant:
            return self.values.stored.get(value, perm)
        return self.values.tf.transpose(self[index], perm)

    def array(self, index: int) -> np.ndarray[Any, Any] | None:
        """What is stored in operand `index`; None where it is left out or computed."""
        value = self.value(index)
        tensor: Tensor | None = None if value is None or not value.is_constant else self.values.graph.constant(value)
        return None if tensor is None else to_numpy(tensor)

    def numbers(self, index: int) -> list[Any] | None:
        """The numbers stored in operand `index`, row by row; None where it is left out.

        Raises LoweringError where they are computed.
        """
        if self.value(index) is None:
            return None
        array = self.array(index)
        if array is None:
            raise self.refused(f"operand {index} is computed, and must be stored")
        return list(array.flatten().tolist())

    def listed(self, name: str, index: int) -> list[Any] | None:
        """Numbers that are attribute `name` or, in later opsets, operand `index`; None where they are neither."""
        return list(self.attributes[name]) if name in self.attributes else self.numbers(index)

    def attribute(self, name: str, default: T) -> T:
        found: T = self.attributes.get(name, default)
        return found

    def refused(self, why: str) -> LoweringError:
        return LoweringError(f"tensorflow has no form of {self.node.kind} here: {why} ({self.node.label})")
