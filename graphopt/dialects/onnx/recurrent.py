"""LSTM, GRU and RNN in the form that the ops have, and without first states of zeros.

Exporters leave out results, put the batch first (layout=1, which ONNX Runtime does not run), and write a first state
out as zeros of a computed shape, which hides that it is one.
"""

from __future__ import annotations

import torch

from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode
from graphopt.dialects.onnx.quantized import CONTRIB
from graphopt.dialects.onnx.spellings import RECURRENT, STANDARD, recurrence
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import OPS

_MOVES = ("slice", "reshape", "transpose", "squeeze", "unsqueeze", "identity", "onnx.Expand", "onnx.Slice")
"""Operations that give zeros of zeros."""


def raise_recurrent(graph: OnnxGraph) -> None:
    """Emit each recurrent operator that leaves out results, or puts the batch first, as the op that it means; and an
    LSTM on integers, as quantize leaves one."""
    for native in list(graph.model.graph):
        if native.op_type == "DynamicQuantizeLSTM" and native.domain == CONTRIB:
            _raise_dynamic(graph, OnnxNode(graph, native))
        if native.op_type not in RECURRENT or native.domain not in STANDARD:
            continue
        op, attributes = RECURRENT[native.op_type], recurrence(native)
        node, layout = OnnxNode(graph, native), native.attributes.get("layout")
        batch_first = layout is not None and bool(layout.as_int())
        complete = len(native.outputs) == len(OPS[op].results) and all(output.name for output in native.outputs)
        if attributes is None or (complete and not batch_first):
            continue
        x, *others = graph.values(native.inputs)
        given: list[Value | None] = [x, *others]
        if batch_first:
            given = [value if value is None or place not in _TRANSPOSED else _swapped(graph, value, node)
                     for place, value in enumerate(given)]  # fmt: skip
        y, *last = graph.emit_all(op, *given, at=node, **attributes)
        if batch_first:  # (length, directions, batch, hidden) -> (batch, length, directions, hidden)
            y = graph.emit("transpose", y, perm=(2, 0, 1, 3), at=node)
            last = [_swapped(graph, value, node) for value in last]
        graph.replace(node, y, *last)


def _raise_dynamic(graph: OnnxGraph, node: OnnxNode) -> None:
    """ONNX Runtime's LSTM on int8 weights: left as it is where directions have scales of their own."""
    x, *given = graph.values(node.native.inputs)
    given += [None] * (11 - len(given))
    attributes = recurrence(node.native)
    dequantized = [_stored_weight(graph, node, *given[place : place + 1], *given[scale : scale + 2])
                   for place, scale in ((0, 7), (1, 9))]  # fmt: skip
    if attributes is None or None in dequantized or x is None:
        return
    scale, zero_point = graph.emit_all("choose_qparams", x, at=node)
    integers = graph.emit("quantize", x, scale, zero_point, at=node)
    x = graph.emit("dequantize", integers, scale, zero_point, at=node)
    graph.replace(node, *graph.emit_all("lstm", x, *dequantized, *given[2:7], at=node, **attributes))


def _stored_weight(
    graph: OnnxGraph, node: OnnxNode, value: Value | None, scale: Value | None, zero_point: Value | None
) -> Value | None:
    """A weight of the operator, (directions, in, rows), as the op reads it: dequantized with a scale for each row."""
    integers, scales, zeros = (None if one is None else graph.constant(one) for one in (value, scale, zero_point))
    if integers is None or scales is None or zeros is None or integers.dtype is not torch.int8 or bool(zeros.any()):
        return None
    by_row = scales.reshape(len(scales), -1).expand(-1, integers.shape[2])
    if not bool((by_row == by_row[0]).all()):
        return None
    stored = graph.add_constant(integers.mT.contiguous()), graph.add_constant(by_row[0].contiguous())
    return graph.emit("dequantize", *stored, at=node, axis=1)


_TRANSPOSED = (0, 5, 6)
"""The inputs that have the batch first with layout=1: x and the first states."""


def _swapped(graph: OnnxGraph, value: Value, at: Node) -> Value:
    return graph.emit("transpose", value, perm=(1, 0, 2), at=at)


def drop_zero_states(graph: OnnxGraph) -> None:
    """Leave out first states that are zeros, whatever computes their shape."""
    for node in graph.sites(*RECURRENT.values()):
        operands = list(node.operands)
        zeros = [place for place in (5, 6) if place < len(operands) and _is_zeros(graph, operands[place])]
        if zeros:
            operands = [None if place in zeros else value for place, value in enumerate(operands)]
            graph.replace(node, *graph.emit_all(node, *operands, at=node))


def _is_zeros(graph: OnnxGraph, value: Value | None) -> bool:
    while value is not None:
        tensor = graph.constant(value)
        if tensor is not None:
            return not bool(tensor.any())
        maker = value.producer
        if maker is None:
            return False
        if maker.kind == "onnx.ConstantOfShape":
            given = maker.attributes.get("value")  # zero where it is left out
            return given is None or not given.numpy().any()
        if maker.kind == "concat":
            return all(_is_zeros(graph, part) for part in maker.operands)
        value = maker.operands[0] if maker.kind in _MOVES else None
    return False
