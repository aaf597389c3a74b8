"""Statistics of activations over batches, in memory that does not grow with their number."""

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite


class MinMax:
    """The smallest and the largest value seen.

    Source: Krishnamoorthi 2018, section 2.1.
    """

    nbytes = 16
    """What it holds."""
    count: int
    """Elements seen, those that a mask left out not among them."""

    def __init__(self) -> None:
        self.count = 0
        self._low = float("inf")
        self._high = float("-inf")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        x: any real dtype and shape; mask: bool, its shape that of x's leading axes (for x (batch, seq, hidden):
        (batch,), (batch, seq) or all three), True = a real position; the others, padding, are left out, whatever they
        hold. Raises ValueError when the mask is not bool or doesn't fit, and on NaN or infinity at a real position,
        saying how many there are and the first index; what was seen before stays as it was.
        """
        x = x.detach()
        if mask is not None:
            _require_fits(mask, x)
        seen = x if mask is None else x[mask]
        if seen.numel() == 0:
            return
        low, high = (float(end) for end in torch.aminmax(seen))
        if not torch.isfinite(torch.tensor([low, high], dtype=torch.float64)).all():
            require_finite(x, "x", where=None if mask is None else _over(mask, x))
        self._low = min(self._low, low)
        self._high = max(self._high, high)
        self.count += seen.numel()

    def range(self) -> tuple[float, float]:
        """The smallest and the largest value, in the units of x. Raises ValueError when nothing was seen."""
        if self.count == 0:
            raise ValueError("no range: no element was observed")
        return self._low, self._high


def _require_fits(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() == 0 or mask.shape != x.shape[: mask.dim()]:
        raise ValueError(f"mask of shape {list(mask.shape)} does not fit the leading axes of {list(x.shape)}")


def _over(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(list(mask.shape) + [1] * (x.dim() - mask.dim())).expand_as(x)
