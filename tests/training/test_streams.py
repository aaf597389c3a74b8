"""The states of the generators: as tensors and back, they draw on as if nothing had happened."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.training import streams


def _drawn(count: int) -> list[float]:
    found = [float(one) for one in torch.randn(count)]
    found += [float(np.random.standard_normal()) for _ in range(count)]
    return found + [random.gauss(0, 1) for _ in range(count)]


@given(seed=st.integers(0, 2**32 - 1), drawn=st.integers(0, 5))
def test_a_state_is_its_tensors(seed: int, drawn: int) -> None:
    """An odd number of draws leaves half of a pair of normal numbers in the states."""
    with streams.restored():
        streams.seed_all(seed)
        _drawn(drawn)
        tensors = streams.as_tensors(streams.get_state())
        expected = _drawn(3)
        streams.seed_all(seed + 1)
        streams.set_state(streams.from_tensors(tensors))
        assert _drawn(3) == expected
