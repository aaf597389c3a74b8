"""What lstm, gru and rnn mean: torch's own functions and a loop over the steps are one reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.ir.ops import OPS
from graphopt.ir.ops.recurrent import DIRECTIONS, TORCH_GATES, reordered

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def layer(
    op: str, direction: str, length: int, batch: int, width: int, hidden: int, seed: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x, the weights and the bias, and the first states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    directions, rows = 1 + (direction == "bidirectional"), GATES[op] * hidden
    weights = [normal(directions, rows, width), normal(directions, rows, hidden), normal(directions, 2 * rows)]
    states = [normal(directions, batch, hidden) for _ in range(2 if op == "lstm" else 1)]
    return normal(length, batch, width), weights, states


sizes = {name: st.integers(1, 4) for name in ("length", "batch", "width", "hidden")}


@pytest.mark.parametrize("op", GATES)
@settings(max_examples=25, deadline=None)
@given(direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 99), **sizes)
def test_a_loop_over_whole_sequences_is_what_torch_computes(op: str, direction: str, seed: int, **shape: int) -> None:
    x, weights, states = layer(op, direction, seed=seed, **shape)
    whole = OPS[op].reference(x, *weights, None, *states, direction=direction)
    lengths = torch.full((x.shape[1],), len(x))
    torch.testing.assert_close(OPS[op].reference(x, *weights, lengths, *states, direction=direction), whole)


@pytest.mark.parametrize("op", GATES)
@settings(max_examples=25, deadline=None)
@given(direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 99), cut=st.integers(1, 4), **sizes)
def test_what_is_behind_the_length_of_a_sequence_is_not_read(
    op: str, direction: str, seed: int, cut: int, **shape: int
) -> None:
    x, weights, states = layer(op, direction, seed=seed, **shape)
    cut = min(cut, len(x))
    lengths = torch.full((x.shape[1],), cut)
    y, *last = OPS[op].reference(x, *weights, lengths, *states, direction=direction)
    expected, *ends = OPS[op].reference(x[:cut], *weights, None, *states, direction=direction)
    torch.testing.assert_close([y[:cut], *last], [expected, *ends])
    assert not bool(y[cut:].any())


@pytest.mark.parametrize("op", ["lstm", "gru"])
@settings(max_examples=25, deadline=None)
@given(direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 99), **sizes)
def test_the_order_of_gates_is_only_how_weights_lie(op: str, direction: str, seed: int, **shape: int) -> None:
    x, weights, states = layer(op, direction, seed=seed, **shape)
    ours: Any = OPS[op].attributes["gates"]
    order = [ours.index(gate) for gate in TORCH_GATES[op]]
    halves = [reordered(half, order, axis=1) for half in weights[2].chunk(2, 1)]
    others = [*(reordered(weight, order, axis=1) for weight in weights[:2]), torch.cat(halves, 1)]
    torch.testing.assert_close(
        OPS[op].reference(x, *others, None, *states, direction=direction, gates=TORCH_GATES[op]),
        OPS[op].reference(x, *weights, None, *states, direction=direction),
    )
