"""Which axes inputs name, and what a mask says of them: the batch and the length, and where padding is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from graphopt.ir.graph import Shape


class Named(Protocol):
    """An input of a graph, as `graphopt.ir.graph.Value` declares it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Shape | None: ...


def labels(claims: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """A name for each symbol of a traced program, of claims (symbol, label, input), each symbol and each name once.

    Axes of one name are of one size, so only the first symbol that claims a label has it; a later one is called by its
    input too: decoder_input_ids_seq. An axis that several inputs share has its name from the first.
    """
    names: dict[str, str] = {}
    for symbol, label, owner in claims:
        if symbol not in names:
            taken = set(names.values())
            options = (label, f"{owner}_{label}", *(f"{owner}_{label}_{number}" for number in range(2, len(taken) + 3)))
            names[symbol] = next(name for name in options if name not in taken)
    return names


Input = TypeVar("Input", bound=Named)


def mask_inputs(inputs: Sequence[Input]) -> list[Input]:
    """The inputs that mark padding by their name; `real_positions` looks at those of rank 2."""
    return [value for value in inputs if "mask" in value.name.lower()]


def real_positions(
    shape: Shape | None, tensor: Tensor, masks: Sequence[Named], feeds: Mapping[str, Tensor]
) -> Tensor | None:
    """Where a value's leading axes hold something else than padding: boolean, (batch, length) or (batch · length,).

    shape: the value's as declared; tensor: what it holds. A mask is an integer or boolean feed (batch, length), 0 at
    padding; with several that fit, a position is padding where all of them are 0. None where no mask fits.
    """
    found: Tensor | None = None
    for mask in masks:
        feed = feeds[mask.name]
        if feed.dim() != 2 or feed.is_floating_point():
            continue
        if tensor.shape[:2] == feed.shape and _may_be_equal(shape, mask.shape):
            real = feed.bool()
        elif tensor.dim() > 1 and tensor.shape[0] == feed.numel() and tensor.shape[:2] != feed.shape:
            real = feed.bool().flatten()
        else:
            continue
        if found is not None and found.shape != real.shape:
            return None
        found = real if found is None else found | real
    return found


def _may_be_equal(shape: Shape | None, mask: Shape | None) -> bool:
    """Whether the leading two axes can be the mask's by their declaration: sizes alone may be equal by chance.

    With 12 heads, for 12 tokens: an axis of a fixed size is not one that the mask leaves open.
    """
    if shape is None or mask is None:
        return True
    return not any(isinstance(a, int) != isinstance(b, int) for a, b in zip(shape[:2], mask, strict=True))
