"""The learning rate over the course of a training."""

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
