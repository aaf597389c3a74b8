"""How ONNX spells each op: one reader and one writer per op.

An op that has no standard operator at the model's opset is a node of domain `graphopt` with a function body. So the
model is valid ONNX, and any engine runs it, at every point of a pipeline.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.dialects.onnx.tensors import FLOATS, NARROW, READABLE, TORCH_DTYPES, onnx_dtype
from graphopt.errors import GraphError, SpellingError
from graphopt.ir.graph import Value
from graphopt.ir.ops import OPS
from graphopt.ir.ops.recurrent import reordered

if TYPE_CHECKING:
    from graphopt.dialects.onnx.graph import OnnxGraph, OnnxValue

DOMAIN = "graphopt"
"""The domain of nodes whose meaning is a function body (`graphopt.dialects.onnx.functions`)."""
STANDARD = ("", "ai.onnx")
PRODUCT_KINDS = ("matmul", "onnx.Gemm")
"""The kinds of products that read a stored matrix through its Transposes."""

Read = tuple[str, tuple["OnnxValue | None", ...], dict[str, Any]]
"""A node as an op: its name, operands in the op's order, attributes."""


@dataclass(frozen=True)
class Spelled:
    """A node that is to be made: its operator, inputs and attributes, and its number of results."""

    op_type: str
    inputs: Sequence[OnnxValue | None]
    attributes: Mapping[str, Any]
    domain: str = ""
    outputs: int = 1


# --- operators that are canonical ops as they stand ------------------------------------------------------------------

_PLAIN = {
    "MatMul": "matmul", "Add": "add", "Mul": "mul", "Sub": "sub", "Div": "div", "Pow": "pow", "Sqrt": "sqrt",
    "Reciprocal": "reciprocal", "Exp": "exp", "Erf": "erf", "Tanh": "tanh", "Sigmoid": "sigmoid", "IsNaN": "isnan",
    "Relu": "relu", "HardSwish": "hard_swish", "Where": "where", "Identity": "identity",
}  # fmt: skip
_PLAIN_OPS = {kind: op_type for op_type, kind in _PLAIN.items()}


RECURRENT = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}

KEPT = ("GlobalAveragePool",)
"""Operators that stay when a node is emitted again, as they have kernels of their own (an integer one of a mean)."""

_SEVERAL_RESULTS = (
    "choose_qparams", "Dropout", "LayerNormalization", "BatchNormalization", *RECURRENT, *RECURRENT.values(),
)  # fmt: skip
"""Operators that may have further results; their readers check that nobody uses those."""


# --- reading -------------------------------------------------------------------------------------------------------


def read(graph: OnnxGraph, node: ir.Node) -> Read | None:
    """The node as an op, or None where it is opaque."""
    if len(node.outputs) > 1 and node.op_type not in _SEVERAL_RESULTS:
        return None
    if node.domain == DOMAIN:
        return _read_function(graph, node)
    if node.domain not in STANDARD:
        return None
    operands = graph.values(node.inputs)
    if node.op_type in _PLAIN:  # before opset 7, Add and the like had attributes that changed their meaning
        return None if node.attributes else (_PLAIN[node.op_type], operands, {})
    reader = _READERS.get(node.op_type)
    return reader(graph, node, operands) if reader is not None else None


def _read_function(graph: OnnxGraph, node: ir.Node) -> Read | None:
    name, _, variant = node.op_type.partition("__")
    if name not in OPS:
        return None
    operands = list(graph.values(node.inputs))
    if "kn" in variant.split("_"):
        index = OPS[name].operands.index("weight")
        weight = operands[index]
        operands[index] = weight.transpose() if weight is not None else None
    own = {key: value for key, value in _function_attributes(node).items() if key in OPS[name].attributes}
    return name, tuple(operands), dict(OPS[name].attributes) | own


def _function_attributes(node: ir.Node) -> dict[str, Any]:
    return {_FROM_CONV.get(name, name): _plain(attribute) for name, attribute in node.attributes.items()}


def _plain(attribute: Any) -> Any:
    value = attribute.value
    if attribute.type is ir.AttributeType.FLOAT:
        return _shortest(value)
    return tuple(value) if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS) else value


_FROM_CONV = {"strides": "stride", "pads": "padding", "dilations": "dilation", "group": "groups", "block_size": "block"}


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return _shortest(attribute.as_float()) if attribute is not None else default


def _shortest(number: float) -> float:
    """The shortest decimal that is this number in the 32 bits that ONNX has: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(number)))


def _integers(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else ()


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def _texts(node: ir.Node, name: str) -> list[str]:
    attribute = node.attributes.get(name)
    return list(attribute.as_strings()) if attribute is not None else []


def _read_conv(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    attributes = spatial(node, operands[1]) if operands[1] is not None else None
    return None if attributes is None else ("conv", operands, attributes)


def spatial(node: ir.Node, weight: OnnxValue) -> dict[str, Any] | None:
    """The attributes of a conv; None where padding depends on the input's size, or torch has no conv of the rank."""
    shape = weight.shape
    if shape is None or len(shape) not in (3, 4, 5) or _text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    rank = len(shape) - 2
    return {
        "stride": _integers(node, "strides") or (1,) * rank,
        "padding": _integers(node, "pads") or (0,) * (2 * rank),
        "dilation": _integers(node, "dilations") or (1,) * rank,
        "groups": _integer(node, "group", 1),
    }


def _read_conv_transpose(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    attributes = spatial(node, operands[1]) if operands[1] is not None else None
    if attributes is None or "output_shape" in node.attributes:  # the padding then depends on the input's size
        return None
    more = _integers(node, "output_padding") or (0,) * len(attributes["stride"])
    return "conv_transpose", operands, attributes | {"output_padding": more}


def _read_recurrent(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    attributes = None if _integer(node, "layout", 0) else recurrence(node)  # `recurrent` puts the batch second
    return None if attributes is None else (RECURRENT[node.op_type], operands, attributes)


def recurrence(node: ir.Node) -> dict[str, Any] | None:
    """The attributes of an LSTM, GRU or RNN; None where its gates are others than the op's, or are clipped."""
    op_type = node.op_type.removeprefix("DynamicQuantize")
    activations = [name.lower() for name in _texts(node, "activations")]
    direction = _text(node, "direction", "forward")
    each, rest = len(_ACTIVATIONS[op_type]), 2 if direction == "bidirectional" else 1
    first = activations[:each] or list(_ACTIVATIONS[op_type])
    if {"clip", "activation_alpha", "activation_beta"} & set(node.attributes) or _integer(node, "input_forget", 0):
        return None
    if activations not in ([], first * rest):
        return None
    if op_type == "RNN":
        return {"direction": direction, "activation": first[0]} if first[0] in ("tanh", "relu") else None
    if first != list(_ACTIVATIONS[op_type]):
        return None
    own = {"reset_after": bool(_integer(node, "linear_before_reset", 0))} if op_type == "GRU" else {}
    return {"direction": direction, "gates": OPS[RECURRENT[op_type]].attributes["gates"]} | own


_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
"""Of one direction, where the node names none."""


def _read_max_pool(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    attributes = window(node, operands[0])
    if attributes is None:
        return None
    dilation = _integers(node, "dilations") or (1,) * len(attributes["kernel"])
    return "max_pool", operands, attributes | {"dilation": dilation}


def _read_average_pool(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    attributes = window(node, operands[0])
    if attributes is None or set(_integers(node, "dilations")) - {1}:
        return None
    return "average_pool", operands, attributes | {"include_pad": bool(_integer(node, "count_include_pad", 0))}


def window(node: ir.Node, x: OnnxValue | None = None) -> dict[str, Any] | None:
    """The attributes that both pools have; None where padding depends on an unknown size of x, or torch has none."""
    kernel, ceil = _integers(node, "kernel_shape"), bool(_integer(node, "ceil_mode", 0))
    auto_pad = _text(node, "auto_pad", "NOTSET")
    if len(kernel) not in (1, 2, 3) or (ceil and auto_pad == "VALID"):
        return None
    stride = _integers(node, "strides") or (1,) * len(kernel)
    padding: tuple[int, ...] | None = _integers(node, "pads") or (0,) * (2 * len(kernel))
    if auto_pad.startswith("SAME"):
        dilation = _integers(node, "dilations") or (1,) * len(kernel)
        padding, ceil = _same(auto_pad, x, kernel, stride, dilation, crops=True), False
    if padding is None:
        return None
    return {"kernel": kernel, "stride": stride, "padding": padding, "ceil": ceil}


def _same(
    auto_pad: str, x: OnnxValue | None, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    *, crops: bool = False,
) -> tuple[int, ...] | None:  # fmt: skip
    """The padding with which a window of stride s makes ceil(size / s) of each size; None where one is not known.

    crops: of a pool, which engines let begin behind the first element where strides are much wider than the window;
    None there too. A conv begins at the first.
    """
    sizes = x.shape[2:] if x is not None and x.shape is not None else ()
    if len(sizes) != len(kernel):
        return None
    begins, ends = list[int](), list[int]()
    for size, width, step, apart in zip(sizes, kernel, stride, dilation, strict=True):
        if not isinstance(size, int):
            return None
        missing = (-(-size // step) - 1) * step + (width - 1) * apart + 1 - size
        if crops and missing < (-2 if auto_pad == "SAME_LOWER" else -1):
            return None
        missing = max(missing, 0)
        less, more = missing // 2, missing - missing // 2
        begins.append(more if auto_pad == "SAME_LOWER" else less)
        ends.append(less if auto_pad == "SAME_LOWER" else more)
    return (*begins, *ends)


def _read_attention(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    plain = (
        all(value is None for value in operands[4:])
        and _number(node, "softcap", 0.0) == 0.0
        and _integer(node, "qk_matmul_output_mode", 0) == 0
        and "softmax_precision" not in node.attributes
    )
    heads = _integer(node, "q_num_heads", 0)
    attributes = {
        "scale": _number(node, "scale", 0.0) if "scale" in node.attributes else None,
        "causal": bool(_integer(node, "is_causal", 0)),
        "heads": heads,
        "kv_heads": _integer(node, "kv_num_heads", heads),
    }
    return ("attention", operands[:4], attributes) if plain else None


def _read_rotary(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    """None where positions pick the angles from a table, or where it turns another part of a head than they cover."""
    cos, turned = operands[1], _integer(node, "rotary_embedding_dim", 0)
    if len([value for value in operands if value is not None]) != 3 or cos is None or cos.rank != 3 or not cos.shape:
        return None
    if turned and cos.shape[-1] != turned // 2:
        return None
    interleaved = bool(_integer(node, "interleaved", 0))
    return "rotary", operands[:3], {"interleaved": interleaved, "heads": _integer(node, "num_heads", 0)}


def _read_layer_norm(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    return _read_norm("layer_norm", node, operands)


def _read_norm(op: str, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    x, weight = operands[0], operands[1]
    axis, eps = _integer(node, "axis", -1), _number(node, "epsilon", 1e-5)
    if weight is None or weight.rank is None or x is None:
        return None
    if axis >= 0:
        if x.rank is None:
            return None
        axis -= x.rank
    return (op, operands, {"eps": eps}) if weight.rank == -axis else None


def _read_batch_norm(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    trains = _integer(node, "training_mode", 0) or any(output.uses() for output in node.outputs[1:])
    return None if trains else ("batch_norm", operands, {"eps": _number(node, "epsilon", 1e-5)})


def _read_gather(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    table = operands[0]
    if table is None or table.rank != 2 or table.dtype not in FLOATS or _integer(node, "axis", 0) != 0:
        return None
    return ("embedding", operands, {}) if table.is_constant or _is_dequantized(graph, table) else None


def _is_dequantized(graph: OnnxGraph, value: OnnxValue) -> bool:
    """Whether a value is the dequantize of a stored tensor."""
    producer = value.native.producer()
    found = read(graph, producer) if producer is not None else None
    return found is not None and found[0] == "dequantize" and all(one is None or one.is_constant for one in found[1])


def _read_softmax(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    old = graph.opset < 13
    axis, rank = _integer(node, "axis", 1 if old else -1), operands[0].rank if operands[0] is not None else None
    if old and (rank is None or axis not in (-1, rank - 1)):  # it flattened x to 2-D
        return None
    return "softmax", operands, {"axis": axis}


def _read_mean(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    axes: tuple[int, ...] | None = _integers(node, "axes")
    if len(operands) > 1 and operands[1] is not None:
        axes = _constant_integers(graph, operands[1])
    if not axes:
        return None
    return "mean", operands[:1], {"axes": axes, "keepdim": bool(_integer(node, "keepdims", 1))}


def _read_global_mean(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    rank = operands[0].rank if operands[0] is not None else None
    return None if rank is None or rank < 3 else ("mean", operands, {"axes": tuple(range(2, rank)), "keepdim": True})


def _read_clip(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    if graph.opset < 11:
        bounds = [_number(node, name, 0.0) if name in node.attributes else None for name in ("min", "max")]
    else:
        given = (*operands[1:], None, None)[:2]
        bounds = [_constant_number(graph, value) for value in given]
        if any(value is not None and bound is None for value, bound in zip(given, bounds, strict=True)):
            return None
    if bounds == [None, None]:
        return "identity", operands[:1], {}
    return "clip", operands[:1], {"low": bounds[0], "high": bounds[1]}


def _constant_number(graph: OnnxGraph, value: OnnxValue | None) -> float | None:
    """The number in a constant of one element, where a Python float holds it exactly."""
    tensor = graph.constant(value) if value is not None else None
    if tensor is None or tensor.numel() != 1:
        return None
    number = tensor.item()
    if tensor.dtype == torch.float32:
        return _shortest(number)
    return float(number) if float(number) == number or number != number else None  # bounds of int64 may be too long


def _read_hard_sigmoid(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    alpha, beta = _number(node, "alpha", 0.2), _number(node, "beta", 0.5)
    return ("hard_sigmoid", operands, {}) if (alpha, beta) == (_shortest(1 / 6), 0.5) else None


def _read_concat(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    return ("concat", operands, {"axis": _integer(node, "axis", 1)}) if None not in operands else None


def _read_pad(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    if _text(node, "mode", "constant") != "constant":
        return None
    if graph.opset < 11:
        return "pad", operands[:1], {"padding": _integers(node, "pads"), "value": _number(node, "value", 0.0)}
    x, sizes, fill, axes = (*operands, None, None)[:4]
    padding = _constant_integers(graph, sizes)
    value = 0.0 if fill is None else _constant_number(graph, fill)
    if padding is None or value is None:
        return None
    if axes is not None:
        chosen, rank = _constant_integers(graph, axes), x.rank if x is not None else None
        if chosen is None or rank is None:
            return None
        sides = [0] * (2 * rank)
        for index, axis in enumerate(chosen):
            sides[axis % rank], sides[rank + axis % rank] = padding[index], padding[len(chosen) + index]
        padding = tuple(sides)
    return "pad", (x,), {"padding": padding, "value": value}


def _constant_integers(graph: OnnxGraph, value: OnnxValue | None) -> tuple[int, ...] | None:
    tensor = graph.constant(value) if value is not None else None
    return tuple(tensor.flatten().tolist()) if tensor is not None else None


def _read_squeeze(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    """Without axes, Squeeze drops every axis of size 1. That depends on the sizes, so it stays opaque."""
    axes = _integers(node, "axes") if graph.opset < 13 else _constant_integers(graph, (*operands, None)[1])
    return (node.op_type.lower(), operands[:1], {"axes": axes}) if axes else None


def _read_quantize(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    x, scale, zero_point = (*operands, None)[:3]
    if x is None or scale is None or scale.dtype is not torch.float32 or scale.rank not in (0, 1):
        return None
    axis = _scale_axis(node, x, scale)
    dtype = ir.DataType(_integer(node, "output_dtype", 0)) if zero_point is None else zero_point.native.dtype
    if zero_point is None and dtype not in _SIGNED:
        return None  # without a zero point ONNX means uint8 by default, and the op int8
    if _integer(node, "block_size", 0):
        return None
    return "quantize", operands, {"axis": axis, "bits": dtype.bitwidth if dtype in NARROW else 8}


_SIGNED = {ir.DataType.INT8: 8, ir.DataType.INT4: 4, ir.DataType.INT2: 2}
"""The types of signed integers, and their bits."""


def _scale_axis(node: ir.Node, x: OnnxValue, scale: OnnxValue) -> int | None:
    axis = _integer(node, "axis", 1)
    if scale.rank == 0 or (scale.shape == (1,) and (x.shape is None or x.shape[axis:][:1] != (1,))):
        return None  # one scale for all, which some files give as a vector of one
    return axis if x.rank is None else axis % x.rank


def _read_dequantize(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    x, scale, zero_point = (*operands, None)[:3]
    if x is None or scale is None or scale.dtype is not torch.float32:
        return None
    dtype = x.native.dtype or (zero_point.native.dtype if zero_point is not None else None)  # they are the same
    if dtype not in READABLE:
        return None
    block, bits = _integer(node, "block_size", 0), min(dtype.bitwidth, 8)
    if scale.rank != (x.rank if block else min(scale.rank or 0, 1)):
        return None
    axis = _integer(node, "axis", 1) % (x.rank or 1) if block else _scale_axis(node, x, scale)
    return "dequantize", operands, {"axis": axis, "block": block, "bits": bits}


def _read_reshape(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    if len(operands) < 2 or operands[1] is None:
        return None
    if not _integer(node, "allowzero", 0) and _may_hold_zero(graph, operands[1]):  # it copies the input's size
        return None
    return "reshape", operands, {}


def _may_hold_zero(graph: OnnxGraph, shape: OnnxValue) -> bool:
    """Whether a shape has a literal 0; sizes that the graph computes count as 1 or more."""
    tensor = graph.constant(shape)
    if tensor is not None:
        return bool((tensor == 0).any())
    producer = shape.native.producer()
    if producer is None or producer.op_type not in ("Concat", "Shape"):
        return True
    parts = graph.values(producer.inputs) if producer.op_type == "Concat" else ()
    return any(part is not None and part.is_constant and _may_hold_zero(graph, part) for part in parts)


def _read_transpose(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    perm = _integers(node, "perm")
    rank = operands[0].rank if operands[0] is not None else None
    if not perm:
        if rank is None:
            return None
        perm = tuple(reversed(range(rank)))
    return "transpose", operands, {"perm": perm}


def _read_cast(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    dtype = TORCH_DTYPES.get(ir.DataType(_integer(node, "to", 0)))
    return ("cast", operands, {"dtype": dtype}) if dtype is not None else None


def _read_slice(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    x = operands[0]
    parts = [graph.constant(value) if value is not None else None for value in operands[1:]]
    if x is None or x.shape is None or len(parts) < 3 or any(p is None or p.numel() != 1 for p in parts):
        return None
    start, end, axis, *step = (int(p.item()) for p in parts if p is not None)
    size = x.shape[axis]
    if step not in ([], [1]) or start < 0 or end < 0 or not isinstance(size, int):
        return None
    return "slice", (x,), {"axis": axis % len(x.shape), "start": min(start, size), "end": min(end, size)}


def _read_dropout(graph: OnnxGraph, node: ir.Node, operands: tuple[OnnxValue | None, ...]) -> Read | None:
    training = operands[2] if len(operands) > 2 else None
    flag = graph.constant(training) if training is not None else None
    trains = training is not None and (flag is None or bool(flag.item()))
    masked = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    return None if trains or masked else ("identity", operands[:1], {})


_READERS: dict[str, Callable[[Any, ir.Node, Any], Read | None]] = {
    "Conv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    **dict.fromkeys(RECURRENT, _read_recurrent),
    "MaxPool": _read_max_pool,
    "AveragePool": _read_average_pool,
    "GlobalAveragePool": _read_global_mean,
    "Attention": _read_attention,
    "RotaryEmbedding": _read_rotary,
    "LayerNormalization": _read_layer_norm,
    "RMSNormalization": lambda graph, node, operands: _read_norm("rms_norm", node, operands),
    "BatchNormalization": _read_batch_norm,
    "Gather": _read_gather,
    "Gelu": lambda graph, node, operands: ("gelu", operands, {"approximate": _text(node, "approximate", "none")}),
    "Clip": _read_clip,
    "LeakyRelu": lambda graph, node, operands: ("leaky_relu", operands, {"slope": _number(node, "alpha", 0.01)}),
    "HardSigmoid": _read_hard_sigmoid,
    "Softmax": _read_softmax,
    "ReduceMean": _read_mean,
    "QuantizeLinear": _read_quantize,
    "DequantizeLinear": _read_dequantize,
    "Reshape": _read_reshape,
    "Transpose": _read_transpose,
    "Cast": _read_cast,
    "Slice": _read_slice,
    "Concat": _read_concat,
    "Pad": _read_pad,
    "Squeeze": _read_squeeze,
    "Unsqueeze": _read_squeeze,
    "Dropout": _read_dropout,
}


# --- writing -------------------------------------------------------------------------------------------------------


def write(graph: OnnxGraph, op: str, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    """The node that means `op` at the graph's opset. Raises SpellingError where that has no spelling of it.

    A writer decides what depends on the values of operands and attributes. That the opset has the operator, with these
    inputs and attributes, is checked of every node that is made (`OnnxGraph.emit`).
    """
    if op in _PLAIN_OPS and (op != "hard_swish" or graph.opset >= 14):
        return Spelled(_PLAIN_OPS[op], operands, {})
    writer = _WRITERS.get(op)
    spelled = writer(graph, operands, attributes) if writer is not None else None
    return spelled if spelled is not None else _write_function(graph, op, operands, attributes)


def _write_function(
    graph: OnnxGraph, op: str, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]
) -> Spelled:
    names = OPS[op].operands
    operands = list(operands)
    variant = []
    if op == "conv_int8" and graph.opset < 13:  # where the body has to say the axes of the weight
        variant.append(str(_rank(operands[names.index("weight")])))
    if "bias" in names and len(operands) > names.index("bias") and operands[names.index("bias")] is not None:
        variant.append("bias")
    if "weight" in names and op.startswith("linear"):
        weight = operands[names.index("weight")]
        if weight is not None and weight.transposed:
            variant.append("kn")
            operands[names.index("weight")] = weight.transpose()
    if op == "linear_int8":
        scale = operands[1]
        if scale is not None and scale.is_constant:
            variant.append("static")
        else:
            variant.append("rows" if _is_of_rows(scale, None) else "dynamic")
    op_type = op + ("__" + "_".join(variant) if variant else "")
    while operands and operands[-1] is None:
        operands.pop()
    to_conv = {value: key for key, value in _FROM_CONV.items()}
    spelled = {to_conv.get(key, key): value for key, value in attributes.items() if value not in ((), None)}
    return Spelled(op_type, operands, spelled, DOMAIN, len(OPS[op].results))


def _conv_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    names = {"strides": "stride", "pads": "padding", "dilations": "dilation", "group": "groups",
             "output_padding": "output_padding"}  # fmt: skip
    return {onnx_name: attributes[name] for onnx_name, name in names.items() if attributes.get(name, ()) != ()}


def _write_recurrent(op_type: str) -> Callable[[Any, Any, Any], Spelled]:
    def write_one(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
        op, recurrent = RECURRENT[op_type], operands[2]
        hidden = recurrent.shape[2] if recurrent is not None and recurrent.shape is not None else None
        if not isinstance(hidden, int):
            raise GraphError(f"{op} has no ONNX operator where the number of its hidden units is not known")
        spelled: dict[str, Any] = {"hidden_size": hidden, "direction": attributes["direction"]}
        if op_type == "GRU":
            spelled["linear_before_reset"] = int(attributes["reset_after"])
        if op_type == "RNN" and attributes["activation"] != "tanh":
            spelled["activations"] = ["Relu"] * (2 if attributes["direction"] == "bidirectional" else 1)
        wanted = OPS[op].attributes.get("gates")
        if wanted is not None and attributes["gates"] != wanted:
            order = [attributes["gates"].index(gate) for gate in wanted]
            operands = [
                _with_gates(graph, value, order * (2 if index == 3 else 1)) if index in (1, 2, 3) else value
                for index, value in enumerate(operands)
            ]
        return Spelled(op_type, operands, spelled, outputs=len(OPS[op].results))

    return write_one


def _with_gates(graph: OnnxGraph, value: OnnxValue | None, order: Sequence[int]) -> OnnxValue | None:
    """A weight or bias of a recurrent layer whose rows, gate by gate, are in another order."""
    if value is None:
        return None
    tensor = graph.constant(value)
    if tensor is None:
        raise GraphError(f"'{value.name}' is computed, and its gates are in an order that ONNX does not have")
    half = len(set(order))
    places = [place + index // half * half for index, place in enumerate(order)]  # a bias has two halves
    return graph.add_constant(reordered(tensor, places, axis=1), value.name)


def _write_pool(op_type: str) -> Callable[[Any, Any, Any], Spelled]:
    names = {"kernel": "kernel_shape", "stride": "strides", "padding": "pads", "dilation": "dilations",
             "ceil": "ceil_mode", "include_pad": "count_include_pad"}  # fmt: skip

    def write_one(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
        given = {name: value for name, value in attributes.items() if value not in ((), False)}
        if set(given.get("dilation", ())) == {1}:
            del given["dilation"]  # older than opset 10 has neither it nor ceil_mode
        return Spelled(op_type, operands, {names[name]: value for name, value in given.items()})

    return write_one


def _write_attention(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    if graph.opset < 23:
        raise SpellingError(f"attention has no ONNX operator at opset {graph.opset}; it needs 23")
    if repeats_over_queries(*operands):
        given = {name: value for name, value in attributes.items() if value}
        return Spelled("attention__over_queries", operands, given, DOMAIN)
    spelled: dict[str, Any] = {"is_causal": int(attributes["causal"])}
    if attributes["scale"] is not None:
        spelled["scale"] = float(attributes["scale"])
    if attributes["heads"]:
        spelled["q_num_heads"] = attributes["heads"]
        spelled["kv_num_heads"] = attributes["kv_heads"] or attributes["heads"]
    return Spelled("Attention", operands, spelled)


def _write_rotary(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    if graph.opset < 23:
        raise SpellingError(f"rotary has no ONNX operator at opset {graph.opset}; it needs 23")
    x, cos, _ = operands
    assert x is not None and cos is not None
    width, pairs = (None if value.shape is None else value.shape[-1] for value in (x, cos))
    if not isinstance(width, int) or not isinstance(pairs, int):
        raise SpellingError("the size of a head that rotary turns, or how much of it, is not known")
    heads = attributes["heads"]
    spelled = {"interleaved": int(attributes["interleaved"]), "num_heads": heads}
    spelled["rotary_embedding_dim"] = 2 * pairs if 2 * pairs < width // (heads or 1) else 0
    if repeats_over_batch(x, cos):
        renamed = {"num_heads": "heads", "rotary_embedding_dim": "turned"}
        given = {renamed.get(name, name): value for name, value in spelled.items()}
        return Spelled("rotary__over_batch", operands, given, DOMAIN)
    return Spelled("RotaryEmbedding", operands, spelled)


def repeats_over_batch(x: Value, angles: Value) -> bool:
    """Whether the angles of rotary are the same for all rows of a batch: the operator wants them once for each row."""
    return x.shape is not None and angles.shape is not None and angles.shape[0] == 1 and x.shape[0] != 1


def repeats_over_queries(query: Value | None, *others: Value | None) -> bool:
    """Whether the mask has one row for all queries: ONNX allows that, and ONNX Runtime's kernel fails on it.

    others: the further operands of attention: key, value and, where it is given, mask.
    """
    mask = others[2] if len(others) > 2 else None
    if query is None or mask is None or query.shape is None or mask.shape is None:
        return False
    return len(mask.shape) >= 2 and mask.shape[-2] == 1 and query.shape[-2] != 1


def _write_layer_norm(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    return Spelled("LayerNormalization", operands, {"axis": -_rank(operands[1]), "epsilon": attributes["eps"]})


def _write_rms_norm(
    graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]
) -> Spelled | None:
    if graph.opset < 23:
        raise SpellingError(f"rms_norm has no ONNX operator at opset {graph.opset}; it needs 23")
    return Spelled("RMSNormalization", operands, {"axis": -_rank(operands[1]), "epsilon": attributes["eps"]})


def _rank(value: OnnxValue | None) -> int:
    if value is None or value.rank is None:
        raise GraphError("a norm or conv needs a weight of known rank")
    return value.rank


def _write_gelu(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    if graph.opset < 20:
        raise SpellingError(f"gelu has no ONNX operator at opset {graph.opset}; it needs 20")
    return Spelled("Gelu", operands, {"approximate": attributes["approximate"]})


def _write_mean(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    keepdims = int(attributes["keepdim"])
    if graph.opset < 18:
        return Spelled("ReduceMean", operands, {"axes": attributes["axes"], "keepdims": keepdims})
    axes = graph.add_constant(torch.tensor(attributes["axes"], dtype=torch.int64))
    return Spelled("ReduceMean", [*operands, axes], {"keepdims": keepdims})


def _write_clip(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    bounds = {"min": attributes["low"], "max": attributes["high"]}
    if graph.opset < 11:
        return Spelled("Clip", operands, {name: bound for name, bound in bounds.items() if bound is not None})
    return Spelled("Clip", [*operands, *(_like(graph, operands[0], bound) for bound in bounds.values())], {})


def _like(graph: OnnxGraph, x: OnnxValue | None, number: float | None) -> OnnxValue | None:
    """A number as a constant of x's dtype."""
    dtype = (x.dtype if x is not None else None) or torch.float32
    return None if number is None else graph.add_constant(torch.tensor(number, dtype=dtype))


def _write_pad(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    if graph.opset < 11:
        return Spelled("Pad", operands, {"pads": attributes["padding"], "value": attributes["value"]})
    sizes = graph.add_constant(torch.tensor(attributes["padding"], dtype=torch.int64))
    value = _like(graph, operands[0], attributes["value"] or None)  # 0 is what engines fuse when it is left out
    return Spelled("Pad", [*operands, sizes, value], {})


def _write_squeeze(op_type: str) -> Callable[[Any, Any, Any], Spelled]:
    def write_one(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
        if graph.opset < 13:
            return Spelled(op_type, operands, {"axes": attributes["axes"]})
        axes = graph.add_constant(torch.tensor(attributes["axes"], dtype=torch.int64))
        return Spelled(op_type, [*operands, axes], {})

    return write_one


def _write_softmax(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    axis, rank = attributes["axis"], operands[0].rank if operands[0] is not None else None
    if graph.opset < 13 and axis != -1 and (rank is None or axis != rank - 1):
        raise SpellingError(f"softmax along axis {axis} has no ONNX operator at opset {graph.opset}; it needs 13")
    return Spelled("Softmax", operands, {"axis": axis})


def _write_reshape(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    if graph.opset >= 14:
        return Spelled("Reshape", operands, {"allowzero": 1})
    shape = operands[1]
    if shape is None or _may_hold_zero(graph, shape):
        raise SpellingError(f"reshape to a size of 0 has no ONNX operator at opset {graph.opset}; it needs 14")
    return Spelled("Reshape", operands, {})


def _write_slice(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    if graph.opset < 10:
        names = {"starts": "start", "ends": "end", "axes": "axis"}
        return Spelled("Slice", operands, {name: [attributes[key]] for name, key in names.items()})
    bounds = [graph.add_constant(torch.tensor([attributes[key]])) for key in ("start", "end", "axis")]
    return Spelled("Slice", [*operands, *bounds], {})


def _write_quantize(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    axis, bits = attributes["axis"], attributes["bits"]
    _require_quantized(graph, "quantize", axis)
    spelled = {} if axis is None else {"axis": axis}
    x, scale, zero_point = (*operands, None)[:3]
    if _is_of_rows(scale, axis):
        return _write_rows("quantize", operands, bits)
    if bits < 8:
        if graph.opset < _NARROW_SINCE.get(bits, sys.maxsize):
            raise SpellingError(f"quantize to {bits} bits has no ONNX operator at opset {graph.opset}: there are 8, "
                                f"from opset 21 4, and from opset 25 2")  # fmt: skip
        zero_point = None if zero_point is None else graph.narrowed(zero_point, bits)
    if zero_point is None and graph.opset < 21:
        zero_point = graph.add_constant(torch.zeros(_sizes_of(scale), dtype=torch.int8), "zero_point")
    elif zero_point is None:
        spelled["output_dtype"] = next(int(dtype) for dtype, size in _SIGNED.items() if size == bits)
    return Spelled("QuantizeLinear", [x, scale, zero_point], spelled)


def _is_of_rows(scale: OnnxValue | None, axis: int | None) -> bool:
    """Whether a scale has a number for each row, (..., 1)."""
    return axis is None and scale is not None and (scale.rank or 0) > 1


def _write_rows(op: str, operands: Sequence[OnnxValue | None], bits: int) -> Spelled:
    """With a scale for each row, which the operators of ONNX have for matrices alone."""
    if bits != 8:
        raise SpellingError(f"{op} with a scale for each row has a form in ONNX for 8 bits, not for {bits}")
    zero_point = (*operands, None)[2]
    return Spelled(f"{op}__row" + ("" if zero_point is None else "_shifted"), operands, {}, DOMAIN)


def _require_quantized(graph: OnnxGraph, op: str, axis: int | None) -> None:
    """Raise SpellingError where the opset has no such operator: it needs 10, or 13 with scales along an axis."""
    needed = 10 if axis is None else 13
    if graph.opset < needed:
        several = "" if axis is None else f" with scales along axis {axis}"
        raise SpellingError(
            f"{op}{several} has no ONNX operator at opset {graph.opset}; it needs {needed}: convert the file first"
        )


def _sizes_of(scale: OnnxValue | None) -> list[int]:
    """The shape of the scales of a quantize, in numbers."""
    shape = scale.shape if scale is not None else None
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise SpellingError("a quantize to int8 without a zero point and with computed scales needs opset 21")
    return [int(size) for size in shape]


def _write_dequantize(graph: OnnxGraph, operands: Sequence[OnnxValue | None], attributes: Mapping[str, Any]) -> Spelled:
    block, bits, axis = attributes["block"], attributes["bits"], attributes["axis"]
    spelled = {"axis": axis} if axis is not None else {}
    spelled |= {"block_size": block} if block else {}
    x, scale, zero_point = (*operands, None)[:3]
    if _is_of_rows(scale, axis):
        return _write_rows("dequantize", operands, bits)
    if graph.opset < 13 and not block and axis is not None and x is not None and x.rank is not None:
        op_type = f"dequantize__rows_{x.rank - axis % x.rank}" + ("" if zero_point is None else "_shifted")
        return Spelled(op_type, operands, spelled | {"bits": bits}, DOMAIN)
    _require_quantized(graph, "dequantize", axis)
    if block and graph.opset < 21:  # where the operator has no blocks
        if x is None or x.rank != 2 or attributes["axis"] != 1:
            raise SpellingError("dequantize has a form for matrices only, in blocks along axis 1, before opset 21")
        op_type = "dequantize__blocks" + ("" if zero_point is None else "_shifted")
        return Spelled(op_type, operands, spelled | {"bits": bits}, DOMAIN)
    if bits == 8:
        return Spelled("DequantizeLinear", operands, spelled)
    narrow = x is not None and x.native.dtype in NARROW
    if x is not None and (narrow or (x.is_constant and graph.opset >= _NARROW_SINCE.get(bits, sys.maxsize))):
        zero_point = None if zero_point is None else graph.narrowed(zero_point, bits)
        return Spelled("DequantizeLinear", [x if narrow else graph.narrowed(x, bits), scale, zero_point], spelled)
    op_type = "dequantize" if zero_point is None else "dequantize__shifted"
    return Spelled(op_type, operands, spelled | {"bits": bits}, DOMAIN)


_NARROW_SINCE = {4: 21, 2: 25}
"""By bits, the first opset with such integers. At older opsets, and with other bits, each integer takes a byte."""


_WRITERS: dict[str, Callable[[Any, Any, Any], Spelled | None]] = {
    "conv": lambda graph, operands, attributes: Spelled("Conv", operands, _conv_attributes(attributes)),
    "conv_transpose": lambda graph, operands, attributes: Spelled(
        "ConvTranspose", operands, _conv_attributes(attributes)
    ),
    **{op: _write_recurrent(op_type) for op_type, op in RECURRENT.items()},
    "max_pool": _write_pool("MaxPool"),
    "average_pool": _write_pool("AveragePool"),
    "attention": _write_attention,
    "rotary": _write_rotary,
    "layer_norm": _write_layer_norm,
    "rms_norm": _write_rms_norm,
    "batch_norm": lambda graph, operands, attributes: Spelled(
        "BatchNormalization", operands, {"epsilon": attributes["eps"]}
    ),
    "embedding": lambda graph, operands, attributes: Spelled("Gather", operands, {"axis": 0}),
    "gelu": _write_gelu,
    "clip": _write_clip,
    "leaky_relu": lambda graph, operands, attributes: Spelled("LeakyRelu", operands, {"alpha": attributes["slope"]}),
    "hard_sigmoid": lambda graph, operands, attributes: Spelled(
        "HardSigmoid", operands, {"alpha": 1 / 6, "beta": 0.5}
    ),
    "softmax": _write_softmax,
    "mean": _write_mean,
    "quantize": _write_quantize,
    "dequantize": _write_dequantize,
    "reshape": _write_reshape,
    "transpose": lambda graph, operands, attributes: Spelled("Transpose", operands, {"perm": attributes["perm"]}),
    "cast": lambda graph, operands, attributes: Spelled("Cast", operands, {"to": int(onnx_dtype(attributes["dtype"]))}),
    "slice": _write_slice,
    "concat": lambda graph, operands, attributes: Spelled("Concat", operands, {"axis": attributes["axis"]}),
    "pad": _write_pad,
    "squeeze": _write_squeeze("Squeeze"),
    "unsqueeze": _write_squeeze("Unsqueeze"),
}
