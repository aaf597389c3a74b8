"""Which results of a graph are computed divided by factors, which the weights that read them multiply.

A pass that divides records it here, so that a comparison with another graph can undo it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Place = tuple[str, str, int]
"""A node that passes keep, whatever its name: its op, its module path, and its number among those that share both."""


@dataclass(frozen=True)
class Scaled:
    """A result, divided by one factor for each channel."""

    factors: Tensor
    """Float32, (channels,), > 0."""
    axis: int
    """Of the channels in the result: 1, or -1."""

    def undone(self, x: Tensor) -> Tensor:
        """The result as it would be without the division."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return x * self.factors.reshape(shape).to(x.dtype)

    def then(self, later: Scaled) -> Scaled:
        """Divided by other factors too."""
        return Scaled(self.factors * later.factors, self.axis)


def dumps(scaled: Mapping[Place, Scaled]) -> str:
    """As text, for the metadata of a file: the factors as base64 of float32, little-endian."""
    return json.dumps([
        [*place, one.axis, base64.b64encode(one.factors.numpy().astype("<f4").tobytes()).decode()]
        for place, one in sorted(scaled.items(), key=lambda item: item[0])
    ])  # fmt: skip


def loads(text: str) -> dict[Place, Scaled]:
    """What `dumps` wrote; empty for any other text, since metadata must not make a file unreadable."""
    found: dict[Place, Scaled] = {}
    try:
        for kind, path, number, axis, factors in json.loads(text):
            floats = np.frombuffer(base64.b64decode(factors, validate=True), "<f4").astype(np.float32)
            if axis not in (1, -1) or not len(floats) or not (np.isfinite(floats).all() and (floats > 0).all()):
                return {}
            found[str(kind), str(path), int(number)] = Scaled(torch.from_numpy(floats), axis)
    except (ValueError, TypeError):
        return {}
    return found
