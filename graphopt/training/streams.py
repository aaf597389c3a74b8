"""Random numbers of a training: one stream for the data, one for the model, and the user's own, which is given back.

With two streams a resumed training can iterate the data again, and skip what was seen, without running the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = tuple[torch.Tensor, Any, Any, list[torch.Tensor]]
"""Of torch, numpy, Python, and of torch on each GPU."""


def get_state() -> State:
    """The states of all global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda


def set_state(state: State) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    for device, one in zip(range(torch.cuda.device_count()), state[3], strict=False):  # a checkpoint of other GPUs
        torch.cuda.set_rng_state(one, device)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def restored() -> Iterator[None]:
    """Give the user's generators back as they were."""
    before = get_state()
    try:
        yield
    finally:
        set_state(before)


class Stream:
    """A state of the global generators of its own, which they have inside `active`."""

    def __init__(self, seed: int) -> None:
        with restored():
            seed_all(seed)
            self.state = get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        before = get_state()
        set_state(self.state)
        try:
            yield
        finally:
            self.state = get_state()
            set_state(before)
