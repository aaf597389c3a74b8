"""Names for the dynamic axes of inputs, and which positions of a value are padding, as attention masks say."""

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


def labels(claims: Iterable[tuple[str, str, str]], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A name for each symbolic size of a traced program.

    claims: (symbol, label, input name), one for each dynamic axis of an input. Axes of one name have one size, so only
    the first symbol that claims a label gets it; a later one is prefixed by its input: decoder_input_ids_seq. A symbol
    that several inputs claim is named after the first. given: names of symbols that are known to have them; those of
    one name have one size, too.
    """
    names = dict(given or {})
    for symbol, label, owner in claims:
        if symbol not in names:
            taken = set(names.values())
            options = (label, f"{owner}_{label}", *(f"{owner}_{label}_{number}" for number in range(2, len(taken) + 3)))
            names[symbol] = next(name for name in options if name not in taken)
    return names


Input = TypeVar("Input", bound=Named)


def mask_inputs(inputs: Sequence[Input]) -> list[Input]:
    """The inputs that are attention masks by their name; `real_positions` reads those of rank 2."""
    return [value for value in inputs if is_mask(value.name)]


def is_mask(name: str) -> bool:
    """Whether an input is an attention mask, by its name."""
    return "mask" in name.lower()


def padding_mask(feeds: Mapping[str, Tensor]) -> Tensor | None:
    """Which positions are no padding, by the first input that is a mask (batch, length) of integers or booleans:
    boolean; None without one."""
    masks = (feed for name, feed in feeds.items() if is_mask(name) and feed.dim() == 2 and not feed.is_floating_point())
    mask = next(masks, None)
    return None if mask is None else mask.bool()


def real_positions(
    shape: Shape | None, tensor: Tensor, masks: Sequence[Named], feeds: Mapping[str, Tensor]
) -> Tensor | None:
    """Where a value holds no padding, along its leading axes: boolean, (batch, length) or (batch · length,).

    shape: the value's, as declared; tensor: the value itself. A mask is an integer or boolean feed (batch, length), 0
    at padding; with several that fit, a position is padding where all of them are 0. None where no mask fits.
    """
    unpadded: Tensor | None = None
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
        if unpadded is not None and unpadded.shape != real.shape:
            return None
        unpadded = real if unpadded is None else unpadded | real
    return unpadded


def _may_be_equal(shape: Shape | None, mask: Shape | None) -> bool:
    """Whether the leading two axes can be those of the mask, by the declared shapes.

    Sizes alone may be equal by chance, such as 12 heads and 12 tokens: an axis of fixed size is none of the mask's
    dynamic axes.
    """
    if shape is None or mask is None:
        return True
    return not any(isinstance(a, int) != isinstance(b, int) for a, b in zip(shape[:2], mask, strict=True))
