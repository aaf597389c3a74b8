"""LSTM, GRU and RNN: the products with the input at once, and those with the state in a loop over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphopt.backends.tensorflow.call import Call
from graphopt.ir.ops.recurrent import TORCH_GATES

Step = Callable[[Any, Sequence[Any], int], Sequence[Any]]
"""(the product of one step's input (batch, gates · hidden), the states before it, the direction's place) -> the states
after it, the hidden one first."""

LENGTHS, FIRST_STATE = 4, 5
"""The operands that all three ops have there."""


def lstm(tf: Any, call: Call) -> Any:
    gates, peepholes = call.attributes["gates"], call.optional(7)
    products = _Products(tf, call, len(gates))

    def step(given: Any, state: Sequence[Any], place: int) -> Sequence[Any]:
        hidden, cell = state
        whole = given + tf.linalg.matmul(hidden, products.recurrent(place)) + products.state_bias(place)
        parts = dict(zip(gates, tf.split(whole, len(gates), -1), strict=True))
        if peepholes is not None:
            of_input, of_output, of_forget = tf.split(peepholes[place], 3)
            parts["i"] += of_input * cell
            parts["f"] += of_forget * cell
        cell = tf.sigmoid(parts["f"]) * cell + tf.sigmoid(parts["i"]) * tf.tanh(parts["c"])
        if peepholes is not None:
            parts["o"] += of_output * cell
        return tf.sigmoid(parts["o"]) * tf.tanh(cell), cell

    return _layer(tf, call, products, step, states=2)


def gru(tf: Any, call: Call) -> Any:
    gates, reset_after = call.attributes["gates"], call.attributes["reset_after"]
    products = _Products(tf, call, len(gates))

    def step(given: Any, state: Sequence[Any], place: int) -> Sequence[Any]:
        (hidden,) = state
        new, weight, bias = (
            dict(zip(gates, tf.split(one, len(gates), -1), strict=True))
            for one in (given, products.recurrent(place), products.state_bias(place))
        )
        reset, update = (
            tf.sigmoid(new[gate] + tf.linalg.matmul(hidden, weight[gate]) + bias[gate]) for gate in ("r", "z")
        )
        if reset_after:
            of_state = reset * (tf.linalg.matmul(hidden, weight["h"]) + bias["h"])
        else:
            of_state = tf.linalg.matmul(reset * hidden, weight["h"]) + bias["h"]
        return ((1 - update) * tf.tanh(new["h"] + of_state) + update * hidden,)

    return _layer(tf, call, products, step, states=1)


def rnn(tf: Any, call: Call) -> Any:
    activation = tf.nn.relu if call.attributes["activation"] == "relu" else tf.tanh
    products = _Products(tf, call, len(TORCH_GATES["rnn"]))

    def step(given: Any, state: Sequence[Any], place: int) -> Sequence[Any]:
        of_state = tf.linalg.matmul(state[0], products.recurrent(place)) + products.state_bias(place)
        return (activation(given + of_state),)

    return _layer(tf, call, products, step, states=1)


class _Products:
    """The weights by direction, stored (in, gates · hidden), and the two halves of the bias."""

    def __init__(self, tf: Any, call: Call, gates: int) -> None:
        self.tf, self._weight, self._recurrent = tf, call.permuted(1, (0, 2, 1)), call.permuted(2, (0, 2, 1))
        self._bias = call.optional(3)
        self.hidden, self.directions = self._recurrent.shape[1], self._recurrent.shape[0]
        self._size = gates * self.hidden

    def of_inputs(self, x: Any, place: int) -> Any:
        """x (length, batch, in) -> (length, batch, gates · hidden)."""
        y = self.tf.tensordot(x, self._weight[place], 1)
        return y if self._bias is None else y + self._bias[place, : self._size]

    def recurrent(self, place: int) -> Any:
        return self._recurrent[place]

    def state_bias(self, place: int) -> Any:
        if self._bias is None:
            return self.tf.zeros([self._size], self._recurrent.dtype)
        return self._bias[place, self._size :]


def _layer(tf: Any, call: Call, products: _Products, step: Step, states: int) -> tuple[Any, ...]:
    """y (length, directions, batch, hidden), and the last states (directions, batch, hidden)."""
    x, lengths = call[0], call.optional(LENGTHS)
    zeros = tf.zeros([tf.shape(x)[1], products.hidden], x.dtype)
    outputs, finals = [], []
    for place in range(products.directions):
        given = (call.optional(FIRST_STATE + number) for number in range(states))
        first = [zeros if state is None else state[place] for state in given]
        backwards = call.attributes["direction"] == "reverse" or place == 1
        y, last = _loop(tf, products.of_inputs(x, place), first, lengths, step, place, backwards)
        outputs.append(y)
        finals.append(last)
    return tf.stack(outputs, 1), *(tf.stack(several) for several in zip(*finals, strict=True))


def _loop(
    tf: Any, given: Any, first: Sequence[Any], lengths: Any | None, step: Step, place: int, backwards: bool
) -> tuple[Any, Sequence[Any]]:
    """All hidden states (length, batch, hidden), and the last states. Behind a sequence's end they are 0 and stay."""
    steps = tf.shape(given)[0]
    read = tf.TensorArray(given.dtype, steps).unstack(given)
    written = tf.TensorArray(given.dtype, steps, element_shape=first[0].shape)

    def body(number: Any, state: Sequence[Any], written: Any) -> tuple[Any, Sequence[Any], Any]:
        time = steps - 1 - number if backwards else number
        after = step(read.read(time), state, place)
        y = after[0]
        if lengths is not None:
            inside = (time < tf.cast(lengths, time.dtype))[:, None]
            y = tf.where(inside, y, tf.zeros_like(y))
            after = [tf.where(inside, new, old) for new, old in zip(after, state, strict=True)]
        return number + 1, tuple(after), written.write(time, y)

    _, last, written = tf.while_loop(
        lambda number, state, written: number < steps, body, (0, tuple(first), written),
        shape_invariants=(tf.TensorShape([]), tuple(tf.TensorShape([None, one.shape[-1]]) for one in first), None),
    )  # fmt: skip
    return written.stack(), last
