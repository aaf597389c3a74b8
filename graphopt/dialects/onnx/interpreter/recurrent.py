"""Recurrent operators of ONNX as torch's, whose gates are in another order: their stored weights are put in it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.dialects.onnx.interpreter.call import Call, Form

Gates = Sequence[int]
"""By gate of torch, its place among ONNX's."""


def _derive(gates: Gates) -> Callable[[Sequence[Tensor | None], Mapping[str, Any]], dict[str, Tensor]]:
    """Parameters by the names that nn.LSTM and the like have, of weights W, R and B (dirs, gates · hidden, ...)."""

    def derive(stored: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> dict[str, Tensor]:
        weights, recurrent, bias = (*stored, None, None, None)[1:4]
        if weights is None or recurrent is None:
            return {}
        made = {}
        for direction in range(len(weights)):
            suffix = "_l0" + ("_reverse" if direction else "")
            made[f"weight_ih{suffix}"] = _in_order(weights[direction], gates)
            made[f"weight_hh{suffix}"] = _in_order(recurrent[direction], gates)
            if bias is not None:
                halves = bias[direction].chunk(2)
                made |= {f"bias_{to}h{suffix}": _in_order(half, gates) for to, half in zip("ih", halves, strict=True)}
        return made

    return derive


def _in_order(tensor: Tensor, gates: Gates) -> Tensor:
    parts = tensor.chunk(len(gates))
    return torch.cat([parts[gate] for gate in gates])


def _form(function: Callable[..., tuple[Tensor, ...]], gates: Gates, activations: Sequence[str], **only: Any) -> Form:
    """function: torch's, which takes what torch.lstm takes."""
    derive = _derive(gates)

    def apply(call: Call) -> tuple[Tensor, ...]:
        x, direction = call[0], call.attribute("direction", "forward")
        parameters = call.derived or derive([call.optional(index) for index in range(len(call.given))], {})
        if len(call.given) > 4 and call.given[4] is not None:
            raise call.refused("torch has no lengths of sequences in it")
        if only.get("linear_before_reset") and not call.attribute("linear_before_reset", 0):
            raise call.refused("torch resets after the product (linear_before_reset=1)")
        hidden, directions = call.attributes["hidden_size"], 2 if direction == "bidirectional" else 1
        x = x.flip(0) if direction == "reverse" else x
        states = [call.optional(index) for index in ((5, 6) if function is torch.lstm else (5,))]
        begin = [x.new_zeros(directions, x.shape[1], hidden) if state is None else state for state in states]
        first = tuple(begin) if len(begin) > 1 else begin[0]
        has_bias = "bias_ih_l0" in parameters
        y, *last = function(x, first, list(parameters.values()), has_bias, 1, 0.0, False, directions == 2, False)
        y = y.flip(0) if direction == "reverse" else y
        return (y.reshape(*y.shape[:2], directions, hidden).transpose(1, 2), *last)

    several = tuple(activations), tuple(activations) * 2
    holds = {"activations": several, "layout": (0,), "clip": (), "input_forget": (0,), **only}
    return Form(apply, only=holds, derive=derive)


FORMS: dict[str, Form] = {
    "onnx.GRU": _form(torch.gru, (1, 0, 2), ("Sigmoid", "Tanh"), linear_before_reset=(1,)),
    "onnx.LSTM": _form(torch.lstm, (0, 2, 3, 1), ("Sigmoid", "Tanh", "Tanh")),
    "onnx.RNN": _form(torch.rnn_tanh, (0,), ("Tanh",)),
}
