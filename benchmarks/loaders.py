"""Training data that repeats itself under a seed: the order of an epoch comes from torch's global generator."""

from __future__ import annotations

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
