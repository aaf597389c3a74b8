"""Refuse NaN and infinity, saying how many there are and where the first one is."""

import torch
from torch import Tensor


def require_finite(tensor: Tensor, name: str, *, where: Tensor | None = None) -> None:
    """Raise ValueError when `tensor` holds NaN or infinity.

    tensor: any shape and dtype; name: what the message calls it; where: bool, same shape, True at the elements that
    count (all of them when None). The message holds the number of offenders and the index of the first, row-major.
    """
    if where is None and _all_finite(tensor):
        return
    bad = ~torch.isfinite(tensor)
    if where is not None:
        bad &= where
    count = int(bad.sum())
    if count:
        first = tuple(torch.nonzero(bad)[0].tolist())
        of = f"{count} of {tensor.numel()} values NaN or infinite"
        raise ValueError(f"{name} has {of}, the first at {first}: {tensor[first].item()}")


def _all_finite(tensor: Tensor) -> bool:
    """One pass and no temporary: NaN and infinity both come through as the minimum or the maximum."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
