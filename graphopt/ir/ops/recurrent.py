"""Recurrent layers: LSTM, GRU and RNN, of one layer in one or two directions, with the axes of ONNX's operators.

The weights of both directions and of all gates are one tensor each. A gate is a block of rows, called by ONNX's letter:
input, output, forget and cell; update z, reset and hidden. torch stores gates in another order; `gates` tells the
order, so that no weight is copied to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from graphopt.ir.axes import NodeAxes, Unclear
from graphopt.ir.ops.declaration import op

RECURRENT = ("lstm", "gru", "rnn")
"""The ops of this family."""

DIRECTIONS = ("forward", "reverse", "bidirectional")

TORCH_GATES = {"lstm": "ifco", "gru": "rzh", "rnn": "h"}
"""By op, the order of gates in torch's weights."""


def _flops(x: Sequence[int], weight: Sequence[int], recurrent: Sequence[int]) -> int:
    """Two products in each step of each sequence: with the input, and with the hidden state."""
    return 2 * prod(x[:2]) * (prod(weight) + prod(recurrent))


def _axes(node: NodeAxes) -> None:
    """A hidden unit goes whole: its rows in all gates of both directions, and the columns that read it one step on."""
    x, weight, recurrent, bias, lengths, *states = (*node.operands, *[None] * 8)[:8]
    assert x is not None and weight is not None and recurrent is not None  # none of them is optional
    y, *last = node.results
    hidden = node.positions(recurrent, 2)
    if hidden is None:
        raise Unclear("axis_of_unknown_size")
    *initial, peepholes = states if node.kind == "lstm" else (*states[:1], None)
    for rows in (value for value in (weight, recurrent, bias, peepholes) if value is not None):
        found = node.positions(rows, 1)
        if found is None:
            raise Unclear("axis_of_unknown_size")
        node.link(*np.broadcast_arrays(hidden, found.reshape(-1, len(hidden))))
        node.lock(rows, 0, "axis_of_directions")
    node.same(x, 2, weight, 2)
    node.same(x, 0, y, 0)
    node.lock(y, 1, "axis_of_directions")
    node.same(x, 1, y, 2)
    node.same(y, 3, recurrent, 2)
    for state in (*(value for value in initial if value is not None), *last):
        node.lock(state, 0, "axis_of_directions")
        node.same(x, 1, state, 1)
        node.same(state, 2, recurrent, 2)
    if lengths is not None:
        node.same(x, 1, lengths, 0)
    node.has_weight(weight, 1, 2)
    node.has_weight(recurrent, 1, 2)


@op(flops=_flops, axes=_axes, results=("y", "y_h", "y_c"))
def lstm(
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    direction: str = "forward",
    gates: str = "iofc",
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer (Hochreiter & Schmidhuber, 1997, with forget gates): its hidden states, and the last hidden and cell
    state.

    x (length, batch, in), weight (directions, 4 · hidden, in), recurrent (directions, 4 · hidden, hidden), bias
    (directions, 8 · hidden): that of the product with x, then that of the product with the state. lengths (batch,): of
    the sequences, after which y is 0. h, c (directions, batch, hidden): zeros where they are left out. peepholes
    (directions, 3 · hidden): of the input, output and forget gate. y (length, directions, batch, hidden). direction:
    forward, reverse or bidirectional.
    """
    layer = _Layer.of("lstm", x, weight, recurrent, bias, direction, gates)
    states = layer.states(h, c)
    if lengths is None and peepholes is None:
        y, h, c = layer.whole(torch.lstm, states)
        return y, h, c

    def step(place: int, given: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
        w, r, b, b_state = layer.weights[place]
        i, f, g, o = (given @ w.T + b + state[0] @ r.T + b_state).chunk(4, -1)
        p, q, s = peepholes[place].chunk(3) if peepholes is not None else [torch.zeros_like(state[1])] * 3
        cell = torch.sigmoid(f + s * state[1]) * state[1] + torch.sigmoid(i + p * state[1]) * torch.tanh(g)
        return torch.sigmoid(o + q * cell) * torch.tanh(cell), cell

    y, h, c = layer.by_steps(step, states, lengths)
    return y, h, c


@op(flops=_flops, axes=_axes, results=("y", "y_h"))
def gru(
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    direction: str = "forward",
    gates: str = "zrh",
    reset_after: bool = True,
) -> tuple[Tensor, Tensor]:
    """One layer (Cho et al., 2014): its hidden states, and the last one; shapes as of `lstm`, with 3 gates.

    reset_after: the reset gate scales the product with the state, as in torch; else the state before the product.
    """
    layer = _Layer.of("gru", x, weight, recurrent, bias, direction, gates)
    states = layer.states(h)
    if lengths is None and reset_after:
        y, h = layer.whole(torch.gru, states)
        return y, h

    def step(place: int, given: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
        (w, r, b, b_state), (old,) = layer.weights[place], state
        x_r, x_z, x_n = (given @ w.T + b).chunk(3, -1)
        h_r, h_z, h_n = (old @ r.T + b_state).chunk(3, -1)
        reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        h_n = reset * h_n if reset_after else (reset * old) @ r.chunk(3)[2].T + b_state.chunk(3)[2]
        return ((1 - update) * torch.tanh(x_n + h_n) + update * old,)

    y, h = layer.by_steps(step, states, lengths)
    return y, h


@op(flops=_flops, axes=_axes, results=("y", "y_h"))
def rnn(
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    direction: str = "forward",
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """One layer (Elman, 1990): its hidden states, and the last one; shapes as of `lstm`, with one gate.

    activation: tanh or relu.
    """
    layer = _Layer.of("rnn", x, weight, recurrent, bias, direction, TORCH_GATES["rnn"])
    states = layer.states(h)
    if lengths is None:
        y, h = layer.whole(torch.rnn_relu if activation == "relu" else torch.rnn_tanh, states)
        return y, h

    def step(place: int, given: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
        w, r, b, b_state = layer.weights[place]
        total = given @ w.T + b + state[0] @ r.T + b_state
        return (total.relu() if activation == "relu" else total.tanh(),)

    y, h = layer.by_steps(step, states, lengths)
    return y, h


# --- references ------------------------------------------------------------------------------------------------------

Step = Callable[[int, Tensor, Sequence[Tensor]], Sequence[Tensor]]
"""(the direction's place, one step of x (batch, in), the state before it) -> the state after it, the hidden one
first."""


@dataclass(frozen=True)
class _Layer:
    """What the references share: the input, and the parameters in torch's order of gates."""

    x: Tensor
    weights: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
    """By direction: of the product with x, of that with the state, and the bias of each."""
    direction: str

    @classmethod
    def of(
        cls, op: str, x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None, direction: str, gates: str
    ) -> _Layer:
        order = [gates.index(gate) for gate in TORCH_GATES[op]]
        if bias is None:
            bias = weight.new_zeros(weight.shape[0], 2 * weight.shape[1])
        halves = zip(weight, recurrent, *bias.chunk(2, 1), strict=True)
        weights = [tuple(reordered(tensor, order) for tensor in several) for several in halves]
        return cls(x, weights, direction)  # type: ignore[arg-type]  # four each

    def states(self, *given: Tensor | None) -> list[Tensor]:
        """The states before the first step (directions, batch, hidden)."""
        zeros = self.x.new_zeros(len(self.weights), self.x.shape[1], self.weights[0][1].shape[1])
        return [zeros if state is None else state for state in given]

    def whole(self, function: Callable[..., tuple[Tensor, ...]], states: Sequence[Tensor]) -> list[Tensor]:
        """y, and the last states, by torch's own function for all steps."""
        x, several = self.x, len(self.weights)
        reverse = self.direction == "reverse"
        parameters = [tensor for each in self.weights for tensor in each]
        first = tuple(states) if len(states) > 1 else states[0]
        y, *last = function(
            x.flip(0) if reverse else x, first, parameters, True, 1, 0.0, False, several == 2, False
        )  # fmt: skip
        y = y.flip(0) if reverse else y
        return [y.reshape(*y.shape[:2], several, y.shape[2] // several).transpose(1, 2), *last]

    def by_steps(self, step: Step, states: Sequence[Tensor], lengths: Tensor | None) -> list[Tensor]:
        """y, and the last states, one step after the other."""
        outputs, finals = [], []
        for place in range(len(self.weights)):
            state: list[Tensor] = [one[place] for one in states]
            backwards = self.direction == "reverse" or place == 1
            found: dict[int, Tensor] = {}
            for time in sorted(range(len(self.x)), reverse=backwards):
                after = step(place, self.x[time], state)
                inside = torch.ones_like(after[0][:, :1], dtype=torch.bool)
                if lengths is not None:
                    inside = (time < lengths).unsqueeze(1)
                state = [torch.where(inside, new, old) for new, old in zip(after, state, strict=True)]
                found[time] = torch.where(inside, after[0], 0.0)
            outputs.append(torch.stack([found[time] for time in sorted(found)]))
            finals.append(state)
        return [torch.stack(outputs, 1), *(torch.stack(several) for several in zip(*finals, strict=True))]


def reordered(rows: Tensor, order: Sequence[int], axis: int = 0) -> Tensor:
    """A tensor with its gates, blocks along an axis, in another order: itself where that is the same one."""
    if list(order) == sorted(order):
        return rows
    blocks = rows.chunk(len(order), axis)
    return torch.cat([blocks[place] for place in order], axis)
