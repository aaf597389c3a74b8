"""Batches of tokens -> the same texts at other lengths: several rows joined to one, and rows cut short.

Activations of a token depend on how many others there are, so that ranges which were calibrated on short texts do not
hold for long ones. Rows are joined without their padding, all inputs alike: ids, masks and token types stay as they
were, and no token is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from graphopt.analysis.masks import is_mask, padding_mask
from graphopt.ir.graph import Feeds, Graph, Value
from graphopt.pipeline.batches import Input

JOINED = (4, 16, 64)
"""How many rows are joined to one."""

CUT = 4
"""The share of a row that is left where rows are cut."""

LEAST = 32
"""Tokens of a row from which on it is cut: what is shorter is short already."""

TOKENS, ROWS = 1024, 16
"""Most tokens of one length, and most rows: few are enough for ranges, and they cost time."""

Row = Mapping[str, Tensor]
"""By input, the tokens of one row without padding, (length,)."""


@dataclass(frozen=True)
class Lengths:
    """Batches at other lengths than those they are made from."""

    batches: tuple[Feeds, ...]
    note: str
    """What they are, for the report."""


def at_other_lengths(batches: Iterable[Feeds], graph: Graph) -> Lengths | None:
    """The first rows of batches, joined and cut; None where the graph takes no tokens, or one length alone.

    Joined rows are as long as the graph takes: it is run on them, and shorter ones are tried where it fails or its
    outputs are not finite. Each length is at least twice the one before it, the first of them twice the median.
    """
    if not takes_tokens(graph):
        return None
    size = graph.inputs[0].shape[0] if graph.inputs[0].shape else None
    rows = first_rows(batches, graph.inputs, 4 * max(JOINED))
    lengths = [_length(row) for row in rows]
    found: list[tuple[str, list[Feeds]]] = []
    middle = last = int(median(lengths)) if lengths else 0
    for times in JOINED:
        same = fitting(joined(rows, times), least=2 * last, fits=lambda feeds: _fits(graph, feeds), size=size)
        if same:
            last = _length(same[0])
            found.append(("joined to", same))
    short = in_batches(rows[:ROWS], middle // CUT, size) if middle >= LEAST else []
    if short and all(_fits(graph, feeds) for feeds in short):
        found.append(("cut to", short))
    if not found:
        return None
    parts = [f"{what} {_length(same[0])} ({sum(map(_count, same))} rows)" for what, same in found]
    note = f"calibrated at other lengths too: rows of {_range(lengths)} tokens were {', '.join(parts)}"
    return Lengths(tuple(feeds for _, same in found for feeds in same), note)


def takes_tokens(graph: Graph) -> bool:
    """Whether all inputs are integers (batch, length) of an open length, and an embedding reads one of them."""
    for value in graph.inputs:
        integers = value.dtype is not None and not value.dtype.is_floating_point
        if not integers or value.rank != 2 or isinstance((value.shape or (0, 0))[1], int):
            return False
    return any(_is_embedded(value) for value in graph.inputs)


def _is_embedded(value: Value) -> bool:
    return any(
        node.kind == "embedding" or (node.kind == "cast" and _is_embedded(node.result)) for node in value.users
    )


def first_rows(batches: Iterable[Feeds], inputs: Sequence[Input], count: int) -> list[Row]:
    """So many rows at most, each without its padding: where all masks of the input's length are 0."""
    rows: list[Row] = []
    for feeds in batches:
        real = {value.name: _real(value, inputs, feeds) for value in inputs}
        for place in range(len(next(iter(feeds.values())))):
            row = {name: feeds[name][place][real[name][place]] for name in real}
            if min(map(len, row.values())):
                rows.append(row)
            if len(rows) == count:
                return rows
    return rows


def _real(value: Input, inputs: Sequence[Input], feeds: Feeds) -> Tensor:
    """Where an input holds no padding, (batch, length)."""
    shape = feeds[value.name].shape
    masks = [feeds[one.name].bool() for one in inputs if is_mask(one.name) and feeds[one.name].shape == shape]
    return torch.stack(masks).any(0) if masks else torch.ones_like(feeds[value.name], dtype=torch.bool)


def joined(rows: Sequence[Row], times: int) -> list[Row]:
    """Each so many rows one after the other; all of them, where there are fewer."""
    times = min(times, len(rows))
    starts = range(0, len(rows) - times + 1, times) if times > 1 else ()
    return [
        {name: torch.cat([row[name] for row in rows[start : start + times]]) for name in rows[start]}
        for start in starts
    ]


def fitting(
    rows: Sequence[Row], *, least: int, fits: Callable[[Feeds], bool], size: int | str | None = None
) -> list[Feeds]:
    """Batches of rows, cut to the greatest length that fits: theirs, or a power of two; none where that is below
    `least`. size: of a batch, where it is fixed."""
    length = min(map(_length, rows), default=0)
    while length >= least and length:
        batches = in_batches(rows[: max(1, min(ROWS, TOKENS // length))], length, size)
        if not batches or fits(batches[0]):
            return batches
        length = 1 << (length - 1).bit_length() - 1
    return []


def in_batches(rows: Sequence[Row], length: int, size: int | str | None = None) -> list[Feeds]:
    """Rows cut to one length, in one batch, or in batches of a fixed size; rows that are shorter are left out.

    length: of the first input; one of another length (of a decoder) is cut by the same share.
    """
    rows = [row for row in rows if _length(row) >= length]
    count = size if isinstance(size, int) else max(1, len(rows))
    batches: list[Feeds] = []
    for start in range(0, len(rows) - count + 1, count):
        group = rows[start : start + count]
        least = {name: min(len(row[name]) for row in group) for name in group[0]}
        own = {name: max(1, shortest * length // least[next(iter(least))]) for name, shortest in least.items()}
        batches.append({name: torch.stack([row[name][: own[name]] for row in group]) for name in own})
    return batches


def text(feeds: Feeds) -> str:
    """How long the rows of a batch are, in tokens of the first input, without padding: 44, or 6 to 23."""
    mask = padding_mask(feeds)
    return _range([_length(feeds)] if mask is None else mask.sum(1).tolist())


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def _fits(graph: Graph, feeds: Feeds) -> bool:
    """Whether a graph runs on a batch and its outputs are finite."""
    try:
        outputs = graph.evaluate(feeds, graph.outputs)
    except Exception:  # the engines' own errors, such as of an index beyond the last position, have no common base
        return False
    return all(bool(one.isfinite().all()) for one in outputs if one.is_floating_point())


def _length(row: Mapping[str, Tensor]) -> int:
    """Of the first input, of a row or of a batch."""
    return int(next(iter(row.values())).shape[-1])


def _count(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))
