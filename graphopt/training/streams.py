"""Random numbers of a training: one stream for the data, one for the model, and the user's own, which is given back.

With two streams a resumed training can iterate the data again, and skip what was seen, without running the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = tuple[torch.Tensor, Any, Any, list[torch.Tensor]]
"""Of torch, numpy, Python, and of torch on each GPU."""


_PYTHON = 3
"""The version of the form that Python's generator gives its state in, since 3.2."""


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


def as_tensors(state: State) -> dict[str, torch.Tensor]:
    """A state as tensors by name, which `from_tensors` reads."""
    of_torch, of_numpy, of_python, of_gpus = state
    name, keys, *rest = of_numpy
    assert name == "MT19937"  # of numpy's global generator
    version, internal, gauss = of_python
    assert version == _PYTHON
    return {
        "torch": of_torch,
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy position": torch.tensor(rest, dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        **{f"cuda{place}": one for place, one in enumerate(of_gpus)},
    }


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> State:
    """The state that `as_tensors` was given. Raises KeyError where a tensor is missing."""
    position, has_gauss, cached = tensors["numpy position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    gauss = float(tensors["python gauss"])
    gpus = [tensors[name] for name in sorted(tensors, key=lambda one: (len(one), one)) if name.startswith("cuda")]
    return (
        tensors["torch"],
        ("MT19937", keys, int(position), int(has_gauss), cached),
        (_PYTHON, tuple(tensors["python"].tolist()), None if math.isnan(gauss) else gauss),
        gpus,
    )


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
