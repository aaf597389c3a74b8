"""The two halves of a factorized weight: how a weight is seen as a matrix, and how a linear or conv becomes two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """One way to see a weight (out, in, *kernel) as a matrix, of which rank r gives two weights around r channels.

    Channel: (out, in · kernel), a kernel to r channels and then a linear or 1x1 (Zhang et al. 2015, section 3.1).
    Spatial: (out · k2, in · k1), a k1 x 1 kernel to r channels and then a 1 x k2 (Jaderberg et al. 2014, scheme 2; Tai
    et al. 2016, theorem 1, for its closed form). A stride, padding and dilation go to the half that spans their axis.
    """

    shape: tuple[int, ...]
    """Of the weight."""
    spatial: bool = False
    """Needs two kernel axes, each longer than 1."""

    def __post_init__(self) -> None:
        if self.spatial and (len(self.shape) != 4 or min(self.shape[2:]) < 2):
            raise ValueError(f"a kernel {list(self.shape[2:])} does not have two axes longer than 1")

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[3] if self.spatial else self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] * self.shape[2] if self.spatial else math.prod(self.shape[1:])

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of the first half."""
        return (self.shape[2], 1) if self.spatial else self.shape[2:]

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (rows, columns)."""
        if self.spatial:
            weight = weight.permute(0, 3, 1, 2)
        return weight.reshape(self.rows, self.columns)

    def moments(self, patches: Tensor) -> Tensor:
        """What `matrix` multiplies: (columns, columns), from the second moments of whole patches (in · kernel, ·).

        For a spatial split, those of a column of the patches, in the mean over the columns.
        """
        if not self.spatial:
            return patches
        columns, width = self.columns, self.shape[3]
        return patches.reshape(columns, width, columns, width).diagonal(dim1=1, dim2=3).mean(-1)

    def halves(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the first and the second half, from u (rows, r) and v (r, columns)."""
        rank = v.shape[0]
        inner = v.reshape(rank, self.shape[1], *self.kernel)
        if self.spatial:
            outer = u.reshape(self.shape[0], self.shape[3], rank).permute(0, 2, 1).unsqueeze(2)
        else:
            outer = u.reshape(self.shape[0], rank, *(1 for _ in self.kernel))
        return inner.contiguous(), outer.contiguous()

    def attributes(self, conv: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The attributes of both halves, from those of the conv (stride, padding, dilation; groups are 1)."""
        if not self.spatial:
            return dict(conv), {}
        stride, dilation = (conv.get(name) or (1, 1) for name in ("stride", "dilation"))
        top, left, bottom, right = conv.get("padding") or (0, 0, 0, 0)
        return (
            {"stride": (stride[0], 1), "padding": (top, 0, bottom, 0), "dilation": (dilation[0], 1)},
            {"stride": (1, stride[1]), "padding": (0, left, 0, right), "dilation": (1, dilation[1])},
        )

    def numbers(self, rank: int = 1) -> int:
        """How many numbers the pair holds."""
        return rank * (self.rows + self.columns)

    def work(self, rank: int = 1, *, before: int = 1, after: int = 1) -> float:
        """Multiply-adds of the pair over those of the whole; before, after: the length of the last axis of x and y.

        They matter to a spatial pair with a stride: its first half runs before that axis is shortened.
        """
        widened = before / after if self.spatial else 1.0
        return rank * (self.columns * widened + self.rows) / (self.rows * self.columns)

    def most(self, work: float = 0.0) -> int:
        """The largest rank that gains: fewer numbers than the weight, and fewer multiply-adds at `work` for each rank.

        0 where rank 1 gains nothing.
        """
        by_numbers = (math.prod(self.shape) - 1) // self.numbers()
        by_work = math.ceil(1 / work) - 1 if work else by_numbers
        return max(0, min(by_numbers, by_work, self.rows, self.columns))
