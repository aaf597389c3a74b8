"""The learning rate, and the share that gradual pruning removes, over the course of a training."""

from __future__ import annotations

import math


def learning_rate(progress: float, *, warmup: float, decay: str) -> float:
    """The factor of the highest learning rate: a linear rise over `warmup`, then cosine, linear or no decay to 0.

    progress: the share of the training that is done, 0 to 1.
    """
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / (1 - warmup)
    if decay == "cosine":
        return (1 + math.cos(math.pi * min(rest, 1.0))) / 2
    return 1 - min(rest, 1.0) if decay == "linear" else 1.0


def cubic(progress: float, *, start: float = 0.0, end: float = 1.0) -> float:
    """The share of the final amount that is removed (Zhu & Gupta 2017, equation 1): 1 - (1 - t)³, t rising from 0 at
    `start` to 1 at `end`."""
    t = min(max((progress - start) / (end - start), 0.0), 1.0)
    return 1 - (1 - t) ** 3
