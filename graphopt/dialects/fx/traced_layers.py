"""aten's recurrent layers as operators whose length a trace leaves open.

torch traces lstm, gru and rnn as loops over the length of the example, which fixes it. While `whole_layers` is on, a
call of one is a call of `graphopt_layers::<name>`, of the same arguments, which knows the shapes of its results without
a loop. `recurrent` makes ops of both. Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")

DOMAIN = "graphopt_layers"


def count_of_states(name: str) -> int:
    """How many states a layer keeps from step to step: hidden and cell, or hidden alone."""
    return 2 if name == "lstm" else 1


class _WholeLayers(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        whole = _WHOLE.get(func)
        if whole is not None and len(args) == _ARGUMENTS and not kwargs and _is_plain(args):
            name, operator = whole
            return operator(args[0], list(args[1]) if count_of_states(name) == 2 else args[1], list(args[2]), *args[3:])
        return func(*args, **(kwargs or {}))


_ARGUMENTS = 9
"""Of a call with a tensor; one with a packed sequence has as many, and a list in place of `has_biases`."""


def whole_layers() -> TorchFunctionMode:
    """While it is on, torch.lstm, gru, rnn_tanh and rnn_relu are one operator each, whatever the length."""
    return _WholeLayers()


def _is_plain(arguments: Sequence[Any]) -> bool:
    """Whether a layer is given no packed sequence, does not train, and has no projections."""
    _, _, params, has_biases, num_layers, _, train, bidirectional, _ = arguments
    if not isinstance(has_biases, bool) or train:
        return False
    expected: int = num_layers * (1 + bidirectional) * (4 if has_biases else 2)
    return len(params) == expected


def _shapes(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def results(
        x: Tensor, hx: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        several, hidden = 1 + bidirectional, params[1].shape[1]
        last = (num_layers * several, x.shape[1 - batch_first], hidden)
        y = x.new_empty(*x.shape[:2], several * hidden)
        return y, *(x.new_empty(last) for _ in range(count_of_states(name)))

    return results


def _register(name: str) -> Any:
    states = "Tensor[]" if count_of_states(name) == 2 else "Tensor"
    results = ", ".join(["Tensor"] * (1 + count_of_states(name)))
    torch.library.define(
        f"{DOMAIN}::{name}",
        f"(Tensor input, {states} hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
        f"bool bidirectional, bool batch_first) -> ({results})",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.impl(f"{DOMAIN}::{name}", "CompositeExplicitAutograd", getattr(torch.ops.aten, name).input)
    torch.library.register_fake(f"{DOMAIN}::{name}", _shapes(name))
    return getattr(getattr(torch.ops, DOMAIN), name).default


_WHOLE = {getattr(torch, name): (name, _register(name)) for name in NAMES}
