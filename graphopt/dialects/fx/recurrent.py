"""aten.lstm, gru, rnn_tanh and rnn_relu -> lstm, gru and rnn: one op for each of their layers.

aten takes a list of weights, one for each layer, direction and product; an op has one tensor for both directions. What
that was packed from is kept (`Native.packed`), so that what it learns can be handed back to the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.native import Packed
from graphopt.dialects.fx.traced_layers import DOMAIN, NAMES, count_of_states
from graphopt.dialects.fx.views import FxNode, FxValue, raw_of
from graphopt.ir.graph import Value
from graphopt.ir.ops.recurrent import TORCH_GATES

_OPS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType({
    "lstm": ("lstm", {"gates": TORCH_GATES["lstm"]}),
    "gru": ("gru", {"gates": TORCH_GATES["gru"]}),
    "rnn_tanh": ("rnn", {}),
    "rnn_relu": ("rnn", {"activation": "relu"}),
})  # fmt: skip
"""By operator, the op and its attributes."""

_KINDS = {f"aten.{name}.input": name for name in NAMES} | {f"{DOMAIN}.{name}.default": name for name in NAMES}

_ZEROS = ("aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default")


def raise_recurrent(graph: FxGraph) -> None:
    """Put ops in the place of aten's recurrent layers, but for those with projections, or with computed weights."""
    packed: dict[tuple[Value, ...], FxValue] = {}
    for node in graph.sites(*_KINDS):
        if isinstance(node, FxNode) and (layers := _parameters(node)) is not None:
            _raise_layers(graph, node, layers, packed)


_Layer = Sequence[Sequence[FxValue]]
"""By direction, the weights of the product with the input and of that with the state, and their biases, if any."""


def _parameters(node: FxNode) -> Sequence[_Layer] | None:
    """The parameters of each layer; None where they are no stored tensors, or not those of a layer without
    projections."""
    given, a = node.operands[1 + count_of_states(_KINDS[node.kind]) :], node.attributes
    several, each = 2 if a["bidirectional"] else 1, 4 if a["has_biases"] else 2
    values = [value for value in given if isinstance(value, FxValue) and value.is_constant]
    if a["train"] or len(values) != len(given) or len(values) != a["num_layers"] * several * each:
        return None
    directions = [values[start : start + each] for start in range(0, len(values), each)]
    return [directions[start : start + several] for start in range(0, len(directions), several)]


def _raise_layers(
    graph: FxGraph, node: FxNode, layers: Sequence[_Layer], packed: dict[tuple[Value, ...], FxValue]
) -> None:
    name, a = _KINDS[node.kind], node.attributes
    (kind, own), (x, *states) = _OPS[name], node.operands[: 1 + count_of_states(name)]
    assert x is not None
    several, finals = len(layers[0]), list[tuple[Value, ...]]()
    if a["batch_first"]:
        x = graph.emit("transpose", x, perm=(1, 0, 2), at=node)
    for number, layer in enumerate(layers):
        parameters = [_packed(graph, values, packed) for values in _operands(layer)]
        first = [_part(graph, node, state, number * several, several, len(layers)) for state in states]
        operands = [*parameters, *[None] * (3 - len(parameters)), None, *first]
        direction = "bidirectional" if several == 2 else "forward"
        y, *last = graph.emit_all(kind, x, *operands, at=node, direction=direction, **own)
        finals.append(tuple(last))
        if several == 1:
            x = graph.emit("squeeze", y, axes=(1,), at=node)
        else:  # (length, directions, batch, hidden) -> (length, batch, directions · hidden)
            x = graph.emit("transpose", y, perm=(0, 2, 1, 3), at=node)
            x = graph.emit("aten.flatten.using_ints", x, start_dim=2, at=node)
    if a["batch_first"]:
        x = graph.emit("transpose", x, perm=(1, 0, 2), at=node)
    joined = [parts[0] if len(parts) == 1 else graph.emit("concat", *parts, axis=0, at=node)
              for parts in zip(*finals, strict=True)]  # fmt: skip
    graph.replace(node, x, *joined)


def _operands(layer: _Layer) -> list[list[list[FxValue]]]:
    """By operand (weight, recurrent, bias) and by direction, the tensors that are joined along its rows."""
    weights = [[[each[0]] for each in layer], [[each[1]] for each in layer]]
    return weights if len(layer[0]) == 2 else [*weights, [list(each[2:]) for each in layer]]


def _packed(
    graph: FxGraph, parts: Sequence[Sequence[FxValue]], packed: dict[tuple[Value, ...], FxValue]
) -> FxValue:
    """One constant for the tensors of both directions; the same for all who read these."""
    key = tuple(value for several in parts for value in several)
    if key not in packed:
        tensors = [torch.cat([_tensor(graph, value) for value in several]) for several in parts]
        packed[key] = graph.add_constant(torch.stack(tensors), key[0].name)
        names = tuple(tuple(_stored_name(value) for value in several) for several in parts)
        graph.native.packed[_stored_name(packed[key])] = Packed(names)
    return packed[key]


def _tensor(graph: FxGraph, value: Value) -> torch.Tensor:
    tensor = graph.constant(value)
    assert tensor is not None  # `_parameters` looks
    return tensor


def _stored_name(value: Value) -> str:
    native = raw_of(value)
    assert isinstance(native, fx.Node)  # a stored tensor
    return str(native.target)


def _part(graph: FxGraph, node: FxNode, state: Value | None, start: int, count: int, layers: int) -> Value | None:
    """The first state of a layer; None where it is zeros."""
    maker = None if state is None else state.producer
    if state is None or (maker is not None and maker.kind in _ZEROS):
        return None
    return state if layers == 1 else graph.emit("slice", state, axis=0, start=start, end=start + count, at=node)
