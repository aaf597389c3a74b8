"""What lies between a few measurements, where a quantity grows by powers."""

from collections.abc import Sequence

import torch
from torch import Tensor


def power_between(xs: Sequence[float], ys: Sequence[float], at: Tensor) -> Tensor:
    """y at points `at` (float64, from 0 to the last of xs), by straight lines in log x and log y; 0 at 0.

    xs: rising, above 0, at least 2; ys: at least 0. A y below the one before it is taken for that: more cannot do less.
    Below the first x the first line goes on, at a power of at least 1. Raises ValueError where xs or `at` are not so.
    """
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    if len(x) < 2 or bool((x[1:] <= x[:-1]).any()) or x[0] <= 0:
        raise ValueError(f"xs must rise from above 0, and be at least 2, got {list(xs)}")
    if at.numel() and (float(at.min()) < 0 or float(at.max()) > xs[-1]):
        raise ValueError(f"points must lie in [0, {xs[-1]:g}]")
    log_x, log_y = x.log(), y.cummax(0).values.clamp(min=torch.finfo(torch.float64).tiny).log()
    powers = log_y.diff() / log_x.diff()
    powers = torch.cat([powers[:1].clamp(min=1), powers])
    piece = torch.bucketize(at, x[:-1], right=True)
    start = (piece - 1).clamp(min=0)
    found = (log_y[start] + powers[piece] * (at.clamp(min=torch.finfo(torch.float64).tiny).log() - log_x[start])).exp()
    return torch.where(at > 0, found, 0)
