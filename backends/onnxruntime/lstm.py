"""Int8 LSTMs on onnxruntime: one kernel that quantizes the input and, step by step, the hidden state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt.backends.onnxruntime.weight_only import is_stored
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder


def _dynamic(
    op: Recorder, x: str, scale: str, zero_point: str, w: str, w_scale: str, r: str, r_scale: str,
    bias: str | None = None, lengths: str | None = None, h: str | None = None, c: str | None = None,
    peepholes: str | None = None,
) -> Pattern:  # fmt: skip
    integers = op.dequantize(op.quantize(x, scale, zero_point), scale, zero_point)
    weights = op.dequantize(w, w_scale, bind="weight"), op.dequantize(r, r_scale, bind="recurrent")
    return op.lstm(integers, *weights, bias, lengths, h, c, peepholes)


def _on_stored_weights(m: Match) -> bool:
    return m.scale.producer is not None and m.scale.producer.kind == "choose_qparams" and all(
        is_stored(node) and node.attributes["axis"] == 1 for node in (m.weight, m.recurrent)
    )


def _dynamic_quantize_lstm(op: Builder, m: Match) -> Mapping[Value, Value]:
    """The weights are transposed here, not at each run; those of both directions share the scales of their rows."""
    weights = [_kernel_weight(op, node) for node in (m.weight, m.recurrent)]
    states = [m.bias, m.lengths, m.h, m.c, m.peepholes]
    parameters = [value for _, scale, zero_point in weights for value in (scale, zero_point)]
    hidden = m.recurrent.result.shape[2]
    y = op(
        "com.microsoft.DynamicQuantizeLSTM", m.x, *(integers for integers, _, _ in weights), *states, *parameters,
        hidden_size=hidden, direction=m.root.attributes["direction"], _outputs=3,
    )  # fmt: skip
    assert y.producer is not None
    return dict(zip(m.root.results, y.producer.results, strict=True))


def _kernel_weight(op: Builder, node: Node) -> tuple[Value, Value, Value]:
    """A weight as the kernel reads it: int8 (directions, in, rows); scales and zero points (directions, rows)."""
    integers, scale = (op.graph.constant(node.required(name)) for name in ("x", "scale"))
    if integers is None or scale is None or integers.dtype is not torch.int8:
        raise Declined("weight_not_in_integers")
    by_row = scale.reshape(1, -1).expand(integers.shape[0], -1).contiguous()
    tensors: tuple[Tensor, ...] = (integers.mT.contiguous(), by_row, torch.zeros_like(by_row, dtype=torch.int8))
    first, second, third = (op.constant(tensor) for tensor in tensors)
    return first, second, third


def _floats(op: Builder, m: Match) -> Mapping[Value, Value]:
    """Floats, on weights that are stored in integers: for layers whose products are too small to pay."""
    operands = m.root.operands[1:]
    results = op.graph.emit_all(m.root, m.x, *operands, at=m.root)
    return dict(zip(m.root.results, results, strict=True))


def _gates(m: Match) -> list[Node]:
    return [m.scale.producer, *m.nodes]


DYNAMIC = Choice(
    "lstm-int8",
    _dynamic,
    {"DynamicQuantizeLSTM": _dynamic_quantize_lstm, "LSTM": _floats},
    check=_on_stored_weights,
    around=_gates,
    shared=True,
)
