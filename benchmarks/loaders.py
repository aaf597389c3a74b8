"""Training data that repeats itself under a seed: the order of an epoch comes from torch's global generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import Batch


class Sentences:
    """Batches of sentences that are alike in length: fixed batches, in another order each epoch.

    Fixed, so that what a teacher says of them can be kept on disk.
    """

    def __init__(self, tokens: Any, texts: Sequence[str], labels: Sequence[int] | None = None, size: int = 32) -> None:
        ids = tokens(list(texts), truncation=True, max_length=128)["input_ids"]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
        order.sort(key=lambda index: len(ids[index]))  # stable: sentences of one length stay shuffled
        parts = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        self.batches = [_padded([ids[index] for index in part], tokens.pad_token_id) for part in parts]
        if labels is not None:
            for batch, part in zip(self.batches, parts, strict=True):
                batch["labels"] = torch.tensor([labels[index] for index in part])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[index] for index in torch.randperm(len(self.batches)).tolist())


class Edited:
    """Sentences of which half are edited, differently each epoch: spliced with another one, or with words left out and
    words taken from another. A teacher has an answer to any text, and a student learns more from many."""

    def __init__(self, tokens: Any, texts: Sequence[str], size: int = 32, longest: int = 64) -> None:
        ids = tokens(list(texts), add_special_tokens=False)["input_ids"]
        self.ids = [row[: longest - 2] for row in ids if row]
        self.first, self.last, self.pad = tokens.cls_token_id, tokens.sep_token_id, tokens.pad_token_id
        self.size, self.longest = size, longest

    def __len__(self) -> int:
        return len(self.ids) // self.size

    def __iter__(self) -> Iterator[Batch]:
        chance = random.Random(int(torch.randint(0, 2**31, (1,))))
        rows = [self._edited(self.ids[index], chance) for index in torch.randperm(len(self.ids)).tolist()]
        batches = []
        for start in range(0, len(rows), 32 * self.size):  # alike in length, within a part of the epoch
            part = sorted(rows[start : start + 32 * self.size], key=len)
            batches += [part[at : at + self.size] for at in range(0, len(part) - self.size + 1, self.size)]
        for index in torch.randperm(len(batches)).tolist()[: len(self)]:
            yield _padded([[self.first, *row, self.last] for row in batches[index]], self.pad)

    def _edited(self, row: list[int], chance: random.Random) -> list[int]:
        kind, other = chance.random(), chance.choice(self.ids)
        if kind < 0.25:
            row = row[: chance.randint(1, len(row))] + other[chance.randrange(len(other)) :]
        elif kind < 0.5:
            left = [word for word in row if chance.random() > 0.1] or row
            row = [chance.choice(other) if chance.random() < 0.15 else word for word in left]
        return row[: self.longest - 2]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


class Images:
    """Batches of images, shifted by up to 4 pixels and mirrored by chance, with their labels."""

    def __init__(self, images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor], size: int = 128) -> None:
        """images: uint8 (number, channels, height, width)."""
        self.images, self.labels, self.prepare, self.size = images, labels, prepare, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))[: len(self) * self.size]
        for chosen in order.reshape(-1, self.size):
            yield _moved(self.prepare(self.images[chosen].float())), self.labels[chosen]


def _moved(images: Tensor, most: int = 4) -> Tensor:
    height, width = images.shape[2:]
    padded = F.pad(images, (most,) * 4)
    shifts = torch.randint(0, 2 * most + 1, (len(images), 2)).tolist()
    rows = [one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, shifts, strict=True)]
    mirrored = torch.rand(len(images)) < 0.5
    moved = torch.stack(rows)
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


class Shuffled:
    """Batches in another order each epoch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[index] for index in torch.randperm(len(self.batches)).tolist())
