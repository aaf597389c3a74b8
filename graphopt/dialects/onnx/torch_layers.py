"""aten's recurrent layers -> LSTM, GRU and RNN, in place of the translations that torch's exporter has.

The exporter writes shapes out that then nobody knows, and unrolls an RNN over a fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.dialects.fx.traced_layers import DOMAIN, NAMES
from graphopt.dialects.onnx.graph import OPSET
from graphopt.dialects.onnx.spellings import RECURRENT
from graphopt.errors import GraphError
from graphopt.ir.ops import OPS
from graphopt.ir.ops.recurrent import TORCH_GATES


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of these operators, for torch.onnx.export."""
    layers = getattr(torch.ops, DOMAIN)
    return {
        operator: _translation(*_OPERATORS[name])
        for name in NAMES for operator in (getattr(torch.ops.aten, name).input, getattr(layers, name).default)
    }  # fmt: skip


_OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
}


def _translation(op_type: str, own: dict[str, Any]) -> Callable[..., Any]:
    from onnxscript.values import Opset  # takes half a second

    op = Opset("", OPSET)
    def translate(
        x: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        several, each = 2 if bidirectional else 1, 4 if has_biases else 2
        if len(params) != num_layers * several * each:
            raise GraphError(
                f"{op_type} with projections (proj_size) has no operator in ONNX: use a target of PyTorch, such as "
                "fbgemm"
            )
        attributes = {"direction": "bidirectional" if bidirectional else "forward", **own}
        attributes |= {"activations": own["activations"] * several} if "activations" in own else {}
        states = list(hx) if op_type == "LSTM" else [hx]
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        finals = []
        for layer in range(num_layers):
            first = layer * several
            of = [params[start * each : (start + 1) * each] for start in range(first, first + several)]
            weights = [_joined(op, op_type, [[one[place]] for one in of]) for place in (0, 1)]
            bias = _joined(op, op_type, [one[2:] for one in of]) if has_biases else None
            begin = [_part(op, state, first, several) if num_layers > 1 else state for state in states]
            hidden = int(of[0][1].shape[1])
            y, *last = getattr(op, op_type)(x, *weights, bias, None, *begin, hidden_size=hidden, **attributes)
            finals.append(last)
            if several == 1:
                x = op.Squeeze(y, op.Constant(value_ints=[1]))
            else:
                x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, 2 * hidden]))
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        joined = [parts[0] if num_layers == 1 else op.Concat(*parts, axis=0) for parts in zip(*finals, strict=True)]
        return x, *joined

    return translate


def _joined(op: Any, op_type: str, tensors: Sequence[Sequence[Any]]) -> Any:
    """The tensors of each direction, their gates in ONNX's order, one after the other; the directions stacked."""
    kind = RECURRENT[op_type]
    wanted = OPS[kind].attributes.get("gates", TORCH_GATES[kind])
    order = [TORCH_GATES[kind].index(gate) for gate in wanted]
    directions = []
    for several in tensors:
        rows = [_in_order(op, one, order) for one in several]
        whole = rows[0] if len(rows) == 1 else op.Concat(*rows, axis=0)
        directions.append(op.Unsqueeze(whole, op.Constant(value_ints=[0])))
    return directions[0] if len(directions) == 1 else op.Concat(*directions, axis=0)


def _in_order(op: Any, tensor: Any, order: Sequence[int]) -> Any:
    if len(order) == 1:
        return tensor
    rows = int(tensor.shape[0]) // len(order)
    places = [rows * place + row for place in order for row in range(rows)]
    return op.Gather(tensor, op.Constant(value_ints=places), axis=0)


def _part(op: Any, state: Any, start: int, count: int) -> Any:
    bounds = (op.Constant(value_ints=[number]) for number in (start, start + count, 0))
    return op.Slice(state, *bounds)
