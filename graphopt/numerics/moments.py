"""Moments of the inputs of a layer over batches: norms, means, second moments."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.numerics.finite import require_finite
from graphopt.numerics.quantize import Grid

Rows = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]
"""How a convolution reads its input: kernel, stride, padding (begins, then ends), dilation, groups."""


class Norm:
    """The L2 norm of each feature over all rows: ‖x_j‖ of WANDA (Sun et al. 2024, section 3)."""

    def __init__(self, features: int, conv: Rows | None = None) -> None:
        """features: inputs of one output: the last axis of x, or C / groups * kernel sizes of a convolution."""
        self.features, self.conv = features, conv
        groups = 1 if conv is None else conv[4]
        self._squares = torch.zeros(groups, features, dtype=torch.float64)
        self.count = 0
        """Rows seen."""

    @property
    def nbytes(self) -> int:
        return self._squares.nbytes

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch: as `Covariance.update`."""
        rows = _rows(x, mask, self.features, self.conv)
        self._squares += rows.square().sum(2).double()
        self.count += rows.shape[2]

    def merge(self, other: Self) -> None:
        """Take in the rows that another has seen."""
        self._squares += other._squares
        self.count += other.count

    def norms(self) -> Tensor:
        """Float64 (groups, features): the root of the mean square (the norm over sqrt(count)). ValueError if empty."""
        _require_rows(self.count)
        return (self._squares / self.count).sqrt()


class Mean:
    """The mean of each feature over all rows: what a change of weights shifts the outputs by, on average."""

    def __init__(self, features: int, conv: Rows | None = None) -> None:
        """features: as for `Norm`."""
        self.features, self.conv = features, conv
        self._sum = torch.zeros(1 if conv is None else conv[4], features, dtype=torch.float64)
        self.count = 0
        """Rows seen."""

    @property
    def nbytes(self) -> int:
        return self._sum.nbytes

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch: as `Covariance.update`."""
        rows = _rows(x, mask, self.features, self.conv)
        self._sum += rows.sum(2).double()
        self.count += rows.shape[2]

    def merge(self, other: Self) -> None:
        """Take in the rows that another has seen."""
        self._sum += other._sum
        self.count += other.count

    def mean(self) -> Tensor:
        """Float64 (groups, features). ValueError when no row was seen."""
        _require_rows(self.count)
        return self._sum / self.count


class Covariance:
    """The second moment matrix of the rows that a layer multiplies with its weight: the mean of x xᵀ, not centred.

    Half the Hessian of the layer's squared output error (Hassibi & Stork 1993; Frantar & Alistarh 2022, section 3).
    """

    def __init__(self, features: int, conv: Rows | None = None) -> None:
        """features: as for `Norm`. Holds groups * features² float64 numbers."""
        self.features, self.conv = features, conv
        self.groups = 1 if conv is None else conv[4]
        self._sum: Tensor | None = None
        self._first = torch.zeros(self.groups, features, dtype=torch.float64)
        self.count = 0
        """Rows seen."""

    @property
    def nbytes(self) -> int:
        """What it will hold: nothing is allocated before the first batch."""
        return self.groups * self.features**2 * 8

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        x: float, (..., features), or (N, C, *space) with `conv`; mask: bool, the shape of x's leading axes, True = a
        real position (not with `conv`, whose patches reach over positions: there it is left aside).
        Raises ValueError on NaN or infinity at a real position.
        """
        rows = _rows(x, mask, self.features, self.conv)
        if self._sum is None:
            self._sum = torch.zeros(self.groups, self.features, self.features, dtype=torch.float64)
        self._sum += (rows @ rows.transpose(1, 2)).double()
        self._first += rows.sum(2).double()
        self.count += rows.shape[2]

    def merge(self, other: Self) -> None:
        """Take in the rows that another has seen."""
        self._sum = _total(self._sum, other._sum)
        self._first += other._first
        self.count += other.count

    def matrix(self) -> Tensor:
        """Float64 (groups, features, features), symmetric. ValueError when no row was seen."""
        _require_rows(self.count)
        assert self._sum is not None
        return self._sum / self.count

    def affine(self) -> Tensor:
        """`matrix` with a last feature that is always 1, whose row holds the means: a row and a column larger."""
        _require_rows(self.count)
        assert self._sum is not None
        moments = torch.empty(self.groups, self.features + 1, self.features + 1, dtype=torch.float64)
        torch.div(self._sum, self.count, out=moments[:, :-1, :-1])  # no further copy of what may be the largest tensor
        moments[:, -1, :-1] = moments[:, :-1, -1] = self._first / self.count
        moments[:, -1, -1] = 1
        return moments


class QuantizedMoments:
    """r rᵀ of the quantized inputs r, and the cross moments x rᵀ with the float inputs x: means over all rows.

    r is x rounded to the steps of the activation (halves to even) and saturated (Jacob et al. 2018, section 2.1).
    """

    def __init__(self, features: int, conv: Rows | None, grid: Grid) -> None:
        """features, conv: as for `Norm`; grid: the quantization, per tensor."""
        self.features, self.conv, self.grid, self.scale = features, conv, grid, grid.scale
        self.groups = 1 if conv is None else conv[4]
        self._second: Tensor | None = None
        self._cross: Tensor | None = None
        self._means = torch.zeros(2, self.groups, features, dtype=torch.float64)
        self.count = 0
        """Rows seen."""

    @property
    def nbytes(self) -> int:
        """What it will hold: nothing is allocated before the first batch."""
        return 2 * self.groups * self.features**2 * 8

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch: as `Covariance.update`."""
        rows = _rows(x, mask, self.features, self.conv)
        # Patches repeat values, so these are rounded before; the zeros around an image are on every grid.
        quantized = _rows(self.grid.values(self.grid.round(x.detach().float())), mask, self.features, self.conv)
        if self._second is None or self._cross is None:
            shape = self.groups, self.features, self.features
            self._second, self._cross = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self._second += (quantized @ quantized.transpose(1, 2)).double()
        self._cross += (rows @ quantized.transpose(1, 2)).double()
        self._means += torch.stack([rows.sum(2), quantized.sum(2)]).double()
        self.count += rows.shape[2]

    def merge(self, other: Self) -> None:
        """Take in the rows that another has seen."""
        self._second, self._cross = _total(self._second, other._second), _total(self._cross, other._cross)
        self._means += other._means
        self.count += other.count

    def affine(self) -> Tensor:
        """The means of r rᵀ and of x rᵀ, each with a last feature that is always 1: float64 (2, groups, features + 1,
        features + 1). ValueError when no row was seen."""
        _require_rows(self.count)
        assert self._second is not None and self._cross is not None
        mean, mean_quantized = self._means / self.count
        one = torch.ones(self.groups, 1, dtype=torch.float64)
        found = []
        for matrix, first in ((self._second, mean_quantized), (self._cross, mean)):
            right = torch.cat([first, one], 1).unsqueeze(2)
            found.append(torch.cat([torch.cat([matrix / self.count, mean_quantized.unsqueeze(1)], 1), right], 2))
        return torch.stack(found)


def _total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    return b if a is None else a if b is None else a + b


def _require_rows(count: int) -> None:
    if count == 0:
        raise ValueError("no row was observed")


def _rows(x: Tensor, mask: Tensor | None, features: int, conv: Rows | None) -> Tensor:
    """Float32 (groups, features, rows): what is multiplied with the weight, one row per output position."""
    x = x.detach().float()
    if conv is not None:
        require_finite(x, "x")
        return _patches(x, conv)
    if mask is not None:
        x = x[mask]
    require_finite(x, "x")
    if x.shape[-1] != features:
        raise ValueError(f"x has {x.shape[-1]} features, not {features}")
    return x.reshape(1, -1, features).transpose(1, 2)


def _patches(x: Tensor, conv: Rows) -> Tensor:
    """Every patch that a kernel is laid over, channels first: (groups, C / groups * kernel sizes, patches).

    Positions come last, so that what is copied lies side by side.
    """
    kernel, stride, padding, dilation, groups = conv
    rank = len(kernel)
    begin, end = padding[:rank] or (0,) * rank, padding[rank:] or (0,) * rank
    x = F.pad(x, [side for axis in reversed(range(rank)) for side in (begin[axis], end[axis])])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride or (1,) * rank, dilation or (1,) * rank, strict=True)):
        reach = gap * (size - 1) + 1
        x = x.unfold(2 + axis, reach, step)[..., ::gap]
    batch, channels, *rest = x.shape
    x = x.reshape(batch, groups, channels // groups, *rest)
    x = x.movedim((0, *range(3, 3 + rank)), tuple(range(-1 - rank, 0)))
    # (groups, C / groups, *kernel, N, *positions) -> (groups, C / groups · kernel, N · positions)
    return x.flatten(-1 - rank).flatten(1, -2)
